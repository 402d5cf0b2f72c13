"""Digits of other collections than MNIST: images.normalise compared with a plain resize.

python -m benchmarks.hands     # the current model of saved_models; a minute

Each collection is read as raw pictures, as the server reads them. Columns: the share that is right,
the share that is flagged as uncertain, the share of the others that is right, and the share that is
right after a plain resize. Under the data directory, `usps/zip.train.gz` has a digit a line: its
label, and 16x16 values from -1 to 1; `wild/labels.csv` has columns file and label.
"""

import gzip
from pathlib import Path

import click
import numpy as np
from PIL import Image

from benchmarks.robustness import count_errors, encode, load_wild, resize
from mnist import data, images, inference, registry

SCALE, MARGIN = 5, 20  # a digit of 16x16 becomes one of 80x80 on paper of 120x120


def load_usps(path: Path) -> tuple[list[bytes], np.ndarray]:
    """Read envelopes' digits; returns PNG files, dark on white, and labels (N,) int64."""
    with gzip.open(path, "rt") as lines:
        rows = np.array([line.split() for line in lines], np.float32)
    return [render(row.reshape(16, 16)) for row in rows[:, 1:]], rows[:, 0].astype(np.int64)


def render(digit: np.ndarray) -> bytes:
    """Enlarge ink (H, W), -1..1, on white paper with a margin; returns a PNG file."""
    paper = ((1 - digit) * 127.5).round().astype(np.uint8)
    size = (SCALE * digit.shape[1], SCALE * digit.shape[0])
    large = np.asarray(Image.fromarray(paper).resize(size, Image.Resampling.BICUBIC))
    return encode(np.pad(large, MARGIN, constant_values=255))


def find_collections(data_dir: Path) -> dict[str, tuple[list[bytes], np.ndarray]]:
    """Read the collections that exist: files and labels by name."""
    readers = {"usps": (load_usps, "usps/zip.train.gz"), "wild": (load_wild, "wild/labels.csv")}
    return {
        name: read(data_dir / path)
        for name, (read, path) in readers.items()
        if (data_dir / path).exists()
    }


def print_row(
    classify: inference.Classifier, name: str, files: list[bytes], labels: np.ndarray
) -> None:
    """Print the shares of a collection; a picture that cannot be read is wrong and uncertain."""
    right, sure = np.zeros(len(files), bool), np.zeros(len(files), bool)
    for i, file in enumerate(files):
        try:
            predictions = classify.predict(images.normalise(file)[None])
        except images.ImageError:
            continue
        right[i] = predictions.probabilities[0].argmax() == labels[i]
        sure[i] = not predictions.uncertain[0]
    baseline = 1 - count_errors(classify, files, labels, resize) / len(labels)
    shares = (right.mean(), 1 - sure.mean(), right[sure].mean(), baseline)
    click.echo(f"{name:8}{len(files):8,}" + "".join(f"{share:12.1%}" for share in shares))


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
def main(folder: Path, data_dir: Path | None) -> None:
    """Print the shares that are read right of each collection."""
    name, record = registry.record(folder)
    classify = inference.load(folder, name)
    click.echo(f"{name}: {record['model']['name']}, {classify.engine}")
    headings = ("", "n", "right", "uncertain", "sure, right", "plain")
    click.echo("{:8}{:>8}{:>12}{:>12}{:>12}{:>12}".format(*headings))
    for collection, (files, labels) in find_collections(data_dir or Path("data")).items():
        print_row(classify, collection, files, labels)


if __name__ == "__main__":
    try:
        main()
    except (registry.RegistryError, data.DataError) as error:
        raise SystemExit(f"hands: {error}") from error
