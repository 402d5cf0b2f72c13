"""Calibration of probabilities: reliability bins and the expected calibration error."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15  # of confidence, as in Guo et al. 2017, arXiv 1706.04599

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]


def reliability_bins(probabilities: Floats, labels: Labels) -> NDArray[np.float64]:
    """A reliability diagram (bins, 3): number of images, mean confidence, accuracy.

    Confidence is the probability of the predicted class, in BINS bins of equal width; empty bins
    are left out.
    """
    confidence = probabilities.max(1).astype(np.float64)
    correct = (probabilities.argmax(1) == labels).astype(np.float64)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    n, sums, hits = (np.bincount(bins, weights, BINS) for weights in (None, confidence, correct))
    filled = n > 0
    return np.stack([n[filled], sums[filled] / n[filled], hits[filled] / n[filled]], 1)


def calibration_error(probabilities: Floats, labels: Labels) -> float:
    """The expected calibration error (0..1): the mean gap between confidence and accuracy.

    Guo et al. 2017, arXiv 1706.04599; over reliability_bins(), weighted by their images.
    """
    n, confidences, accuracies = reliability_bins(probabilities, labels).T
    return round(float(n @ np.abs(accuracies - confidences) / n.sum()), 5)
