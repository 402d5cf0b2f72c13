"""Corrected pictures, stored as a folder data set: one subfolder for each class."""

import hashlib
from pathlib import Path

from mnist import disk, images


class Full(Exception):
    """The folder is at its limit."""


def keep(folder: Path, max_bytes: int, picture: bytes, label: str, max_pixels: int) -> Path:
    """Keep the picture's bytes under `label`, one of the model's classes; returns the path.

    The same picture is kept once, under the last label. `run.py --dataset folder:FOLDER` trains on
    the folder. Raises images.ImageError if the bytes are not a picture, Full if the folder would
    exceed `max_bytes`, OSError if it cannot be written to.
    """
    from filelock import FileLock  # most servers keep no corrections, and start faster without it

    images.normalise(picture, recipe="plain", max_pixels=max_pixels)
    extension = images.read_header(picture).format.lower()
    name = f"{hashlib.sha256(picture).hexdigest()[:24]}.{extension}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / label.replace("/", "-").lstrip(".") / name
    with FileLock(folder / ".lock"):  # for all threads and processes
        if path.exists():
            return path
        path.parent.mkdir(exist_ok=True)
        if former := next(folder.glob(f"*/{name}"), None):  # under another label
            return former.replace(path)
        used_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if used_bytes + len(picture) > max_bytes:
            raise Full(f"{folder} would hold over {max_bytes} bytes (FEEDBACK_MAX_BYTES)")
        disk.replace_file(path, picture)
    return path
