"""mnist.lowrank: large layers that need few directions become narrow steps, and say the same."""

import pytest
import torch
from torch import nn

from mnist import lowrank, models


class Narrow(nn.Module):
    """A convolution of inputs in 3 directions, one of outputs in 2, a layer of outputs in 3."""

    def __init__(self) -> None:
        super().__init__()
        self.few = nn.Conv2d(1, 3, 3, padding=1, stride=2)
        self.conv = nn.Conv2d(24, 24, 3, padding=1, padding_mode="reflect")
        self.conv2 = nn.Conv2d(24, 32, 3, padding=2, stride=2, dilation=2, bias=False)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.wide = nn.Linear(32 * 16, 40)
        self.output = nn.Linear(40, 3)
        self.register_buffer("mix", torch.randn(24, 3))
        with torch.no_grad():
            for layer, rank in ((self.conv2, 2), (self.wide, 3)):
                flat = layer.weight.flatten(1)
                few = torch.randn(len(flat), rank) @ torch.randn(rank, flat.shape[1]) / 30
                layer.weight.copy_(few.reshape(layer.weight.shape))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.einsum("nchw,dc->ndhw", self.few(images), self.mix)
        x = self.conv3(self.conv2(self.conv(x).relu()).relu()).relu()
        return self.output(self.wide(x.flatten(1)).relu())


def pictures(n: int = 300) -> torch.Tensor:
    return torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def shapes(model: nn.Module) -> dict[str, list[tuple[int, ...]]]:
    """By name, the weights of each layer that has become steps."""
    return {
        name: [tuple(step.weight.shape) for step in steps]
        for name, steps in model.named_modules()
        if isinstance(steps, lowrank.Steps)
    }


def test_layers_of_low_rank_become_steps_and_the_others_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lowrank, "LOSS", 1e-6)
    monkeypatch.setattr(lowrank, "LARGE", 0)
    torch.manual_seed(0)
    model = Narrow().eval()
    lowered = lowrank.lower(model, pictures())
    assert lowered
    assert shapes(lowered.model) == {
        "conv": [(3, 24, 1, 1), (24, 3, 3, 3)],
        "conv2": [(2, 24, 3, 3), (32, 2, 1, 1)],
        "wide": [(3, 512), (40, 3)],
    }
    with torch.no_grad():
        wanted, found = model(pictures()), lowered.model(pictures())
    assert found == pytest.approx(wanted, abs=2e-3 * float(wanted.abs().max()))
    assert not shapes(model)  # which stays as it was


def test_the_work_is_counted_by_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "LOSS", 1e-6)
    torch.manual_seed(0)
    lowered = lowrank.lower(Narrow().eval(), pictures())
    assert lowered
    places = {"few": 64, "conv": 64, "conv2": 16}
    one = {name: 9 * places[name] for name in places}
    rest = 3 * one["few"] + 32 * one["conv2"] + 512 * 40 + 40 * 3  # each of conv3's groups has one
    before = rest + 24 * 24 * one["conv"] + 24 * 32 * one["conv2"]
    after = rest + 24 * 3 * 64 + 3 * 24 * one["conv"] + 24 * 2 * one["conv2"] + 2 * 32 * 16
    assert set(shapes(lowered.model)) == {"conv", "conv2"}  # `wide` has too little of the work
    assert lowered.work == pytest.approx(after / before)


def test_what_is_lost_of_a_layer_is_no_more_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 200)).eval()
    with torch.no_grad():  # each direction counts half as much as the one before
        halves = torch.diag(0.5 ** torch.arange(200))
        model[1].weight.copy_(torch.randn(200, 200) @ halves @ torch.randn(200, 256))
    lost = []
    for loss in (0.1, 0.003, 1e-5):
        monkeypatch.setattr(lowrank, "LOSS", loss)
        lowered = lowrank.lower(model, pictures())
        assert lowered
        with torch.no_grad():
            wanted = model(pictures())
            off = lowered.model(pictures()) - wanted
        lost.append(float((off**2).mean() / wanted.var(0, correction=0).mean()))
        assert 0 < lost[-1] < 1.01 * loss
    assert lost == sorted(lost, reverse=True)


def test_a_network_that_gains_nothing_is_not_lowered() -> None:
    class Means(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :3]

    for model in (nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), Means()):
        assert lowrank.lower(model, pictures()) is None


def test_a_lowered_network_has_the_features_of_the_layers_that_it_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lowrank, "LOSS", 1e-6)
    torch.manual_seed(0)
    model = Narrow().eval()
    lowered = lowrank.lower(model, pictures())
    assert lowered
    with torch.no_grad():
        wanted = models.WithFeatures(model)(pictures())
        found = models.WithFeatures(lowered.model)(pictures())
    assert len(found) == len(wanted) == 1 + models.FEATURE_LAYERS
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=2e-3 * float(other.abs().max()))
