"""The architectures, built by name for a data set's channels, size and classes."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from mnist.folding import Factors


def _start(model: nn.Module) -> None:
    """He et al. 2015 (arXiv 1502.01852): weights that keep the signal's size through ReLUs.

    Against torch's default: 99 errors instead of 116 of 7,500 after 26,000 images (batch 64, Adam,
    lr 0.001, one seed each), and 109 instead of 122 at batch 33 and lr 0.00039.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


class Parallel(nn.Module):
    """TASK.md's network: two parallel convolutions in the second stage, their outputs summed.

    Images (N, channels, size, size) float32, standardised -> logits (N, classes).
    """

    # In its training form, see mnist.folding.
    NORMALISED = ("conv1", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "fc1", "fc2")

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        side = size // 2 // 2
        self.conv1 = _conv(channels, 32)
        self.conv2_1 = _conv(32, 64)
        self.conv2_2 = _conv(32, 64)
        self.conv3_1 = _conv(64, 512)
        self.conv3_2 = _conv(512, 512)
        self.fc1 = nn.Linear(512 * side * side, 1000)
        self.fc2 = nn.Linear(1000, 500)
        self.output = nn.Linear(500, classes)
        _start(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu_(self.conv1(images)), 2)  # (N, 32, 14, 14) for 28x28
        x = F.relu_(self.conv2_1(x)) + F.relu_(self.conv2_2(x))
        x = F.max_pool2d(x, 2)  # (N, 64, 7, 7)
        x = F.relu_(self.conv3_2(F.relu_(self.conv3_1(x)))).flatten(1)  # (N, 512 * 7 * 7)
        return self.output(F.relu_(self.fc2(F.relu_(self.fc1(x)))))


class ParallelSplit(nn.Module):
    """Another reading of TASK.md's drawing: the two branches stay apart through the third stage.

    Each has a convolution of its own there, half as wide; what they find is joined.
    """

    NORMALISED = Parallel.NORMALISED

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        side = size // 2 // 2
        self.conv1 = _conv(channels, 32)
        self.conv2_1, self.conv3_1 = _conv(32, 64), _conv(64, 256)
        self.conv2_2, self.conv3_2 = _conv(32, 64), _conv(64, 256)
        self.fc1 = nn.Linear(2 * 256 * side * side, 1000)
        self.fc2 = nn.Linear(1000, 500)
        self.output = nn.Linear(500, classes)
        _start(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu_(self.conv1(images)), 2)
        branches = ((self.conv2_1, self.conv3_1), (self.conv2_2, self.conv3_2))
        ends = [F.relu_(third(F.max_pool2d(F.relu_(second(x)), 2))) for second, third in branches]
        x = torch.cat(ends, 1).flatten(1)  # (N, 512 * 7 * 7) for 28x28
        return self.output(F.relu_(self.fc2(F.relu_(self.fc1(x)))))


class Linear(nn.Module):
    """One layer, the least that learns: a yardstick, and quick enough for trying things out."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.output = nn.Linear(channels * size * size, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.output(images.flatten(1))


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [_conv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]


def cnn(channels: int, size: int, classes: int) -> nn.Module:
    """Three blocks of convolution and batch norm, then what is left of each map on average."""
    return _started(
        *(*_block(channels, 32), nn.MaxPool2d(2)),
        *(*_block(32, 64), nn.MaxPool2d(2)),
        *(*_block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Dropout(0.5), nn.Linear(128, 64), nn.ReLU()),
        *(nn.Dropout(0.3), nn.Linear(64, classes)),
    )


def compact(channels: int, size: int, classes: int) -> nn.Module:
    """Convolutions only: seven narrow ones, and the mean of each class's map as its logit."""
    return _started(
        *(*_block(channels, 16), *_block(16, 16), nn.MaxPool2d(2)),
        *(*_block(16, 24), *_block(24, 24), nn.MaxPool2d(2)),
        *(*_block(24, 32), nn.Dropout(0.1)),
        *(nn.Conv2d(32, classes, kernel_size=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def large(channels: int, size: int, classes: int) -> nn.Module:
    """Three ever wider convolutions, each halving the sides, then three layers with dropout."""
    return _started(
        *(*_block(channels, 64), nn.MaxPool2d(2)),
        *(*_block(64, 128), nn.MaxPool2d(2)),
        *(*_block(128, 256), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(256 * (size // 8) ** 2, 512), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(512, 256), nn.ReLU(), nn.Dropout(0.3)),
        nn.Linear(256, classes),
    )


def _started(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*layers)
    _start(model)
    return model


NETWORKS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "parallel": Parallel,
    "parallel-split": ParallelSplit,
    "linear": Linear,
    "cnn": cnn,
    "compact": compact,
    "large": large,
}
"""By name: (channels, size, classes) -> a network; one of your own can be added (--import)."""


def build(name: str, channels: int, size: int, classes: int) -> nn.Module:
    """A new network with random weights (torch's global random state).

    `name` is a key of NETWORKS, `size` the side of the square images in pixels (at least 8).
    Raises ValueError for an unknown name.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(NETWORKS)}")
    return NETWORKS[name](channels, size, classes)


# Flagged of noise, letters and Fashion-MNIST with 1, 2, 3, 4 and 5 (WIDEST 512): 91, 95, 95,
# 96 and 96 %; 67, 71, 78, 79 and 80 %; 61, 62, 67, 70 and 69 % (`parallel`, seed 0 of
# benchmarks/uncertain.py, 2026-11-21). In `cnn` and `compact` 4 did better than 3, too.
FEATURE_LAYERS = 4
WIDEST = (
    256  # features of one layer; with 128, 256 and 512: 95, 96, 96 %; 81, 78, 79 %; 72, 71, 70 %
)


class WithFeatures(nn.Module):
    """A network that also gives what it has made of the images in the end.

    Images (N, channels, size, size) float32 -> logits (N, classes), and for each of the last
    FEATURE_LAYERS linear and 2-d convolutional layers features (N, d) float32, d at most WIDEST:
    that layer's input. A network without such layers, or of fewer, gives fewer. Factors are one
    layer, so that a training form has the features of its plain network.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen: list[torch.Tensor] = []

        def keep(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if inputs and len(inputs[0]) == len(images):
                seen.append(_features(layer, inputs[0]))
                del seen[:-FEATURE_LAYERS]

        modules = [*self.model.modules()]
        later = {layer for m in modules if isinstance(m, Factors) for layer in [*m][1:]}
        layers = [m for m in modules if isinstance(m, nn.Linear | nn.Conv2d) and m not in later]
        hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
        try:
            return self.model(images), *seen
        finally:
            for hook in hooks:
                hook.remove()


def _features(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a layer is given, as (N, d): the mean over the places of a map, or over tokens.

    Where it is wider than WIDEST, the means of neighbours; in a flattened map these are places.
    """
    if isinstance(layer, nn.Conv2d):
        x = x.mean((2, 3))
    elif x.dim() > 2:
        x = x.flatten(1, -2).mean(1)
    width = int(x.shape[1])
    group = math.ceil(width / WIDEST)
    if group == 1:
        return x
    if rest := -width % group:  # to pad by nothing would be a step of its own in ONNX
        x = F.pad(x, (0, rest))
    return x.reshape(-1, math.ceil(width / group), group).mean(2)


def parameters(model: nn.Module) -> int:
    """How many numbers the training adjusts."""
    return sum(p.numel() for p in model.parameters())
