"""A folder of pictures as a data set, with a subfolder for each class."""

import contextlib
import functools
import hashlib
import logging
import multiprocessing
import os
import statistics
from collections import Counter
from pathlib import Path

import numpy as np

from mnist import images as pictures
from mnist.data.download import DataError
from mnist.data.cache import Arrays, load_cached, track_progress
from mnist.data.sources import TEST_SHARE, Source
from mnist.data.splits import split_stratified

SIZE = 28  # default of --image-size, in pixels: MNIST's
MIN_CLASS_PICTURES = 10  # of a class: one or two for each split, the others for training
MAX_BROKEN_SHARE = 0.5  # of a class's files; more unreadable files have a common cause
MAX_IMBALANCE = 20  # ratio of class sizes above which the model hardly predicts the rare class
MAX_REDUCTION = 4  # ratio of a side to the read size; above it, lines under 4 pixels wide fade
MIN_TINT = 0.05  # mean difference (0..1) of a pixel's channels: above the tint of a grey scan
WARNING_SAMPLE = 100  # pictures that are examined for warnings
MAX_NAMED = 5  # files that a warning names
REASONS = {"blank": "of one colour", "too_many_pixels": "too large"}  # by ImageError.code

log = logging.getLogger(__name__)

Labelled = list[tuple[Path, int]]


def make_source(path: Path, size: int = SIZE, channels: int = 1) -> Source:
    """The pictures under `path`; the classes are the sorted names of their folders.

    If `path` has train/ and test/ with class folders in each, these are the splits; otherwise a
    stratified seventh becomes the test split. Pictures are read by images.normalise, recipe
    "plain", at size x size pixels, in grey or (3 channels) RGB. Files and folders with a leading
    dot are left out. Raises DataError, here or in `read`; its message says what to change.
    """
    has_test, classes = _find_layout(path)
    parts = {part: path / part for part in ("train", "test")}

    def read_all(data_dir: Path, root: Path, minimum: int) -> Arrays:
        files = _list_files(root, classes)
        _check_counts(root, classes, [label for _, label in files], minimum)
        digest = hashlib.sha256(str(root).encode()).hexdigest()[:8]
        cache = data_dir / "folders" / f"{path.name}-{digest}-{size}x{channels}.npz"
        names = [file for file, _ in files]
        images, labels, notes = load_cached(
            cache,
            names,
            (classes, size, channels),
            lambda: _read_pictures(root, classes, files, size, channels, minimum),
        )
        for note in [*_describe_ignored(root, classes), *notes.tolist()]:
            _warn(note)
        return images, labels

    def read(data_dir: Path, part: str) -> Arrays:
        if has_test:
            if part == "train":  # a fault in the test split must show before the training
                read_all(data_dir, parts["test"], 1)
            return read_all(data_dir, parts[part], MIN_CLASS_PICTURES if part == "train" else 1)
        images, labels = read_all(data_dir, path, MIN_CLASS_PICTURES)
        train, test = split_stratified(np.arange(len(labels)), labels, TEST_SHARE)
        index = train if part == "train" else test
        return images[index], labels[index]

    return Source(read, classes)


def _find_layout(path: Path) -> tuple[bool, tuple[str, ...]]:
    """Whether a folder has train/ and test/, and its classes. Raises DataError."""
    if not path.is_dir():
        raise DataError(f"there is no folder {path}")
    parts = {part: path / part for part in ("train", "test")}
    has_test = all(_list_folders(folder) for folder in parts.values())
    if not has_test and _list_folders(parts["train"]):
        raise DataError(
            f"{path} has a train/ with classes but no test/ with the same ones; make one (or give "
            f"that name to another part), or put the classes' folders right into {path}"
        )
    if has_test and (unused := sorted(set(_list_folders(path)) - set(parts))):
        _warn(f"{path}: only train/ and test/ are used, not {', '.join(unused)}")
    classes = _list_classes(parts["train"] if has_test else path)
    if has_test and (unmatched := set(classes) ^ set(_list_folders(parts["test"]))):
        names = ", ".join(sorted(unmatched))
        raise DataError(
            f"{path}: train/ and test/ must have the same classes; only one has {names}"
        )
    return has_test, classes


@functools.cache  # once per text, as train and test may be read from the same files
def _warn(text: str) -> None:
    if multiprocessing.parent_process() is None:  # not in workers, which read the same pictures
        log.warning("%s", text)


def _list_folders(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(
        folder.name for folder in path.iterdir() if folder.is_dir() and folder.name[0] != "."
    )


def _list_classes(path: Path) -> tuple[str, ...]:
    names = _list_folders(path)
    if not names:
        example = path / "cat" / "1.png"
        raise DataError(f"{path} has no class folders; put each class into one, such as {example}")
    if odd := [name for name in names if "\ufffd" in os.fsencode(name).decode(errors="replace")]:
        raise DataError(f"{path}: the folder {odd[0]!r} has a name that is not UTF-8; rename it")
    if len(names) == 1:
        inner = path / names[0]
        hint = f"; are the classes those in {inner}?" if len(_list_folders(inner)) > 1 else ""
        raise DataError(f"{path} has only one class, {names[0]!r}; at least two are needed{hint}")
    return tuple(names)


def _list_files(root: Path, classes: tuple[str, ...]) -> Labelled:
    return [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((root / name).iterdir())
        if file.is_file() and file.name[0] != "."
    ]


def _describe_ignored(root: Path, classes: tuple[str, ...]) -> list[str]:
    """Warnings about files and folders that are ignored because of their place."""
    loose = [path.name for path in root.iterdir() if path.is_file() and path.name[0] != "."]
    inner = [f"{name}/{folder}" for name in classes for folder in _list_folders(root / name)]
    ignored = {"files beside the class folders": loose, "folders in class folders": inner}
    return [
        f"{root}: {kind} are not read: {_join_names(names)}"
        for kind, names in ignored.items()
        if names
    ]


def _join_names(names: list[str]) -> str:
    suffix = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(sorted(names)[:MAX_NAMED]) + suffix


def _check_counts(root: Path, classes: tuple[str, ...], labels: list[int], minimum: int) -> None:
    counts = Counter(labels)
    fewest = min(range(len(classes)), key=lambda label: counts[label])
    if counts[fewest] < minimum:
        name, n = classes[fewest], counts[fewest]
        raise DataError(
            f"class {name!r} has {n} pictures; at least {minimum} are needed: add some to "
            f"{root / name}, or remove that folder"
        )


def _read_pictures(
    root: Path, classes: tuple[str, ...], files: Labelled, size: int, channels: int, minimum: int
) -> Arrays:
    """The readable pictures, their labels, and warnings about them."""
    images, labels = list[np.ndarray](), list[int]()
    broken: list[tuple[Path, int, Exception]] = []
    for file, label in track_progress(files, f"reading {root}"):
        try:
            images.append(_read_picture(file, size, channels))
            labels.append(label)
        except (pictures.ImageError, OSError) as error:
            broken.append((file, label, error))
    notes = _describe_loss([file for file, _ in files], size, channels)
    if broken:
        notes.append(_describe_broken(classes, files, broken))
    _check_counts(root, classes, labels, minimum)
    notes += _describe_imbalance(classes, labels)
    return np.stack(images), np.array(labels, np.int64), np.array(notes, str)


def _read_picture(file: Path, size: int, channels: int) -> np.ndarray:
    return pictures.normalise(file.read_bytes(), size=size, channels=channels, recipe="plain")


def _describe_broken(
    classes: tuple[str, ...], files: Labelled, broken: list[tuple[Path, int, Exception]]
) -> str:
    """A warning that names unreadable files; raises DataError if most of a class are unreadable."""
    counts, totals = Counter(label for _, label, _ in broken), Counter(label for _, label in files)
    for label, n in counts.items():
        if n > MAX_BROKEN_SHARE * totals[label]:
            file, _, error = next(entry for entry in broken if entry[1] == label)
            raise DataError(
                f"class {classes[label]!r}: {n} of {totals[label]} files cannot be used "
                f"({file.name}: {error}); mend or remove them"
            )
    names = _join_names([f"{file.parent.name}/{file.name}" for file, _, _ in broken])
    reasons = Counter(
        REASONS.get(getattr(error, "code", ""), "unreadable") for _, _, error in broken
    )
    summary = ", ".join(f"{n} {word}" for word, n in reasons.items())
    return (
        f"{len(broken)} of {len(files)} files cannot be used as pictures ({summary}), and are left "
        f"out: {names}"
    )


def _describe_imbalance(classes: tuple[str, ...], labels: list[int]) -> list[str]:
    (most, n), *_, (least, m) = Counter(labels).most_common()
    if n < MAX_IMBALANCE * m:
        return []
    return [
        f"class {classes[most]!r} has {n} pictures, {classes[least]!r} only {m}: the model will "
        f"hardly ever answer {classes[least]!r}; add pictures of it, or take some of "
        f"{classes[most]!r} away"
    ]


def _describe_loss(files: list[Path], size: int, channels: int) -> list[str]:
    """Warnings where the typical picture is far larger than its read size, or colourful."""
    sides, tints = list[int](), list[float]()
    for file in files[:: max(1, len(files) // WARNING_SAMPLE)]:
        with contextlib.suppress(Exception):  # _read_pictures() reports unreadable files
            if channels == 1:
                colours = _read_picture(file, size, 3).astype(int)
                tints.append(float((colours.max(0) - colours.min(0)).mean() / 255))
            sides.append(_longest_side(file))
    notes = []
    if sides and (side := round(statistics.median(sides))) > MAX_REDUCTION * size:
        notes.append(
            f"the pictures are typically {side} pixels long and are read at {size}: fine detail is "
            "lost; a larger --image-size keeps more of it"
        )
    if tints and statistics.median(tints) > MIN_TINT:
        notes.append("the pictures are colourful and are read as grey; --color keeps their colors")
    return notes


def _longest_side(file: Path) -> int:
    """A picture's longest side in pixels."""
    _, width, height = pictures.read_header(file.read_bytes())
    return max(width, height)
