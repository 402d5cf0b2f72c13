"""The registry (saved_models/): immutable model files and model_info.json.

`python -m mnist.registry --help`.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mnist import disk
from mnist.registry.records import DatasetEntry as DatasetEntry
from mnist.registry.records import Info, Record, find_fault, mask_storage_urls

if TYPE_CHECKING:
    from filelock import FileLock

INFO = "model_info.json"
FOLDER = Path("saved_models")
SAMPLE = Path(__file__).parents[2] / "serve" / "sample_model"  # a registry with one small model
SAMPLE_NOTE = "this is a sample model; `python run.py` makes your own"
NAME = re.compile(r"\d{8}-\d{6}(-\d+)?")
STORES = [("s3:",), ("gs:",)]  # the first parts of a URL as a path


class RegistryError(RuntimeError):
    """A registry, record or file is unusable; the message says which one and what to do."""


class UnknownModel(RegistryError):
    """The registry has no model of this name."""


def read(folder: Path) -> Info:
    """The content of model_info.json; without models where the file does not exist yet.

    Raises RegistryError like parse().
    """
    if folder.parts[:1] in STORES:
        url = str(folder).replace(":/", "://", 1)
        text = f"{url} is an object store, which only the server reads; copy it to a folder first"
        raise RegistryError(text)
    try:
        content = (folder / INFO).read_bytes()
    except FileNotFoundError:
        return {"schema": 1, "current": None, "models": {}}
    except OSError as error:
        raise RegistryError(f"{folder / INFO} cannot be read: {error}") from error
    return parse(content, str(folder / INFO))


def parse(content: bytes, source: str) -> Info:
    """The content of a model_info.json; `source` is its path or URL, for messages.

    Secrets in records of older versions are masked. Raises RegistryError where it is not JSON or
    lacks a key that readers rely on.
    """
    try:
        info = json.loads(content.decode("utf-8-sig"))  # an editor may add a mark
    except (ValueError, RecursionError) as error:
        raise RegistryError(f"{source} cannot be read: {error}") from error
    if not isinstance(info, dict) or info.get("schema") != 1:
        raise RegistryError(f"{source} is not of schema 1; a newer version wrote it")
    if location := find_fault(info):
        text = f"{source}: {location} is missing or malformed"
        raise RegistryError(f"{text}; correct it, or restore a copy")
    if info["current"] not in (None, *info["models"]):
        raise RegistryError(f"{source}: `current` names none of its models; correct it")
    mask_storage_urls(info["models"])
    return info  # type: ignore[return-value]


def default_folder() -> Path:
    """FOLDER, or SAMPLE while FOLDER has no model. Raises RegistryError like read()."""
    return FOLDER if read(FOLDER)["models"] else SAMPLE


def record(folder: Path, name: str | None = None) -> tuple[str, Record]:
    """The name and record of a model, by default the current one.

    Raises RegistryError where there is no current model, UnknownModel for an unknown name.
    """
    info = read(folder)
    name = info["current"] if name is None else name
    if name is None:
        raise RegistryError(f"no current model in {folder}; {_describe_remedy(folder, info)}")
    if not NAME.fullmatch(name) or name not in info["models"]:
        names = ", ".join(info["models"]) or "none"
        raise UnknownModel(f"no model {name!r} in {folder}; it has {names}")
    return name, info["models"][name]


def file(folder: Path, name: str, kind: str = "weights") -> Path:
    """The path of a model's file, after a check of its checksum.

    Raises RegistryError where the file is missing or altered.
    """
    entry = record(folder, name)[1]["files"][kind]
    path = folder / Path(entry["file"]).name
    try:
        with path.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise RegistryError(f"{path}: {error.strerror}; model {name} cannot be used") from error
    if actual != entry["sha256"]:
        raise RegistryError(
            f"{path} was altered: its SHA-256 is {actual}, the record says {entry['sha256']}; "
            f"`python -m mnist.registry use` another model, or restore the file"
        )
    return path


def versions(paths: Iterable[Path]) -> list[tuple[int, ...] | None]:
    """A stamp for each file that changes with it; None for a missing file."""
    stamps: list[tuple[int, ...] | None] = []
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            stamps.append(None)
        else:
            stamps.append((status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino))
    return stamps


def save(
    folder: Path, files: Mapping[str, tuple[str, bytes]], entry: Mapping[str, Any], promote: str
) -> str:
    """Save a new model; returns its name.

    `files` maps a kind ("weights") to the file's suffix (".pth") and content; `entry` is the record
    without `created`, `files` and `golden`; `promote` is "better", "always" or "never". Files are
    written first, the record last, and each gets its final name only when it is complete: a crash
    at any moment leaves the registry unchanged, and the next save removes orphaned files.
    """
    with _lock(folder):
        info = read(folder)
        _remove_orphans(folder, info)
        now = datetime.now(UTC)
        name = _new_name(folder, info, now)
        created = now.strftime("%Y-%m-%dT%H:%M:%SZ")
        model = cast("Record", {**entry, "created": created, "files": {}})
        (folder / f".{name}.tmp").touch()  # marks files without a record for _remove_orphans
        for kind, (suffix, content) in files.items():
            path = folder / f"{name}{suffix}"
            disk.replace_file(path, content)
            digest = hashlib.sha256(content).hexdigest()
            model["files"][kind] = {"file": path.name, "sha256": digest, "bytes": len(content)}
        if "golden" in files:
            model["golden"] = model["files"]["golden"]["file"]
        info["models"][name] = model
        current = info["models"][info["current"]] if info["current"] else None
        if promote == "always" or (promote == "better" and better(model, current)):
            info["current"] = name
        _write_info(folder, info)
        _remove_orphans(folder, info)
    return name


def better(new: Record, current: Record | None) -> bool:
    """Whether `new` may replace `current` as the current model.

    It may where there is no current model, or for the same data and classes if its error rate on
    the calibration split is no higher, with its weights and as served; but a --quick model never
    replaces a model without --quick.
    """
    if current is None:
        return True
    if new["quick"] and not current["quick"]:
        return False
    if any(new["dataset"][key] != current["dataset"][key] for key in ("name", "sha256", "classes")):
        return False
    a, b = (entry["metrics"]["calibration"] for entry in (new, current))
    kinds = [kind for kind in ("errors", "served_errors") if kind in a and kind in b]
    return all(a[kind] * b["n"] <= b[kind] * a["n"] for kind in kinds)


def use(folder: Path, name: str) -> None:
    """Make `name` the current model, after a check of its files."""
    with _lock(folder):
        for kind in record(folder, name)[1]["files"]:
            file(folder, name, kind)
        _write_info(folder, read(folder) | {"current": name})


def remove(folder: Path, name: str) -> None:
    """Delete a model that is not the current one: its record first, then its files."""
    with _lock(folder):
        entry = record(folder, name)[1]
        info = read(folder)
        if name == info["current"]:
            raise RegistryError(f"{name} is the current model; `use` another one first")
        del info["models"][name]
        (folder / f".{name}.tmp").touch()  # marks files without a record for _remove_orphans
        _write_info(folder, info)
        for part in entry["files"].values():
            (folder / Path(part["file"]).name).unlink(missing_ok=True)
        _remove_orphans(folder, info)


def attach_file(folder: Path, name: str, suffix: str, content: bytes) -> None:
    """Save a reproducible file next to a model; remove() deletes it, the record does not list it.

    Raises UnknownModel where the model was removed meanwhile.
    """
    with _lock(folder):
        record(folder, name)
        disk.replace_file(folder / f"{name}{suffix}", content)


def check_writable(folder: Path) -> None:
    """Raise RegistryError for a folder that save() could not write to, before the training.

    A network file system may refuse the lock alone.
    """
    try:
        with _lock(folder):
            disk.check_writable(folder)
    except OSError as error:
        raise RegistryError(f"cannot write to {folder}: {error.strerror}; see --output") from error
    read(folder)


def _describe_remedy(folder: Path, info: Info) -> str:
    """What makes a model current where there is none."""
    if not info["models"]:
        return "`python run.py` saves one"
    option = "" if folder == FOLDER else f"--folder {shlex.quote(str(folder))} "
    names = ", ".join(info["models"])
    return f"`python -m mnist.registry {option}use NAME` makes one current: {names}"


def _remove_orphans(folder: Path, info: Info) -> None:
    """Delete the files of an interrupted save or removal, which a marker file names.

    Other files without a record stay: they may be a person's, or the record may be lost.
    """
    for marker in folder.glob(".*.tmp"):
        name = marker.name[1:-4]
        if NAME.fullmatch(name) and name not in info["models"]:
            for orphan in folder.glob(f"{name}.*"):
                orphan.unlink()
        marker.unlink()


def _new_name(folder: Path, info: Info, now: datetime) -> str:
    base = now.strftime("%Y%m%d-%H%M%S")
    name, n = base, 1
    while name in info["models"] or any(folder.glob(f"{name}.*")):
        n += 1
        name = f"{base}-{n}"
    return name


def _lock(folder: Path) -> "FileLock":
    from filelock import FileLock  # imported late: the server only reads, and starts faster

    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".lock")


def _write_info(folder: Path, info: Info) -> None:
    text = json.dumps(info, indent=2, ensure_ascii=False) + "\n"
    # A path may have bytes that are no UTF-8; so written, they are JSON's own escapes.
    disk.replace_file(folder / INFO, text.encode(errors="backslashreplace"))
