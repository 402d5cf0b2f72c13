"""deploy/sagemaker/train.py: a job's hyperparameters as options, and its copy of the study."""

import contextlib
import importlib.util
import sqlite3
from pathlib import Path
from types import ModuleType

import pytest

from mnist.job.options import Options, make_command
from tests.conftest import ROOT


@pytest.fixture
def train() -> ModuleType:
    path = ROOT / "deploy/sagemaker/train.py"
    spec = importlib.util.spec_from_file_location("sagemaker_train", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hyperparameters_of_a_job_are_options_or_entries_of_the_space(
    train: ModuleType, tmp_path: Path
) -> None:
    parsed: list[Options] = []
    command = make_command(parsed.extend)
    job = {"trials": 4, "quick": True, "plain": False, "model": ["linear"], "train_samples": 500}
    space = {"lr": 0.001, "batch_size": "int:32:64"}
    arguments = train.make_options(job | space, str(tmp_path))
    command.main(arguments, standalone_mode=False)
    (options,) = parsed
    assert options.dataset == f"folder:{tmp_path}"
    assert (options.trials, options.quick, options.plain) == (4, True, False)
    assert (options.model, options.train_samples) == ("linear", 500)
    assert options.param == ("lr=0.001", "batch_size=int:32:64")
    job = {"dataset": "fashion", "augment": "none"}  # an option, though also a hyperparameter
    command.main(train.make_options(job, str(tmp_path)), standalone_mode=False)
    assert (parsed[1].dataset, parsed[1].data_dir) == ("fashion", tmp_path)
    assert (parsed[1].augment, parsed[1].param) == ("none", ())


def test_the_copy_of_a_study_has_no_half_transaction(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "CHECKPOINTS", tmp_path / "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    database = tmp_path / "db.sqlite3"
    train.save_study(database)  # nothing yet
    with contextlib.closing(sqlite3.connect(database)) as writer:
        writer.execute("PRAGMA journal_mode=WAL")  # the row is not in the file yet
        writer.execute("CREATE TABLE t (x)")
        writer.execute("INSERT INTO t VALUES (1)")
        writer.commit()
        writer.execute("INSERT INTO t VALUES (2)")
        train.save_study(database)
    with contextlib.closing(sqlite3.connect(tmp_path / "checkpoints/db.sqlite3")) as copy:
        assert copy.execute("SELECT x FROM t").fetchall() == [(1,)]
