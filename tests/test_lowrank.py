"""mnist.lowrank: layers whose outputs need few directions become small, and say the same."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from mnist import export, inference, lowrank
from mnist.data import Dataset
from tests.test_export import small


class Narrow(nn.Module):
    """A convolution and a layer whose outputs vary in 2 and 3 directions, between others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 24, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(24, 32, 3, padding=2, stride=2, dilation=2, bias=False)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.wide = nn.Linear(32 * 16, 40)
        self.output = nn.Linear(40, 3)
        with torch.no_grad():
            for layer, rank in ((self.conv2, 2), (self.wide, 3)):
                flat = layer.weight.flatten(1)
                few = torch.randn(len(flat), rank) @ torch.randn(rank, flat.shape[1]) / 30
                layer.weight.copy_(few.reshape(layer.weight.shape))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv3(self.conv2(self.conv(images).relu()).relu()).relu()
        return self.output(self.wide(x.flatten(1)).relu())


@pytest.fixture
def dataset() -> Dataset:
    return small(1, 16, 3)


def shapes(content: bytes) -> list[tuple[int, ...]]:
    """Of all weights, not biases, in the order in which they are used."""
    graph = onnx.load_from_string(content).graph
    by_name = {each.name: tuple(each.dims) for each in graph.initializer}
    used = [name for node in graph.node for name in node.input if name in by_name]
    return [by_name[name] for name in used if len(by_name[name]) > 1]


def logits(content: bytes, dataset: Dataset) -> np.ndarray:
    return inference.by_onnx(content)(dataset.train.images[:300].numpy())[0]


def lowered(content: bytes, dataset: Dataset) -> bytes:
    return lowrank.lower(content, dataset.train.images[:300].numpy())


def test_layers_of_low_rank_become_two_and_the_others_stay(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "LOSS", 1e-4)
    torch.manual_seed(0)
    before = export.to_onnx(Narrow().eval(), dataset)
    after = lowered(before, dataset)
    kept = [(24, 1, 3, 3), (32, 1, 3, 3), (3, 40)]
    assert shapes(before) == [kept[0], (32, 24, 3, 3), kept[1], (40, 512), kept[2]]
    conv, layer = [(2, 24, 3, 3), (32, 2, 1, 1)], [(3, 512), (40, 3)]
    assert shapes(after) == [kept[0], *conv, kept[1], *layer, kept[2]]
    wanted = logits(before, dataset)
    assert logits(after, dataset) == pytest.approx(wanted, abs=1e-3 * float(np.abs(wanted).max()))


def test_what_is_lost_of_a_layer_is_no_more_than_allowed(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 200)).eval()
    with torch.no_grad():  # each direction counts half as much as the one before
        halves = torch.diag(0.5 ** torch.arange(200))
        model[1].weight.copy_(torch.randn(200, 200) @ halves @ torch.randn(200, 256))
    before = export.to_onnx(model, dataset)
    wanted = logits(before, dataset)
    lost = []
    for loss in (0.1, 0.003, 1e-5):
        monkeypatch.setattr(lowrank, "LOSS", loss)
        off = logits(lowered(before, dataset), dataset) - wanted  # of the images it learnt from
        lost.append(float((off**2).mean() / wanted.var(0).mean()))
        assert 0 < lost[-1] < 1.01 * loss
    assert lost == sorted(lost, reverse=True)


def test_a_network_that_gains_nothing_stays_as_it_is(dataset: Dataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
    content = export.to_onnx(model.eval(), dataset)
    after = lowered(content, dataset)
    assert shapes(after) == shapes(content) == [(3, 256)]
    assert np.array_equal(logits(after, dataset), logits(content, dataset))


def test_a_network_without_such_layers_stays_as_it_is(dataset: Dataset) -> None:
    class Means(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :3]

    content = export.to_onnx(Means().eval(), dataset)
    after = lowered(content, dataset)
    assert np.array_equal(logits(after, dataset), logits(content, dataset))
