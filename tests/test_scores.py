"""mnist.scores: how far probabilities can be believed."""

import numpy as np
import pytest

from mnist import scores


def test_calibration_error_is_that_of_a_computation_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.35, 0.65], [0.0, 1.0]], np.float32)
    labels = np.array([0, 1, 1, 1])
    # bins of 1/15: 0.9 twice, once right; 0.65 right; 1.0 right
    assert scores.calibration_error(probabilities, labels) == pytest.approx(
        (2 * abs(0.5 - 0.9) + abs(1 - 0.65) + 0) / 4, abs=1e-5
    )


@pytest.mark.parametrize("classes", [2, 10, 47])
def test_calibration_error_equals_an_independent_one(classes: int) -> None:
    rng = np.random.default_rng(classes)
    probabilities = rng.dirichlet(np.full(classes, 0.2), 2_000)
    labels = rng.integers(0, classes, 2_000)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        confidence = max(row)
        edge = next(i for i in range(15) if confidence < (i + 1) / 15 or i == 14)
        bins.setdefault(edge, []).append((confidence, row.index(confidence) == label))
    expected = sum(
        abs(sum(right for _, right in rows) - sum(confidence for confidence, _ in rows)) / 2_000
        for rows in bins.values()
    )
    assert scores.calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-5)
    assert [n for n, *_ in scores.reliability_bins(probabilities, labels)] == [
        len(bins[i]) for i in sorted(bins)
    ]
