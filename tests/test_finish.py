"""mnist.finish: one final model of a study, and the test split opened once."""

import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist import data, display, finish, models, registry, search, training
from tests.conftest import DIGITS, Command

pytestmark = pytest.mark.usefixtures("blank_pictures")

SHORT = [*DIGITS, "--trials", "1", "--confirm", "0", "--epochs", "0.5", "--final-epochs", "1"]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened to the test split."""
    seen: list[str] = []
    evaluate = finish.evaluate

    def watched(job: finish.Job, *rest: Any) -> dict[str, torch.Tensor]:
        def open_test() -> data.Split:
            seen.append("opened")
            return job.dataset.open_test()

        return evaluate(replace(job, dataset=replace(job.dataset, open_test=open_test)), *rest)

    monkeypatch.setattr(finish, "evaluate", watched)
    return seen


def test_who_was_replaced_while_it_exported_does_not_open_the_test_split(
    run: Command, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = finish.replaced

    def replaced(job: finish.Job) -> bool:
        opened.append("asked")
        return opened == ["asked"] or real(job)  # the first time it was; then it finishes again

    monkeypatch.setattr(finish, "replaced", replaced)
    done = run(*SHORT)
    assert done.returncode == 0, done.stderr
    assert opened == ["asked", "asked", "opened", "asked"]
    assert len(registry.read(tmp_path / "saved_models")["models"]) == 1


def test_the_final_training_leaves_time_for_the_layers_of_low_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = search.Plan(1000, 1.0, final_s=600.0, images_per_s=100.0, confirm_s=20.0)

    def job(passed_s: float, **chosen: Any) -> Any:
        given = {"final_epochs": None, "timeout": None, "quick": False} | chosen
        monkeypatch.setattr(finish.time, "monotonic", lambda: passed_s)
        options = types.SimpleNamespace(**given)
        return types.SimpleNamespace(options=options, plan=plan, start=0.0, total_s=1000.0)

    share = 1 + finish.LOWERED_SHARE
    assert finish.final_s(job(400)) == pytest.approx(600 / share)
    assert finish.final_s(job(400, quick=True)) == pytest.approx(600)
    assert finish.final_s(job(0, timeout=500)) == pytest.approx(0.7 * 500 / share)
    rest_s = finish.Job.rest_s.fget(job(0))  # type: ignore[attr-defined]
    assert rest_s == pytest.approx(20 + 600 * share)


def test_the_time_left_has_what_comes_after_a_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display, "PLAIN_EVERY_S", -1.0)
    half: Any = types.SimpleNamespace(samples=50, total=100, loss=0.5)
    for after, left in ((0.0, "about 50 s left"), (0.3, "about 80 s left")):
        display.Display(1, 1.0, 1.0, []).training("final", half, 100.0, after)
        assert left in capsys.readouterr().err


def test_without_room_for_its_result_the_test_split_stays_closed(
    run: Command, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(finish.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1_000_000))
        done = run(*SHORT)
    assert done.returncode == 1
    assert "no room for the evaluation" in done.stderr.splitlines()[-1]
    assert opened == []
    assert run(*SHORT).returncode == 0
    assert opened == ["opened"]


def test_a_better_model_becomes_current_and_a_worse_one_does_not(
    run: Command, tmp_path: Path
) -> None:
    found = []
    for study, lr in (("a", "1e-5"), ("b", "0.01"), ("c", "1e-5")):
        done = run(*SHORT, "--study", study, "--param", f"lr={lr}")
        assert done.returncode == 0, done.stderr
        name, record = registry.record(tmp_path / "saved_models")
        found.append((record["study"]["name"], f"{name}.pth, current" in done.stdout))
    assert found == [("a", True), ("b", True), ("b", False)]


GREEDY = """
import multiprocessing
from pathlib import Path
import torch
from mnist import models

class Greedy(models.Linear):
    def forward(self, images):
        if self.training and len(images) > 8 and multiprocessing.parent_process():
            with Path("refusals").open("a") as log:
                log.write("too large" + chr(10))
            raise torch.OutOfMemoryError("made up")
        return super().forward(images)

models.NETWORKS["greedy"] = Greedy
"""


def test_a_winner_whose_batches_were_too_large_for_the_memory_is_finished_in_parts(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.NETWORKS, "greedy", models.Linear)  # gone when the test is over
    file = tmp_path / "greedy.py"
    file.write_text(GREEDY)
    own = ["--import", str(file), "--model", "greedy", "--param", "batch_size=32"]
    done = run("--dataset", "digits", *own, *SHORT[4:])
    assert done.returncode == 0, done.stderr
    record = registry.record(tmp_path / "saved_models")[1]
    assert record["hyperparameters"]["batch_size"] == 32
    assert (tmp_path / "refusals").read_text() == "too large\n"  # by the trial, not at the end


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
    return ["--dataset", "digits", "--import", str(file), "--model", "wide", *SHORT[5:]]


def test_int8_is_of_the_model_in_low_rank_which_is_trained_once(
    run: Command, tmp_path: Path, wide: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as first:
        first.setattr(finish, "evaluate", killed)
        assert run(*wide).returncode == 130
    monkeypatch.setattr(finish.lowrank, "lower", killed)  # what was kept will do
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
    monkeypatch.setattr(finish, "CHECKPOINT_S", 0)
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
    monkeypatch.setattr(finish.training, "fit", fit)
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
        lower = finish.lower
        monkeypatch.setattr(finish, "lower", lambda job, *_: lower(replace(job, latest=0.0), *_))
    else:
        monkeypatch.setattr(finish.lowrank, "lower", fails)
    done = run(*wide)
    assert done.returncode == 0, done.stderr
    assert f"int8 goes without layers of low rank: {why}" in caplog.text
    record = registry.record(tmp_path / "saved_models")[1]
    assert record["engines"] == {"served": "onnx_int8", "left_out": {}}
    assert "full" not in record["calibration"]
