"""The networks by name, built for the channels, size and classes of a data set."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from mnist.folding import Factors


def _initialise(model: nn.Module) -> None:
    """Set weights by He et al. 2015 (arXiv 1502.01852), for a constant variance of activations.

    Compared with torch's default: 99 errors instead of 116 on 7,500 images after 26,000 training
    images (batch 64, Adam, lr 0.001, one seed each), 109 instead of 122 at batch 33, lr 0.00039.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


def _flatten(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, C * H * W).

    The gradient gets the memory format of `x`: operations on two memory formats are slow. Training
    `parallel` is 1.13 times as fast with it (median of 9 pairs, two cores of Zen 4).
    """
    channels_last = torch.channels_last
    if x.requires_grad and x.is_contiguous(memory_format=channels_last):
        x.register_hook(lambda gradient: gradient.contiguous(memory_format=channels_last))
    return x.flatten(1)


class Parallel(nn.Module):
    """TASK.md's network: two parallel convolutions in the second stage, their outputs summed.

    Images (N, channels, size, size) float32, standardised -> logits (N, classes).
    """

    # Layers that get a batch norm in the training form (mnist.folding).
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
        _initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu_(self.conv1(images)), 2)  # (N, 32, 14, 14) for 28x28
        x = F.relu_(self.conv2_1(x)) + F.relu_(self.conv2_2(x))
        x = F.max_pool2d(x, 2)  # (N, 64, 7, 7)
        x = _flatten(F.relu_(self.conv3_2(F.relu_(self.conv3_1(x)))))  # (N, 512 * 7 * 7)
        return self.output(F.relu_(self.fc2(F.relu_(self.fc1(x)))))


class ParallelSplit(nn.Module):
    """Another reading of TASK.md's drawing: the two branches stay apart through the third stage.

    Each branch has a convolution there, half as wide; their outputs are concatenated.
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
        _initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu_(self.conv1(images)), 2)
        branches = ((self.conv2_1, self.conv3_1), (self.conv2_2, self.conv3_2))
        ends = [F.relu_(third(F.max_pool2d(F.relu_(second(x)), 2))) for second, third in branches]
        x = _flatten(torch.cat(ends, 1))  # (N, 512 * 7 * 7) for 28x28
        return self.output(F.relu_(self.fc2(F.relu_(self.fc1(x)))))


class Residual(nn.Module):
    """Residual blocks (He et al. 2016, arXiv 1512.03385) for things and photos.

    The convolution and the pooling at the start of each stage halve the side, down to 7 to 13
    pixels; the maximum of each map goes to a linear layer. The number of weights hardly depends on
    the images' size, unlike `parallel`'s.
    """

    MIN_SIDE = 14  # of maps that are halved

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        halvings = max(1, int(math.log2(size / self.MIN_SIDE)) + 1)
        widths = [32, *[64] * (halvings - 1), 128]
        self.stem = _conv(channels, widths[0])
        self.stages = nn.ModuleList(map(_ResidualStage, widths, widths[1:]))
        self.output = nn.Linear(widths[-1], classes)
        self.NORMALISED = tuple(
            name for name, layer in self.named_modules() if isinstance(layer, nn.Conv2d)
        )
        _initialise(self)
        nn.init.normal_(self.output.weight, std=0.01)  # maxima are large: so would logits be

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu_(self.stem(images))
        for stage in self.stages:
            x = stage(F.max_pool2d(x, 2))
        return self.output(x.amax((2, 3)))


class _ResidualStage(nn.Module):
    """A convolution to another width, then a residual block of two."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = _conv(inputs, outputs)
        self.branch1, self.branch2 = _conv(outputs, outputs), _conv(outputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu_(self.conv(x))
        return x + F.relu_(self.branch2(F.relu_(self.branch1(x))))


class Linear(nn.Module):
    """A single linear layer: a baseline, and fast in tests."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.output = nn.Linear(channels * size * size, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.output(images.flatten(1))


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [_conv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]


def cnn(channels: int, size: int, classes: int) -> nn.Module:
    """Three blocks of convolution and batch norm, the mean of each map, then two linear layers."""
    return _sequential(
        *(*_block(channels, 32), nn.MaxPool2d(2)),
        *(*_block(32, 64), nn.MaxPool2d(2)),
        *(*_block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Dropout(0.5), nn.Linear(128, 64), nn.ReLU()),
        *(nn.Dropout(0.3), nn.Linear(64, classes)),
    )


def compact(channels: int, size: int, classes: int) -> nn.Module:
    """Convolutions only: six narrow ones, and a mean map per class as its logit."""
    return _sequential(
        *(*_block(channels, 16), *_block(16, 16), nn.MaxPool2d(2)),
        *(*_block(16, 24), *_block(24, 24), nn.MaxPool2d(2)),
        *(*_block(24, 32), nn.Dropout(0.1)),
        *(nn.Conv2d(32, classes, kernel_size=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def large(channels: int, size: int, classes: int) -> nn.Module:
    """Three convolutions of growing width, each with pooling, then three linear layers."""
    return _sequential(
        *(*_block(channels, 64), nn.MaxPool2d(2)),
        *(*_block(64, 128), nn.MaxPool2d(2)),
        *(*_block(128, 256), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(256 * (size // 8) ** 2, 512), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(512, 256), nn.ReLU(), nn.Dropout(0.3)),
        nn.Linear(256, classes),
    )


def _sequential(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*layers)
    _initialise(model)
    return model


NETWORKS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "parallel": Parallel,
    "parallel-split": ParallelSplit,
    "residual": Residual,
    "linear": Linear,
    "cnn": cnn,
    "compact": compact,
    "large": large,
}
"""Name -> (channels, size, classes) -> a network; a plugin (--import) may add one."""


def build(name: str, channels: int, size: int, classes: int) -> nn.Module:
    """A new network with random weights (torch's global random state).

    `name` is a key of NETWORKS, `size` the side of the square images in pixels (at least 8).
    Raises ValueError for an unknown name.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(NETWORKS)}")
    return NETWORKS[name](channels, size, classes)


# Share flagged of noise with 1, 2, 3, 4 and 5 layers (MAX_FEATURES 512): 91, 95, 95, 96 and 96 %;
# of letters: 67, 71, 78, 79 and 80 %; of Fashion-MNIST: 61, 62, 67, 70 and 69 % (`parallel`, seed 0
# of benchmarks/ood.py, 2026-11-21). In `cnn` and `compact`, too, 4 did better than 3.
FEATURE_LAYERS = 4
# Features of one layer. With 128, 256 and 512: 95, 96, 96 %; 81, 78, 79 %; 72, 71, 70 %.
MAX_FEATURES = 256


class WithFeatures(nn.Module):
    """A network that returns features with its logits.

    Images (N, channels, size, size) float32 -> logits (N, classes), and for each of the last
    FEATURE_LAYERS linear and 2-d convolutional layers the layer's input as features (N, d) float32,
    d at most MAX_FEATURES. A network with fewer such layers returns fewer. Factors count as one
    layer, so that a training form has the same features as its plain network.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features: list[torch.Tensor] = []

        def record_input(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if inputs and len(inputs[0]) == len(images):
                features.append(_extract_features(layer, inputs[0]))
                del features[:-FEATURE_LAYERS]

        modules = [*self.model.modules()]
        inner = {layer for m in modules if isinstance(m, Factors) for layer in [*m][1:]}
        layers = [m for m in modules if isinstance(m, nn.Linear | nn.Conv2d) and m not in inner]
        hooks = [layer.register_forward_pre_hook(record_input) for layer in layers]
        try:
            return self.model(images), *features
        finally:
            for hook in hooks:
                hook.remove()


def _extract_features(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A layer's input as (N, d): the mean over the positions of a map, or over tokens.

    Where it is wider than MAX_FEATURES, means of adjacent values: positions, in a flattened map.
    """
    if isinstance(layer, nn.Conv2d):
        x = x.mean((2, 3))
    elif x.dim() > 2:
        x = x.flatten(1, -2).mean(1)
    width = int(x.shape[1])
    group = math.ceil(width / MAX_FEATURES)
    if group == 1:
        return x
    if padding := -width % group:  # in ONNX a padding of 0 is a step, too
        x = F.pad(x, (0, padding))
    return x.reshape(-1, math.ceil(width / group), group).mean(2)


def count_parameters(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in model.parameters())
