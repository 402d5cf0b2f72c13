"""How much a picture's features are like those of the images a model was trained on."""

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# In which the covariance is kept, as in all others it is next to nothing; and the share of the mean
# variance that is added in every direction. Of noise, letters and Fashion-MNIST, 64 directions and
# 0.1 flagged 94, 82 and 82 %, 128 and 0.03 95, 84 and 83 %, 128 and 0.01 the same, 192 and 256 with
# any of them no more (`parallel` in int8, three seeds of benchmarks/uncertain.py, 2026-11-28).
DIRECTIONS, RIDGE = 128, 0.03


@dataclass(frozen=True)
class Likeness:
    """Features (d,) as a normal distribution around each class's mean, with one covariance.

    `means` is (classes, d). Distances count less along the columns of `directions` (d, k), by the
    square of their length, the more, the more training images differ there; `unit` is the mean
    squared distance of training images.
    """

    means: NDArray[np.float32]
    directions: NDArray[np.float32]
    unit: float

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores (N,) of features (N, d): about -1 for a training image, the lower the stranger.

        Minus the squared distance to the nearest class, by Mahalanobis (Lee et al. 2018, arXiv
        1807.03888), of features of unit length (Mueller and Hein 2025, arXiv 2505.18032).
        """
        weights, offsets = self._terms
        found = features @ weights  # in one product: it is a server's time
        along, towards = np.split(found, [self.directions.shape[1]], axis=1)
        lengths = _lengths(features) - _lengths(along)
        return (np.max(towards - offsets, 1) - lengths) / np.float32(self.unit)

    @cached_property
    def _terms(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of |x - m|^2 - |(x - m) D|^2, written out, all that is known before x: (d, k + classes)
        to be multiplied with x, and (classes,)."""
        along = self.means @ self.directions
        towards = 2 * (self.means - along @ self.directions.T)
        weights = np.concatenate([self.directions, towards.T], 1)
        return np.ascontiguousarray(weights), _lengths(self.means) - _lengths(along)

    def to_bytes(self) -> bytes:
        """As an .npz file, for load()."""
        stream = io.BytesIO()
        np.savez(stream, means=self.means, directions=self.directions, unit=self.unit)
        return stream.getvalue()


def load(path: Path) -> Likeness:
    with np.load(path) as kept:
        return Likeness(kept["means"], kept["directions"], float(kept["unit"]))


def fit(features: NDArray[np.float32], labels: NDArray[np.int64]) -> Likeness:
    """From the features (N, d) of training images and their labels (N,).

    Raises ValueError where there are none, or they do not differ within a class.
    """
    if not features.size:
        raise ValueError("the network gives no features")
    classes, index = np.unique(labels, return_inverse=True)
    means = np.stack([features[labels == label].mean(0) for label in classes])
    apart = features - means[index]
    variances, axes = np.linalg.eigh(apart.T @ apart / len(apart))
    ridge = RIDGE * variances.mean()
    if not ridge > 0:
        raise ValueError("the features of a class do not differ")
    large = np.maximum(variances[-DIRECTIONS:], 0)
    directions = axes[:, -DIRECTIONS:] * np.sqrt(large / (large + ridge))
    likeness = Likeness(means, directions.astype(np.float32), 1.0)
    return Likeness(means, likeness.directions, -float(likeness(features).mean()))


def _lengths(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared, (N,), of rows (N, d)."""
    return np.einsum("nd,nd->n", rows, rows)
