"""Trackers beside a search: what they get, and that they can neither stop nor delay it."""

import importlib.util
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from mnist.job import trackers, tracking
from mnist.job.trackers import Entry, Package
from tests.conftest import DIGITS, SHORT, Command

pytestmark = pytest.mark.usefixtures("blank_pictures")


class Fake:
    """A tracker that keeps entries; `error` and `gate` make it fail or wait."""

    entries: list[Entry]
    error: Exception | None
    gate: threading.Event

    def __init__(self, folder: Path) -> None:
        pass

    def log(self, entry: Entry) -> None:
        self.gate.wait()
        if self.error:
            raise self.error
        self.entries.append(entry)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Fake]]:
    Fake.entries, Fake.error, Fake.gate = [], None, threading.Event()
    Fake.gate.set()
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Package(Fake, "json", "json"))
    yield Fake
    Fake.gate.set()


def test_a_tracker_gets_each_trial_with_its_curve_and_the_model_with_its_files(
    run: Command, fake: type[Fake], tmp_path: Path
) -> None:
    done = run(*DIGITS, *SHORT, "--trials", "2", "--track", "tensorboard")
    assert done.returncode == 0, done.stderr
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/db.sqlite3")
    *trials, model = fake.entries
    assert [entry.name for entry in trials] == ["trial 0", "trial 1"]
    for entry, trial in zip(trials, study.trials, strict=True):
        assert entry.params == trial.params
        assert entry.curve == trial.intermediate_values
        assert entry.state == trial.state.name.lower()
        assert entry.metrics == {"accuracy": trial.value}
    assert {path.suffix for path in model.files} >= {".pth", ".onnx"}
    assert all(path.exists() for path in model.files)
    assert model.metrics["test_errors"] == model.record["metrics"]["test"]["errors"]


def test_a_finished_study_is_logged_when_a_tracker_is_asked_for(
    run: Command, fake: type[Fake]
) -> None:
    run(*DIGITS, *SHORT)
    assert not fake.entries
    assert run(*DIGITS, *SHORT, "--track", "tensorboard").returncode == 0
    assert [entry.name.split()[0] for entry in fake.entries] == ["trial", "model"]


def test_a_tracker_that_raises_is_one_warning(
    run: Command, fake: type[Fake], caplog: pytest.LogCaptureFixture
) -> None:
    fake.error = ConnectionError("no route to postgresql://me:secret@host\nsecond line")
    with caplog.at_level(logging.WARNING):
        done = run(*DIGITS, *SHORT, "--track", "tensorboard")
    assert done.returncode == 0
    assert "model: saved_models/" in done.stdout
    assert [record.getMessage() for record in caplog.records] == [
        "--track tensorboard: no route to postgresql://***@host; "
        "the search is not affected; the same command logs what is missing"
    ]


def test_a_tracker_that_hangs_does_not_hold_the_search(
    run: Command,
    fake: type[Fake],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake.gate.clear()
    monkeypatch.setattr(tracking, "FLUSH_S", 0.1)
    done = run(*DIGITS, *SHORT, "--track", "tensorboard")
    assert done.returncode == 0
    assert "model: saved_models/" in done.stdout
    assert "is not done after" in caplog.text
    assert not fake.entries


def test_a_missing_package_is_named_with_its_command(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = run(*DIGITS, "--track", "mlflow")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"pip install {trackers.TRACKERS['mlflow'].requirement}" in done.stderr


def test_of_several_members_one_logs_a_trial() -> None:
    study = optuna.create_study()
    states: dict[str | None, Any] = {"a": TrialState.COMPLETE, "b": TrialState.PRUNED}
    states |= {"gone": TrialState.COMPLETE, None: TrialState.FAIL}
    for owner, state in states.items():
        attrs = {"run": {"by": owner}} if owner else {}
        value = 0.5 if state == TrialState.COMPLETE else None
        study.add_trial(create_trial(state=state, value=value, user_attrs=attrs))
    study.add_trial(create_trial(state=TrialState.WAITING))
    study.set_user_attr("members", {"a": {}, "b": {}})
    by_member = {
        member: [trial.number for trial in tracking.find_trials(study, member)] for member in "ab"
    }
    assert by_member == {"a": [0, 2, 3], "b": [1]}
