"""What kind of pictures a data set has, and which of its classes are mirror images."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from mnist.data.splits import Split

COMPARED, SIDE = 2_000, 28  # images of a class comparison, and their side in pixels
CHUNK = 100  # images that are reduced to this side at a time: 79 MB at 256 pixels in color
MIN_SHARE = 0.5  # of either class that must look like the other when it is mirrored


def find_kind(recipe: str, channels: int) -> str:
    """The kind of augmentation (augmentation.KINDS) for images of a recipe: ink, grey or colour."""
    if recipe == "digit":
        return "digit"
    return "photo" if channels == 3 else "thing"


def find_mirrored_classes(train: Split, n_classes: int) -> tuple[tuple[int, int], ...]:
    """Pairs of classes that are each other's mirror image, such as b and d, or arrows.

    The nearest of COMPARED other images gives the class of each image and of its mirror image. Two
    classes are a pair if mirroring brings MIN_SHARE more of either into the other. In one direction
    only, that says little: 84 % of mirrored ankle boots are nearest to a bag, as all boots of
    Fashion-MNIST point to the left.
    """
    part = train.head(COMPARED)
    images = torch.cat([_reduce(images) for images in part.images.split(CHUNK)])
    labels = part.labels.cpu().numpy()
    confusion = [
        _count_neighbours(queries.flatten(1), images.flatten(1), labels, n_classes)
        for queries in (images.flip(-1), images)
    ]
    sizes = np.maximum(np.bincount(labels, minlength=n_classes), 1)
    gained = (confusion[0] - confusion[1]) / sizes[:, None]
    mutual = np.triu(np.minimum(gained, gained.T), 1)
    return tuple((int(i), int(j)) for i, j in np.argwhere(mutual >= MIN_SHARE))


def describe_mirrored_classes(
    classes: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> str | None:
    """A line that names pairs of classes; None without any."""
    if not pairs:
        return None
    names = ", ".join(f"{classes[i]!r} and {classes[j]!r}" for i, j in pairs)
    return f"mirror images of each other: {names}; so training images are not mirrored"


def _reduce(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, C, H, W) as float32 with a side of at most SIDE pixels."""
    images = images.float()
    if images.shape[-1] <= SIDE:
        return images
    return F.interpolate(images, size=(SIDE, SIDE), mode="area")


def _count_neighbours(
    queries: torch.Tensor, images: torch.Tensor, labels: np.ndarray, n_classes: int
) -> np.ndarray:
    """Counts (class of query, class of its nearest image); image i is no neighbour of query i."""
    distances = torch.cdist(queries, images)
    nearest = distances.fill_diagonal_(torch.inf).argmin(1).cpu().numpy()
    counts = np.zeros((n_classes, n_classes))
    np.add.at(counts, (labels, labels[nearest]), 1)
    return counts
