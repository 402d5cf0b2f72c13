"""Reading many pictures: with the time left in sight, and only once."""

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
from rich.progress import track

from mnist import images as pictures

PLAIN_EVERY_S = 5.0

Arrays = tuple[np.ndarray, ...]
"""Images and labels, and whatever else is to be remembered with them."""
T = TypeVar("T")


def shown(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, with a bar on standard error; without a terminal, a line now and then."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        yield from track(items, what, console=console, transient=True)
        return
    last = time.monotonic()
    for i, item in enumerate(items):
        if time.monotonic() - last > PLAIN_EVERY_S:
            last = time.monotonic()
            console.print(f"{what}: {i:,} of {len(items):,}", soft_wrap=True)
        yield item


def remembered(
    path: Path, origin: Iterable[Path], settings: object, make: Callable[[], Arrays]
) -> Arrays:
    """Arrays as `make` gives them, or as an earlier call kept them in the file `path`.

    That is: while the files they are made from (`origin`), the settings and mnist/images.py are
    the same. Where the file cannot be written, nothing is kept.
    """
    key = hashlib.sha256(Path(pictures.__file__).read_bytes() + repr(settings).encode())
    for each in origin:
        status = each.stat()
        key.update(os.fsencode(each) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    # A damaged file may raise anything: OSError, ValueError, zipfile.BadZipFile, zlib.error.
    with contextlib.suppress(Exception), np.load(path) as kept:
        if str(kept["key"]) == key.hexdigest():
            return tuple(kept[f"arr_{i}"] for i in range(len(kept.files) - 1))
    made = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as temporary:
            new = Path(temporary) / "new.npz"
            np.savez(new, *made, key=key.hexdigest())
            new.replace(path)
    return made
