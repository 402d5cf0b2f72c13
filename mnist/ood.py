"""The out-of-distribution score: how close a picture's features are to those of training images."""

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# DIRECTIONS: how many principal directions of the covariance are stored; the variance in all
# others is close to zero. RIDGE: share of the mean variance that is added in every direction.
# Flagged of noise, letters and Fashion-MNIST: 64 directions and 0.1: 94, 82 and 82 %; 128 and 0.03:
# 95, 84 and 83 %; 128 and 0.01: the same; 192 and 256 with any of these ridges: no more
# (`parallel` in int8, three seeds of benchmarks/ood.py, 2026-11-28).
DIRECTIONS, RIDGE = 128, 0.03


@dataclass(frozen=True)
class OutOfDistributionScore:
    """A normal distribution of features (d,) around the mean of each class, with one covariance.

    `means` is (classes, d). A squared distance along a column of `directions` (d, k) counts less,
    by the squared length of the column, which is larger where training images differ more. `unit`
    is the mean squared distance of training images.
    """

    means: NDArray[np.float32]
    directions: NDArray[np.float32]
    unit: float

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores (N,) of features (N, d): about -1 for a training image, lower for stranger ones.

        Minus the squared Mahalanobis distance to the nearest class (Lee et al. 2018, arXiv
        1807.03888), of features of unit length (Mueller and Hein 2025, arXiv 2505.18032).
        """
        weights, offsets = self._terms
        products = features @ weights  # a single product, as the server computes this per request
        along, towards = np.split(products, [self.directions.shape[1]], axis=1)
        lengths = _squared_norms(features) - _squared_norms(along)
        return (np.max(towards - offsets, 1) - lengths) / np.float32(self.unit)

    @cached_property
    def _terms(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The parts of |x - m|^2 - |(x - m) D|^2, multiplied out, that do not depend on x: a matrix
        (d, k + classes) to multiply x with, and offsets (classes,)."""
        along = self.means @ self.directions
        towards = 2 * (self.means - along @ self.directions.T)
        weights = np.concatenate([self.directions, towards.T], 1)
        return np.ascontiguousarray(weights), _squared_norms(self.means) - _squared_norms(along)

    def to_bytes(self) -> bytes:
        """The content of an .npz file, which load() reads."""
        stream = io.BytesIO()
        np.savez(stream, means=self.means, directions=self.directions, unit=self.unit)
        return stream.getvalue()


def load(path: Path) -> OutOfDistributionScore:
    with np.load(path) as arrays:
        return OutOfDistributionScore(arrays["means"], arrays["directions"], float(arrays["unit"]))


def fit(features: NDArray[np.float32], labels: NDArray[np.int64]) -> OutOfDistributionScore:
    """Fit the score to features (N, d) of training images and their labels (N,).

    Raises ValueError where there are no features, or they do not differ within a class.
    """
    if not features.size:
        raise ValueError("the network gives no features")
    classes, index = np.unique(labels, return_inverse=True)
    means = np.stack([features[labels == label].mean(0) for label in classes])
    deviations = features - means[index]
    variances, axes = np.linalg.eigh(deviations.T @ deviations / len(deviations))
    ridge = RIDGE * variances.mean()
    if not ridge > 0:
        raise ValueError("the features of a class do not differ")
    largest = np.maximum(variances[-DIRECTIONS:], 0)
    directions = axes[:, -DIRECTIONS:] * np.sqrt(largest / (largest + ridge))
    score = OutOfDistributionScore(means, directions.astype(np.float32), 1.0)
    return OutOfDistributionScore(means, score.directions, -float(score(features).mean()))


def _squared_norms(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared norms (N,) of rows (N, d)."""
    return np.einsum("nd,nd->n", rows, rows)
