"""Batch norms: their statistics, from training images without augmentation."""

import torch
from torch import nn

from mnist import metrics
from mnist.data import Dataset, Split

NORM_IMAGES = 1_000  # training images for the statistics
OUTLIER_SHARE = 1 / 4  # images without a class in a training batch, for each of its images


def check_batch_size(model: nn.Module, batch_size: int) -> None:
    """Raise ValueError for a batch of one image in a network with 1-d batch norms."""
    if batch_size == 1 and any(isinstance(layer, nn.BatchNorm1d) for layer in model.modules()):
        raise ValueError("batch_size is 1; batch norms need at least 2, or use --plain")


def list_layers(model: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    """The model's batch norms that track running statistics."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.track_running_stats
    ]


@torch.no_grad()
def recompute_statistics(
    model: nn.Module, dataset: Dataset, train: Split, outliers: torch.Tensor | None = None
) -> None:
    """Replace the batch norms' statistics by those of NORM_IMAGES unaugmented training images.

    If the training batches have outliers (uint8 images without a class), OUTLIER_SHARE of them is
    added here, too. Without them, a model that was trained on 240,000 images made 121 instead of 68
    errors on 15,000 held-out images: it took most of these images for outliers.

    The running statistics are of augmented images and lag some steps behind: with them, the same
    weights made 251 errors on 5,000 validation images after 8,000 training images, with those of
    2,000 unaugmented images 127 (`parallel`, Adam, batch 64, lr 0.003; docs/lab-log.md has more).
    """
    layers = list_layers(model)
    if not layers:
        return
    momenta = [norm.momentum for norm in layers]
    model.eval()  # dropout stays off
    for norm in layers:
        norm.reset_running_stats()
        norm.momentum = None  # average over all batches
        norm.train()
    images = train.head(NORM_IMAGES).images
    if outliers is not None:
        images = torch.cat([images, outliers[: round(OUTLIER_SHARE * len(images))]])
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images = images[order]  # each batch has its share
    n_batches = max(1, len(images) // metrics.EVAL_BATCH)
    for batch in images.split(metrics.EVAL_BATCH)[:n_batches]:  # of equal size
        model(dataset.standardise(batch))
    for norm, value in zip(layers, momenta, strict=True):
        norm.momentum = value
    model.train()
