"""A data set by name -> uint8 tensors in memory and its splits."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnist import folders, plugins
from mnist.files import DataError
from mnist.reading import Arrays
from mnist.sources import DATASETS, Reader, Source
from mnist.splits import Split, cut

VALIDATION, CALIBRATION = 5000 / 60000, 2500 / 60000  # of the training files, as for MNIST
LEAST = 8  # training images of a class: what is left of folders.LEAST pictures without the test's
FOLDER = "folder:"


@dataclass(frozen=True)
class Dataset:
    """The splits that choices may be made on, and what is known of the data.

    `mean` and `std` are those of the training split scaled to 0..1, over all channels; `sha256` is
    that of pixels and labels, `cut` that of the cut into splits. The test split is not here: see
    open_test.
    """

    name: str
    sha256: str
    cut: str
    classes: tuple[str, ...]
    size: int
    channels: int
    recipe: str
    mean: float
    std: float
    train: Split
    validation: Split
    calibration: Split
    open_test: Callable[[], Split]
    """Reads the test split. For the one evaluation of a model that is being saved, nothing else."""

    def to(self, device: torch.device) -> "Dataset":
        """The same data with its splits on `device`, where training wants them."""
        names = ("train", "validation", "calibration")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def record(self, test: int) -> dict[str, Any]:
        """What model_info.json keeps of it; `test` is the number of test images."""
        keys = ("name", "sha256", "size", "channels", "recipe", "mean", "std")
        names = ("train", "validation", "calibration")
        sizes = {name: len(getattr(self, name)) for name in names}
        about = {key: getattr(self, key) for key in keys}
        return about | {"classes": list(self.classes), "splits": sizes | {"test": test}}


def load(
    name: str,
    data_dir: Path | None = None,
    train_samples: int | None = None,
    most_validation: int | None = None,
    image_size: int | None = None,
    color: bool = False,
) -> Dataset:
    """The data set called `name`, one of DATASETS or folder:PATH; files that lack are fetched.

    They are looked for under `data_dir`, by default MNIST_DATA_DIR from the environment, or data.
    `train_samples` cuts the training split down to that many, stratified, `most_validation` the
    validation split to at most so many. Pictures of a folder are read grey, or in `color`, at a
    side of `image_size` pixels, by default folders.SIZE. Raises ValueError for an unknown name or
    a number out of range, DataError where the data cannot be had or used.
    """
    name, source = _source(name, image_size, color)
    data_dir = data_dir or Path(os.environ.get("MNIST_DATA_DIR", "data"))
    images, labels = _checked(name, source, _read(name, source, data_dir, "train"))
    # Two of each class for the rest: it is cut again.
    train, rest = cut(np.arange(len(labels)), labels, VALIDATION + CALIBRATION, least=2)
    calibration, validation = cut(rest, labels, VALIDATION / (VALIDATION + CALIBRATION))
    digest = hashlib.sha256(b"".join(part.tobytes() for part in (train, validation, calibration)))
    if train_samples is not None:
        train = _part(train, labels, train_samples, name, len(source.classes))
        digest.update(train.tobytes())

    def split(index: np.ndarray) -> Split:
        return Split(torch.from_numpy(images[index]), torch.from_numpy(labels[index]))

    def open_test() -> Split:
        arrays = _checked(name, source, _read(name, source, data_dir, "test"), least=0)
        return Split(*map(torch.from_numpy, arrays))

    mean, std = _mean_and_std(images[train])
    return Dataset(
        name=name,
        sha256=hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
        cut=digest.hexdigest(),
        classes=source.classes,
        size=images.shape[-1],
        channels=images.shape[1],
        recipe=source.recipe,
        mean=round(mean, 4),
        std=round(std, 4),
        train=split(train),
        validation=split(validation[:most_validation]),
        calibration=split(calibration),
        open_test=open_test,
    )


def reader(name: str) -> Reader | None:
    """What reads the data set; None for a folder's pictures."""
    return DATASETS[name].read if name in DATASETS else None


def _source(name: str, image_size: int | None, color: bool) -> tuple[str, Source]:
    """The data set's name in records, and where it comes from."""
    if name.startswith(FOLDER):
        path = Path(name.removeprefix(FOLDER)).expanduser().absolute()
        channels = 3 if color else 1
        return f"{FOLDER}{path.name}", folders.source(path, image_size or folders.SIZE, channels)
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}, {FOLDER}PATH")
    if image_size or color:
        raise ValueError(f"--image-size and --color are for {FOLDER}PATH; {name} is as it is")
    return name, DATASETS[name]


def _read(name: str, source: Source, data_dir: Path, part: str) -> Arrays:
    """What a source returns; raises DataError for whatever a plugin raises."""
    try:
        images, labels = source.read(data_dir, part)
    except Exception as error:
        if isinstance(error, DataError) or not plugins.is_from_plugin(source.read):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        text = f"{name}: its {part} part cannot be read: {type(error).__name__}: {reason}"
        raise DataError(text) from error
    return np.asarray(images), np.asarray(labels)


def _checked(name: str, source: Source, arrays: Arrays, least: int = LEAST) -> Arrays:
    """What a source gave, if it is as Source says, and enough to be cut; else raises DataError."""
    images, labels = arrays
    if len(set(map(str, source.classes))) < len(source.classes):
        raise DataError(f"{name} has classes that are called the same: {source.classes}")
    n, side, classes = len(labels), images.shape[-1] if images.ndim else 0, len(source.classes)
    if images.dtype != np.uint8 or images.shape not in [(n, c, side, side) for c in (1, 3)]:
        given = f"{images.dtype} {images.shape}"
        raise DataError(f"{name} gives images {given}; uint8 ({n}, 1 or 3, side, side) is wanted")
    if labels.dtype != np.int64 or labels.shape != (n,) or not set(labels) <= set(range(classes)):
        raise DataError(f"{name} gives labels that are not int64 (N,), from 0 to {classes - 1}")
    counts = np.bincount(labels, minlength=classes)
    if counts.min() < least:
        fewest = f"class {source.classes[counts.argmin()]!r} has {counts.min()} training images"
        raise DataError(f"{name}: {fewest}; at least {least} are needed")
    return images, labels


def _part(
    train: np.ndarray, labels: np.ndarray, samples: int, name: str, classes: int
) -> np.ndarray:
    """A stratified part of the training split; raises ValueError where it has not so many."""
    if not classes <= samples <= len(train):
        limits = f"{classes} (one of each class) to {len(train)}"
        raise ValueError(f"train-samples is {samples}; {name} takes {limits}")
    if samples <= len(train) - classes:
        return cut(train, labels, samples)[1]
    return train[:samples]  # too few are left out for one of each class; the order is shuffled


def _mean_and_std(images: np.ndarray) -> tuple[float, float]:
    """Of uint8 pixels, as shares of 255, without a copy of them as floats."""
    counts = sum(np.bincount(image.ravel(), minlength=256) for image in images)
    levels = np.arange(256) / 255
    mean = float(np.average(levels, weights=counts))
    return mean, float(np.average((levels - mean) ** 2, weights=counts)) ** 0.5
