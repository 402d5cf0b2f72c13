"""mnist.job.release: what is saved of a final model, and the test split opened once."""

import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist import data, metrics, models, registry
from mnist.job import release
from mnist.search import checkpoints
from tests.conftest import DIGITS, SHORT, Command

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Events of the test split."""
    events: list[str] = []
    evaluate = release.evaluate

    def evaluate_and_note(
        model: Any, dataset: data.Dataset, *arguments: Any
    ) -> dict[str, torch.Tensor]:
        def open_test() -> data.Split:
            events.append("opened")
            return dataset.open_test()

        return evaluate(model, replace(dataset, open_test=open_test), *arguments)

    monkeypatch.setattr(release, "evaluate", evaluate_and_note)
    return events


@pytest.mark.usefixtures("known_speed")
def test_a_member_replaced_during_export_does_not_open_the_test_split(
    run: Command, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = release.is_replaced

    def replaced(*arguments: Any) -> bool:
        opened.append("asked")
        # Only the first time; then the member leads again.
        return opened == ["asked"] or real(*arguments)

    monkeypatch.setattr(release, "is_replaced", replaced)
    done = run(*DIGITS, *SHORT)
    assert done.returncode == 0, done.stderr
    assert opened == ["asked", "asked", "opened", "asked"]
    assert len(registry.read(tmp_path / "saved_models")["models"]) == 1


@pytest.mark.usefixtures("known_speed")
def test_without_room_for_its_result_the_test_split_stays_closed(
    run: Command, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(
            checkpoints.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1_000_000)
        )
        done = run(*DIGITS, *SHORT)
    assert done.returncode == 1
    assert "the evaluation needs 10 MB free" in done.stderr.splitlines()[-1]
    assert opened == []
    assert run(*DIGITS, *SHORT).returncode == 0
    assert opened == ["opened"]


@pytest.mark.usefixtures("known_speed")
def test_a_better_model_becomes_current_and_a_worse_one_does_not(
    run: Command, tmp_path: Path
) -> None:
    outcomes = []
    for study, lr in (("a", "1e-5"), ("b", "0.01"), ("c", "1e-5")):
        done = run(*DIGITS, *SHORT, "--study", study, "--param", f"lr={lr}")
        assert done.returncode == 0, done.stderr
        name, record = registry.record(tmp_path / "saved_models")
        outcomes.append((record["study"]["name"], f"{name}.pth, current" in done.stdout))
    assert outcomes == [("a", True), ("b", True), ("b", False)]


def test_the_weights_are_the_plain_network_and_what_is_served_computes_the_same(
    run: Command, tmp_path: Path
) -> None:
    done = run("--dataset", "digits", "--model", "parallel", *SHORT, "--final-epochs", "2")
    assert done.returncode == 0, done.stderr
    name, record = registry.record(tmp_path / "saved_models")
    weights = torch.load(tmp_path / "saved_models" / f"{name}.pth", weights_only=True)
    plain = models.build("parallel", 1, 28, 10)
    plain.load_state_dict(weights)
    assert record["model"]["parameters"] == models.count_parameters(plain)
    assert record["training"]["form"] == "factored"
    test = record["metrics"]["test"]
    digits = data.load("digits")
    assert metrics.errors(plain, digits, digits.open_test()) == test["errors"]
    assert abs(test["served_errors"] - test["errors"]) <= 2


@pytest.mark.usefixtures("known_speed")
def test_plain_trains_the_layers_themselves(run: Command, tmp_path: Path) -> None:
    options = ["--dataset", "digits", "--model", "residual", *SHORT]
    done = run(*options, "--plain")
    assert done.returncode == 0, done.stderr
    record = registry.record(tmp_path / "saved_models")[1]
    assert record["training"]["form"] == "plain"
    other = run(*options)
    assert other.returncode == 2
    assert "layers is in their training form, in the study plain" in other.stderr
