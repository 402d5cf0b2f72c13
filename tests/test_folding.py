"""mnist.folding: a training form computes what the plain network that it folds into computes."""

import pytest
import torch
from torch import nn

from mnist import data, folding, models, training


class Odd(nn.Module):
    """Layers of every kind that can be factored, and some that cannot."""

    NORMALISED = ("few", "conv", "dilated", "strided", "grouped", "point", "wide")

    def __init__(self) -> None:
        super().__init__()
        self.few = nn.Conv2d(1, 24, 3, padding=1, stride=2)
        self.conv = nn.Conv2d(24, 24, 3, padding=1, padding_mode="reflect")
        self.dilated = nn.Conv2d(24, 32, (3, 5), padding=(2, 4), dilation=2, bias=False)
        self.strided = nn.Conv2d(32, 32, 3, stride=2)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.point = nn.Conv2d(32, 16, 1, padding=1)
        self.wide = nn.Linear(16 * 9 * 9, 40)
        self.deep = nn.Linear(40, 30, bias=False)
        self.output = nn.Linear(30, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.dilated(self.conv(self.few(images).relu()).relu()).relu()
        x = self.point(self.grouped(self.strided(x).relu()).relu()).relu().flatten(1)
        return self.output(self.deep(self.wide(x).relu()).relu())


@pytest.fixture
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of a few weights are factored, too."""
    for name, value in (
        ("MIN_CONV_WEIGHTS", 1),
        ("MIN_LINEAR_WEIGHTS", 1),
        ("MAX_WEIGHT_SHARE", 10),
    ):
        monkeypatch.setattr(folding, name, value)
    monkeypatch.setattr(folding, "CONV_RANK", 5)
    monkeypatch.setattr(folding, "LINEAR_RANK", 4)


def with_random_statistics(form: nn.Module) -> nn.Module:
    """In evaluation mode, with norms as no training would leave them."""
    for module in form.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.0, 2.0)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return form.eval()


def factored(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, folding.Factors)}


def largest_difference(one: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        logits = one(images)
        return float((logits - other(images)).abs().max() / logits.abs().max())


@pytest.mark.usefixtures("small_layers")
def test_every_kind_of_layer_folds_back_exactly() -> None:
    torch.manual_seed(0)
    form = with_random_statistics(folding.training_form(Odd()))
    assert factored(form) == {
        *("few", "conv", "dilated", "strided", "point", "wide", "deep", "output")
    }
    images = torch.randn(30, 1, 32, 32)
    plain = folding.fold(form)
    Odd().load_state_dict(plain.state_dict())  # the same layers, with and without bias
    assert largest_difference(form, plain, images) < 1e-4
    narrow = folding.merge_norms(form)
    assert largest_difference(form, narrow, images) < 1e-4
    assert not any(isinstance(module, nn.BatchNorm2d) for module in narrow.modules())


@pytest.mark.parametrize("name", models.NETWORKS)
def test_known_networks_fold_into_themselves(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, 1, 28, 10)
    form = with_random_statistics(folding.training_form(model))
    plain = folding.fold(form)
    shapes = {key: part.shape for key, part in model.state_dict().items()}
    assert {key: part.shape for key, part in plain.state_dict().items()} == shapes
    assert models.count_parameters(plain) == models.count_parameters(model)
    assert largest_difference(form, plain, torch.randn(8, 1, 28, 28)) < 1e-4


def test_a_network_without_normalised_has_no_training_form() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 512, 3), nn.ReLU(), nn.Conv2d(512, 512, 3, bias=False))
    form = folding.training_form(plain)
    assert form is plain  # its weights may be pre-trained
    assert not folding.has_factors(form)
    assert folding.fold(form).state_dict().keys() == plain.state_dict().keys()


def test_only_layers_that_get_smaller_are_factorised() -> None:
    assert factored(folding.training_form(models.build("compact", 1, 28, 10))) == set()
    parallel = folding.training_form(models.build("parallel", 1, 28, 10))
    assert factored(parallel) == set(models.Parallel.NORMALISED)
    whole = {name for name in factored(parallel) if len(parallel.get_submodule(name)) == 2}  # type: ignore[arg-type]
    assert whole == {"conv1", "conv2_1", "conv2_2", "fc2"}  # themselves, and a norm
    assert (
        models.count_parameters(parallel)
        < models.count_parameters(models.build("parallel", 1, 28, 10)) / 10
    )


def test_a_form_that_was_trained_folds_back_exactly(digits: data.Dataset) -> None:
    torch.manual_seed(0)
    form = folding.training_form(models.build("parallel", 1, digits.size, 10))
    for _ in training.fit(form, digits, digits.train, samples=2_000, lr=0.002):
        pass
    images = digits.standardise(digits.validation.images)
    assert largest_difference(form.eval(), folding.fold(form).eval(), images) < 1e-4


def test_a_form_has_the_features_of_its_plain_network() -> None:
    torch.manual_seed(0)
    form = with_random_statistics(folding.training_form(models.build("parallel", 1, 28, 10)))
    images = torch.randn(5, 1, 28, 28)
    with torch.no_grad():
        pairs = [
            models.WithFeatures(network)(images)
            for network in (folding.fold(form), folding.merge_norms(form))
        ]
    assert len(pairs[0]) == 1 + models.FEATURE_LAYERS
    for plain, narrow in zip(*pairs, strict=True):
        assert torch.allclose(plain, narrow, rtol=1e-3, atol=1e-4)
