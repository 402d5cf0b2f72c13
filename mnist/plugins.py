"""Plugins: Python files that register networks and data sets (--import)."""

import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path


class PluginError(RuntimeError):
    """A plugin that cannot be loaded."""


def load(path: Path) -> None:
    """Run a plugin, which may add to `models.NETWORKS` and `data.DATASETS`. Raises PluginError."""
    spec = importlib.util.spec_from_file_location(f"plugin_{path.stem}", path)
    if spec is None or spec.loader is None or path.suffix != ".py":
        raise PluginError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a plugin may raise anything
        line = error.__traceback__ and _find_line(error, path)
        position = f", line {line}" if line else ""
        reason = (str(error).strip().splitlines() or [""])[0]
        raise PluginError(f"{path}{position}: {type(error).__name__}: {reason}") from error


def is_from_plugin(component: object) -> bool:
    """Whether a plugin defines this network or data reader."""
    return component is not None and not getattr(component, "__module__", "").startswith("mnist.")


def digest(paths: Iterable[Path]) -> str:
    """A suffix with a hash of the plugins' content; empty without plugins."""
    content = b"".join(path.read_bytes() for path in paths)
    return f" of {hashlib.sha256(content).hexdigest()[:16]}" if content else ""


def read_source(path: Path) -> str:
    """The text of a plugin, in the encoding that it declares."""
    return importlib.util.decode_source(path.read_bytes())


def _find_line(error: BaseException, path: Path) -> int | None:
    """The number of the last line of `path` in the traceback."""
    number, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(path):
            number = step.tb_lineno
        step = step.tb_next
    return number
