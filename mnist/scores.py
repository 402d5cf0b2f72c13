"""How far a model's probabilities can be believed."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15  # of confidence, as in Guo et al. 2017, arXiv 1706.04599

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]


def reliability(probabilities: Floats, labels: Labels) -> NDArray[np.float64]:
    """How far confidence can be believed, as (bins, 3): images, their mean confidence, accuracy.

    Confidence is the probability of the class that is read, in BINS bins of equal width; empty
    bins are left out.
    """
    confidence = probabilities.max(1).astype(np.float64)
    right = (probabilities.argmax(1) == labels).astype(np.float64)
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    n, sure, true = (np.bincount(place, part, BINS) for part in (None, confidence, right))
    there = n > 0
    return np.stack([n[there], sure[there] / n[there], true[there] / n[there]], 1)


def calibration_error(probabilities: Floats, labels: Labels) -> float:
    """The expected calibration error (0..1): how far confidence and accuracy are apart.

    Guo et al. 2017, arXiv 1706.04599; over the bins of reliability(), weighted by their images.
    """
    n, sure, true = reliability(probabilities, labels).T
    return round(float(n @ np.abs(true - sure) / n.sum()), 5)
