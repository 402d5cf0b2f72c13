"""mnist.job: what is left of a study when it is finished."""

from pathlib import Path

import optuna
import pytest

from tests.conftest import SHORT, Command

pytestmark = pytest.mark.usefixtures("blank_pictures")


def test_of_a_finished_study_only_checkpoints_of_trials_that_wait_are_left(
    run: Command, tmp_path: Path
) -> None:
    assert run(*SHORT).returncode == 0
    assert list((tmp_path / "artifacts").glob("*/*.pt")) == []
    storage = f"sqlite:///{tmp_path}/db.sqlite3"
    study = optuna.load_study(study_name=None, storage=storage)
    study.enqueue_trial({"lr": 0.01, "batch_size": 50, "optimizer": "Adam"})
    folder = tmp_path / "artifacts" / f"{study.study_name}-{study.user_attrs['id'][:8]}"
    folder.mkdir()
    for name in ("trial-0.pt", "trial-1.pt", "final-0-1200.pt", ".trial-1.pt.7.tmp"):
        (folder / name).touch()
    assert run(*SHORT).returncode == 0
    assert [path.name for path in folder.iterdir()] == ["trial-1.pt"]
    (folder / "trial-1.pt").unlink()
    assert run(*SHORT).returncode == 0
    assert not folder.exists()
