"""mnist.data.sources: every data set with a name, from made-up files in its real format."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mnist import data, images
from mnist.data import download, sources
from tests.conftest import DATA_DIR
from tests.test_data import mirror

DATASETS = download.import_torchvision().datasets
TRAIN, TEST = 12, 2  # images of each class


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def ell(side: int = 28) -> np.ndarray:
    """An L: looks different when it is transposed."""
    image = np.zeros((side, side), np.uint8)
    image[2:-2, 4:7] = 250
    image[-5:-2, 4:-3] = 250
    return image


def packed(array: np.ndarray) -> bytes:
    """A gzipped idx file."""
    kind = {"u1": 8, "i4": 12}[array.dtype.str[1:]]
    header = struct.pack(f">4B{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    return gzip.compress(header + array.astype(array.dtype.newbyteorder(">")).tobytes())


def labels(classes: int, part: str) -> np.ndarray:
    return np.tile(np.arange(classes, dtype=np.uint8), TRAIN if part == "train" else TEST)


def idx_pair(marks: np.ndarray, image: np.ndarray) -> tuple[bytes, bytes]:
    return packed(np.stack([image] * len(marks))), packed(marks)


def serve_kmnist(served: Path, url: str, patch: pytest.MonkeyPatch) -> None:
    resources = []
    for part, names in (("train", sources.FILES), ("test", sources.TEST_FILES)):
        for name, content in zip(names, idx_pair(labels(10, part), ell()), strict=True):
            (served / f"{name}.gz").write_bytes(content)
            resources.append((f"{name}.gz", md5(content)))
    patch.setattr(DATASETS.KMNIST, "mirrors", [url])
    patch.setattr(DATASETS.KMNIST, "resources", resources)


def serve_qmnist(served: Path, url: str, patch: pytest.MonkeyPatch) -> None:
    resources: dict[str, list[tuple[str, str]]] = {}
    for part, names in (("train", sources.QMNIST_FILES), ("test", sources.QMNIST_TEST_FILES)):
        marks = np.zeros((len(labels(10, part)), 8), np.int32)
        marks[:, 0] = labels(10, part)
        marks[:, 1:] = 2_000  # the writer and so on
        resources[part] = []
        for name, content in zip(names, idx_pair(marks, ell()), strict=True):
            (served / f"{name}.gz").write_bytes(content)
            resources[part].append((f"{url}{name}.gz", md5(content)))
    patch.setattr(DATASETS.QMNIST, "resources", resources)


def serve_emnist(served: Path, url: str, patch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(served / "gzip.zip", "w") as archive:
        for split, classes in (("digits", 10), ("letters", 26), ("balanced", 47)):
            for part in ("train", "test"):
                marks = labels(classes, part) + (split == "letters")
                for kind, content in zip(
                    ("images-idx3", "labels-idx1"), idx_pair(marks, ell().T), strict=True
                ):
                    archive.writestr(f"gzip/emnist-{split}-{part}-{kind}-ubyte.gz", content)
    patch.setattr(DATASETS.EMNIST, "url", f"{url}gzip.zip")
    patch.setattr(DATASETS.EMNIST, "md5", md5((served / "gzip.zip").read_bytes()))


def serve_usps(served: Path, url: str, patch: pytest.MonkeyPatch) -> None:
    import bz2

    split_list = {}
    levels = ell(16).ravel() / 125 - 1  # -1..1
    pixels = " ".join(f"{i + 1}:{level:.4f}" for i, level in enumerate(levels))
    for part, name in (("train", "usps.bz2"), ("test", "usps.t.bz2")):
        lines = "".join(f"{mark + 1} {pixels} \n" for mark in labels(10, part))
        content = bz2.compress(lines.encode())
        (served / name).write_bytes(content)
        split_list[part] = [f"{url}{name}", name, md5(content)]
    patch.setattr(DATASETS.USPS, "split_list", split_list)


def serve_cifar10(served: Path, url: str, patch: pytest.MonkeyPatch) -> None:
    contents = {"batches.meta": {"label_names": list(sources.CIFAR10_CLASSES)}}
    red = np.zeros((3, 32, 32), np.uint8)
    red[0, :, 16:] = 255  # the right half
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        marks = [*range(10)] * 2
        pixels = np.stack([red.ravel()] * 20)
        contents[name] = {"data": pixels, "labels": marks}
    sums = []
    with tarfile.open(served / "cifar.tar.gz", "w:gz") as archive:
        for name, value in contents.items():
            content = pickle.dumps(value)
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
            sums.append([name, md5(content)])
    patch.setattr(DATASETS.CIFAR10, "url", f"{url}cifar.tar.gz")
    patch.setattr(DATASETS.CIFAR10, "tgz_md5", md5((served / "cifar.tar.gz").read_bytes()))
    patch.setattr(DATASETS.CIFAR10, "meta", DATASETS.CIFAR10.meta | {"md5": sums[0][1]})
    patch.setattr(DATASETS.CIFAR10, "train_list", sums[1:6])
    patch.setattr(DATASETS.CIFAR10, "test_list", sums[6:])


Server = Callable[[Path, str, pytest.MonkeyPatch], None]
CASES: list[tuple[str, Server, int, str]] = [
    ("kmnist", serve_kmnist, 10, "KMNIST/raw/t10k-labels-idx1-ubyte"),
    ("qmnist", serve_qmnist, 10, "QMNIST/raw/qmnist-test-labels-idx2-int"),
    ("emnist-digits", serve_emnist, 10, "EMNIST/raw/emnist-digits-test-labels-idx1-ubyte"),
    ("emnist-letters", serve_emnist, 26, "EMNIST/raw/emnist-letters-test-labels-idx1-ubyte"),
    ("emnist-balanced", serve_emnist, 47, "EMNIST/raw/emnist-balanced-test-labels-idx1-ubyte"),
    ("usps", serve_usps, 10, "usps.t.bz2"),
    ("cifar10", serve_cifar10, 10, "cifar-10-batches-py/test_batch"),
]


@pytest.mark.parametrize(("name", "serve", "classes", "file"), CASES)
def test_a_data_set_is_fetched_once_by_torchvision_and_read(
    name: str,
    serve: Server,
    classes: int,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = tmp_path / "mirror"
    served.mkdir()
    with mirror(served) as url:
        serve(served, url, monkeypatch)
        dataset = data.load(name, tmp_path / "data")
    reloaded = data.load(name, tmp_path / "data")  # the mirror is gone
    assert reloaded.sha256 == dataset.sha256
    assert (tmp_path / "data" / file).is_file()
    assert len(dataset.classes) == len(set(dataset.classes)) == classes
    counts = torch.bincount((dataset.train + dataset.validation + dataset.calibration).labels)
    assert counts.tolist() == [10 if name == "cifar10" else TRAIN] * classes
    test = dataset.open_test()
    assert torch.bincount(test.labels).tolist() == [TEST] * classes
    assert test.images.dtype == torch.uint8
    size = (3, 32, 32) if name == "cifar10" else (1, 28, 28)
    assert test.images.shape[1:] == dataset.train.images.shape[1:] == size
    picture = dataset.train.images[0].numpy()
    if name == "cifar10":  # the right half is red
        assert picture[:, 9].tolist() == [[0] * 16 + [255] * 16, [0] * 32, [0] * 32]
    else:  # an upright L: its stem is at the left, its foot at the bottom
        top, *_, bottom = (np.flatnonzero(row > 100) for row in picture[0] if (row > 100).any())
        assert top[0] == bottom[0]
        assert len(bottom) > 2 * len(top)


@pytest.mark.parametrize(("name", "serve"), [(name, serve) for name, serve, *_ in CASES])
def test_images_pass_through_normalise_bit_for_bit(
    name: str, serve: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mirror(tmp_path) as url:
        serve(tmp_path, url, monkeypatch)
        dataset = data.load(name, tmp_path / "data")
    picture = dataset.validation.images[0].numpy()
    stream = io.BytesIO()
    Image.fromarray(picture.transpose(1, 2, 0).squeeze()).save(stream, "PNG")
    entry: dict[str, Any] = dataset.record(0)
    settings = {key: entry[key] for key in ("size", "channels", "recipe")}
    assert np.array_equal(images.normalise(stream.getvalue(), **settings), picture)


def test_letters_have_their_names() -> None:
    assert data.DATASETS["emnist-letters"].classes[::25] == ("a", "z")
    balanced = data.DATASETS["emnist-balanced"].classes
    assert (balanced[9], balanced[10], balanced[35], balanced[36], balanced[46]) == (*"9AZat",)


def test_a_damaged_file_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mirror(tmp_path) as url:
        serve_kmnist(tmp_path, url, monkeypatch)
        data.load("kmnist", tmp_path / "data")
    path = tmp_path / "data" / "KMNIST" / "raw" / sources.FILES[0]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(data.DataError, match=f"{path.name} is damaged .*; remove it, and it will"):
        data.load("kmnist", tmp_path / "data")


def test_fashion_comes_from_debian_s_package_before_the_mirrors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = {}
    for part, names in (("train", sources.FILES), ("test", sources.TEST_FILES)):
        for name, content in zip(names, idx_pair(labels(10, part), ell()), strict=True):
            (tmp_path / f"{name}.gz").write_bytes(content)
            sums[name] = hashlib.sha256(gzip.decompress(content)).hexdigest()
    title, other = sources.FASHION.sources
    assert "mirrors" in other
    here = {title: download.debian_fetcher(sources.DEBIAN_PACKAGE, tmp_path, sums)}
    file_set = replace(sources.FASHION, files=sums, sources=here)
    read = sources.idx_reader(file_set, sources.FILES, sources.TEST_FILES)
    monkeypatch.setitem(data.DATASETS, "fashion", data.Source(read, sources.FASHION_CLASSES))
    dataset = data.load("fashion", tmp_path / "data")
    assert len(dataset.open_test()) == 10 * TEST
    laid = tmp_path / "data" / "FashionMNIST" / "raw"
    assert {path.name for path in laid.iterdir()} == set(sums)


def test_without_fashion_s_files_one_line_names_every_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sources.DEBIAN_FOLDER.exists():
        pytest.skip("Debian's package is installed")
    monkeypatch.setattr(DATASETS.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(data.DataError) as caught:
        data.load("fashion", tmp_path)
    words = ["does not exist", "Debian's", "apt install dataset-fashion-mnist"]
    words += ["mirrors", "refused"]
    places = [str(caught.value).index(word) for word in words]
    assert places == sorted(places)


def test_real_fashion_is_read_unchanged() -> None:
    try:
        dataset = data.load("fashion", DATA_DIR)
    except data.DataError as error:
        pytest.skip(f"no source of Fashion-MNIST can be reached: {error}")
    assert [len(part) for part in (dataset.train, dataset.validation)] == [52_500, 5_000]
    assert (dataset.recipe, dataset.classes[9]) == ("plain", "Ankle boot")
    # As published with torchvision's examples.
    assert dataset.mean == pytest.approx(0.286, abs=1e-3)
    for picture in dataset.validation.images[:300].numpy():
        stream = io.BytesIO()
        Image.fromarray(picture[0]).save(stream, "PNG")
        assert np.array_equal(images.normalise(stream.getvalue(), recipe="plain"), picture)


def made_up(shape: tuple[int, ...], marks: list[int], kind: type = np.uint8) -> data.Source:
    def read(data_dir: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
        noise = np.random.default_rng(0).integers(0, 256, (len(marks), *shape))
        return noise.astype(kind), np.array(marks, np.int64)

    return data.Source(read, ("cat", "dog"))


def test_a_plugin_s_data_set_is_registered_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.DATASETS, "mine", made_up((3, 20, 20), [0, 1] * 20))
    dataset = data.load("mine")
    assert (dataset.size, dataset.channels, dataset.recipe) == (20, 3, "plain")
    assert len(dataset.train + dataset.validation + dataset.calibration) == 40


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (made_up((28, 28), [0, 1] * 20), "mine gives images uint8 (40, 28, 28); uint8 (40, 1 or 3"),
        (made_up((1, 28, 20), [0, 1] * 20), "(40, 1, 28, 20)"),
        (made_up((1, 28, 28), [0, 1] * 20, float), "float64"),
        (made_up((1, 28, 28), [0, 1, 2] * 20), "from 0 to 1"),
        (made_up((1, 28, 28), [0] * 20), "class 'dog' has 0 training images; at least 8"),
    ],
)
def test_an_error_in_a_plugin_s_data_set_is_reported(
    source: data.Source, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(data.DATASETS, "mine", source)
    with pytest.raises(data.DataError) as caught:
        data.load("mine")
    assert words in str(caught.value)
