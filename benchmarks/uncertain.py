"""What a model calls uncertain, by the score that it is served with and by others.

python -m benchmarks.uncertain     # the current model of saved_models, which is one of digits

Each score's threshold flags 1 % of the calibration images. Every picture goes through
images.normalise as one that is sent to the server does; what that refuses as blank got no answer,
and is left out of the shares.
"""

import csv
import io
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from scipy.special import logsumexp, softmax

from mnist import calibration, data, images, inference, models, registry

SIDES = (28, 140)  # of noise pictures
EACH = 100  # noise pictures of a kind and a side
LETTERS = "AEFHKMNPRTUVWXaefhkmnrtuvwx"  # no B, C, D, G, I, J, L, O, Q, S, Y, Z: too like digits
LETTER_PICTURES = 20 * len(LETTERS)
CLOTHES = 500  # Fashion-MNIST's training images
KNOWN = 1_500  # validation images
VIM_DIMENSIONS = 32

Dice = np.random.Generator
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Logits (N, classes) and penultimate features (N, d) -> (N,), low for what is strange."""


# --- the pictures: uint8 (side, side)


def uniform(dice: Dice, side: int) -> np.ndarray:
    return dice.integers(0, 256, (side, side), np.uint8)


def gaussian(dice: Dice, side: int) -> np.ndarray:
    noise = dice.normal(128, dice.uniform(20, 60), (side, side))
    return noise.clip(0, 255).astype(np.uint8)


def salt_and_pepper(dice: Dice, side: int) -> np.ndarray:
    where, share = dice.random((side, side)), dice.uniform(0.02, 0.3)
    ground = np.full((side, side), dice.choice([0, 128, 255]), np.uint8)
    return np.where(where < share, 0, np.where(where > 1 - share, 255, ground)).astype(np.uint8)


def blobs(dice: Dice, side: int) -> np.ndarray:
    field = ndimage.gaussian_filter(dice.normal(size=(side, side)), side * dice.uniform(0.03, 0.15))
    return (255 * (field - field.min()) / np.ptp(field)).astype(np.uint8)


def strokes(dice: Dice, side: int) -> np.ndarray:
    """Four to ten straight lines."""
    paper = int(dice.choice([0, 255]))
    picture = Image.new("L", (side, side), paper)
    for _ in range(dice.integers(4, 11)):
        ends = [tuple(end) for end in dice.uniform(0, side, (2, 2))]
        width = max(1, round(side * dice.uniform(0.02, 0.08)))
        ImageDraw.Draw(picture).line(ends, fill=255 - paper, width=width)
    return np.asarray(picture)


NOISE = (uniform, gaussian, salt_and_pepper, blobs, strokes)


def letters(dice: Dice) -> Iterable[np.ndarray]:
    """In DejaVu, which matplotlib has: sans, serif and mono, upright and slanted, thin and bold."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [path for path in sorted(folder.glob("DejaVuS*.ttf")) if "Display" not in path.name]
    for i in range(LETTER_PICTURES):
        font = ImageFont.truetype(fonts[dice.integers(len(fonts))], int(dice.integers(24, 120)))
        picture = Image.new("L", (140, 140), 255)
        pen, letter = ImageDraw.Draw(picture), LETTERS[i % len(LETTERS)]
        pen.text((70, 70), letter, fill=0, font=font, anchor="mm")
        yield np.asarray(picture)


def encoded(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def sent(files: Iterable[bytes]) -> tuple[np.ndarray, int]:
    """Pictures as the model sees them, uint8 (N, 1, 28, 28), and how many are refused."""
    seen, refused = [], 0
    for file in files:
        try:
            seen.append(images.normalise(file))
        except images.ImageError:
            refused += 1
    return np.stack(seen), refused


def strange(dice: Dice, data_dir: Path | None) -> dict[str, tuple[np.ndarray, int]]:
    """By name: what looks like no digit, as `sent` gives it."""
    found = {}
    for kind in NOISE:
        for side in SIDES:
            pictures = [kind(dice, side) for _ in range(EACH)]
            found[f"{kind.__name__} {side}"] = sent(map(encoded, pictures))
    found["letters"] = sent(map(encoded, letters(dice)))
    clothes = data.load("fashion", data_dir).train.images[:CLOTHES, 0].numpy()
    found["fashion"] = sent(map(encoded, clothes))
    return found


# --- the scores


def scores_by(logits: np.ndarray, features: np.ndarray, labels: np.ndarray) -> dict[str, Score]:
    """By name; those of features know them from training images, and their labels (N,)."""
    unit = length_one(features)
    centre = features.mean(0)
    space = np.linalg.svd(features - centre, full_matrices=False)[2][:VIM_DIMENSIONS].T

    def residual(each: np.ndarray) -> np.ndarray:
        apart = each - centre
        return np.linalg.norm(apart - apart @ space @ space.T, axis=1)

    alpha = logits.max(1).mean() / residual(features).mean()
    plain, normed = mahalanobis(features, labels), mahalanobis(unit, labels)
    return {
        "softmax": lambda z, f: softmax(z, axis=1).max(1),
        "largest logit": lambda z, f: z.max(1),
        "energy": lambda z, f: logsumexp(z, axis=1),
        "ViM": lambda z, f: logsumexp(z, axis=1) - alpha * residual(f),
        "Mahalanobis": lambda z, f: plain(f),
        "  of unit length": lambda z, f: normed(length_one(f)),
        "nearest, cosine": lambda z, f: (length_one(f) @ unit.T).max(1),
    }


def length_one(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)


def mahalanobis(features: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    means = np.stack([features[labels == label].mean(0) for label in np.unique(labels)])
    covariance = np.cov(features - means[labels], rowvar=False)
    covariance += 0.1 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    white = np.linalg.cholesky(np.linalg.inv(covariance))
    return lambda f: -(((f @ white)[:, None] - means @ white) ** 2).sum(2).min(1)


def penultimate(model: torch.nn.Module, dataset: data.Dataset, pictures: np.ndarray) -> Any:
    """Logits (N, classes) and features (N, d) of pictures uint8, in torch."""
    watched, parts = models.WithFeatures(model).eval(), torch.from_numpy(pictures).split(250)
    with torch.inference_mode():
        outputs = [watched(dataset.standardise(part)) for part in parts]
    return [torch.cat([output[i] for output in outputs]).numpy() for i in (0, -1)]


# --- the table


def row(name: str, score: Callable[[str], np.ndarray], groups: dict[str, list[str]]) -> None:
    """Per cent flagged of each group, under the threshold that 1 % of `calibration` is below."""
    limit = calibration.fit_threshold(score("calibration"))
    flagged = {
        group: np.concatenate([score(each) for each in members]) < limit
        for group, members in groups.items()
    }
    click.echo(f"{name:18}" + "".join(f"{100 * low.mean():10.1f}" for low in flagged.values()))


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--seed", default=0, help="Of the noise and the letters.")
def main(folder: Path, data_dir: Path | None, seed: int) -> None:
    """Print the share of pictures that each score flags."""
    name, record = registry.record(folder)
    dataset = data.load(record["dataset"]["name"], data_dir)
    found = strange(np.random.default_rng(seed), data_dir)
    if (table := (data_dir or Path("data")) / "wild" / "labels.csv").exists():
        with table.open() as lines:
            files = [table.parent / line["file"] for line in csv.DictReader(lines)]
        found["wild"] = sent(file.read_bytes() for file in files)
    noise = [each for each in found if each.split()[0] in {kind.__name__ for kind in NOISE}]
    groups = {"noise": noise} | {each: [each] for each in found}
    pictures = {each: seen for each, (seen, _) in found.items()}
    pictures["calibration"] = dataset.calibration.images.numpy()
    pictures["validation"] = dataset.validation.images[:KNOWN].numpy()
    groups |= {"validation": ["validation"], "calibration": ["calibration"]}
    refused = sum(n for _, n in found.values())
    click.echo(
        f"{name}: {record['model']['name']}; {refused} pictures refused as blank; seed {seed}"
    )
    click.echo(f"{'% flagged':18}" + "".join(f"{group[:9]:>10}" for group in groups))
    number = sum(len(pictures[each]) for each in noise)
    click.echo(f"{'n':18}{number:10}" + "".join(f"{len(pictures[g]):10}" for g in [*groups][1:]))
    known = dataset.train.head(calibration.OOD_IMAGES)
    weights = torch.load(registry.file(folder, name, "weights"), weights_only=True)
    model = models.build(
        record["model"]["name"], dataset.channels, dataset.size, len(dataset.classes)
    )
    model.load_state_dict(weights)
    given = {each: penultimate(model, dataset, seen) for each, seen in pictures.items()}
    ways = scores_by(*penultimate(model, dataset, known.images.numpy()), known.labels.numpy())
    for way, score in ways.items():
        row(way, lambda each, score=score: score(*given[each]), groups)
    for engine, kind in inference.ENGINE_FILES.items():
        if kind in record["files"]:
            classify = inference.load(folder, name, threads=1, engine=engine)
            row(f"served: {engine}", partial(served, classify, pictures, {}), groups)


def served(
    classify: inference.Classifier,
    pictures: dict[str, np.ndarray],
    kept: dict[str, np.ndarray],
    each: str,
) -> np.ndarray:
    """The scores of one group of pictures."""
    if each not in kept:
        kept[each] = classify.scores(*classify.outputs(pictures[each]))
    return kept[each]


if __name__ == "__main__":
    try:
        main()
    except (registry.RegistryError, data.DataError) as error:
        raise SystemExit(f"uncertain: {error}") from error
