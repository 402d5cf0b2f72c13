"""Training forms: networks for training that fold back into the plain networks that are saved.

In a training form, a large layer is a product of narrow layers without activations between them,
and each layer that the network names in NORMALISED is followed by a batch norm. Both are linear in
evaluation mode, so the training form folds into the plain network exactly.
"""

import copy
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import nn

# Number of weights from which a layer is factorised. A linear layer uses each weight once per
# image, a convolution at every position.
MIN_CONV_WEIGHTS, MIN_LINEAR_WEIGHTS = 100_000, 1_000_000
MAX_WEIGHT_SHARE = 0.5  # largest share of a layer's weights that its factors may have together
CONV_RANK, LINEAR_RANK = 32, 16  # docs/lab-log.md lists the ranks that were tried

Layer = nn.Conv2d | nn.Linear


class Factors(nn.Sequential):
    """A layer as a product of narrow layers, or as itself; a batch norm may follow."""

    @property
    def layers(self) -> list[Layer]:
        return [module for module in self if isinstance(module, Layer)]

    @property
    def norm(self) -> nn.BatchNorm1d | nn.BatchNorm2d | None:
        last = self[-1]
        return last if isinstance(last, nn.BatchNorm1d | nn.BatchNorm2d) else None


def training_form(model: nn.Module) -> nn.Module:
    """A copy of a new network in its training form; `model` itself if it has no NORMALISED.

    NORMALISED names the layers that get a batch norm; it may be empty. Replaced layers are
    initialised anew, with torch's global random state (He et al. 2015, arXiv 1502.01852); all other
    layers are copied.
    """
    normalised = getattr(model, "NORMALISED", None)
    if normalised is None:  # its layers may be pre-trained, or not be called as modules
        return model
    return _replace_modules(model, lambda name, module: _factorise(module, name in normalised))


def fold(form: nn.Module) -> nn.Module:
    """The plain network, which computes the same as the training form in evaluation mode."""
    return _replace_modules(merge_norms(form), lambda _, module: _multiply_factors(module))


def merge_norms(form: nn.Module) -> nn.Module:
    """The training form with its batch norms folded into its narrow layers, which stay separate.

    It computes the same as the plain network with fewer multiplications. The server runs this form.
    """
    return _replace_modules(form, lambda _, module: _merge_norm(module))


def has_factors(model: nn.Module) -> bool:
    """Whether a model is a training form with at least one factorised or normalised layer."""
    return any(isinstance(module, Factors) for module in model.modules())


def _replace_modules(
    model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]
) -> nn.Module:
    """A copy of `model` in which `replacement` replaces modules by name; None keeps a module."""
    replacements = {id(module): replacement(name, module) for name, module in model.named_modules()}
    memo: dict[int, Any] = {key: new for key, new in replacements.items() if new is not None}
    return copy.deepcopy(model, memo)  # deepcopy takes a memo's entry instead of a copy


# --- into a training form ------------------------------------------------------------------------


def _factorise(module: nn.Module, norm: bool) -> Factors | None:
    """The factors that replace a layer in training; None where the layer stays."""
    if type(module) not in (nn.Conv2d, nn.Linear) or getattr(module, "groups", 1) > 1:
        return None
    assert isinstance(module, Layer)
    layers, norm = _make_factors(module), norm and module.bias is not None
    if not layers and not norm:
        return None
    layers = layers or [_make_like(module, *module.weight.shape[1::-1])]
    for layer in layers[:-1]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    nn.init.kaiming_normal_(layers[-1].weight, nonlinearity="relu")
    width = len(module.weight)
    if norm:
        batch_norm = nn.BatchNorm2d if isinstance(module, nn.Conv2d) else nn.BatchNorm1d
        return Factors(*layers, batch_norm(width))
    if module.bias is not None:
        layers[-1].bias = nn.Parameter(torch.zeros(width))
    return Factors(*layers)


def _make_factors(layer: Layer) -> list[Layer]:
    """Two or three new layers without bias whose product replaces the layer; [] without a gain."""
    outputs, inputs = layer.weight.shape[:2]
    if isinstance(layer, nn.Linear):
        rank, min_weights = LINEAR_RANK, MIN_LINEAR_WEIGHTS
        layers: list[Layer] = [_make_like(layer, inputs, rank), _make_like(layer, rank, outputs)]
    else:
        rank, min_weights = CONV_RANK, MIN_CONV_WEIGHTS
        first = [nn.Conv2d(inputs, rank, 1, bias=False)] if inputs >= 4 * rank else []
        middle = _make_like(layer, rank if first else inputs, rank)
        layers = [*first, middle, nn.Conv2d(rank, outputs, 1, bias=False)]
    before, after = layer.weight.numel(), sum(factor.weight.numel() for factor in layers)
    return [] if before < min_weights or after > MAX_WEIGHT_SHARE * before else layers


def _make_like(layer: Layer, inputs: int, outputs: int) -> Layer:
    """A new layer of the same kind and geometry without bias, of these channels or features."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(inputs, outputs, bias=False)
    geometry = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    options = {name: getattr(layer, name) for name in geometry}
    return nn.Conv2d(inputs, outputs, bias=False, **options)


# --- back to the plain network -------------------------------------------------------------------


@torch.no_grad()
def _merge_norm(module: nn.Module) -> Factors | None:
    """Factors with the batch norm folded into the last layer; None where there is no batch norm."""
    if not isinstance(module, Factors) or (norm := module.norm) is None:
        return None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    layers = copy.deepcopy(module.layers)
    weight = layers[-1].weight
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight.copy_(weight.double() * scale.view(-1, *[1] * (weight.dim() - 1)))
    bias = norm.bias.double() - norm.running_mean.double() * scale
    layers[-1].bias = nn.Parameter(bias.float())
    return Factors(*layers)


@torch.no_grad()
def _multiply_factors(module: nn.Module) -> Layer | None:
    """The product of Factors without a batch norm, as one layer; None for any other module."""
    if not isinstance(module, Factors):
        return None
    layers = module.layers
    weight = reduce(_multiply_weights, [layer.weight for layer in layers])
    outputs, inputs = weight.shape[:2]
    product = _make_like(max(layers, key=_geometry), inputs, outputs)
    product.weight = nn.Parameter(weight)
    product.bias = layers[-1].bias
    return product


def _geometry(layer: Layer) -> tuple[tuple[int, ...], ...]:
    """The geometry of a layer. All factors of a convolution but one are 1x1, of stride 1."""
    if isinstance(layer, nn.Linear):
        return ()
    padding = layer.padding if isinstance(layer.padding, tuple) else ()
    return layer.kernel_size, layer.stride, padding


def _multiply_weights(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The weight of one layer equal to `first`, then `second`; at least one kernel is 1x1."""
    if first.dim() == 2:
        return second @ first
    product = torch.einsum("orhw,rixy->oihxwy", second, first)
    return product.flatten(4, 5).flatten(2, 3)
