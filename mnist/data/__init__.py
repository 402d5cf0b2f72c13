"""Loads a data set by name: uint8 tensors in memory, in splits."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnist import plugins
from mnist.data import folders
from mnist.data.cache import Arrays
from mnist.data.download import DataError
from mnist.data.kinds import COMPARED, find_kind, find_mirrored_classes
from mnist.data.sources import DATASETS, Reader, Source
from mnist.data.splits import Split, split_stratified
from mnist.shell import first_line

# Shares of the training files, as for MNIST.
VALIDATION_SHARE, CALIBRATION_SHARE = 5000 / 60000, 2500 / 60000
# Training images of a class: folders.MIN_CLASS_PICTURES without the test images.
MIN_CLASS_IMAGES = 8
FOLDER_PREFIX = "folder:"


@dataclass(frozen=True)
class Dataset:
    """A data set with all splits but the test split, which only open_test() reads.

    `mean` and `std` are those of the training split scaled to 0..1, over all channels; `sha256` is
    the hash of pixels and labels, `split_sha256` that of the indices of the splits.
    `mirrored_classes` are pairs of classes that are each other's mirror image.
    """

    name: str
    sha256: str
    split_sha256: str
    classes: tuple[str, ...]
    size: int
    channels: int
    recipe: str
    mean: float
    std: float
    train: Split
    validation: Split
    calibration: Split
    mirrored_classes: tuple[tuple[int, int], ...]
    open_test: Callable[[], Split]
    """Reads the test split, for the single evaluation of a model that is being saved."""

    @property
    def kind(self) -> str:
        """The kind of augmentation that suits the images."""
        return find_kind(self.recipe, self.channels)

    def to(self, device: torch.device) -> "Dataset":
        """The same data set with its splits on `device`."""
        names = ("train", "validation", "calibration")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def standardise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, C, H, W), 0..255 -> float32; the training split gets mean 0 and deviation 1."""
        return (images.float() / 255 - self.mean) / self.std

    def record(self, test: int) -> dict[str, Any]:
        """The data set's entry in model_info.json; `test` is the number of test images."""
        keys = ("name", "sha256", "size", "channels", "recipe", "mean", "std")
        names = ("train", "validation", "calibration")
        sizes = {name: len(getattr(self, name)) for name in names}
        entries = {key: getattr(self, key) for key in keys}
        return entries | {"classes": list(self.classes), "splits": sizes | {"test": test}}


def load(
    name: str,
    data_dir: Path | None = None,
    train_samples: int | None = None,
    max_validation: int | None = None,
    image_size: int | None = None,
    color: bool = False,
) -> Dataset:
    """Load the data set `name`, one of DATASETS or folder:PATH; missing files are downloaded.

    `data_dir` is the folder of the files, by default the environment's MNIST_DATA_DIR, or data.
    `train_samples` reduces the training split to this number, stratified; `max_validation` is the
    largest size of the validation split. A folder's pictures are read in grey, or in `color`, with
    a side of `image_size` pixels, by default folders.SIZE. Raises ValueError for an unknown name or
    a number out of range, DataError where the data are missing or unusable.
    """
    name, source = _find_source(name, image_size, color)
    data_dir = data_dir or Path(os.environ.get("MNIST_DATA_DIR", "data"))
    images, labels = _validate(name, source, _read_part(name, source, data_dir, "train"))
    train, validation, calibration = _split_indices(labels)
    digest = hashlib.sha256(b"".join(part.tobytes() for part in (train, validation, calibration)))
    if train_samples is not None:
        train = _take_subset(train, labels, train_samples, name, len(source.classes))
        digest.update(train.tobytes())

    def split(index: np.ndarray) -> Split:
        return Split(torch.from_numpy(images[index]), torch.from_numpy(labels[index]))

    def open_test() -> Split:
        arrays = _read_part(name, source, data_dir, "test")
        return Split(*map(torch.from_numpy, _validate(name, source, arrays, min_per_class=0)))

    mean, std = _compute_mean_and_std(images[train])
    is_ink, few = source.recipe == "digit", split(train[:COMPARED])
    return Dataset(
        name=name,
        sha256=hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
        split_sha256=digest.hexdigest(),
        classes=source.classes,
        size=images.shape[-1],
        channels=images.shape[1],
        recipe=source.recipe,
        mean=round(mean, 4),
        std=round(std, 4),
        train=split(train),
        validation=split(validation[:max_validation]),
        calibration=split(calibration),
        mirrored_classes=() if is_ink else find_mirrored_classes(few, len(source.classes)),
        open_test=open_test,
    )


def _split_indices(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the splits train, validation and calibration; the labels (N,) int64."""
    # Two of each class, as these are split again.
    train, held_out = split_stratified(
        np.arange(len(labels)), labels, VALIDATION_SHARE + CALIBRATION_SHARE, min_per_class=2
    )
    calibration, validation = split_stratified(
        held_out, labels, VALIDATION_SHARE / (VALIDATION_SHARE + CALIBRATION_SHARE)
    )
    return train, validation, calibration


def find_reader(name: str) -> Reader | None:
    """The function that reads a named data set; None for a folder of pictures."""
    return DATASETS[name].read if name in DATASETS else None


def _find_source(name: str, image_size: int | None, color: bool) -> tuple[str, Source]:
    """The data set's name in records, and its source."""
    if name.startswith(FOLDER_PREFIX):
        path = Path(name.removeprefix(FOLDER_PREFIX)).expanduser().absolute()
        channels = 3 if color else 1
        source = folders.make_source(path, image_size or folders.SIZE, channels)
        return f"{FOLDER_PREFIX}{path.name}", source
    if name not in DATASETS:
        raise ValueError(
            f"unknown data set {name!r}; known: {', '.join(DATASETS)}, {FOLDER_PREFIX}PATH"
        )
    if image_size or color:
        raise ValueError(
            f"--image-size and --color are only for {FOLDER_PREFIX}PATH, not for {name}"
        )
    return name, DATASETS[name]


def _read_part(name: str, source: Source, data_dir: Path, part: str) -> Arrays:
    """Read a part from its source; any error of a plugin becomes a DataError."""
    try:
        images, labels = source.read(data_dir, part)
    except Exception as error:
        if isinstance(error, DataError) or not plugins.is_from_plugin(source.read):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        text = f"{name}: its {part} part cannot be read: {reason}"
        raise DataError(text) from error
    return np.asarray(images), np.asarray(labels)


def _validate(
    name: str, source: Source, arrays: Arrays, min_per_class: int = MIN_CLASS_IMAGES
) -> Arrays:
    """The arrays of a source; raises DataError if they are not as Source says, or too few."""
    images, labels = arrays
    if len(set(map(str, source.classes))) < len(source.classes):
        raise DataError(f"{name} has classes with the same name: {source.classes}")
    n, size, classes = len(labels), images.shape[-1] if images.ndim else 0, len(source.classes)
    if images.dtype != np.uint8 or images.shape not in [(n, c, size, size) for c in (1, 3)]:
        received = f"{images.dtype} {images.shape}"
        raise DataError(
            f"{name} gives images {received}; uint8 ({n}, 1 or 3, side, side) is expected"
        )
    if labels.dtype != np.int64 or labels.shape != (n,) or not set(labels) <= set(range(classes)):
        raise DataError(f"{name} gives labels that are not int64 (N,), from 0 to {classes - 1}")
    counts = np.bincount(labels, minlength=classes)
    if counts.min() < min_per_class:
        text = f"class {source.classes[counts.argmin()]!r} has {counts.min()} training images"
        raise DataError(f"{name}: {text}; at least {min_per_class} are needed")
    return images, labels


def _take_subset(
    train: np.ndarray, labels: np.ndarray, samples: int, name: str, classes: int
) -> np.ndarray:
    """A stratified subset of the training split; raises ValueError for impossible sizes."""
    if not classes <= samples <= len(train):
        limits = f"{classes} (one of each class) to {len(train)}"
        raise ValueError(f"--train-samples is {samples}; {name} takes {limits}")
    if samples <= len(train) - classes:
        return split_stratified(train, labels, samples)[1]
    return train[:samples]  # too few are left for a stratified split; `train` is shuffled


def _compute_mean_and_std(images: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of uint8 pixels scaled to 0..1, without a copy as floats."""
    counts = sum(np.bincount(image.ravel(), minlength=256) for image in images)
    levels = np.arange(256) / 255
    mean = float(np.average(levels, weights=counts))
    return mean, float(np.average((levels - mean) ** 2, weights=counts)) ** 0.5
