"""How well a model flags pictures without a digit: its own score compared with other scores.

python -m benchmarks.ood     # the current model of saved_models, of digits; two minutes

Compares softmax, energy, ViM, Mahalanobis and other scores with that of the served model, on noise,
letters, Omniglot's characters, clothes, photos of hands and pictures in `wild/`. Three tables: the
share that is flagged where 1 % of the calibration images are, the area under the ROC curve (AUROC)
against calibration images, and the share that passes where 95 % of these do (FPR95). The model was
not trained on calibration images. Every picture goes through images.normalise as on the server.
Pictures that it refuses as blank get no answer, and are left out.
"""

import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click
import matplotlib
import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from scipy.special import logsumexp, softmax
from sklearn.metrics import roc_auc_score
from torch import nn

from benchmarks.robustness import encode, load_wild
from mnist import calibration, data, images, inference, models, registry

SIDES = (28, 140)  # of noise pictures
NOISE_PICTURES = 100  # of each kind and side
LETTERS = "AEFHKMNPRTUVWXaefhkmnrtuvwx"  # no B, C, D, G, I, J, L, O, Q, S, Y, Z: too like digits
LETTER_PICTURES = 20 * len(LETTERS)
PICTURES = 1_000  # of Omniglot, of photos and of Fashion-MNIST's training images, at most
VIM_DIMENSIONS = 32

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Logits (N, classes) and penultimate features (N, d) -> (N,), low for unfamiliar pictures."""


# --- the pictures: uint8 (side, side)


def draw_uniform(rng: Generator, side: int) -> np.ndarray:
    return rng.integers(0, 256, (side, side), np.uint8)


def draw_gaussian(rng: Generator, side: int) -> np.ndarray:
    noise = rng.normal(128, rng.uniform(20, 60), (side, side))
    return noise.clip(0, 255).astype(np.uint8)


def draw_salt_and_pepper(rng: Generator, side: int) -> np.ndarray:
    draws, share = rng.random((side, side)), rng.uniform(0.02, 0.3)
    ground = np.full((side, side), rng.choice([0, 128, 255]), np.uint8)
    return np.where(draws < share, 0, np.where(draws > 1 - share, 255, ground)).astype(np.uint8)


def draw_blobs(rng: Generator, side: int) -> np.ndarray:
    field = ndimage.gaussian_filter(rng.normal(size=(side, side)), side * rng.uniform(0.03, 0.15))
    return (255 * (field - field.min()) / np.ptp(field)).astype(np.uint8)


def draw_strokes(rng: Generator, side: int) -> np.ndarray:
    """Draw four to ten straight lines."""
    paper = int(rng.choice([0, 255]))
    picture = Image.new("L", (side, side), paper)
    for _ in range(rng.integers(4, 11)):
        ends = [tuple(end) for end in rng.uniform(0, side, (2, 2))]
        width = max(1, round(side * rng.uniform(0.02, 0.08)))
        ImageDraw.Draw(picture).line(ends, fill=255 - paper, width=width)
    return np.asarray(picture)


NOISE = {
    "uniform": draw_uniform,
    "gaussian": draw_gaussian,
    "salt_and_pepper": draw_salt_and_pepper,
    "blobs": draw_blobs,
    "strokes": draw_strokes,
}


def draw_letters(rng: Generator) -> Iterator[np.ndarray]:
    """Draw letters in DejaVu, which matplotlib has: sans, serif and mono, of several styles."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [path for path in sorted(folder.glob("DejaVuS*.ttf")) if "Display" not in path.name]
    for i in range(LETTER_PICTURES):
        font = ImageFont.truetype(fonts[rng.integers(len(fonts))], int(rng.integers(24, 120)))
        picture = Image.new("L", (140, 140), 255)
        pen, letter = ImageDraw.Draw(picture), LETTERS[i % len(LETTERS)]
        pen.text((70, 70), letter, fill=0, font=font, anchor="mm")
        yield np.asarray(picture)


def normalise_all(files: Iterable[bytes]) -> tuple[np.ndarray, int]:
    """Normalise files to model inputs uint8 (N, 1, 28, 28); also returns how many are refused."""
    inputs, refused = [], 0
    for file in files:
        try:
            inputs.append(images.normalise(file))
        except images.ImageError:
            refused += 1
    return np.stack(inputs), refused


def make_unfamiliar(rng: Generator, data_dir: Path | None) -> dict[str, list[bytes]]:
    """Make or read the files of pictures that show no digit, in groups by name.

    Under the data directory, `omniglot/*.zip` has PNG files and `sign-digits/` photos in folders.
    """
    noise = [
        encode(draw(rng, side))
        for draw in NOISE.values()
        for side in SIDES
        for _ in range(NOISE_PICTURES)
    ]
    clothes = data.load("fashion", data_dir).train.images[:PICTURES, 0].numpy()
    groups = {
        "noise": noise,
        "letters": [encode(picture) for picture in draw_letters(rng)],
        "fashion": [encode(picture) for picture in clothes],
    }
    folder = data_dir or Path("data")
    for archive in sorted((folder / "omniglot").glob("*.zip")):
        with zipfile.ZipFile(archive) as files:
            names = sorted(name for name in files.namelist() if name.endswith(".png"))
            chosen = rng.permutation(names)[:PICTURES]
            groups["omniglot"] = [files.read(name) for name in chosen]
    if photos := sorted((folder / "sign-digits").glob("*/*")):
        chosen = rng.permutation(len(photos))[:PICTURES]
        groups["photos"] = [photos[i].read_bytes() for i in chosen]
    if (table := folder / "wild" / "labels.csv").exists():
        groups["wild"] = load_wild(table)[0]
    return groups


# --- the scores


def fit_scores(logits: np.ndarray, features: np.ndarray, labels: np.ndarray) -> dict[str, Score]:
    """Fit the scores to the outputs for training images and their labels (N,); returns by name."""
    unit = scale_to_unit_length(features)
    centre = features.mean(0)
    axes = np.linalg.svd(features - centre, full_matrices=False)[2][:VIM_DIMENSIONS].T

    def compute_residual(features: np.ndarray) -> np.ndarray:
        centred = features - centre
        return np.linalg.norm(centred - centred @ axes @ axes.T, axis=1)

    alpha = logits.max(1).mean() / compute_residual(features).mean()
    mahalanobis, unit_mahalanobis = fit_mahalanobis(features, labels), fit_mahalanobis(unit, labels)
    return {
        "softmax": lambda z, f: softmax(z, axis=1).max(1),
        "largest logit": lambda z, f: z.max(1),
        "energy": lambda z, f: logsumexp(z, axis=1),
        "ViM": lambda z, f: logsumexp(z, axis=1) - alpha * compute_residual(f),
        "Mahalanobis": lambda z, f: mahalanobis(f),
        "  of unit length": lambda z, f: unit_mahalanobis(scale_to_unit_length(f)),
        "nearest, cosine": lambda z, f: (scale_to_unit_length(f) @ unit.T).max(1),
    }


def scale_to_unit_length(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)


def fit_mahalanobis(features: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fit minus the squared Mahalanobis distance to the nearest class of features (N, d)."""
    means = np.stack([features[labels == label].mean(0) for label in np.unique(labels)])
    covariance = np.cov(features - means[labels], rowvar=False)
    covariance += 0.1 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    whitening = np.linalg.cholesky(np.linalg.inv(covariance))
    return lambda f: -(((f @ whitening)[:, None] - means @ whitening) ** 2).sum(2).min(1)


def load_network(folder: Path, name: str, dataset: data.Dataset) -> nn.Module:
    """Load the weights of a saved model, which was trained on this data set."""
    network = registry.record(folder, name)[1]["model"]["name"]
    model = models.build(network, dataset.channels, dataset.size, len(dataset.classes))
    weights = torch.load(registry.file(folder, name, "weights"), weights_only=True)
    model.load_state_dict(weights)
    return model


@torch.inference_mode()
def compute_outputs(
    model: nn.Module, dataset: data.Dataset, inputs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute logits (N, classes) and penultimate features (N, d) of uint8 inputs, in torch."""
    network = models.WithFeatures(model).eval()
    batches = torch.from_numpy(inputs).split(250)
    outputs = [network(dataset.standardise(batch)) for batch in batches]
    logits, features = (torch.cat([output[i] for output in outputs]).numpy() for i in (0, -1))
    return logits, features


# --- the tables


def flag(known: np.ndarray, scores: np.ndarray) -> float:
    """The per cent of scores below the one that flags 1 % of the calibration images."""
    return 100 * float((scores < calibration.fit_threshold(known)).mean())


def compute_auroc(known: np.ndarray, scores: np.ndarray) -> float:
    """The per cent of pairs of a calibration image and a picture where the image scores higher."""
    both = np.concatenate([known, scores])
    return 100 * float(roc_auc_score(np.arange(len(both)) < len(known), both))


def compute_fpr95(known: np.ndarray, scores: np.ndarray) -> float:
    """The per cent of scores above the one that 95 % of the calibration images reach."""
    return 100 * float((scores >= np.quantile(known, 0.05)).mean())


TABLES = {"% flagged": flag, "AUROC, %": compute_auroc, "FPR95, %": compute_fpr95}
KNOWN = "calibration"


def print_tables(rows: dict[str, dict[str, np.ndarray]]) -> None:
    """Print each table, with a row for each score and a column for each group of pictures."""
    groups = [group for group in next(iter(rows.values())) if group != KNOWN]
    for title, measure in TABLES.items():
        click.echo(f"\n{title:18}" + "".join(f"{group:>11}" for group in groups))
        for name, scores in rows.items():
            cells = (f"{measure(scores[KNOWN], scores[group]):11.1f}" for group in groups)
            click.echo(f"{name:18}" + "".join(cells))


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("saved_models"))
@click.option("--data-dir", type=click.Path(path_type=Path), envvar="MNIST_DATA_DIR")
@click.option("--seed", default=0, show_default=True, help="Of the pictures.")
def main(folder: Path, data_dir: Path | None, seed: int) -> None:
    """Print how well each score separates pictures without a digit."""
    name, record = registry.record(folder)
    dataset = data.load(record["dataset"]["name"], data_dir)
    files = make_unfamiliar(np.random.default_rng(seed), data_dir)
    normalised = {group: normalise_all(pictures) for group, pictures in files.items()}
    click.echo(f"{name}: {record['model']['name']}; seed {seed}")
    for group, (group_inputs, refused) in normalised.items():
        click.echo(f"{group}: {len(group_inputs):,} pictures, {refused} refused as blank")
    inputs = {group: group_inputs for group, (group_inputs, _) in normalised.items()}
    inputs[KNOWN] = dataset.calibration.images.numpy()
    model, known = load_network(folder, name, dataset), dataset.train.head(calibration.OOD_IMAGES)
    outputs = {group: compute_outputs(model, dataset, inputs[group]) for group in inputs}
    known_outputs = compute_outputs(model, dataset, known.images.numpy())
    rows = {
        score_name: {group: score(*outputs[group]) for group in inputs}
        for score_name, score in fit_scores(*known_outputs, known.labels.numpy()).items()
    }
    for engine, kind in inference.ENGINE_FILES.items():
        if kind in record["files"]:
            classify = inference.load(folder, name, threads=1, engine=engine)
            rows[f"served: {engine}"] = {
                group: classify.scores(*classify.outputs(inputs[group])) for group in inputs
            }
    print_tables(rows)


if __name__ == "__main__":
    try:
        main()
    except (registry.RegistryError, data.DataError) as error:
        raise SystemExit(f"ood: {error}") from error
