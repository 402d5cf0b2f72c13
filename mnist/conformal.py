"""Prediction sets: classes that contain the true one with a stated coverage (split conformal)."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

# Coverages whose limits a record stores. For other coverages, the next higher one is used.
COVERAGES = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)
DEFAULT_COVERAGE = 0.999
# With a half, sets at 0.999 have 1.4 to 2.7 classes in the mean instead of 1.1 to 1.2 (`parallel`,
# 2,000 calibration images).
EMPTY_SHARE = 0.2


class Limits(NamedTuple):
    """A class is in the set of a picture if its probability is at least `probability`. The set is
    empty if the picture's score is below `score`, if any. `coverage` is the guaranteed one."""

    coverage: float
    probability: float
    score: float | None


def fit(
    probabilities: np.ndarray, scores: np.ndarray, labels: np.ndarray
) -> dict[str, list[float | None]]:
    """Limits by coverage, from probabilities (N, classes), scores (N,), high for pictures that look
    like a class, and labels (N,), all of the calibration split.

    The set of another picture of the same kind misses its true class with a probability of at most
    1 - coverage (Sadinle et al. 2019, arXiv 1609.00451). EMPTY_SHARE of these misses may be empty
    sets. Coverages that N pictures cannot guarantee are left out.
    """
    n = len(labels)
    of_true_class = np.sort(probabilities[np.arange(n), labels])
    ordered_scores = np.sort(scores)
    limits: dict[str, list[float | None]] = {}
    for coverage in COVERAGES:
        misses = int((1 - coverage) * (n + 1) + 1e-9)
        empty = int(misses * EMPTY_SHARE)
        if misses:
            probability = float(of_true_class[misses - empty - 1])
            limits[str(coverage)] = [
                probability,
                float(ordered_scores[empty - 1]) if empty else None,
            ]
    return limits


def choose(limits: Mapping[str, list[float | None]], coverage: float) -> Limits | None:
    """The limits for the lowest stored coverage that is high enough, else for the highest one."""
    known = sorted((float(key), pair) for key, pair in limits.items())
    if not known:
        return None
    stored, (probability, score) = next(
        (entry for entry in known if entry[0] >= coverage), known[-1]
    )
    return Limits(stored, probability or 0.0, score)


def make_sets(probabilities: np.ndarray, scores: np.ndarray, limits: Limits) -> np.ndarray:
    """Which classes are in the set of each picture: (N, classes) bool."""
    sets = probabilities >= limits.probability
    return sets if limits.score is None else sets & (scores >= limits.score)[:, None]
