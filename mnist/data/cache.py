"""Progress while many pictures are read, and a cache of the result."""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mnist import images

PLAIN_INTERVAL_S = 5.0
_READERS = Path(images.__file__).parent  # the modules that normalise pictures

Arrays = tuple[np.ndarray, ...]
"""Images and labels, and further arrays that are cached with them."""
T = TypeVar("T")


def track_progress(items: Sequence[T], label: str) -> Iterator[T]:
    """Yield the items; shows a bar on standard error, or lines without a terminal."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        text = TextColumn("{task.description}", markup=False)  # it may have a path with brackets
        columns = (text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            yield from bar.track(items, description=label)
        return
    last_line = time.monotonic()
    for i, item in enumerate(items):
        if time.monotonic() - last_line > PLAIN_INTERVAL_S:
            last_line = time.monotonic()
            console.print(f"{label}: {i:,} of {len(items):,}", soft_wrap=True)
        yield item


def load_cached(
    path: Path, inputs: Iterable[Path], settings: object, make: Callable[[], Arrays]
) -> Arrays:
    """The arrays of `make`, or those that an earlier call stored in the file `path`.

    The cache is valid while the `inputs` that `make` reads, the settings and the modules
    that read pictures are unchanged. Where the file cannot be written, nothing is cached.
    """
    code = [module.read_bytes() for module in sorted(_READERS.glob("*.py"))]
    key = hashlib.sha256(b"".join(code) + repr(settings).encode())
    for file in inputs:
        status = file.stat()
        key.update(os.fsencode(file) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    # A damaged file may raise anything: OSError, ValueError, zipfile.BadZipFile, zlib.error.
    with contextlib.suppress(Exception), np.load(path) as cached:
        if str(cached["key"]) == key.hexdigest():
            return tuple(cached[f"arr_{i}"] for i in range(len(cached.files) - 1))
    arrays = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as temporary:
            new = Path(temporary) / "new.npz"
            np.savez(new, *arrays, key=key.hexdigest())
            new.replace(path)
    return arrays
