"""A part of a data set, and how images are cut into such parts."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import train_test_split

SPLIT_SEED = 2026  # of every cut; never --seed, so that every study sees the same cut


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, C, H, W), 0..255, ink is high; labels int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, n: int) -> "Split":
        """The first n samples; the splits are shuffled, so this is a fair sample."""
        return Split(self.images[:n], self.labels[:n])

    def __add__(self, other: "Split") -> "Split":
        return Split(torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels]))

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


def cut(
    index: np.ndarray, labels: np.ndarray, share: float | int, least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """`index` (N,) in two shuffled, stratified parts; `share` goes to the second.

    A float is a share of 1, enlarged for small data: `least` of each class are in the second part,
    and one in the first, where the class has that many. An int is a number, and kept to.
    """
    second = share
    if isinstance(share, float):
        # With n / m of n images in a part, of which a class has m, at least one of it is there.
        ratio = len(index) / np.unique(labels[index], return_counts=True)[1].min()
        second = max(round(share * len(index)), math.ceil(least * ratio))
        second = min(second, len(index) - math.ceil(ratio))
    first, rest = train_test_split(
        index, test_size=second, stratify=labels[index], random_state=SPLIT_SEED
    )
    return first, rest
