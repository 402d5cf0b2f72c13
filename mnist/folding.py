"""Training forms: a network as it is trained, and back to the network as it is saved.

In its training form a large layer is a product of narrow layers with nothing between them, and each
layer that a network names in NORMALISED is followed by a batch norm. Both are linear in evaluation
mode, so the trained form folds into the plain network exactly.
"""

import copy
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import nn

# Weights from which a layer is factored. A linear layer uses each of its weights once an image, a
# convolution at every position.
LARGE_CONV, LARGE_LINEAR = 100_000, 1_000_000
GAIN = 0.5  # most of a layer's weights that its factors may have together
CONV_RANK, LINEAR_RANK = 32, 16  # docs/lab-log.md has the ranks that were tried

Layer = nn.Conv2d | nn.Linear


class Factors(nn.Sequential):
    """One layer as a product of narrow layers, or as itself, and then perhaps a batch norm."""

    @property
    def layers(self) -> list[Layer]:
        return [module for module in self if isinstance(module, Layer)]

    @property
    def norm(self) -> nn.BatchNorm1d | nn.BatchNorm2d | None:
        last = self[-1]
        return last if isinstance(last, nn.BatchNorm1d | nn.BatchNorm2d) else None


def training_form(model: nn.Module) -> nn.Module:
    """A copy of a new network as it is to be trained, if it has NORMALISED; else `model` itself.

    NORMALISED names the layers that get a batch norm; none may be in it. Layers that are replaced
    are initialised anew, by torch's global random state (He et al. 2015, arXiv 1502.01852); all
    others are copied.
    """
    normalised = getattr(model, "NORMALISED", None)
    if normalised is None:  # its layers may be pre-trained, or used otherwise than by being called
        return model
    return _replaced(model, lambda name, module: _factors(module, name in normalised))


def fold(form: nn.Module) -> nn.Module:
    """The plain network: it computes what the training form computes in evaluation mode."""
    return _replaced(merge_norms(form), lambda _, module: _product(module))


def merge_norms(form: nn.Module) -> nn.Module:
    """The training form with its batch norms folded into its narrow layers, which stay apart.

    It computes what the plain network computes with fewer multiplications: this is what is served.
    """
    return _replaced(form, lambda _, module: _without_norm(module))


def has_factors(model: nn.Module) -> bool:
    """Whether a model is a training form that differs from its plain network."""
    return any(isinstance(module, Factors) for module in model.modules())


def _replaced(
    model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]
) -> nn.Module:
    """A copy of `model`, with the replacement of each named module for which there is one."""
    made = {id(module): replacement(name, module) for name, module in model.named_modules()}
    memo: dict[int, Any] = {key: module for key, module in made.items() if module is not None}
    return copy.deepcopy(model, memo)  # it takes what the memo has instead of a copy


# --- into a training form ------------------------------------------------------------------------


def _factors(module: nn.Module, norm: bool) -> Factors | None:
    """What a layer is trained as; None where it stays as it is."""
    if type(module) not in (nn.Conv2d, nn.Linear) or getattr(module, "groups", 1) > 1:
        return None
    assert isinstance(module, Layer)
    layers, norm = _narrow(module), norm and module.bias is not None
    if not layers and not norm:
        return None
    layers = layers or [_like(module, *module.weight.shape[1::-1])]
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


def _narrow(layer: Layer) -> list[Layer]:
    """The layer as the product of two or three new ones, without bias; none where it is no gain."""
    outputs, inputs = layer.weight.shape[:2]
    if isinstance(layer, nn.Linear):
        rank, large = LINEAR_RANK, LARGE_LINEAR
        layers: list[Layer] = [_like(layer, inputs, rank), _like(layer, rank, outputs)]
    else:
        rank, large = CONV_RANK, LARGE_CONV
        first = [nn.Conv2d(inputs, rank, 1, bias=False)] if inputs >= 4 * rank else []
        middle = _like(layer, rank if first else inputs, rank)
        layers = [*first, middle, nn.Conv2d(rank, outputs, 1, bias=False)]
    weights, fewer = layer.weight.numel(), sum(each.weight.numel() for each in layers)
    return [] if weights < large or fewer > GAIN * weights else layers


def _like(layer: Layer, inputs: int, outputs: int) -> Layer:
    """A new layer of the same kind and geometry, between so many channels or features, no bias."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(inputs, outputs, bias=False)
    geometry = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    options = {name: getattr(layer, name) for name in geometry}
    return nn.Conv2d(inputs, outputs, bias=False, **options)


# --- and back ------------------------------------------------------------------------------------


@torch.no_grad()
def _without_norm(module: nn.Module) -> Factors | None:
    """Factors whose last layer does what their batch norm did; None where there is none."""
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
def _product(module: nn.Module) -> Layer | None:
    """The one layer that Factors without a norm are; None for any other module."""
    if not isinstance(module, Factors):
        return None
    layers = module.layers
    weight = reduce(_multiplied, [layer.weight for layer in layers])
    outputs, inputs = weight.shape[:2]
    product = _like(max(layers, key=_extent), inputs, outputs)
    product.weight = nn.Parameter(weight)
    product.bias = layers[-1].bias
    return product


def _extent(layer: Layer) -> tuple[tuple[int, ...], ...]:
    """All factors of a convolution but the one with its geometry are 1x1, of stride 1."""
    if isinstance(layer, nn.Linear):
        return ()
    padding = layer.padding if isinstance(layer.padding, tuple) else ()
    return layer.kernel_size, layer.stride, padding


def _multiplied(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The weight of `second` after `first` as one layer; of two kernels one is 1x1."""
    if first.dim() == 2:
        return second @ first
    product = torch.einsum("orhw,rixy->oihxwy", second, first)
    return product.flatten(4, 5).flatten(2, 3)
