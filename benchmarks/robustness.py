"""Errors of a model on raw pictures of digits: images.normalise compared with a plain resize.

python -m benchmarks.robustness     # the current model of saved_models; a minute

Images of a split are rendered at 140x140, dark on white, and changed in the way of each suite. Both
ways of reading get the bytes of a file, as the server does. The baseline is the usual way: grey,
resized to 28x28, inverted if the border is light. Pictures in `wild/labels.csv` (columns file,
label) under the data directory are a suite of their own.

The final model was trained on the validation images, too, but not on the calibration images.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import click
import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

from mnist import data, images, inference, registry

SIDE = 140  # pixels, five times the side of an MNIST image
SPLITS = ("validation", "calibration", "test")

Change = Callable[[np.ndarray, Generator], bytes]
"""Ink float (140, 140), 0..1, ink is high -> the bytes of a file."""


def render(digit: np.ndarray) -> np.ndarray:
    """Enlarge a digit uint8 (28, 28) to ink float (140, 140), 0..1."""
    large = Image.fromarray(digit).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(large) / 255


def encode(picture: np.ndarray, file_format: str = "PNG", **options: int) -> bytes:
    """Write brightness float (H, W), 0..1, grey uint8 (H, W) or RGBA uint8 (H, W, 4) as a file."""
    if picture.dtype != np.uint8:
        picture = (picture.clip(0, 1) * 255).round().astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, file_format, **options)
    return stream.getvalue()


# --- changes of a picture


def keep(ink: np.ndarray, rng: Generator) -> bytes:
    return encode(1 - ink)


def invert(ink: np.ndarray, rng: Generator) -> bytes:
    return encode(ink)


def shift(ink: np.ndarray, rng: Generator) -> bytes:
    """Move the digit by up to a third of the side, as far as the ink stays inside."""
    inked_rows, inked_columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    offsets = [
        rng.integers(max(-SIDE // 3, -inked[0]), min(SIDE // 3, SIDE - 1 - inked[-1]) + 1)
        for inked in (inked_rows, inked_columns)
    ]
    return encode(1 - np.roll(ink, offsets, (0, 1)))


def shrink(ink: np.ndarray, rng: Generator) -> bytes:
    """Scale the digit to 0.25 to 0.7 of its size, in the middle."""
    side = round(SIDE * rng.uniform(0.25, 0.7))
    small = Image.fromarray((ink * 255).astype(np.uint8)).resize((side, side))
    canvas, start = np.zeros((SIDE, SIDE)), (SIDE - side) // 2
    canvas[start : start + side, start : start + side] = np.asarray(small) / 255
    return encode(1 - canvas)


def rotate(ink: np.ndarray, rng: Generator) -> bytes:
    """Rotate by 15 degrees, to either side."""
    return encode(1 - ndimage.rotate(ink, rng.choice([-15, 15]), reshape=False, order=1))


def thin(ink: np.ndarray, rng: Generator) -> bytes:
    """Erode strokes by 6 of 140 pixels; of thinner strokes a line of 2 pixels stays."""
    inside = ndimage.distance_transform_edt(ink > 0.5)
    ridge = (inside > 0) & (inside >= ndimage.maximum_filter(inside, 3))
    line = ndimage.binary_dilation(ridge, np.ones((2, 2)))
    return encode(1 - np.maximum(ndimage.grey_erosion(ink, (7, 7)), line))


def thicken(ink: np.ndarray, rng: Generator) -> bytes:
    """Dilate strokes by 8 of 140 pixels."""
    return encode(1 - ndimage.grey_dilation(ink, (9, 9)))


def remove_paper(ink: np.ndarray, rng: Generator) -> bytes:
    """Draw black strokes on a transparent background."""
    strokes = np.zeros((SIDE, SIDE, 4), np.uint8)
    strokes[..., 3] = (ink * 255).round()
    return encode(strokes)


def compress(ink: np.ndarray, rng: Generator) -> bytes:
    """Write a JPEG of quality 30."""
    return encode(1 - ink, "JPEG", quality=30)


def light_unevenly(ink: np.ndarray, rng: Generator) -> bytes:
    """Reduce the light from 1 to 0.35 across the picture; the ink reflects a fifth of the light."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    slope = (np.cos(angle) * x + np.sin(angle) * y) / (abs(np.cos(angle)) + abs(np.sin(angle)))
    return encode((1 - 0.8 * ink) * (0.675 + 0.325 * slope))


def draw_rules(ink: np.ndarray, rng: Generator) -> bytes:
    """Draw grey rules behind the ink, two pixels thick, every 28 pixels."""
    paper = np.ones((SIDE, SIDE))
    first = rng.integers(28)
    paper[first::28] = paper[first + 1 :: 28] = 0.7
    return encode(np.minimum(paper, 1 - ink))


def draw_slanted_rules(ink: np.ndarray, rng: Generator) -> bytes:
    """Draw rules that rise or fall by 4 to 14 pixels from edge to edge."""
    y, x = np.mgrid[:SIDE, :SIDE]
    fall = rng.choice([-1, 1]) * rng.uniform(4, 14)
    on_rule = np.round(y + fall * x / SIDE + rng.integers(28)) % 28 < 2
    return encode(np.minimum(1 - 0.3 * on_rule, 1 - ink))


def cast_shadow(ink: np.ndarray, rng: Generator) -> bytes:
    """Halve the light beyond a soft edge across the picture; the ink reflects a fifth of light."""
    angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-0.4, 0.4)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    shadow = np.clip(0.5 + 8 * (np.cos(angle) * x + np.sin(angle) * y - offset), 0, 1)
    return encode((1 - 0.8 * ink) * (1 - 0.5 * shadow))


def place_on_sheet(ink: np.ndarray, rng: Generator) -> bytes:
    """Place the digit on a sheet six times as wide, with uneven light and grain; write a JPEG.

    The light falls to one side and to the corners.
    """
    height, width = 5 * SIDE, 6 * SIDE
    sheet = np.zeros((height, width))
    top, left = rng.integers(height - SIDE), rng.integers(width - SIDE)
    sheet[top : top + SIDE, left : left + SIDE] = ink
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    light = (0.7 + 0.25 * (np.cos(angle) * x + np.sin(angle) * y)) * (1 - 0.1 * (x**2 + y**2))
    return encode((1 - 0.7 * sheet) * light + rng.normal(0, 0.03, light.shape), "JPEG")


def add_noise(ink: np.ndarray, rng: Generator) -> bytes:
    """Add noise of standard deviation 0.1 to dark grey ink on light grey paper."""
    return encode(0.85 - 0.7 * ink + rng.normal(0, 0.1, ink.shape))


SUITES: dict[str, Change] = {
    "unchanged": keep,
    "inverted": invert,
    "shifted": shift,
    "scaled": shrink,
    "rotated by 15 degrees": rotate,
    "thin": thin,
    "thick": thicken,
    "transparent": remove_paper,
    "JPEG, quality 30": compress,
    "uneven light": light_unevenly,
    "ruled paper": draw_rules,
    "rules that fall": draw_slanted_rules,
    "edge of a shadow": cast_shadow,
    "small on a sheet": place_on_sheet,
    "noise": add_noise,
}


# --- reading and comparing


def resize(file: bytes, size: int = 28) -> np.ndarray:
    """The baseline of images.normalise: a file -> uint8 (1, size, size)."""
    image = Image.open(io.BytesIO(file)).convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    grey = np.asarray(page.convert("L").resize((size, size), Image.Resampling.BILINEAR))
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return (255 - grey if np.median(border) > 127 else grey)[None]


def count_errors(
    classify: inference.Classifier,
    files: Iterable[bytes],
    labels: np.ndarray,
    read: Callable[[bytes], np.ndarray],
) -> int:
    """Count wrong predictions; a picture that `read` refuses is an error, too."""
    pictures, readable_labels = [], []
    for file, label in zip(files, labels, strict=True):
        with suppress(images.ImageError):
            pictures.append(read(file))
            readable_labels.append(label)
    correct = classify(np.stack(pictures)).argmax(1) == np.array(readable_labels)
    return len(labels) - int(correct.sum())


def make_suites(digits: np.ndarray, seed: int) -> Iterator[tuple[str, list[bytes]]]:
    """Make the files of each suite from digits uint8 (N, 28, 28); yields its name and files."""
    for name, change in SUITES.items():
        rng = np.random.default_rng(seed)
        yield name, [change(render(digit), rng) for digit in digits]


def load_wild(table: Path) -> tuple[list[bytes], np.ndarray]:
    """Read pictures that people made; returns the files and their digits (N,) int64."""
    with table.open() as file:
        rows = list(csv.DictReader(file))
    files = [(table.parent / row["file"]).read_bytes() for row in rows]
    return files, np.array([int(row["label"]) for row in rows])


def print_row(
    classify: inference.Classifier, suite: str, files: list[bytes], labels: np.ndarray
) -> None:
    """Print the errors on the files of a suite, with images.normalise and with the baseline."""
    n = len(labels)
    errors, baseline = (
        count_errors(classify, files, labels, read) for read in (images.normalise, resize)
    )
    accuracies = f"{1 - errors / n:10.1%}{1 - baseline / n:10.1%}"
    click.echo(f"{suite:24}{n:8,}{errors:8}{baseline:8}{accuracies}")


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--split", type=click.Choice(SPLITS), default="validation", show_default=True)
@click.option("--images", "n", default=500, show_default=True, help="Of the split, for each suite.")
@click.option("--seed", default=0, show_default=True, help="Of the changes.")
def main(folder: Path, data_dir: Path | None, split: str, n: int, seed: int) -> None:
    """Print the errors on each suite, with images.normalise and with a plain resize."""
    name, record = registry.record(folder)
    dataset = data.load(record["dataset"]["name"], data_dir)
    examples = (dataset.open_test() if split == "test" else getattr(dataset, split)).head(n)
    classify = inference.load(folder, name)
    click.echo(f"{name}: {record['model']['name']}, {classify.engine}; {split}, seed {seed}")
    headings = ("", "n", "errors", "plain", "right", "plain")
    click.echo("{:24}{:>8}{:>8}{:>8}{:>10}{:>10}".format(*headings))
    labels = examples.labels.numpy()
    for suite, files in make_suites(examples.images[:, 0].numpy(), seed):
        print_row(classify, suite, files, labels)
    table = (data_dir or Path("data")) / "wild" / "labels.csv"
    if table.exists():
        print_row(classify, "wild", *load_wild(table))


if __name__ == "__main__":
    try:
        main()
    except (registry.RegistryError, data.DataError) as error:
        raise SystemExit(f"robustness: {error}") from error
