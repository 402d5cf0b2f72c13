"""mnist.training: a run, its progress, its evaluation."""

import copy
import inspect
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mnist import folding, metrics, models, optimizers, training
from mnist.data import Dataset, Split
from mnist.search.study import FIRST_PARAMS
from tests.conftest import Clock


def build(digits: Dataset, name: str = "linear", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.build(name, digits.channels, digits.size, len(digits.classes))


def fit(model: nn.Module, digits: Dataset, **settings: object) -> list[training.Progress]:
    settings = {"samples": 2_000, "lr": 0.01} | settings
    return list(training.fit(model, digits, digits.train, digits.validation, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_one_batch_can_be_overfitted(digits: Dataset, optimizer: str) -> None:
    few = digits.train.head(32)
    model = build(digits)
    lr = {"Adam": 0.01, "AdamW": 0.01, "RMSprop": 0.003, "SGD": 0.1}[optimizer]
    run = training.fit(
        model, digits, few, few, samples=32 * 100, lr=lr, optimizer=optimizer, augmentation=0
    )
    assert list(run)[-1].errors == 0


def test_same_seed_same_weights(digits: Dataset) -> None:
    def weights(seed: int) -> torch.Tensor:
        model = build(digits)
        fit(model, digits, seed=seed)
        return model.state_dict()["output.weight"]

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_progress_is_reported_where_asked_and_on_the_whole_at_the_end(digits: Dataset) -> None:
    model = build(digits)
    reports = [p for p in fit(model, digits, validate_at=[500, 1000]) if p.n]
    assert [500 <= reports[0].samples < 550, 1000 <= reports[1].samples < 1050] == [True, True]
    assert reports[-1].samples == reports[-1].total
    assert reports[-1].n == len(digits.validation)
    assert reports[-1].accuracy == 1 - reports[-1].errors / reports[-1].n  # type: ignore[operator]
    assert len(reports) == 3
    assert reports[-1].log_loss is not None
    shares = metrics.predict(model, digits, digits.validation.images)
    expected = nn.functional.nll_loss(shares.log(), digits.validation.labels)
    assert reports[-1].log_loss == pytest.approx(float(expected), abs=1e-5)
    few = [p.n for p in fit(build(digits), digits, validate_at=[500], subset=20) if p.n]
    assert few == [20, len(digits.validation)]


def test_validation_in_mid_run_does_not_change_the_run(digits: Dataset) -> None:
    ends = []
    for validation in (digits.validation, None):
        model = folding.training_form(build(digits, "parallel"))
        run = training.fit(
            model, digits, digits.train, validation, samples=400, validate_at=[100, 200]
        )
        assert sum(progress.n is not None for progress in run) == (3 if validation else 0)
        ends.append(model.state_dict())
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


def test_a_cycle_of_the_learning_rate_ends_with_each_rung() -> None:
    shares = [optimizers.cycle_position(step, [2, 6]) for step in range(1, 7)]
    assert shares == [0.25, 0.75, 0.125, 0.375, 0.625, 0.875]


def test_weights_of_a_training_form_shrink_and_others_do_not(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "DECAY", 1 / 3_000)
    for module in (build(digits, "parallel"), folding.training_form(build(digits, "parallel"))):
        before = {name: part.clone() for name, part in module.state_dict().items()}
        fit(module, digits, samples=320, batch_size=32, lr=0.0, schedule="constant")
        for name, part in module.named_parameters():
            factored = ".0." in name or ".1." in name or ".2." in name
            if name.endswith("weight") and factored and part.dim() > 1:
                shares = [
                    optimizers.learning_rate_factor((i + 0.5) / 10, "constant") for i in range(10)
                ]
                expected = math.prod(1 - 32 / 3_000 * share for share in shares)
                assert torch.allclose(part, before[name] * expected, rtol=1e-4)
            else:
                assert torch.equal(part, before[name]), name


def test_a_batch_in_parts_has_the_loss_and_the_gradient_of_the_whole(digits: Dataset) -> None:
    ends, losses = [], []
    for micro_batch in (None, 8):  # of 33: 7, 7, 7, 6, 6
        model = build(digits)
        reports = fit(model, digits, samples=99, optimizer="SGD", lr=0.1, micro_batch=micro_batch)
        ends.append(model.state_dict()["output.weight"])
        losses.append([report.loss for report in reports])
    # Adam would hide a gradient of another scale.
    assert torch.allclose(*ends, rtol=0, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bfloat16_rounds_and_learns_with_weights_in_float32(digits: Dataset) -> None:
    ends = []
    for bfloat16 in (False, True):
        model = folding.training_form(build(digits, "parallel"))
        run = fit(model, digits, samples=320, batch_size=32, lr=0.002, bfloat16=bfloat16)
        ends.append(model.state_dict()["output.weight"])
        assert run[-1].loss < 2.2  # 2.3 is chance
    assert not torch.equal(*ends)
    assert torch.allclose(*ends, atol=0.05)
    assert ends[1].dtype == torch.float32


def test_every_sample_is_seen_once_in_a_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    order = training.ShuffledPasses(10, generator)
    seen = torch.cat([order.take(4) for _ in range(5)])
    assert seen[:10].sort().values.tolist() == list(range(10))
    assert seen[10:].sort().values.tolist() == list(range(10))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_warms_up_and_falls_to_zero(schedule: str) -> None:
    factors = [optimizers.learning_rate_factor(i / 100, schedule) for i in range(101)]
    assert factors[0] == factors[-1] == 0
    assert max(factors) == 1
    assert factors.index(1) == round(100 * optimizers.WARM_UP)
    middle = optimizers.learning_rate_factor((1 + optimizers.WARM_UP) / 2, schedule)
    assert middle == pytest.approx(0.5)
    three_quarters = optimizers.WARM_UP + 0.75 * (1 - optimizers.WARM_UP)
    late = optimizers.learning_rate_factor(three_quarters, schedule)
    assert late == pytest.approx({"linear": 0.25, "cosine": (1 - math.sqrt(0.5)) / 2}[schedule])


def test_a_constant_learning_rate_only_warms_up() -> None:
    assert optimizers.learning_rate_factor(optimizers.WARM_UP / 2, "constant") == 0.5
    assert (
        optimizers.learning_rate_factor(0.5, "constant")
        == optimizers.learning_rate_factor(1, "constant")
        == 1
    )


@pytest.mark.parametrize(
    "other",
    [
        {"weight_decay": 0.1},
        {"momentum": 0.5, "optimizer": "SGD"},
        {"momentum": 0.5, "optimizer": "RMSprop"},
        {"label_smoothing": 0.2},
        {"augmentation": 0.0},
        {"schedule": "cosine"},
    ],
    ids=str,
)
def test_every_hyperparameter_changes_the_run(digits: Dataset, other: dict[str, object]) -> None:
    usual = {key: value for key, value in other.items() if key == "optimizer"}
    ends = []
    for settings in (usual, other):
        model = build(digits)
        fit(model, digits, samples=200, **settings)
        ends.append(model.state_dict()["output.weight"])
    assert not torch.equal(*ends)


def test_dropout_is_set_in_all_layers_of_the_network(digits: Dataset) -> None:
    model = build(digits, "cnn")
    assert [layer.p for layer in training.dropout_layers(model)] == [0.5, 0.3]
    fit(model, digits, samples=64, dropout=0.1)
    assert [layer.p for layer in training.dropout_layers(model)] == [0.1, 0.1]


def test_a_loss_that_is_nan_ends_the_run(digits: Dataset) -> None:
    with pytest.raises(
        training.Diverged, match=r"the loss is (nan|inf) after .* a lower lr may help"
    ):
        fit(build(digits), digits, optimizer="SGD", lr=1e38)


def test_standardised_training_images_have_mean_0_and_deviation_1(digits: Dataset) -> None:
    inputs = digits.standardise(digits.train.images)
    assert inputs.dtype == torch.float32
    assert float(inputs.mean()) == pytest.approx(0, abs=1e-3)
    assert float(inputs.std()) == pytest.approx(1, abs=1e-3)


def test_scores_agree_with_counts_made_by_hand() -> None:
    # Three of class a (one read as b), two of class b (both right): n 5, 1 error.
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.1, 0.9], [0.3, 0.7]])
    scores = metrics.classification_scores(probabilities, torch.tensor([0, 0, 0, 1, 1]), ["a", "b"])
    assert (scores["errors"], scores["n"], scores["accuracy"]) == (1, 5, 0.8)
    assert scores["per_class"]["a"] == {"precision": 1.0, "recall": 0.6667, "f1": 0.8}
    assert scores["per_class"]["b"] == {"precision": 0.6667, "recall": 1.0, "f1": 0.8}
    # Wilson (1927): centre (p + z²/2n) / (1 + z²/n), z = 1.959964
    z2, p, n = 1.959964**2, 0.8, 5
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    assert scores["interval95"] == pytest.approx([centre - half, centre + half], abs=1e-4)


def test_errors_count_the_last_smaller_batch_right(digits: Dataset) -> None:
    model = build(digits)
    split = Split(digits.train.images[:251], digits.train.labels[:251])
    logits = model(digits.standardise(split.images))
    assert metrics.errors(model, digits, split) == int((logits.argmax(1) != split.labels).sum())


@pytest.mark.parametrize(
    ("dataset", "params", "expected"),
    [
        ({}, {}, ("digit", True, 0)),
        ({}, {"augment": "thing"}, ("thing", True, 0)),
        ({"recipe": "plain"}, {}, ("thing", False, 0.5)),
        ({"recipe": "plain", "mirrored_classes": ((1, 2),)}, {}, ("thing", False, 0)),
        (
            {"recipe": "plain"},
            {"augment": "photo", "mirror": 0.2},
            ("photo", False, 0.2),
        ),
    ],
)
def test_the_augmentation_is_the_requested_one_or_that_of_the_data_set_s_kind(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, dataset: Any, params: Any, expected: Any
) -> None:
    real, seen = training.change_images, set()

    def change_images(*arguments: Any, is_ink: bool, mirror: float) -> torch.Tensor:
        seen.add((arguments[-1], is_ink, mirror))
        return real(*arguments, is_ink=is_ink, mirror=mirror)

    monkeypatch.setattr(training, "change_images", change_images)
    fit(build(digits), replace(digits, **dataset), samples=100, **params)
    assert seen == {expected}


def test_outliers_are_added_to_each_batch_with_equal_targets(digits: Dataset) -> None:
    outliers = torch.full((3, 1, 28, 28), 7, dtype=torch.uint8)
    model, seen = build(digits), []
    model.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]) if module.training else None
    )
    settings: dict[str, Any] = {"augmentation": 0, "batch_size": 20, "samples": 40}
    reports = fit(model, digits, outliers=outliers, **settings)
    expected = digits.standardise(outliers[:1])
    assert [len(batch) for batch in seen] == [25, 25]
    assert all(torch.equal(batch[20:], expected.expand(5, -1, -1, -1)) for batch in seen)
    assert [report.samples for report in reports][-1] == 40  # they do not count


def test_a_network_trained_with_outliers_is_unsure_of_them(digits: Dataset) -> None:
    outliers = 255 - digits.train.images[:50]
    confidence = {}
    for name, extra in {"with": outliers, "without": None}.items():
        model = build(digits)
        fit(model, digits, samples=6_000, lr=0.01, batch_size=50, outliers=extra)
        with torch.no_grad():
            shares = model.eval()(digits.standardise(outliers)).softmax(1)
            known = model(digits.standardise(digits.validation.images)).argmax(1)
        assert (known == digits.validation.labels).float().mean() > 0.8
        confidence[name] = float(shares.amax(1).mean())
    assert confidence["with"] < 0.5 < 0.7 < confidence["without"]


def test_the_worst_mistakes_have_the_lowest_probability_of_the_true_class() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3], [0.4, 0.6]])
    labels = torch.tensor([1, 1, 1, 0, 0])
    assert metrics.worst_mistakes(probabilities, labels, 24).tolist() == [0, 2, 4]
    assert metrics.worst_mistakes(probabilities, labels, 2).tolist() == [0, 2]
    assert metrics.worst_mistakes(probabilities, probabilities.argmax(1), 24).tolist() == []


@pytest.mark.parametrize("bfloat16", [True, False])
def test_validation_has_the_precision_of_the_training(digits: Dataset, bfloat16: bool) -> None:
    model, dtypes = build(digits), []
    model.register_forward_hook(
        lambda module, _, logits: None if module.training else dtypes.append(logits.dtype)
    )
    fit(model, digits, samples=200, bfloat16=bfloat16)
    assert set(dtypes) == {torch.bfloat16 if bfloat16 else torch.float32}


def test_the_defaults_are_the_published_best() -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(training.fit).parameters.items()
    }
    assert {name: defaults[name] for name in FIRST_PARAMS} == FIRST_PARAMS


def test_an_accuracy_needs_validation_images() -> None:
    progress = training.Progress(10, 100, 0.5)
    assert progress.accuracy is None
    assert replace(progress, errors=0, n=0).accuracy is None
    assert replace(progress, errors=0, n=4).accuracy == 1
    assert replace(progress, errors=3, n=4).accuracy == 0.25


def test_a_run_has_about_the_images_asked_for_and_a_hundred_reports(digits: Dataset) -> None:
    reports = fit(build(digits), digits, samples=3_000, batch_size=8)
    assert reports[-1].samples == 3_000
    assert len(reports) == 100
    assert {report.total for report in reports} == {3_000}
    samples = [report.samples for report in reports]
    assert samples == [8 * math.ceil(375 * i / 100) for i in range(1, 101)]
    rounded = fit(build(digits), digits, samples=44, batch_size=8)  # 5.5 batches
    assert rounded[-1].samples == 48
    assert [report.samples for report in fit(build(digits), digits, samples=1, batch_size=8)] == [8]
    few = digits.train.head(5)
    run = training.fit(build(digits), digits, few, batch_size=8, samples=10)
    assert [progress.samples for progress in run] == [5, 10]


def test_a_run_whose_total_changes_ends_there_at_a_learning_rate_of_zero(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions: list[float] = []
    factor = optimizers.learning_rate_factor

    def learning_rate_factor(position: float, schedule: str) -> float:
        positions.append(position)
        return factor(position, schedule)

    monkeypatch.setattr(optimizers, "learning_rate_factor", learning_rate_factor)
    totals = {160: 400, 240: 400, 320: 1_600}
    asked: list[tuple[int, int]] = []

    def adjust_total(seen: int, total: int) -> int:
        asked.append((seen, total))
        return totals.get(seen, total)

    settings = {"samples": 800, "batch_size": 8, "adjust_total": adjust_total}
    model = build(digits)
    reports = fit(model, digits, **settings)
    some = [report.total for report in reports if report.samples in (152, 160, 320)]
    assert some == [800, 400, 1_600]
    assert reports[-1].samples == reports[-1].total == 1_600
    assert reports[-1].n == len(digits.validation)
    assert positions[19:21] == [19.5 / 100, 20.5 / 50]
    assert positions[39:41] == [39.5 / 50, 40.5 / 200]
    assert positions[-1] == 199.5 / 200
    assert asked[-1][0] < 1_600  # the last report cannot change the total
    now = fit(build(digits), digits, **settings | {"adjust_total": lambda seen, total: 8})
    assert [report.samples for report in now] == [8, 16]


def test_a_resumed_run_keeps_its_changed_total(digits: Dataset) -> None:
    settings: dict[str, Any] = {"samples": 800, "batch_size": 8}
    whole, resumed, state = build(digits), build(digits, seed=1), None
    run = training.fit(
        whole, digits, digits.train, **settings, adjust_total=lambda seen, total: 1_200
    )
    for progress in run:
        if progress.samples == 400 and progress.state is not None:
            state = copy.deepcopy(progress.state())
    assert state is not None
    *_, last = training.fit(resumed, digits, digits.train, **settings, resume=state)
    assert last.samples == last.total == 1_200
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])
    del state["steps"]  # of an old version
    *_, last = training.fit(build(digits), digits, digits.train, **settings, resume=state)
    assert last.samples == last.total == 800


def test_a_report_s_loss_is_the_mean_since_the_last_one(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([*range(1, 199), math.inf, 200])
    monkeypatch.setattr(training, "_backward", lambda *_: torch.tensor(float(next(losses))))
    run = training.fit(build(digits), digits, digits.train, batch_size=8, samples=200 * 8)
    assert [next(run).loss for _ in range(99)] == [2 * i + 1.5 for i in range(99)]
    with pytest.raises(training.Diverged, match="the loss is inf after 1600 samples"):
        next(run)


def test_validation_at_no_images_or_past_the_end_is_left_out(digits: Dataset) -> None:
    reports = fit(build(digits), digits, samples=320, batch_size=32, validate_at=[0, 64, 10_000])
    assert [report.samples for report in reports if report.n] == [64, 320]


@pytest.mark.parametrize(
    ("first_s", "step_s", "steps"),
    [
        (100.0, 0.25, 4),
        (0.25, 0.25, 12),  # until 2.5 s have passed
        (0.01, 0.01, 100),  # the last step, with the validation, does not count
    ],
)
def test_a_speed_is_that_of_the_second_half_of_the_steps(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, first_s: float, step_s: float, steps: int
) -> None:
    clock, taken = Clock(), []

    def fake_fit(*arguments: Any, **settings: Any) -> Any:
        assert arguments == (model, digits, digits.train)
        assert settings == {"batch_size": 8, "samples": 800, "lr": 0.1}
        for i in range(1, 101):
            clock.now_s += {2: first_s, 100: 50.0}.get(i, step_s)
            taken.append(i)
            yield training.Progress(8 * i, 800, 0.5)

    model = build(digits)
    monkeypatch.setattr(training, "fit", fake_fit)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=clock.monotonic))
    speed = training.measure_speed(model, digits, batch_size=8, lr=0.1)
    assert speed == pytest.approx(8 / step_s)
    assert len(taken) == steps
