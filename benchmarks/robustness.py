"""Errors of a model on raw pictures of digits, brought to its form here and by a plain resize.

python -m benchmarks.robustness     # the current model of saved_models

Images of a split are rendered at 140x140, dark on white, changed as a suite says, and read from the
bytes of a file, as the server reads them. Beside it is what is most often done instead: grey,
resized to 28x28, inverted where the rim is light. Pictures in `wild/labels.csv` (columns file,
label) under the data directory are a suite of their own.

The final model was trained on the validation images, too; on the calibration images it was not.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click
import numpy as np
from PIL import Image
from scipy import ndimage

from mnist import data, images, inference, registry

SIDE = 140  # five times MNIST's
SPLITS = ("validation", "calibration", "test")

Dice = np.random.Generator
Suite = Callable[[np.ndarray, Dice], bytes]
"""Ink float (140, 140), 0..1, high -> the bytes of a file."""


def rendered(digit: np.ndarray) -> np.ndarray:
    """A digit uint8 (28, 28) as ink float (140, 140), 0..1."""
    large = Image.fromarray(digit).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(large) / 255


def encoded(paper: np.ndarray, kind: str = "PNG", **options: int) -> bytes:
    """Light (H, W), 0..1, or RGBA uint8 (H, W, 4), as a file."""
    if paper.dtype != np.uint8:
        paper = (paper.clip(0, 1) * 255).round().astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(paper).save(stream, kind, **options)
    return stream.getvalue()


# --- the suites


def unchanged(ink: np.ndarray, dice: Dice) -> bytes:
    return encoded(1 - ink)


def inverted(ink: np.ndarray, dice: Dice) -> bytes:
    return encoded(ink)


def shifted(ink: np.ndarray, dice: Dice) -> bytes:
    """By up to a third of the side, as far as the ink stays inside."""
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    by = [
        dice.integers(max(-SIDE // 3, -at[0]), min(SIDE // 3, SIDE - 1 - at[-1]) + 1)
        for at in (rows, columns)
    ]
    return encoded(1 - np.roll(ink, by, (0, 1)))


def scaled(ink: np.ndarray, dice: Dice) -> bytes:
    """To 0.25 to 0.7 of its size, in the middle."""
    side = round(SIDE * dice.uniform(0.25, 0.7))
    small = Image.fromarray((ink * 255).astype(np.uint8)).resize((side, side))
    out, at = np.zeros((SIDE, SIDE)), (SIDE - side) // 2
    out[at : at + side, at : at + side] = np.asarray(small) / 255
    return encoded(1 - out)


def rotated(ink: np.ndarray, dice: Dice) -> bytes:
    """By 15 degrees, to either side."""
    return encoded(1 - ndimage.rotate(ink, dice.choice([-15, 15]), reshape=False, order=1))


def thin(ink: np.ndarray, dice: Dice) -> bytes:
    """By 6 of 140 pixels, but a line of 2 pixels stays where a stroke was."""
    inside = ndimage.distance_transform_edt(ink > 0.5)
    ridge = (inside > 0) & (inside >= ndimage.maximum_filter(inside, 3))
    line = ndimage.binary_dilation(ridge, np.ones((2, 2)))
    return encoded(1 - np.maximum(ndimage.grey_erosion(ink, (7, 7)), line))


def thick(ink: np.ndarray, dice: Dice) -> bytes:
    """By 8 of 140 pixels."""
    return encoded(1 - ndimage.grey_dilation(ink, (9, 9)))


def transparent(ink: np.ndarray, dice: Dice) -> bytes:
    """Black strokes without paper."""
    strokes = np.zeros((SIDE, SIDE, 4), np.uint8)
    strokes[..., 3] = (ink * 255).round()
    return encoded(strokes)


def jpeg(ink: np.ndarray, dice: Dice) -> bytes:
    """Quality 30."""
    return encoded(1 - ink, "JPEG", quality=30)


def lighting(ink: np.ndarray, dice: Dice) -> bytes:
    """The paper's light falls from 1 to 0.35 across the picture; the ink reflects a fifth."""
    angle = dice.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    along = (np.cos(angle) * x + np.sin(angle) * y) / (abs(np.cos(angle)) + abs(np.sin(angle)))
    return encoded((1 - 0.8 * ink) * (0.675 + 0.325 * along))


def ruled(ink: np.ndarray, dice: Dice) -> bytes:
    """Grey rules behind the ink, two pixels thick, every 28."""
    paper = np.ones((SIDE, SIDE))
    first = dice.integers(28)
    paper[first::28] = paper[first + 1 :: 28] = 0.7
    return encoded(np.minimum(paper, 1 - ink))


def slanted(ink: np.ndarray, dice: Dice) -> bytes:
    """Such rules, that rise or fall by 4 to 14 pixels from edge to edge."""
    y, x = np.mgrid[:SIDE, :SIDE]
    fall = dice.choice([-1, 1]) * dice.uniform(4, 14)
    on_rule = np.round(y + fall * x / SIDE + dice.integers(28)) % 28 < 2
    return encoded(np.minimum(1 - 0.3 * on_rule, 1 - ink))


def shadowed(ink: np.ndarray, dice: Dice) -> bytes:
    """Beyond a soft edge across the picture there is half the light; the ink reflects a fifth."""
    angle, at = dice.uniform(0, 2 * np.pi), dice.uniform(-0.4, 0.4)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    beyond = np.clip(0.5 + 8 * (np.cos(angle) * x + np.sin(angle) * y - at), 0, 1)
    return encoded((1 - 0.8 * ink) * (1 - 0.5 * beyond))


def on_a_sheet(ink: np.ndarray, dice: Dice) -> bytes:
    """A sixth as wide as a sheet whose light falls to one side and to its corners; grain, JPEG."""
    height, width = 5 * SIDE, 6 * SIDE
    sheet = np.zeros((height, width))
    top, left = dice.integers(height - SIDE), dice.integers(width - SIDE)
    sheet[top : top + SIDE, left : left + SIDE] = ink
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle = dice.uniform(0, 2 * np.pi)
    light = (0.7 + 0.25 * (np.cos(angle) * x + np.sin(angle) * y)) * (1 - 0.1 * (x**2 + y**2))
    return encoded((1 - 0.7 * sheet) * light + dice.normal(0, 0.03, light.shape), "JPEG")


def noisy(ink: np.ndarray, dice: Dice) -> bytes:
    """Grain of a deviation of 0.1, ink and paper not quite black and white."""
    return encoded(0.85 - 0.7 * ink + dice.normal(0, 0.1, ink.shape))


SUITES: dict[str, Suite] = {
    "unchanged": unchanged,
    "inverted": inverted,
    "shifted": shifted,
    "scaled": scaled,
    "rotated by 15 degrees": rotated,
    "thin": thin,
    "thick": thick,
    "transparent": transparent,
    "JPEG, quality 30": jpeg,
    "uneven light": lighting,
    "ruled paper": ruled,
    "rules that fall": slanted,
    "edge of a shadow": shadowed,
    "small on a sheet": on_a_sheet,
    "noise": noisy,
}


# --- reading them


def resized(file: bytes, size: int = 28) -> np.ndarray:
    """The plain way, uint8 (1, size, size)."""
    image = Image.open(io.BytesIO(file)).convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    grey = np.asarray(page.convert("L").resize((size, size), Image.Resampling.BILINEAR))
    rim = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return (255 - grey if np.median(rim) > 127 else grey)[None]


def errors(
    classify: inference.Classifier,
    files: Iterable[bytes],
    labels: np.ndarray,
    read: Callable[[bytes], np.ndarray],
) -> np.ndarray:
    """Which of the pictures are read wrong, (N,) bool; one that is refused is."""
    seen, there = [], []
    for file in files:
        try:
            seen.append(read(file))
            there.append(True)
        except images.ImageError:
            there.append(False)
    wrong = np.ones(len(labels), bool)
    wrong[there] = classify(np.stack(seen)).argmax(1) != labels[there]
    return wrong


def suites(digits: np.ndarray, seed: int) -> Iterator[tuple[str, list[bytes]]]:
    """Each suite's name and its files, of digits uint8 (N, 28, 28)."""
    for name, suite in SUITES.items():
        dice = np.random.default_rng(seed)
        yield name, [suite(rendered(digit), dice) for digit in digits]


def wild(table: Path) -> tuple[list[bytes], np.ndarray]:
    """Pictures that people made, and the digits (N,) int64 they show."""
    with table.open() as file:
        lines = list(csv.DictReader(file))
    files = [(table.parent / line["file"]).read_bytes() for line in lines]
    return files, np.array([int(line["label"]) for line in lines])


def compare(
    classify: inference.Classifier, name: str, files: list[bytes], labels: np.ndarray
) -> None:
    """One line of the table."""
    ours, plain = (
        errors(classify, files, labels, read).sum() for read in (images.normalise, resized)
    )
    n = len(labels)
    shares = f"{1 - ours / n:10.1%}{1 - plain / n:10.1%}"
    click.echo(f"{name:24}{n:8,}{ours:8}{plain:8}{shares}")


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--split", type=click.Choice(SPLITS), default="validation")
@click.option("--images", "n", default=500, help="Of the split, for each suite.")
@click.option("--seed", default=0)
def main(folder: Path, data_dir: Path | None, split: str, n: int, seed: int) -> None:
    """Print the errors of each suite, with images.normalise and with a plain resize."""
    name, record = registry.record(folder)
    dataset = data.load(record["dataset"]["name"], data_dir)
    chosen = (dataset.open_test() if split == "test" else getattr(dataset, split)).head(n)
    classify = inference.load(folder, name)
    click.echo(f"{name}: {record['model']['name']}, {classify.engine}; {split}, seed {seed}")
    heads = ("", "n", "errors", "plain", "right", "plain")
    click.echo("{:24}{:>8}{:>8}{:>8}{:>10}{:>10}".format(*heads))
    labels = chosen.labels.numpy()
    for suite, files in suites(chosen.images[:, 0].numpy(), seed):
        compare(classify, suite, files, labels)
    table = (data_dir or Path("data")) / "wild" / "labels.csv"
    if table.exists():
        compare(classify, "wild", *wild(table))


if __name__ == "__main__":
    try:
        main()
    except (registry.RegistryError, data.DataError) as error:
        raise SystemExit(f"robustness: {error}") from error
