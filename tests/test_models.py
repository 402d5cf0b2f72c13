"""mnist.models: the networks, by name."""

import pytest
import torch

from mnist import models
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("parallel", 28_287_054), ("linear", 7_850), ("cnn", 102_026)],
)
def test_a_network_has_the_parameters_that_its_table_gives(name: str, parameters: int) -> None:
    assert models.count_parameters(models.build(name, 1, 28, 10)) == parameters


def test_compact_has_under_25_000_parameters() -> None:
    assert models.count_parameters(models.build("compact", 1, 28, 10)) < 25_000


@pytest.mark.parametrize("name", models.NETWORKS)
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 28, 10), (3, 32, 47), (1, 8, 2)])
def test_a_network_is_built_for_its_data(name: str, channels: int, size: int, classes: int) -> None:
    model = models.build(name, channels, size, classes).eval()
    assert model(torch.rand(2, channels, size, size)).shape == (2, classes)


def test_in_parallel_split_each_branch_reads_only_its_own_second_stage() -> None:
    model = models.build("parallel-split", 1, 28, 10)
    shape = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert shape["conv3_1.weight"] == shape["conv3_2.weight"] == (256, 64, 3, 3)
    assert shape["fc1.weight"] == (1000, 512 * 7 * 7)


@pytest.mark.parametrize(
    ("name", "widths"),
    [("parallel", [256, 256, 250, 250]), ("linear", [196]), ("cnn", [32, 64, 128, 64])],
)
def test_features_are_what_the_last_layers_are_given(name: str, widths: list[int]) -> None:
    model = models.build(name, 1, 28, 10).eval()
    images = torch.rand(3, 1, 28, 28)
    logits, *features = models.WithFeatures(model)(images)
    assert torch.equal(logits, model(images))
    assert [tuple(part.shape) for part in features] == [(3, width) for width in widths]
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_features_of_maps_tokens_and_wide_rows_are_means() -> None:
    layers = torch.nn.Conv2d(4, 2, 3), torch.nn.Linear(6, 2)
    maps, tokens, wide = torch.rand(2, 4, 5, 5), torch.rand(2, 7, 6), torch.rand(2, 514)
    assert torch.allclose(models._extract_features(layers[0], maps), maps.mean((2, 3)))
    assert torch.allclose(models._extract_features(layers[1], tokens), tokens.mean(1))
    narrow = models._extract_features(layers[1], wide)
    assert narrow.shape == (2, 172)  # of three each; the last are filled up with zeros
    assert torch.allclose(narrow[:, :171], wide[:, :513].reshape(2, 171, 3).mean(2))


def test_a_network_of_other_layers_has_no_features() -> None:
    assert len(models.WithFeatures(torch.nn.Flatten())(torch.rand(2, 1, 8, 8))) == 1


def test_the_docs_list_every_network() -> None:
    text = (ROOT / "docs/search.md").read_text()
    for name in models.NETWORKS:
        assert f"`{name}`" in text


def test_the_parallel_network_is_the_one_in_the_table() -> None:
    model = models.build("parallel", 1, 28, 10)
    shapes = {}
    for name, layer in model.named_children():
        layer.register_forward_hook(
            lambda _, __, out, name=name: shapes.update({name: tuple(out.shape[1:])})
        )
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert shapes == {
        "conv1": (32, 28, 28),
        "conv2_1": (64, 14, 14),
        "conv2_2": (64, 14, 14),
        "conv3_1": (512, 7, 7),
        "conv3_2": (512, 7, 7),
        "fc1": (1000,),
        "fc2": (500,),
        "output": (10,),
    }
    assert models.count_parameters(model) == 28_287_054


def test_both_parallel_branches_are_used() -> None:
    model = models.build("parallel", 1, 28, 10)
    model(torch.rand(1, 1, 28, 28)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_an_unknown_network_is_named() -> None:
    with pytest.raises(ValueError, match="unknown network 'paralel'; known: parallel"):
        models.build("paralel", 1, 28, 10)


def test_the_gradient_of_the_flattened_features_keeps_their_memory_format() -> None:
    formats = []
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    channels_last_copy = features.to(memory_format=torch.channels_last, copy=True)
    flat = models._flatten(channels_last_copy)
    channels_last_copy.register_hook(
        lambda gradient: formats.append(gradient.is_contiguous(memory_format=torch.channels_last))
    )
    (flat * torch.arange(48.0)).sum().backward()
    assert formats == [True]
    assert features.grad is not None
    assert torch.equal(features.grad.flatten(1), torch.arange(48.0).expand(2, 48))
