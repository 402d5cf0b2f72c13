"""Networks and data sets of one's own: a Python file that adds them to models and data."""

import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path


class OwnError(RuntimeError):
    """A file of one's own that cannot be used."""


def load(path: Path) -> None:
    """Run the file, which may add to `models.NETWORKS` and `data.DATASETS`. Raises OwnError."""
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise OwnError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # somebody else's code may raise anything
        line = error.__traceback__ and _line(error, path)
        where = f", line {line}" if line else ""
        reason = (str(error).strip().splitlines() or [""])[0]
        raise OwnError(f"{path}{where}: {type(error).__name__}: {reason}") from error


def made(thing: object) -> bool:
    """Whether a network or a reader of data is of somebody's own, and none of this project's."""
    return thing is not None and not getattr(thing, "__module__", "").startswith("mnist.")


def digest(paths: Iterable[Path]) -> str:
    """A word that changes with what is in the files; nothing where there are none."""
    content = b"".join(path.read_bytes() for path in paths)
    return f" of {hashlib.sha256(content).hexdigest()[:16]}" if content else ""


def _line(error: Exception, path: Path) -> int | None:
    """The last line of the file that ran."""
    found, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(path):
            found = step.tb_lineno
        step = step.tb_next
    return found
