"""mnist.batch_norms: the statistics of batch norms, and the least batch."""

from typing import Any

import pytest
import torch
from torch import nn

from mnist import batch_norms, folding, metrics, models, training
from mnist.data import Dataset


def test_a_batch_of_one_image_is_refused(digits: Dataset) -> None:
    form = folding.training_form(models.build("parallel", 1, 28, 10))
    settings: dict[str, Any] = {"samples": 66, "batch_size": 33, "micro_batch": 8}
    list(training.fit(form, digits, digits.train, **settings))  # parts of 7, 7, 7, 6 and 6 images
    with pytest.raises(ValueError, match="batch_size is 1; batch norms need at least 2"):
        list(training.fit(form, digits, digits.train, samples=10, batch_size=1))


def test_statistics_are_those_of_images_without_augmentation(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole evaluation batches of the first training images, with dropout off."""
    monkeypatch.setattr(batch_norms, "NORM_IMAGES", 250)
    monkeypatch.setattr(metrics, "EVAL_BATCH", 100)
    norm = nn.BatchNorm1d(28 * 28, momentum=0.3)
    untracked = nn.BatchNorm1d(28 * 28, track_running_stats=False)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), norm, untracked)
    norm.running_mean.fill_(7)  # type: ignore[union-attr]
    batch_norms.recompute_statistics(model, digits, digits.train)
    inputs = digits.standardise(digits.train.images[:200]).flatten(1)
    expected = torch.stack([batch.mean(0) for batch in inputs.split(100)]).mean(0)
    assert torch.allclose(norm.running_mean, expected, atol=1e-5)  # type: ignore[arg-type]
    assert (norm.momentum, norm.training, model.training) == (0.3, True, True)
    assert batch_norms.list_layers(model) == [norm]


def test_a_network_without_batch_norms_is_not_changed(digits: Dataset) -> None:
    model = models.build("linear", 1, 28, 10).eval()
    batch_norms.recompute_statistics(model, digits, digits.train)
    assert not model.training


def test_the_statistics_are_of_images_and_outliers(digits: Dataset) -> None:
    model = folding.training_form(models.build("parallel", 1, 28, 10))
    (norm, *_), means = batch_norms.list_layers(model), []
    for outliers in (None, 255 - digits.train.images[:400]):
        batch_norms.recompute_statistics(model, digits, digits.train, outliers)
        assert norm.running_mean is not None
        means.append(norm.running_mean.clone())
    assert (means[0] - means[1]).abs().max() > 0.01
