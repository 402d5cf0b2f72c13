"""The files of a study's runs: their names, writing, reading, the quota, and their removal."""

import contextlib
import errno
import io
import logging
import shutil
import stat
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from mnist import disk

STALE_AFTER_S = 600  # age at which a temporary file is abandoned; writing one takes seconds
MAX_NAME = 60  # letters of a study's name in that of its folder: with UTF-8 at most 240 bytes

log = logging.getLogger(__name__)


class QuotaExceeded(Exception):
    """A file would exceed --disk-quota."""


class NoRoom(OSError):
    """The disk or --disk-quota has no room for a file that the command needs."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error is a full disk's, so that the same action succeeds when there is room."""
    return isinstance(error, NoRoom) or (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    )


@dataclass(frozen=True)
class Checkpoints:
    """The files of one study, in `folder`; its parent has those of all studies."""

    folder: Path

    @classmethod
    def of_study(cls, artifacts: Path, name: str, study_id: str) -> "Checkpoints":
        """Those of a study, in a folder of `artifacts` with a part of its name and its id."""
        name = name.replace("/", "_")[:MAX_NAME]  # no path, and not too long for a file system
        return cls(artifacts / f"{name}-{study_id[:8]}")

    def trial(self, number: int | str) -> Path:
        return self.folder / f"trial-{number}.pt"

    def confirmation(self, number: int, i: int) -> Path:
        return self.folder / f"confirm-{number}-{i}.pt"

    def final(self, number: int, samples: int) -> Path:
        return self.folder / f"final-{number}-{samples}.pt"

    def weights(self, number: int, samples: int) -> Path:
        """The result of the final training."""
        return self.final(number, samples).with_suffix(".weights.pt")

    def evaluation(self, digest: str) -> Path:
        """The predictions of a final model, whose files have this digest, on the test split."""
        return self.folder / f"test-{digest}.pt"

    def files(self) -> list[Path]:
        return list(self.folder.glob("*"))

    def remove(self, files: Iterable[Path], needed: Container[Path], finished: bool) -> None:
        """Remove `files` that are not `needed`: those of trials, and temporary files of killed
        processes. Of a `finished` study, remove all that are not needed."""
        for path in files:
            with contextlib.suppress(OSError):  # another process removed it, or it is a folder
                stale = path.suffix == ".tmp" and time.time() - path.stat().st_mtime > STALE_AFTER_S
                of_trial = path.match(self.trial("*").name)
                if path not in needed and (finished or stale or of_trial):
                    path.unlink()
        if finished:
            with contextlib.suppress(OSError):  # a file is needed, or the folder does not exist
                self.folder.rmdir()


def save(state: dict[str, Any], path: Path, quota: int | None = None) -> None:
    """Write tensors to a file by rename, in place of its old content.

    Raises QuotaExceeded where the folder above `path.parent`, which has the files of all studies,
    would exceed `quota` bytes while both old and new content exist.
    """
    content = io.BytesIO()
    torch.save(state, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    # With a quota, only one process writes at a time: two must not count on the same space.
    with contextlib.nullcontext() if quota is None else FileLock(path.parent / ".lock"):
        if quota is not None:
            for stale in path.parent.glob(".*.tmp"):  # of killed processes
                stale.unlink(missing_ok=True)
            if used_bytes(path.parent.parent) + content.getbuffer().nbytes > quota:
                raise QuotaExceeded(f"no room for {path} under --disk-quota")
        disk.replace_file(path, content.getbuffer())


def load(path: Path | None) -> dict[str, Any] | None:
    """The tensors that save() wrote; None where there are none or they are damaged."""
    if path is None or not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged file may raise anything
        log.warning("checkpoint %s cannot be read (%s); beginning again", path, error)
        return None


def used_bytes(folder: Path) -> int:
    """Bytes of all files in the folder and below."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process renamed or removed it
            status = path.stat()
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0  # no folders
    return total


def free_bytes(folder: Path, quota: int | None) -> int:
    """Bytes that can be written to a study's folder: free on its disk, and under the quota."""
    free = shutil.disk_usage(folder).free
    return free if quota is None else min(free, quota - used_bytes(folder.parent))
