"""mnist.release: what is saved of a final model, and the test split opened once."""

import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist import data, models, registry, release, training
from mnist.job import Job
from tests.conftest import DIGITS, SHORT, Command

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened to the test split."""
    seen: list[str] = []
    evaluate = release.evaluate

    def watched(job: Job, *rest: Any) -> dict[str, torch.Tensor]:
        def open_test() -> data.Split:
            seen.append("opened")
            return job.dataset.open_test()

        return evaluate(replace(job, dataset=replace(job.dataset, open_test=open_test)), *rest)

    monkeypatch.setattr(release, "evaluate", watched)
    return seen


def test_who_was_replaced_while_it_exported_does_not_open_the_test_split(
    run: Command, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = release.replaced

    def replaced(job: Job) -> bool:
        opened.append("asked")
        return opened == ["asked"] or real(job)  # the first time it was; then it finishes again

    monkeypatch.setattr(release, "replaced", replaced)
    done = run(*DIGITS, *SHORT)
    assert done.returncode == 0, done.stderr
    assert opened == ["asked", "asked", "opened", "asked"]
    assert len(registry.read(tmp_path / "saved_models")["models"]) == 1


def test_without_room_for_its_result_the_test_split_stays_closed(
    run: Command, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(release.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1_000_000))
        done = run(*DIGITS, *SHORT)
    assert done.returncode == 1
    assert "no room for the evaluation" in done.stderr.splitlines()[-1]
    assert opened == []
    assert run(*DIGITS, *SHORT).returncode == 0
    assert opened == ["opened"]


def test_a_better_model_becomes_current_and_a_worse_one_does_not(
    run: Command, tmp_path: Path
) -> None:
    found = []
    for study, lr in (("a", "1e-5"), ("b", "0.01"), ("c", "1e-5")):
        done = run(*DIGITS, *SHORT, "--study", study, "--param", f"lr={lr}")
        assert done.returncode == 0, done.stderr
        name, record = registry.record(tmp_path / "saved_models")
        found.append((record["study"]["name"], f"{name}.pth, current" in done.stdout))
    assert found == [("a", True), ("b", True), ("b", False)]


WIDE = """
from torch import nn
from mnist import models

def wide(channels, size, classes):
    layers = nn.Linear(channels * size**2, 300), nn.ReLU(), nn.Linear(300, classes)
    return nn.Sequential(nn.Flatten(), *layers)

models.NETWORKS["wide"] = wide
"""


@pytest.fixture
def wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options with which a model has a layer that low rank is a gain for."""
    monkeypatch.setitem(models.NETWORKS, "wide", models.Linear)  # gone when the test is over
    file = tmp_path / "wide.py"
    file.write_text(WIDE)
    return ["--dataset", "digits", "--import", str(file), "--model", "wide", *SHORT]


def test_int8_is_of_the_model_in_low_rank_which_is_trained_once(
    run: Command, tmp_path: Path, wide: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as first:
        first.setattr(release, "evaluate", killed)
        assert run(*wide).returncode == 130
    monkeypatch.setattr(release.lowrank, "lower", killed)  # what was kept will do
    done = run(*wide)
    assert done.returncode == 0, done.stderr
    record = registry.record(tmp_path / "saved_models")[1]
    assert "full" in record["calibration"]
    files = record["files"]
    assert "full_likeness" in files
    assert files["onnx_int8"]["bytes"] < files["onnx"]["bytes"] / 5  # 8 bits alone: a quarter
    assert not list((tmp_path / "artifacts").rglob("lowered*"))
    wrong = record["metrics"]["test"]["served_errors"]
    assert f"as it is served, in onnx_int8: {wrong} errors" in done.stdout
    (page,) = (tmp_path / "saved_models").glob("*.report.html")
    assert f"As it is served, in onnx_int8, it reads {wrong} wrong." in page.read_text()


def test_a_training_on_that_was_killed_goes_on_from_its_checkpoint(
    run: Command, tmp_path: Path, wide: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "CHECKPOINT_S", 0)
    begun: list[int] = []

    def fit(*rest: Any, **options: Any) -> Iterator[training.Progress]:
        if "resume" not in options:  # the network is tried, or the machine's speed
            yield from real(*rest, **options)
            return
        begun.append((options["resume"] or {"step": 0})["step"])
        for progress in real(*rest, **options):
            yield progress
            if len(begun) == 1 and 2 * progress.samples > progress.total:
                raise KeyboardInterrupt

    real = training.fit
    monkeypatch.setattr(release.training, "fit", fit)
    assert run(*wide).returncode == 130
    assert run(*wide).returncode == 0
    first, second = begun
    assert first == 0 < second
    assert "full" in registry.record(tmp_path / "saved_models")[1]["calibration"]


@pytest.mark.parametrize("why", ["made up", "--timeout"])
def test_a_model_is_saved_without_low_rank_where_that_fails_or_takes_too_long(
    why: str,
    run: Command,
    tmp_path: Path,
    wide: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: Any) -> None:
        raise TypeError(why)

    if why == "--timeout":
        lower = release.lower
        monkeypatch.setattr(release, "lower", lambda job, *_: lower(replace(job, latest=0.0), *_))
    else:
        monkeypatch.setattr(release.lowrank, "lower", fails)
    done = run(*wide)
    assert done.returncode == 0, done.stderr
    assert f"int8 goes without layers of low rank: {why}" in caplog.text
    record = registry.record(tmp_path / "saved_models")[1]
    assert record["engines"] == {"served": "onnx_int8", "left_out": {}}
    assert "full" not in record["calibration"]
