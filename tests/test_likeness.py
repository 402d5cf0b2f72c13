"""mnist.likeness: the distance it stands for, and what it needs."""

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from mnist import likeness


def clouds(n: int = 600, d: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Features of three classes, stretched in some directions."""
    dice = np.random.default_rng(0)
    labels = dice.integers(0, 3, n)
    spread = dice.normal(size=(n, d)) * np.geomspace(1, 0.01, d)
    return (dice.normal(size=(3, d))[labels] + spread).astype(np.float32), labels


def test_the_score_is_mahalanobis_s_distance_to_the_nearest_class() -> None:
    features, labels = clouds()
    found = likeness.fit(features, labels)
    means = np.stack([features[labels == label].mean(0) for label in range(3)])
    covariance = np.cov(features - means[labels], rowvar=False, bias=True)
    ridge = likeness.RIDGE * np.trace(covariance) / 12
    inverse = np.linalg.inv(covariance + ridge * np.eye(12))
    others = np.random.default_rng(1).normal(size=(50, 12)).astype(np.float32)

    def wanted(points: np.ndarray) -> np.ndarray:
        return cdist(points, means, "mahalanobis", VI=inverse).min(1) ** 2

    assert found(others) == pytest.approx(-wanted(others) / wanted(features).mean(), rel=1e-3)
    assert found(features).mean() == pytest.approx(-1, rel=1e-3)


def test_few_directions_leave_what_is_strange_far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clouds()
    far = features + np.eye(12, dtype=np.float32)[-1]  # where training images hardly differ
    monkeypatch.setattr(likeness, "DIRECTIONS", 3)
    found = likeness.fit(features, labels)
    assert found.directions.shape == (12, 3)
    assert np.quantile(found(features), 0.01) > found(far).max()


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    features, labels = clouds()
    found = likeness.fit(features, labels)
    (tmp_path / "x.npz").write_bytes(found.to_bytes())
    assert np.array_equal(likeness.load(tmp_path / "x.npz")(features), found(features))


@pytest.mark.parametrize("features", [np.empty((4, 0)), np.ones((4, 3))])
def test_features_that_tell_nothing_are_refused(features: np.ndarray) -> None:
    with pytest.raises(ValueError, match="features"):
        likeness.fit(features.astype(np.float32), np.array([0, 0, 1, 1]))
