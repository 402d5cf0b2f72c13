"""Pictures that people have put right, as a folder data set: one sub-folder for each class."""

import hashlib
import io
from pathlib import Path

from PIL import Image

from mnist import images


class Full(Exception):
    """The folder holds as much as it may."""


def keep(folder: Path, most_bytes: int, picture: bytes, label: str, max_pixels: int) -> Path:
    """Keep the picture's bytes under `label`, one of the model's classes; returns the path.

    The same picture is kept once, under the label that came last. `run.py --dataset folder:FOLDER`
    trains on what is there. Raises images.ImageError where it is no picture, Full where the folder
    would exceed `most_bytes`.
    """
    from filelock import FileLock  # most servers keep none, and start faster without

    images.normalise(picture, recipe="plain", max_pixels=max_pixels)
    with Image.open(io.BytesIO(picture), formats=images.FORMATS) as image:
        ending = (image.format or "").lower()
    name = f"{hashlib.sha256(picture).hexdigest()[:24]}.{ending}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / label.replace("/", "-").lstrip(".") / name
    with FileLock(folder / ".lock"):  # of all threads and processes
        if path.exists():
            return path
        path.parent.mkdir(exist_ok=True)
        if former := next(folder.glob(f"*/{name}"), None):  # under another label
            return former.replace(path)
        used = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
        if used + len(picture) > most_bytes:
            raise Full(f"{folder} would hold over {most_bytes} bytes (FEEDBACK_MAX_BYTES)")
        temporary = path.with_name(f".{name}")
        temporary.write_bytes(picture)
        temporary.replace(path)
    return path
