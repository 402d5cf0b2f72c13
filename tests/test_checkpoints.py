"""mnist.search.checkpoints: names, removal, the quota, and what a failed write leaves."""

import errno
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mnist.search import checkpoints
from mnist.search.checkpoints import Checkpoints, NoRoom, QuotaExceeded

STATE = {"weights": torch.arange(1_000.0)}


def test_the_folder_of_a_study_has_its_name_and_the_start_of_its_id(tmp_path: Path) -> None:
    files = Checkpoints.of_study(tmp_path, "a/b", "0123456789")
    assert files.folder == tmp_path / "a_b-01234567"
    long = Checkpoints.of_study(tmp_path, "ü" * 300, "0123456789").folder
    assert long.name == "ü" * 60 + "-01234567"
    assert len(long.name.encode()) <= 255


def test_every_kind_of_run_has_its_own_file(tmp_path: Path) -> None:
    files = Checkpoints(tmp_path)
    paths = {
        "trial-3.pt": files.trial(3),
        "confirm-3-1.pt": files.confirmation(3, 1),
        "final-3-600.pt": files.final(3, 600),
        "final-3-600.weights.pt": files.weights(3, 600),
        "test-abc.pt": files.evaluation("abc"),
    }
    assert {path.name: path for path in paths.values()} == paths
    assert {path.parent for path in paths.values()} == {tmp_path}
    assert files.files() == []
    for path in paths.values():
        path.touch()
    assert sorted(files.files()) == sorted(paths.values())


@pytest.fixture
def study(tmp_path: Path) -> Checkpoints:
    """A study's files: of trials, of a confirmation, and what two killed processes left."""
    files = Checkpoints(tmp_path / "study")
    files.folder.mkdir()
    abandoned, in_use = (files.folder / f".trial-1.pt.{name}.tmp" for name in ("old", "new"))
    for path in (files.trial(1), files.trial(2), files.confirmation(1, 0), abandoned, in_use):
        path.touch()
    old = time.time() - checkpoints.STALE_AFTER_S - 10
    os.utime(abandoned, (old, old))
    os.utime(in_use, (old + 60, old + 60))
    os.utime(files.confirmation(1, 0), (old, old))  # age alone is no reason
    return files


def names(files: Checkpoints) -> set[str]:
    return {path.name for path in files.files()}


def test_in_an_unfinished_study_only_unneeded_files_are_removed(study: Checkpoints) -> None:
    study.remove(study.files(), needed={study.trial(2)}, finished=False)
    assert names(study) == {"trial-2.pt", "confirm-1-0.pt", ".trial-1.pt.new.tmp"}
    study.remove([], needed=(), finished=False)
    assert len(study.files()) == 3


def test_in_a_finished_study_only_needed_files_stay(study: Checkpoints) -> None:
    (study.folder / "a folder").mkdir()
    study.remove(study.files(), needed={study.trial(2)}, finished=True)
    assert names(study) == {"trial-2.pt", "a folder"}
    (study.folder / "a folder").rmdir()
    study.remove([study.trial(7), *study.files()], needed=(), finished=True)  # one is gone already
    assert not study.folder.exists()
    study.remove([], needed=(), finished=True)


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (NoRoom("no room under --disk-quota"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("No space left on device"), False),
    ],
)
def test_a_full_disk_is_distinguished_from_other_errors(error: Exception, is_full: bool) -> None:
    assert checkpoints.is_disk_full(error) == is_full


def test_a_file_that_just_fits_under_the_quota_is_written(tmp_path: Path) -> None:
    path = tmp_path / "all" / "study" / "trial-0.pt"
    checkpoints.save(STATE, path)
    size = path.stat().st_size
    other = path.with_name("trial-1.pt")
    with pytest.raises(QuotaExceeded, match=r"no room for .*trial-1\.pt under --disk-quota"):
        checkpoints.save(STATE, other, quota=2 * size - 1)
    assert not other.exists()
    checkpoints.save(STATE, other, quota=2 * size)
    for saved in (path, other):
        loaded = checkpoints.load(saved)
        assert loaded is not None
        assert torch.equal(loaded["weights"], STATE["weights"])


def test_processes_with_a_quota_write_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks: list[Path] = []
    real = checkpoints.FileLock
    monkeypatch.setattr(checkpoints, "FileLock", lambda path: locks.append(path) or real(path))
    checkpoints.save(STATE, tmp_path / "study" / "one.pt")
    assert locks == []
    checkpoints.save(STATE, tmp_path / "study" / "two.pt", quota=10**6)
    assert locks == [tmp_path / "study" / ".lock"]  # all processes name the same file


def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "trial-0.pt"
    checkpoints.save({"step": 1}, path)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save({"step": 2}, path)
    assert checkpoints.load(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoints.load(None) is None
    assert checkpoints.load(tmp_path / "none.pt") is None


@pytest.mark.parametrize(
    ("quota", "expected"), [(None, 500), (1_000, 500), (450, 150), (100, -200)]
)
def test_free_bytes_are_bounded_by_the_disk_and_by_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: int | None, expected: int
) -> None:
    def disk_usage(folder: Path) -> Any:
        assert folder.exists()
        return SimpleNamespace(free=500)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    for name in ("one", "two"):  # the quota is that of all studies
        (tmp_path / name / "deeper").mkdir(parents=True)
    (tmp_path / "one" / "a.pt").write_bytes(bytes(100))
    (tmp_path / "two" / "deeper" / "b.pt").write_bytes(bytes(200))
    assert checkpoints.free_bytes(tmp_path / "one", quota) == expected
