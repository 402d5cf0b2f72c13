"""A network with less work: its large layers in narrow steps, which few directions do for."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Most that the steps of a layer may lose: of the second moment of what it is given, or the variance
# of what it gives. What that costs in errors, some more training brings back.
LOSS = 0.1
GAIN = 0.5  # most of a layer's work that its steps may have together
LARGE = 0.05  # least share of the network's work that a layer must have
PART = 50  # images at a time, which bounds the memory

Layer = nn.Conv2d | nn.Linear


class Steps(nn.Sequential):
    """A layer as two or three: onto few directions, then what it did, and back from few."""


@dataclass(frozen=True)
class Lowered:
    """A network in which some layers are Steps, and its work as a share of the original's."""

    model: nn.Module
    work: float


class _Seen:
    """What one layer was given and gave: the products of its channels with each other, summed."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.inputs = self.outputs = 0  # places, of one image
        self.given = self.gave = torch.zeros((), dtype=torch.double)

    def add(self, given: torch.Tensor, gave: torch.Tensor) -> None:
        if isinstance(self.layer, nn.Conv2d):
            self.given = self.given + _products(given)
            self.inputs = given[0, 0].numel()
            self.outputs = gave[0, 0].numel()
        else:
            self.outputs = gave[0].numel() // gave.shape[-1]
            gave = gave.movedim(-1, 1)
        self.gave = self.gave + _products(torch.cat([gave, torch.ones_like(gave[:, :1])], 1))

    @property
    def work(self) -> int:
        """Products of a number and a weight, for one image."""
        return self.layer.weight.numel() * self.outputs


def lower(model: nn.Module, images: torch.Tensor) -> Lowered | None:
    """A copy of a network with each large layer that gains by it in narrow steps.

    These are onto the directions in which the layer's inputs (of convolutions only) and outputs
    vary most, for `images`, standardised float32 (N, channels, size, size) on the network's device:
    as many as leave LOSS of it to all others (Zhang et al. 2015, arXiv 1505.06798; Kim et al. 2016,
    arXiv 1511.06530). The copy is to be trained on. None where no layer gains.
    """
    model = copy.deepcopy(model).eval()
    seen = _watch(model, images)
    whole = sum(each.work for each in seen.values())
    saved = 0
    for name, layer in [*model.named_modules()]:
        if layer not in seen or seen[layer].work < LARGE * whole:
            continue
        if found := _in_steps(seen[layer]):
            steps, work = found
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, steps)
            saved += seen[layer].work - work
    return Lowered(model, 1 - saved / whole) if saved else None


@torch.no_grad()
def _watch(model: nn.Module, images: torch.Tensor) -> dict[nn.Module, _Seen]:
    """By layer, of all convolutions and linear layers."""
    layers = [each for each in model.modules() if type(each) in (nn.Conv2d, nn.Linear)]
    seen: dict[nn.Module, _Seen] = {}

    def keep(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.setdefault(layer, _Seen(layer)).add(inputs[0], output)

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        for part in images.split(PART):
            model(part)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _products(x: torch.Tensor) -> torch.Tensor:
    """Of (N, d, ...) those of all columns d with each other, summed over the rest: (d, d)."""
    rows = x.movedim(1, -1).flatten(0, -2)
    return (rows.T @ rows).cpu().double()  # there is no float64 on mps


def _in_steps(seen: _Seen) -> tuple[Steps, int] | None:
    """The layer done with the least work, and that work; None where it is no gain."""
    if getattr(seen.layer, "groups", 1) != 1:
        return None
    sums = seen.gave / seen.gave[-1, -1]  # its last row and column: the means, and 1
    mean = sums[-1, :-1]
    back = _directions(sums[:-1, :-1] - torch.outer(mean, mean))
    ways: list[tuple[torch.Tensor | None, torch.Tensor | None]] = [(None, back)]
    if isinstance(seen.layer, nn.Conv2d):
        onto = _directions(seen.given)
        ways += [(onto, None), (onto, back)]
    best = min(ways, key=lambda way: _work(seen, *way))
    work = _work(seen, *best)
    return None if work > GAIN * seen.work else (_steps(seen.layer, *best, mean), work)


def _work(seen: _Seen, onto: torch.Tensor | None, back: torch.Tensor | None) -> int:
    outputs, inputs, *kernel = seen.layer.weight.shape
    first = last = 0
    if onto is not None:
        first, inputs = inputs * onto.shape[1] * seen.inputs, onto.shape[1]
    if back is not None:
        last, outputs = outputs * back.shape[1] * seen.outputs, back.shape[1]
    return first + outputs * inputs * torch.Size(kernel).numel() * seen.outputs + last


def _steps(
    layer: Layer, onto: torch.Tensor | None, back: torch.Tensor | None, mean: torch.Tensor
) -> Steps:
    """The layer between `onto` (inputs, few) and `back` (outputs, few): what varies from the mean
    (outputs,) of what it gave."""
    weight = layer.weight.detach().cpu().double()
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().cpu().double()
    steps: list[nn.Module] = []
    if onto is not None:
        weight = torch.einsum("oi...,if->of...", weight, onto)
        steps.append(_place(layer, onto.T))
    if back is None:
        steps.append(_like(layer, weight, bias))
    else:
        weight = torch.einsum("oi...,of->fi...", weight, back)
        steps.append(_like(layer, weight, back.T @ (bias - mean)))
        steps.append(_place(layer, back, mean))
    return Steps(*steps).to(layer.weight.device)


def _like(layer: Layer, weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    """The layer with other weights, of fewer inputs or outputs."""
    outputs, inputs = weight.shape[:2]
    if isinstance(layer, nn.Linear):
        return _with(nn.Linear(inputs, outputs), weight, bias)
    how = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    return _with(nn.Conv2d(inputs, outputs, weight.shape[2:], **how), weight, bias)  # type: ignore[arg-type]


def _place(layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Layer:
    """A layer that takes (outputs, inputs) `weight` of every place of a map, or of a row."""
    outputs, inputs = weight.shape
    if isinstance(layer, nn.Linear):
        return _with(nn.Linear(inputs, outputs, bias is not None), weight, bias)
    made = nn.Conv2d(inputs, outputs, 1, bias=bias is not None)
    return _with(made, weight[:, :, None, None], bias)


def _with(layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None) -> Layer:
    state = {"weight": weight} | ({} if bias is None else {"bias": bias})
    layer.load_state_dict(state)
    return layer


def _directions(products: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (d, few) of all but LOSS of what these products (d, d) have.

    It is turned at random, so that all of its directions vary alike: 8 bits then do for each.
    """
    variances, axes = torch.linalg.eigh(products)
    variances = variances.clamp(min=0)
    lost = variances.cumsum(0) <= LOSS * variances.sum()
    few = max(1, int((~lost).sum()))
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(few, few, generator=generator, dtype=torch.double))[0]
    return axes[:, -few:] @ turn
