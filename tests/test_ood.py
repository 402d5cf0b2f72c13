"""mnist.ood: the distance that the score stands for, and the features that it needs."""

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from mnist import ood


def draw_clouds(n: int = 600, d: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Draw features of three classes, stretched in some directions."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, n)
    spread = rng.normal(size=(n, d)) * np.geomspace(1, 0.01, d)
    return (rng.normal(size=(3, d))[labels] + spread).astype(np.float32), labels


def test_the_score_is_mahalanobis_s_distance_to_the_nearest_class() -> None:
    features, labels = draw_clouds()
    score = ood.fit(features, labels)
    means = np.stack([features[labels == label].mean(0) for label in range(3)])
    covariance = np.cov(features - means[labels], rowvar=False, bias=True)
    ridge = ood.RIDGE * np.trace(covariance) / 12
    inverse = np.linalg.inv(covariance + ridge * np.eye(12))
    others = np.random.default_rng(1).normal(size=(50, 12)).astype(np.float32)

    def expected(points: np.ndarray) -> np.ndarray:
        return cdist(points, means, "mahalanobis", VI=inverse).min(1) ** 2

    assert score(others) == pytest.approx(-expected(others) / expected(features).mean(), rel=1e-3)
    assert score(features).mean() == pytest.approx(-1, rel=1e-3)


def test_few_directions_leave_strange_features_far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = draw_clouds()
    far = features + np.eye(12, dtype=np.float32)[-1]  # where training images hardly differ
    monkeypatch.setattr(ood, "DIRECTIONS", 3)
    score = ood.fit(features, labels)
    assert score.directions.shape == (12, 3)
    assert np.quantile(score(features), 0.01) > score(far).max()


def test_a_score_is_read_back_from_its_file(tmp_path: Path) -> None:
    features, labels = draw_clouds()
    score = ood.fit(features, labels)
    (tmp_path / "x.npz").write_bytes(score.to_bytes())
    assert np.array_equal(ood.load(tmp_path / "x.npz")(features), score(features))


@pytest.mark.parametrize("features", [np.empty((4, 0)), np.ones((4, 3))])
def test_features_that_do_not_differ_are_refused(features: np.ndarray) -> None:
    with pytest.raises(ValueError, match="features"):
        ood.fit(features.astype(np.float32), np.array([0, 0, 1, 1]))
