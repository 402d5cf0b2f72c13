"""mnist.export: whatever network, its ONNX files answer as it does, or are left out."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from mnist import (
    calibration,
    data,
    export,
    folding,
    inference,
    metrics,
    models,
    plugins,
    registry,
    scores,
    training,
)
from tests.conftest import DIGITS, SHORT, Command
from tests.test_registry import entry


def small(channels: int, size: int, classes: int) -> data.Dataset:
    """The first classes of `digits`, in another size and in colour."""
    digits = data.load("digits")

    def split(part: data.Split) -> data.Split:
        some = part.labels < classes
        images = nn.functional.interpolate(part.images[some].float(), (size, size), mode="bilinear")
        tints = torch.linspace(1, 0.5, channels)[:, None, None]
        return data.Split((images * tints).to(torch.uint8), part.labels[some])

    parts = {name: split(getattr(digits, name)) for name in ("train", "validation", "calibration")}
    names = digits.classes[:classes]
    return replace(digits, **parts, channels=channels, size=size, classes=names)


class Normed(nn.Module):
    """Batch norm after convolution and layer, dropout, average pooling, a skip, a concatenation."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GELU())
        self.layer = nn.Sequential(
            nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5)
        )
        self.output = nn.Linear(32, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.first(images).relu()
        x = torch.cat([x, x + self.second(x)], 1)
        x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1) + x.amax((2, 3))
        return self.output(self.layer(x))


class Tokens(nn.Module):
    """Attention over patches, with layer norm and dropout."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, 16, size // 3, stride=size // 3)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.output = nn.Linear(16, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.output(self.block(self.patches(images).flatten(2).transpose(1, 2)).mean(1))


def trained(
    dataset: data.Dataset, network: str = "linear", seed: int = 0, samples: int = 3_000
) -> nn.Module:
    """A network that reads most of it right."""
    torch.manual_seed(seed)
    model = models.build(network, dataset.channels, dataset.size, len(dataset.classes))
    for _ in training.fit(model, dataset, dataset.train, samples=samples, augmentation=0):
        pass
    return model


def fresh(network: type[nn.Module], dataset: data.Dataset) -> nn.Module:
    """Random weights, but batch norms that have seen the data."""
    torch.manual_seed(0)
    model = network(dataset.channels, dataset.size, len(dataset.classes))
    model.train()(dataset.standardise(dataset.train.images[:200]))
    return model.eval()


@pytest.mark.parametrize(
    ("network", "channels", "size", "classes"),
    [(network, 3, 13, 2) for network in (*models.NETWORKS.values(), Normed, Tokens)]
    + [(network, 1, 28, 10) for network in (Normed, Tokens)],
)
def test_any_network_answers_in_onnx_as_in_torch_and_in_int8_nearly(
    network: type[nn.Module], channels: int, size: int, classes: int
) -> None:
    dataset = small(channels, size, classes)
    model = fresh(network, dataset)
    float32 = export.to_onnx(model, dataset)
    int8 = export.to_int8(float32, dataset)
    wanted = inference.torch_runner(model, dataset.mean, dataset.std)
    for n in (1, 2, 20):  # any batch size
        images = dataset.validation.images[:n].numpy()
        logits, wanted_features = wanted(images)
        largest = float(np.abs(logits).max())
        for content, tolerance in ((float32, 1e-4), (int8, 0.1)):
            outputs, features = inference.onnx_runner(content)(images)
            assert outputs.shape == (n, classes)
            assert outputs == pytest.approx(logits, abs=tolerance * largest)
            assert features == pytest.approx(wanted_features, abs=tolerance)


def test_the_graph_standardises_pixels_itself() -> None:
    dataset = small(1, 16, 3)
    content = export.to_onnx(trained(dataset), dataset)
    (pixels,) = onnx.load_from_string(content).graph.input
    assert pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [dim.dim_value for dim in pixels.type.tensor_type.shape.dim] == [0, 1, 16, 16]


def test_exporting_leaves_the_model_as_it_was_and_repeats_exactly() -> None:
    dataset = small(1, 16, 3)
    model = fresh(Normed, dataset)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    one, two = export.export(model, dataset), export.export(model, dataset)
    assert (
        one.files == two.files
    )  # a process that takes over from a killed one continues with the same files
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_exported_files_do_not_name_the_machine() -> None:
    dataset = small(1, 16, 3)
    for _, content in export.export(fresh(Normed, dataset), dataset).files.values():
        assert str(Path(__file__).parents[1]).encode() not in content
        assert b"site-packages" not in content


class Hidden(models.Linear):
    """Computes in NumPy, which exporters do not see."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.from_numpy(images.detach().numpy() * 1))


class Foreign(models.Linear):
    """Uses an operator that the exporter does not know."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.mT)


@pytest.mark.parametrize("network", [Hidden, Foreign])
def test_a_network_that_cannot_be_exported_is_served_by_torch(
    network: type[nn.Module],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    exported = export.export(fresh(network, small(1, 16, 3)), small(1, 16, 3))
    assert set(exported.files) == {"golden", "likeness"}
    assert exported.served.engine == "torch"
    assert exported.left_out["onnx"]
    assert "saved without onnx" in caplog.text
    assert capfd.readouterr().out == ""  # run.py --json writes there


def test_int8_with_more_errors_than_allowed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = small(1, 16, 3)
    model = trained(dataset)
    wrong = export.to_onnx(models.build("linear", 1, 16, 3), dataset)  # of other weights
    monkeypatch.setattr(export, "to_int8", lambda *_: wrong)
    exported = export.export(model, dataset)
    assert exported.served.engine == "onnx"
    assert set(exported.files) == {"onnx", "golden", "likeness"}
    assert "more errors of" in exported.left_out["onnx_int8"]


def test_all_engines_are_one_function_though_onnx_has_fewer_multiplications(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "MIN_CONV_WEIGHTS", 100)
    monkeypatch.setattr(folding, "MIN_LINEAR_WEIGHTS", 100)
    monkeypatch.setattr(folding, "CONV_RANK", 4)
    dataset = data.load("digits")
    torch.manual_seed(0)
    form = folding.training_form(models.build("parallel", 1, dataset.size, 10))
    for _ in training.fit(form, dataset, dataset.train, samples=3_000, lr=0.003):
        pass
    model = folding.fold(form.eval())
    exported = export.export(model, dataset, folding.merge_norms(form))
    assert exported.served.engine == "onnx_int8"
    assert len(exported.files["onnx"][1]) < 4 * models.count_parameters(model) / 10
    state = io.BytesIO()
    torch.save(model.state_dict(), state)
    record = entry(
        dataset=dataset.record(0), model={"name": "parallel"}, calibration=exported.calibration
    )
    files = {"weights": (".pth", state.getvalue())} | exported.files
    name = registry.save(tmp_path, files, record, "always")
    images = dataset.calibration.images.numpy()
    given = {
        engine: inference.load(tmp_path, name, engine=engine).outputs(images)
        for engine in inference.ENGINE_FILES
    }
    for logits, features in zip(given["torch"], given["onnx"], strict=True):
        assert logits == pytest.approx(features, abs=1e-4)
    for engine in inference.ENGINE_FILES:  # one score and one threshold fit all of them
        uncertain = inference.load(tmp_path, name, engine=engine).predict(images).uncertain
        assert uncertain.mean() <= 2 * calibration.MAX_UNCERTAIN


@pytest.mark.parametrize(("more", "taken"), [(0, True), (1, True), (2, False)])
def test_int8_may_make_one_more_error(more: int, taken: bool) -> None:
    labels = np.arange(200) % 2
    wanted = np.eye(2)[labels]
    wanted[:5] = wanted[:5, ::-1]  # 5 errors
    logits = wanted.copy()
    logits[5 : 5 + more] = logits[5 : 5 + more, ::-1]
    if taken:
        export._check_outputs("onnx_int8", logits, wanted, labels)
    else:
        with pytest.raises(ValueError, match="2 more errors"):
            export._check_outputs("onnx_int8", logits, wanted, labels)


def drawn(n: int, sharper: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `sharper` times too large for the labels drawn from them."""
    generator = np.random.default_rng(0)
    fair = generator.normal(0, 2, (n, 5))
    shares = inference.probabilities(fair)
    labels = (shares.cumsum(1) < generator.random((n, 1))).sum(1)
    return fair * sharper, labels


@pytest.mark.parametrize("sharper", [0.5, 1.0, 3.0])
def test_the_temperature_corrects_an_overconfident_model(sharper: float) -> None:
    logits, labels = drawn(20_000, sharper)
    temperature = calibration.fit_temperature(logits, labels)
    assert temperature == pytest.approx(sharper, rel=0.05)
    after = scores.calibration_error(inference.probabilities(logits, temperature), labels)
    assert after < 0.015
    if sharper != 1:
        before = scores.calibration_error(inference.probabilities(logits), labels)
        assert before > 5 * after


@pytest.mark.parametrize(("n", "expected"), [(1, 1 - 2 / 9), (10, 1 - 2 / 36), (98, 1 - 2 / 300)])
def test_without_an_error_one_label_in_n_plus_2_counts_as_random(n: int, expected: float) -> None:
    labels = np.arange(n) % 3
    logits = np.eye(3)[labels]
    shares = inference.probabilities(logits, calibration.fit_temperature(logits, labels))
    assert shares.max(1) == pytest.approx(expected, rel=1e-3)


def test_probabilities_are_the_softmax_over_the_temperature() -> None:
    logits = np.array([[1.0, 2.0, 500.0], [0.0, 0.0, math.log(2)]], np.float32)
    for temperature in (0.5, 1.0, 4.0):
        wanted = torch.softmax(torch.from_numpy(logits) / temperature, 1).numpy()
        shares = inference.probabilities(logits, temperature)
        assert shares.dtype == np.float32
        assert shares == pytest.approx(wanted, abs=1e-6)


class Bare(nn.Module):
    """A network of which no layer is a module, so that there are no features."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels * size**2, classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight


@pytest.mark.parametrize(("network", "score"), [(Normed, "likeness"), (Bare, "logit")])
def test_at_most_one_in_a_hundred_calibration_images_is_uncertain(
    network: type[nn.Module], score: str
) -> None:
    dataset = small(1, 16, 3)
    dataset = replace(dataset, calibration=dataset.train)  # more of them
    exported = export.export(fresh(network, dataset), dataset)
    assert exported.calibration["score"] == score
    assert ("likeness" in exported.files) == (score == "likeness")
    uncertain = exported.served.predict(dataset.calibration.images.numpy()).uncertain
    assert 0.005 < uncertain.mean() <= calibration.MAX_UNCERTAIN
    assert exported.calibration["uncertain_below"] == exported.served.uncertain_below


def test_noise_is_uncertain() -> None:
    dataset = data.load("digits")
    exported = export.export(trained(dataset), dataset)
    shape = (100, 1, dataset.size, dataset.size)
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert exported.served.predict(noise)[1].mean() > 0.95
    assert exported.served.predict(dataset.validation.images.numpy())[1].mean() < 0.1


def test_logits_are_the_score_where_the_features_of_an_engine_differ() -> None:
    dataset = small(1, 16, 3)
    model = trained(dataset)
    exported = export.export(model, dataset)
    images = dataset.calibration.images.numpy()
    right = exported.served.outputs(images)
    other = (right[0], -right[1])
    engine = exported.served.engine
    classifier = calibration.set_threshold(
        exported.served, {engine: right, "other": other}, dataset
    )
    assert classifier.ood_score is None


@pytest.mark.parametrize("n", [10, 99, 100, 250, 2_500])
def test_the_threshold_is_the_highest_possible(n: int) -> None:
    scores = np.random.default_rng(0).normal(-1, 0.3, n).astype(np.float32)
    limit = calibration.fit_threshold(scores)
    assert (scores < limit).sum() <= calibration.MAX_UNCERTAIN * n
    assert (scores < limit + 1e-3).sum() >= int(calibration.MAX_UNCERTAIN * n)
    assert limit == round(limit, 4)


def test_golden_images_range_from_the_least_to_the_most_certain() -> None:
    dataset = small(1, 16, 3)
    exported = export.export(trained(dataset), dataset)
    with np.load(io.BytesIO(exported.files["golden"][1])) as golden:
        assert set(golden) == {"images", "torch", "onnx", "onnx_int8"}
        assert golden["images"].shape == (export.GOLDEN_IMAGES, 1, 16, 16)
        sure = golden["onnx_int8"].max(1)
        assert np.all(np.diff(sure) >= 0)
        every = exported.served(dataset.calibration.images.numpy()).max(1)
        assert (sure[0], sure[-1]) == pytest.approx((every.min(), every.max()), abs=1e-6)


def test_a_run_saves_all_files_that_serving_needs(saved: Path) -> None:
    name, record = registry.record(saved)
    kinds = {"weights", "onnx", "onnx_int8", "golden", "likeness", "predictions"}
    assert set(record["files"]) == kinds
    assert record["golden"] == f"{name}.golden.npz"
    assert record["files"]["onnx_int8"]["file"] == f"{name}.int8.onnx"
    assert record["engines"] == {"served": "onnx_int8", "left_out": {}}
    assert 0.1 < record["calibration"]["temperature"] < 10
    assert record["calibration"]["score"] == "likeness"
    assert record["calibration"]["uncertain_below"] < -1
    sets = record["calibration"]["prediction_sets"]
    probabilities = [probability for probability, _ in sets.values()]
    assert probabilities == sorted(probabilities, reverse=True)
    test = record["metrics"]["test"]
    assert 0.9 < test["coverage"] <= 1 <= test["set_size"] < 5
    calibration = record["metrics"]["calibration"]
    assert calibration["served_errors"] <= calibration["errors"] + 1
    assert 0 <= calibration["ece"] < 0.5
    with np.load(registry.file(saved, name, "predictions")) as predictions:
        assert set(predictions) == {
            *("probabilities", "served", "sets", "labels", "mistakes", "images")
        }
        wrong = metrics.count_errors(predictions["served"], predictions["labels"])
        assert record["metrics"]["test"]["served_errors"] == wrong
        assert predictions["served"].shape == predictions["probabilities"].shape == (257, 10)


@pytest.mark.slow
@pytest.mark.usefixtures("known_speed")
@pytest.mark.parametrize("from_plugin", [False, True])
def test_a_model_that_cannot_be_exported_is_saved_nevertheless(
    from_plugin: bool,
    run: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: Any) -> bytes:
        raise RuntimeError("made up")

    monkeypatch.setattr(export, "to_onnx", broken)
    monkeypatch.setattr(plugins, "is_from_plugin", lambda _: from_plugin)
    assert run(*DIGITS, *SHORT, "--confirm", "1").returncode == 0
    assert "saved without onnx: made up" in caplog.text
    info = registry.read(tmp_path / "saved_models")
    (name,) = info["models"]
    assert info["current"] == (
        None if from_plugin else name
    )  # a server cannot build a plugin's network
    _, record = registry.record(tmp_path / "saved_models", name)
    assert set(record["files"]) == {"weights", "golden", "likeness", "predictions"}
    assert record["engines"] == {"served": "torch", "left_out": {"onnx": "made up"}}
    classifier = inference.load(tmp_path / "saved_models", name)
    assert classifier.engine == "torch"
    assert classifier.skipped_engines["onnx"] == "made up"


def test_a_model_from_before_training_forms_answers_as_it_was_saved(tmp_path: Path) -> None:
    """Its int8 file and its weights are different networks, each with its own calibration."""
    dataset = data.load("digits")
    model, other = (trained(dataset, seed=seed, samples=4_000) for seed in (0, 1))
    full, low = export.export(model, dataset), export.export(other, dataset)
    calibration = low.calibration | {"full": full.calibration}
    calibration["temperature"] = 2.0
    files = {key: full.files[key] for key in ("onnx", "golden")}
    files |= {"onnx_int8": low.files["onnx_int8"], "likeness": low.files["likeness"]}
    files["full_likeness"] = (".full_likeness.npz", full.files["likeness"][1])
    images = dataset.calibration.images.numpy()[:8]
    in_torch = inference.Classifier(
        "torch",
        inference.torch_runner(model, dataset.mean, dataset.std),
        temperature=full.calibration["temperature"],
    )
    int8 = inference.Classifier(
        "onnx_int8", inference.onnx_runner(low.files["onnx_int8"][1]), temperature=2.0
    )
    given = {"torch": in_torch(images), "onnx": in_torch(images), "onnx_int8": int8(images)}
    golden, state = io.BytesIO(), io.BytesIO()
    np.savez(golden, images=images, **given)
    torch.save(model.state_dict(), state)
    files |= {"golden": (".golden.npz", golden.getvalue()), "weights": (".pth", state.getvalue())}
    record = entry(dataset=dataset.record(0), model={"name": "linear"}, calibration=calibration)
    name = registry.save(tmp_path, files, record, "always")
    assert inference.load(tmp_path, name).engine == "onnx_int8"
    for engine, probabilities in given.items():
        classify = inference.load(tmp_path, name, engine=engine)
        assert classify(images) == pytest.approx(probabilities, abs=inference.TOLERANCE[engine])
        expected = calibration if engine == "onnx_int8" else full.calibration
        assert classify.uncertain_below == expected["uncertain_below"]
