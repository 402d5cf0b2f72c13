"""mnist.conformal: sets of classes that hold the true one as often as stated."""

import numpy as np
import pytest

from mnist import conformal


def draw(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities (n, 5), scores (n,) and labels (n,) drawn by these probabilities."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(5, 0.2), n)
    labels = (probabilities.cumsum(1) < rng.random((n, 1))).sum(1).clip(max=4)
    return probabilities, rng.normal(size=n), labels


@pytest.mark.parametrize("coverage", [0.9, 0.98, 0.999])
def test_sets_hold_the_true_class_as_often_as_stated(coverage: float) -> None:
    held = []
    for seed in range(20):
        limits = conformal.choose(conformal.fit(*draw(2_500, seed)), coverage)
        assert limits is not None
        probabilities, scores, labels = draw(5_000, 1_000 + seed)
        sets = conformal.make_sets(probabilities, scores, limits)
        held.append(sets[np.arange(len(labels)), labels].mean())
    # The mean of 20 calibrations of 2,500 images is within three standard errors of the coverage
    # or above it; rounding, and misses that are both, make it higher by at most a half of the rest.
    error = 3 * np.sqrt(coverage * (1 - coverage) / 2_500 / 20)
    assert coverage - error < np.mean(held) < coverage + (1 - coverage) / 2 + error


def test_a_set_is_empty_for_a_score_below_that_of_nearly_all_others() -> None:
    probabilities, scores, labels = draw(2_500)
    limits = conformal.choose(conformal.fit(probabilities, scores, labels), 0.9)
    assert limits is not None
    certain = np.array([[1.0, 0, 0, 0, 0]] * 2)
    sets = conformal.make_sets(certain, np.array([scores.min() - 1, scores.max()]), limits)
    assert sets.tolist() == [[False] * 5, [True, False, False, False, False]]
    below = (scores < limits.score).mean()
    assert 0.019 < below < 0.02  # a fifth of the misses


def test_the_limits_follow_from_the_ranks() -> None:
    # 99 images: a coverage of 0.9 may miss 10 of 100, two by their scores and eight by probability.
    shares = np.arange(1, 100) / 100
    limits = conformal.fit(np.stack([shares, 1 - shares], 1), np.arange(99.0), np.zeros(99, int))
    assert limits == {
        "0.9": [0.08, 1.0],
        "0.95": [0.04, 0.0],
        "0.98": [0.02, None],
        "0.99": [0.01, None],
    }


@pytest.mark.parametrize(
    ("coverage", "expected"),
    [
        (0.5, (0.9, 0.9, -1.0)),
        (0.9, (0.9, 0.9, -1.0)),
        (0.91, (0.95, 0.5, None)),
        (0.95, (0.95, 0.5, None)),
        (0.999, (0.95, 0.5, None)),
    ],
)
def test_the_next_higher_coverage_is_taken_or_the_highest(
    coverage: float, expected: tuple[float, float, float | None]
) -> None:
    limits = {"0.95": [0.5, None], "0.9": [0.9, -1.0]}
    assert conformal.choose(limits, coverage) == expected


def test_too_few_images_give_no_limits() -> None:
    assert conformal.fit(*draw(8)) == {}
    assert conformal.choose({}, 0.9) is None
    assert conformal.fit(*draw(9)).keys() == {"0.9"}
    assert conformal.fit(*draw(999)).keys() >= {"0.999"}
    assert "0.999" not in conformal.fit(*draw(998))
