"""Warnings about the pictures of a folder data set."""

import contextlib
import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mnist import images as pictures
from mnist.data.download import DataError
from mnist.data.layout import Labelled
from mnist.images.files import join_names

MAX_BROKEN_SHARE = 0.5  # of a class's files; more unreadable files have a common cause
MAX_IMBALANCE = 20  # ratio of class sizes above which the model hardly predicts the rare class
MAX_REDUCTION = 4  # ratio of a side to the read size; above it, lines under 4 pixels wide fade
MIN_TINT = 0.05  # mean difference (0..1) of a pixel's channels: above the tint of a grey scan
WARNING_SAMPLE = 100  # pictures that are examined for warnings
REASONS = {"blank": "of one colour", "too_many_pixels": "too large"}  # by ImageError.code

Broken = list[tuple[Path, int, Exception]]


def read_picture(file: Path, size: int, channels: int) -> np.ndarray:
    """A picture uint8 (channels, size, size). Raises images.ImageError or OSError."""
    return pictures.normalise(file.read_bytes(), size=size, channels=channels, recipe="plain")


def describe_broken(classes: Sequence[str], files: Labelled, broken: Broken) -> list[str]:
    """A warning that names unreadable files; raises DataError if most of a class are unreadable."""
    if not broken:
        return []
    counts, totals = Counter(label for _, label, _ in broken), Counter(label for _, label in files)
    for label, n in counts.items():
        if n > MAX_BROKEN_SHARE * totals[label]:
            file, _, error = next(entry for entry in broken if entry[1] == label)
            raise DataError(
                f"class {classes[label]!r}: {n} of {totals[label]} files cannot be used "
                f"({join_names([file.name])}: {error}); repair or remove them"
            )
    names = join_names([f"{file.parent.name}/{file.name}" for file, _, _ in broken])
    reasons = Counter(
        REASONS.get(getattr(error, "code", ""), "unreadable") for _, _, error in broken
    )
    summary = ", ".join(f"{n} {word}" for word, n in reasons.items())
    return [
        f"{len(broken)} of {len(files)} files cannot be used as pictures ({summary}), and are left "
        f"out: {names}"
    ]


def describe_imbalance(classes: Sequence[str], labels: list[int]) -> list[str]:
    """A warning if a class has far more pictures than another one."""
    (most, n), *_, (least, m) = Counter(labels).most_common()
    if n < MAX_IMBALANCE * m:
        return []
    return [
        f"class {classes[most]!r} has {n} pictures, {classes[least]!r} only {m}: the model will "
        f"hardly ever answer {classes[least]!r}; add pictures of it, or remove some of "
        f"{classes[most]!r}"
    ]


def describe_loss(files: list[Path], size: int, channels: int) -> list[str]:
    """Warnings where the typical picture is far larger than its read size, or colourful."""
    sides, tints = list[int](), list[float]()
    for file in files[:: max(1, len(files) // WARNING_SAMPLE)]:
        with contextlib.suppress(Exception):  # describe_broken() names unreadable files
            if channels == 1:
                colours = read_picture(file, size, 3).astype(int)
                tints.append(float((colours.max(0) - colours.min(0)).mean() / 255))
            _, width, height = pictures.read_header(file.read_bytes())
            sides.append(max(width, height))
    notes = []
    if sides and (side := round(statistics.median(sides))) > MAX_REDUCTION * size:
        notes.append(
            f"the pictures are typically {side} pixels long and are read at {size}: fine detail is "
            "lost; a larger --image-size keeps more of it"
        )
    if tints and statistics.median(tints) > MIN_TINT:
        notes.append("the pictures are colourful and are read as grey; --color keeps their colors")
    return notes


# --- the same picture twice


def describe_repeated(
    root: Path,
    train: np.ndarray,
    train_labels: np.ndarray,
    train_files: list[Path],
    test: np.ndarray,
    test_labels: np.ndarray,
    test_files: list[Path],
) -> list[str]:
    """Warnings about equal images (N, C, H, W) in several classes, and in both parts."""
    hashes, test_hashes = _hash_all(train), _hash_all(test)
    files = [*train_files, *test_files]
    labels = [*train_labels.tolist(), *test_labels.tolist()]
    leaks = _describe_leaks(hashes, test_hashes, root, files)
    return _describe_twins([*hashes, *test_hashes], labels, root, files) + leaks


def _hash_all(images: np.ndarray) -> list[bytes]:
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]


def _describe_twins(
    hashes: list[bytes], labels: list[int], root: Path, files: list[Path]
) -> list[str]:
    """A warning about equal pictures of several classes."""
    first = dict[bytes, int]()  # the first picture with this hash
    mixed = dict[bytes, tuple[int, int]]()  # two pictures of different classes
    for i, key in enumerate(hashes):
        if labels[first.setdefault(key, i)] != labels[i]:
            mixed.setdefault(key, (first[key], i))
    if not mixed:
        return []
    n = sum(key in mixed for key in hashes)
    one, other = next(iter(mixed.values()))
    return [
        f"{n} of {len(files)} pictures are in more than one class, with the same pixels, such as "
        f"{_join(root, files[one], files[other])}: no model can tell them apart; keep each in one "
        "class"
    ]


def _describe_leaks(
    hashes: list[bytes], test_hashes: list[bytes], root: Path, files: list[Path]
) -> list[str]:
    """A warning about test pictures, the last ones of `files`, that are training pictures, too."""
    trained = {key: i for i, key in enumerate(hashes)}
    leaks = [(i, key) for i, key in enumerate(test_hashes) if key in trained]
    if not leaks:
        return []
    i, key = leaks[0]
    example = _join(root, files[len(hashes) + i], files[trained[key]])
    return [
        f"{len(leaks)} of {len(test_hashes)} test pictures are training pictures, too, with the "
        f"same pixels, such as {example}: the test accuracy will be too high; keep each picture "
        "once"
    ]


def _join(root: Path, one: Path, other: Path) -> str:
    return " and ".join(join_names([str(file.relative_to(root))]) for file in (one, other))
