"""A folder of pictures as a data set, with a subfolder for each class."""

import functools
import hashlib
import logging
import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mnist import images as pictures
from mnist.data import notes
from mnist.data.cache import Arrays, load_cached, track_progress
from mnist.data.layout import Labelled, Part, find_parts
from mnist.data.sources import TEST_SHARE, Source
from mnist.data.splits import split_stratified

SIZE = 28  # default of --image-size, in pixels: MNIST's
MIN_CLASS_PICTURES = 10  # of a class: one or two for each split, the others for training

log = logging.getLogger(__name__)


def make_source(path: Path, size: int = SIZE, channels: int = 1) -> Source:
    """The pictures under `path`; the classes are the sorted names of their folders, in NFC.

    If `path` has train/ and test/ (or training/ and testing/) with class folders in each, these are
    the splits; otherwise a stratified seventh becomes the test split. Pictures are read by
    images.normalise, recipe "plain", at size x size pixels, in grey or (3 channels) RGB.
    `mnist.images.files` says which files are pictures. Raises DataError, here or in `read`; its
    message says what to change.
    """
    train, test, layout_notes = find_parts(path)
    _warn_all(layout_notes)

    def read_part(data_dir: Path, part: Part, minimum: int) -> _Pictures:
        return _read_part(data_dir / "folders", path.name, part, size, channels, minimum)

    def read(data_dir: Path, part: str) -> Arrays:
        if test is None:
            everything = read_part(data_dir, train, MIN_CLASS_PICTURES)
            index = np.arange(len(everything.labels))
            indices = split_stratified(index, everything.labels, TEST_SHARE)
            splits = dict(zip(("train", "test"), map(everything.take, indices), strict=True))
        else:
            splits = {"test": read_part(data_dir, test, 1)}
            if part == "train":  # after the test split, whose faults must show before the training
                splits["train"] = read_part(data_dir, train, MIN_CLASS_PICTURES)
        if part == "train" and _is_main_process():
            _warn_all(notes.describe_repeated(path, *splits["train"], *splits["test"]))
        return splits[part].images, splits[part].labels

    return Source(read, tuple(train.classes))


class _Pictures(NamedTuple):
    """Images uint8 (N, C, H, W), labels int64 (N,), and the files that they are from."""

    images: np.ndarray
    labels: np.ndarray
    files: list[Path]

    def take(self, index: np.ndarray) -> "_Pictures":
        return _Pictures(self.images[index], self.labels[index], [self.files[i] for i in index])


def _read_part(
    folder: Path, name: str, part: Part, size: int, channels: int, minimum: int
) -> _Pictures:
    """Read a part, or its cache in `folder`."""
    files = part.list_pictures()
    part.check_counts([label for _, label in files], minimum)
    digest = hashlib.sha256(str(part.root).encode()).hexdigest()[:8]
    images, labels, index, texts = load_cached(
        folder / f"{name}-{digest}-{size}x{channels}.npz",
        [file for file, _ in files],
        (tuple(part.classes), size, channels),
        lambda: _read_pictures(part, files, size, channels, minimum),
    )
    _warn_all([*part.describe_ignored(), *texts.tolist()])
    return _Pictures(images, labels, [files[i][0] for i in index])


def _read_pictures(part: Part, files: Labelled, size: int, channels: int, minimum: int) -> Arrays:
    """The readable pictures, their labels, their indices in `files`, and warnings about them."""
    images, index = list[np.ndarray](), list[int]()
    broken: notes.Broken = []
    for i, (file, label) in enumerate(track_progress(files, f"reading {part.root}")):
        try:
            images.append(notes.read_picture(file, size, channels))
            index.append(i)
        except (pictures.ImageError, OSError) as error:
            broken.append((file, label, error))
    classes, labels = tuple(part.classes), [files[i][1] for i in index]
    texts = notes.describe_loss([file for file, _ in files], size, channels)
    texts += notes.describe_broken(classes, files, broken)
    part.check_counts(labels, minimum)
    texts += notes.describe_imbalance(classes, labels)
    return np.stack(images), np.array(labels, np.int64), np.array(index), np.array(texts, str)


def _warn_all(texts: Iterable[str]) -> None:
    for text in texts:
        _warn(text)


@functools.cache  # once per text, as train and test may be read from the same files
def _warn(text: str) -> None:
    if _is_main_process():  # not in workers, which read the same pictures
        log.warning("%s", text)


def _is_main_process() -> bool:
    return multiprocessing.parent_process() is None
