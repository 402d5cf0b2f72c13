"""A folder of pictures as a data set: one sub-folder for each class."""

import contextlib
import functools
import hashlib
import logging
import multiprocessing
import os
import statistics
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from mnist import images as pictures
from mnist.files import DataError
from mnist.reading import Arrays, remembered, shown
from mnist.sources import TEST, Source
from mnist.splits import cut

SIZE = 28  # side in pixels, unless --image-size says otherwise: MNIST's
LEAST = 10  # pictures of a class: one or two for each split, the rest to learn from
BROKEN = 0.5  # share of a class's files; with more that cannot be read, something else is wrong
UNBALANCED = 20  # times as many pictures of one class as of another: then the rare one is not seen
FAR_LARGER = 4  # times the side of what is read: then what is narrower than 4 pixels fades
COLOURFUL = 0.05  # mean difference (0..1) of a pixel's channels: above the tint of a grey scan
SAMPLE = 100  # pictures that are looked at for a warning
NAMED = 5  # files at most that a warning names
WHY = {"blank": "of one colour", "too_many_pixels": "too large"}  # an ImageError's code, in words

log = logging.getLogger(__name__)

Labelled = list[tuple[Path, int]]


def source(path: Path, size: int = SIZE, channels: int = 1) -> Source:
    """The pictures under `path`; classes are called as their folders, sorted.

    Where `path` has train/ and test/ with the classes' folders in each, they are that; else a
    stratified seventh becomes the test split. Pictures are read by images.normalise, recipe
    "plain", at size x size pixels, grey or (3 channels) in RGB; files and folders whose name begins
    with a dot are left out. Raises DataError, here or when it is read, that says what to change.
    """
    if not path.is_dir():
        raise DataError(f"there is no folder {path}")
    halves = {part: path / part for part in ("train", "test")}
    own_test = all(_folders(half) for half in halves.values())
    if not own_test and _folders(halves["train"]):
        raise DataError(
            f"{path} has a train/ with classes but no test/ with the same ones; make one (or give "
            f"that name to another part), or put the classes' folders right into {path}"
        )
    if own_test and (unused := sorted(set(_folders(path)) - set(halves))):
        _warn(f"{path}: only train/ and test/ are used, not {', '.join(unused)}")
    classes = _classes(halves["train"] if own_test else path)
    if own_test and (differ := set(classes) ^ set(_folders(halves["test"]))):
        names = ", ".join(sorted(differ))
        raise DataError(
            f"{path}: train/ and test/ must have the same classes; only one has {names}"
        )

    def read_all(data_dir: Path, root: Path, least: int) -> Arrays:
        files = _files(root, classes)
        _enough(root, classes, [label for _, label in files], least)
        place = hashlib.sha256(str(root).encode()).hexdigest()[:8]
        kept = data_dir / "folders" / f"{path.name}-{place}-{size}x{channels}.npz"
        names = [file for file, _ in files]
        images, labels, notes = remembered(
            kept,
            names,
            (classes, size, channels),
            lambda: _read(root, classes, files, size, channels, least),
        )
        for note in [*_overlooked(root, classes), *notes.tolist()]:
            _warn(note)
        return images, labels

    def read(data_dir: Path, part: str) -> Arrays:
        if own_test:
            if part == "train":  # a fault that shows at the end would cost all of it
                read_all(data_dir, halves["test"], 1)
            return read_all(data_dir, halves[part], LEAST if part == "train" else 1)
        images, labels = read_all(data_dir, path, LEAST)
        train, test = cut(np.arange(len(labels)), labels, TEST)
        index = train if part == "train" else test
        return images[index], labels[index]

    return Source(read, classes)


@functools.cache  # once for each text: train and test may be read from the same files
def _warn(text: str) -> None:
    if multiprocessing.parent_process() is None:  # workers read the same pictures
        log.warning("%s", text)


def _folders(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(each.name for each in path.iterdir() if each.is_dir() and each.name[0] != ".")


def _classes(path: Path) -> tuple[str, ...]:
    names = _folders(path)
    if not names:
        example = path / "cat" / "1.png"
        raise DataError(f"{path} has no class folders; put each class into one, such as {example}")
    if odd := [name for name in names if "\ufffd" in os.fsencode(name).decode(errors="replace")]:
        raise DataError(f"{path}: the folder {odd[0]!r} has a name that is not UTF-8; rename it")
    if len(names) == 1:
        inner = path / names[0]
        hint = f"; are the classes those in {inner}?" if len(_folders(inner)) > 1 else ""
        raise DataError(f"{path} has only one class, {names[0]!r}; at least two are needed{hint}")
    return tuple(names)


def _files(root: Path, classes: tuple[str, ...]) -> Labelled:
    return [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((root / name).iterdir())
        if file.is_file() and file.name[0] != "."
    ]


def _overlooked(root: Path, classes: tuple[str, ...]) -> list[str]:
    """What is said of files and folders in places where none are looked for."""
    loose = [each.name for each in root.iterdir() if each.is_file() and each.name[0] != "."]
    inner = [f"{name}/{each}" for name in classes for each in _folders(root / name)]
    found = {"files beside the class folders": loose, "folders in class folders": inner}
    return [
        f"{root}: {what} are not read: {_some(names)}" for what, names in found.items() if names
    ]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(sorted(names)[:NAMED]) + more


def _enough(root: Path, classes: tuple[str, ...], labels: list[int], least: int) -> None:
    counts = Counter(labels)
    fewest = min(range(len(classes)), key=lambda label: counts[label])
    if counts[fewest] < least:
        name, n = classes[fewest], counts[fewest]
        raise DataError(
            f"class {name!r} has {n} pictures; at least {least} are needed: add some to "
            f"{root / name}, or remove that folder"
        )


def _read(
    root: Path, classes: tuple[str, ...], files: Labelled, size: int, channels: int, least: int
) -> Arrays:
    """All pictures that can be read, their labels, and what is to be said of them: warnings."""
    images, labels = list[np.ndarray](), list[int]()
    broken: list[tuple[Path, int, Exception]] = []
    for file, label in shown(files, f"reading {root}"):
        try:
            images.append(_picture(file, size, channels))
            labels.append(label)
        except (pictures.ImageError, OSError) as error:
            broken.append((file, label, error))
    notes = _loss([file for file, _ in files], size, channels)
    if broken:
        notes.append(_left_out(classes, files, broken))
    _enough(root, classes, labels, least)
    notes += _unbalance(classes, labels)
    return np.stack(images), np.array(labels, np.int64), np.array(notes, str)


def _picture(file: Path, size: int, channels: int) -> np.ndarray:
    return pictures.normalise(file.read_bytes(), size=size, channels=channels, recipe="plain")


def _left_out(
    classes: tuple[str, ...], files: Labelled, broken: list[tuple[Path, int, Exception]]
) -> str:
    """Names the files that cannot be read; raises DataError where they are most of a class."""
    counts, totals = Counter(label for _, label, _ in broken), Counter(label for _, label in files)
    for label, n in counts.items():
        if n > BROKEN * totals[label]:
            file, _, error = next(each for each in broken if each[1] == label)
            raise DataError(
                f"class {classes[label]!r}: {n} of {totals[label]} files cannot be used "
                f"({file.name}: {error}); mend or remove them"
            )
    names = _some([f"{file.parent.name}/{file.name}" for file, _, _ in broken])
    why = Counter(WHY.get(getattr(error, "code", ""), "unreadable") for _, _, error in broken)
    reasons = ", ".join(f"{n} {word}" for word, n in why.items())
    return (
        f"{len(broken)} of {len(files)} files cannot be used as pictures ({reasons}), and are left "
        f"out: {names}"
    )


def _unbalance(classes: tuple[str, ...], labels: list[int]) -> list[str]:
    (most, n), *_, (least, m) = Counter(labels).most_common()
    if n < UNBALANCED * m:
        return []
    return [
        f"class {classes[most]!r} has {n} pictures, {classes[least]!r} only {m}: the model will "
        f"hardly ever answer {classes[least]!r}; add pictures of it, or take some of "
        f"{classes[most]!r} away"
    ]


def _loss(files: list[Path], size: int, channels: int) -> list[str]:
    """Where pictures are typically far larger than they are read, or colourful."""
    sides, tints = list[int](), list[float]()
    for file in files[:: max(1, len(files) // SAMPLE)]:
        with contextlib.suppress(Exception):  # which it is, reading will say
            if channels == 1:
                colours = _picture(file, size, 3).astype(int)
                tints.append(float((colours.max(0) - colours.min(0)).mean() / 255))
            sides.append(_side(file))
    notes = []
    if sides and (side := round(statistics.median(sides))) > FAR_LARGER * size:
        notes.append(
            f"the pictures are typically {side} pixels long and are read at {size}: fine detail is "
            "lost; a larger --image-size keeps more of it"
        )
    if tints and statistics.median(tints) > COLOURFUL:
        notes.append("the pictures are colourful and are read as grey; --color keeps their colors")
    return notes


def _side(file: Path) -> int:
    """The longest side in pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file, formats=pictures.FORMATS) as image:
            return max(image.size)
