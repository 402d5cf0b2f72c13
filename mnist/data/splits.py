"""Splits of a data set, and stratified splitting."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import train_test_split

SPLIT_SEED = 2026  # never --seed, so that all studies have the same splits


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, C, H, W), 0..255, ink is high; labels int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, n: int) -> "Split":
        """The first n samples, which are a random sample, as splits are shuffled."""
        return Split(self.images[:n], self.labels[:n])

    def __add__(self, other: "Split") -> "Split":
        return Split(torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels]))

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


def split_stratified(
    index: np.ndarray, labels: np.ndarray, share: float | int, min_per_class: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Split `index` (N,) into two shuffled, stratified parts; the second one has `share`.

    A float is a share (0..1), enlarged for small data: the second part has `min_per_class` of each
    class, and the first part at least one, if the class is large enough. An int is the exact size.
    """
    second_size = share
    if isinstance(share, float):
        # If the smallest class has m of n images, a part with n / m images has at least one of it.
        ratio = len(index) / np.unique(labels[index], return_counts=True)[1].min()
        second_size = max(round(share * len(index)), math.ceil(min_per_class * ratio))
        second_size = min(second_size, len(index) - math.ceil(ratio))
    first, second = train_test_split(
        index, test_size=second_size, stratify=labels[index], random_state=SPLIT_SEED
    )
    return first, second
