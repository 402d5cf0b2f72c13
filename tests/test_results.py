"""mnist.job.results: the files that a finished study leaves."""

import os
import time
import types
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from mnist.job import results
from mnist.job.options import Options
from mnist.search import checkpoints
from tests.conftest import DIGITS, SHORT, Command

pytestmark = pytest.mark.usefixtures("blank_pictures", "known_speed")


def test_a_finished_study_leaves_only_checkpoints_of_waiting_trials(
    run: Command, tmp_path: Path
) -> None:
    assert run(*DIGITS, *SHORT).returncode == 0
    assert list((tmp_path / "artifacts").glob("*/*.pt")) == []
    storage = f"sqlite:///{tmp_path}/db.sqlite3"
    study = optuna.load_study(study_name=None, storage=storage)
    study.enqueue_trial({"lr": 0.01, "batch_size": 50, "optimizer": "Adam"})
    folder = tmp_path / "artifacts" / f"{study.study_name}-{study.user_attrs['id'][:8]}"
    folder.mkdir()
    for name in ("trial-0.pt", "trial-1.pt", "final-0-1200.pt", ".trial-1.pt.7.tmp"):
        (folder / name).touch()
    assert run(*DIGITS, *SHORT).returncode == 0
    assert [path.name for path in folder.iterdir()] == ["trial-1.pt"]
    (folder / "trial-1.pt").unlink()
    assert run(*DIGITS, *SHORT).returncode == 0
    assert not folder.exists()


@pytest.mark.parametrize("result", [None, {"name": "it"}])
def test_files_that_a_living_member_may_need_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: dict[str, Any] | None
) -> None:
    states = (TrialState.COMPLETE, TrialState.RUNNING)
    trials = [types.SimpleNamespace(number=i, state=state) for i, state in enumerate(states)]
    names = ["trial-0.pt", "trial-1.pt", "final-0-1200.pt", ".trial-1.pt.7.tmp", ".old.pt.8.tmp"]
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / ".old.pt.8.tmp", (0, time.time() - 2 * checkpoints.STALE_AFTER_S))
    monkeypatch.setattr(results, "find_result", lambda *_: result)
    member: Any = types.SimpleNamespace(run_locked=lambda _: trials)
    results.remove_stale_files(member, Options(), checkpoints.Checkpoints(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:4]}
