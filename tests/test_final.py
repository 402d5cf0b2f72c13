"""mnist.job.final: one final model of a study, trained as its winner."""

import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist import models, registry
from mnist.job import display
from mnist.job import final as final_training
from mnist.job.clock import Clock
from mnist.job.final import FinalTraining
from mnist.job.options import Options
from mnist.search import budget, checkpoints, loop
from mnist.search.checkpoints import Checkpoints
from mnist.search.members import Member
from mnist.search.runs import Run, StudyConfig
from tests.conftest import DIGITS, SHORT, Command

pytestmark = pytest.mark.usefixtures("blank_pictures")


def test_the_remaining_time_includes_the_steps_after_a_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display, "PLAIN_INTERVAL_S", -1.0)
    half: Any = types.SimpleNamespace(samples=50, total=100, loss=0.5)
    for after, left in ((0.0, "about 50 s left"), (30.0, "about 80 s left")):
        plan = budget.Plan(1, 1.0, 1.0, 1.0)
        display.Display(1, plan, [], Clock(0.0)).show_training("final", half, 100.0, after)
        assert left in capsys.readouterr().err
    whole: Any = types.SimpleNamespace(samples=100, total=100, loss=0.5)  # after its checkpoint
    display.Display(1, plan, [], Clock(0.0)).show_training("final", whole, 100.0, 30.0)
    assert "about 30 s left" in capsys.readouterr().err
    clock = Clock(0.0, deadline=time.monotonic() + 20.0)
    display.Display(1, plan, [], clock).show_training("final", half, 100.0, 30.0)
    assert "about 20 s left" in capsys.readouterr().err  # --timeout ends it


def test_an_interrupted_final_training_keeps_its_number_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    affordable = iter([5_000, 7_000])
    monkeypatch.setattr(FinalTraining, "_affordable_samples", lambda *_: next(affordable))
    config = StudyConfig("linear", 0, 600, Checkpoints(tmp_path))
    best: Any = types.SimpleNamespace(number=3)
    unused: Any = None
    with Member(f"sqlite:///{tmp_path}/db.sqlite3", "study", threads=1) as member:
        final = FinalTraining(member, unused, unused, Options(), config, unused, unused, 1_000)
        assert final._choose_samples(best) == 5_000
        assert final._choose_samples(best) == 7_000  # it had no checkpoint yet
        config.checkpoints.final(3, 7_000).touch()
        assert final._choose_samples(best) == 7_000


def test_the_length_of_a_new_final_training_follows_its_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FinalTraining, "_affordable_samples", lambda *_: 30_000)
    config = StudyConfig("linear", 0, 600, Checkpoints(tmp_path))
    best: Any = types.SimpleNamespace(number=3, params={}, user_attrs={})
    plan = budget.Plan(600, 1.0, 100.0, 300.0, release_s=20.0, total_s=200.0)
    clock, unused = Clock(time.monotonic() - 90), Any
    with Member(f"sqlite:///{tmp_path}/db.sqlite3", "study", threads=1) as member:
        final = FinalTraining(member, unused, unused, Options(), config, plan, clock, 1_000)
        pace = final._make_run(best).pace
        assert pace is not None
        assert (pace.least, pace.most) == (22_500, 45_000)
        assert pace.deadline == pytest.approx(time.monotonic() + 90, abs=60)
        config.checkpoints.final(3, 30_000).touch()
        assert final._make_run(best).pace is None  # its length is in the checkpoint
        fixed = replace(final, options=Options(final_epochs=40.0))
        assert fixed._make_run(best).pace is None


def test_a_finished_final_training_is_used_if_its_length_is_known(tmp_path: Path) -> None:
    config = StudyConfig("linear", 0, 600, Checkpoints(tmp_path))
    run = Run.for_final(config, 3, {}, 5_000)
    assert run.weights is not None
    weights = {"output.bias": torch.zeros(10)}
    assert final_training._load_trained(run) is None
    checkpoints.save(weights, run.weights)  # as an old version did
    assert final_training._load_trained(run) is None
    checkpoints.save({"weights": weights, "samples": 4_800}, run.weights)
    trained = final_training._load_trained(run)
    assert trained is not None
    assert trained["samples"] == 4_800


def test_a_timeout_ends_the_confirmations_in_time_for_the_final_model(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*DIGITS, *SHORT, "--confirm", "1", "--timeout", "1h"]
    confirmed: list[Any] = []
    record_confirmation = loop.record_confirmation

    def record(*args: Any) -> None:
        record_confirmation(*args)
        confirmed.append(args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "record_confirmation", record)
        patch.setattr(Clock, "elapsed_s", property(lambda _: 2_800 if confirmed else 1))
        done = run(*options)
    assert done.returncode == 0, done.stderr
    line = "--timeout: 1 of 2 confirmations are finished; the final model is made without them"
    assert done.stderr.count(line) == 1
    names = list(registry.read(tmp_path / "saved_models")["models"])
    assert len(names) == 1
    again = run(*options)
    assert (again.returncode, again.stderr) == (0, "")
    assert list(registry.read(tmp_path / "saved_models")["models"]) == names


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
    plugin = ["--import", str(file), "--model", "greedy", "--param", "batch_size=32"]
    done = run("--dataset", "digits", *plugin, "--quick", *SHORT)
    assert done.returncode == 0, done.stderr
    record = registry.record(tmp_path / "saved_models")[1]
    assert record["hyperparameters"]["batch_size"] == 32
    # Twice when the speed was measured, then by the trial; not at the end.
    assert (tmp_path / "refusals").read_text() == 3 * "too large\n"
