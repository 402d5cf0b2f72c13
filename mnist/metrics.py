"""Predictions of a model, and their errors and scores."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_fscore_support
from torch import nn

from mnist.data import Dataset, Split
from mnist.inference import probabilities

# Images per forward pass in evaluation. With 250, a run of batch 64 takes 292 MB instead of 148,
# and one of batch 256 463 MB instead of 333 (`parallel` in bfloat16; imports and data: 360 MB).
EVAL_BATCH = 125
MIN_PROBABILITY = 1e-12  # lower bound in a log-loss, which is infinite for 0


@torch.no_grad()
def predict(
    model: nn.Module, dataset: Dataset, images: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Probabilities (N, classes) float32, on the CPU, for uint8 images (N, C, H, W)."""
    model.eval()
    logits = [model(dataset.standardise(batch)).float() for batch in images.split(EVAL_BATCH)]
    return torch.from_numpy(probabilities(torch.cat(logits).cpu().numpy(), temperature))


def errors(model: nn.Module, dataset: Dataset, split: Split) -> int:
    """The number of images of `split` that the model classifies wrongly."""
    return int((predict(model, dataset, split.images).argmax(1) != split.labels.cpu()).sum())


def count_errors(scores: np.ndarray, labels: np.ndarray) -> int:
    """The number of rows of logits or probabilities (N, classes) with a wrong prediction."""
    return int((scores.argmax(1) != labels).sum())


def validate(model: nn.Module, dataset: Dataset, split: Split) -> tuple[int, int, float]:
    """Errors, number of images, and log-loss."""
    predicted, labels = predict(model, dataset, split.images), split.labels.cpu()
    true_probabilities = predicted[torch.arange(len(labels)), labels].clamp_min(MIN_PROBABILITY)
    wrong = int((predicted.argmax(1) != labels).sum())
    return wrong, len(labels), -float(true_probabilities.log().mean())


def worst_mistakes(probabilities: torch.Tensor, labels: torch.Tensor, limit: int) -> torch.Tensor:
    """Indices (M,) int64, M <= `limit`, of the mistakes with the lowest probability of the true
    class, the worst first."""
    wrong = (probabilities.argmax(1) != labels).nonzero()[:, 0]
    true_probabilities = probabilities[wrong, labels[wrong]]
    return wrong[true_probabilities.argsort(stable=True)[:limit]]


def classification_scores(
    probabilities: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]
) -> dict[str, Any]:
    """The scores of one split for a model's record.

    Errors, n and accuracy with its 95 % interval (Wilson's), and for each class precision, recall
    and F1 (0..1).
    """
    predicted, n = probabilities.argmax(1), len(labels)
    wrong = int((predicted != labels).sum())
    interval = binomtest(n - wrong, n).proportion_ci(0.95, method="wilson")
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, labels=range(len(classes)), zero_division=0.0
    )
    return {
        "errors": wrong,
        "n": n,
        "accuracy": round(1 - wrong / n, 6),
        "interval95": [round(float(interval.low), 4), round(float(interval.high), 4)],
        "per_class": {
            name: {
                "precision": round(float(precision[i]), 4),
                "recall": round(float(recall[i]), 4),
                "f1": round(float(f1[i]), 4),
            }
            for i, name in enumerate(classes)
        },
    }
