"""mnist.data.kinds: what may be changed in the training images of a data set."""

import numpy as np
import pytest
import torch

from mnist.data import Dataset, Split
from mnist.data.kinds import describe_mirrored_classes, find_kind, find_mirrored_classes


@pytest.mark.parametrize(
    ("recipe", "channels", "kind"),
    [("digit", 1, "digit"), ("plain", 1, "thing"), ("plain", 3, "photo")],
)
def test_the_kind_follows_from_recipe_and_channels(recipe: str, channels: int, kind: str) -> None:
    assert find_kind(recipe, channels) == kind


def arrows(classes: str, n: int = 12, size: int = 28) -> Split:
    """Triangles that point left (<), right (>) or up (^), a little displaced: n of each class."""
    random = np.random.default_rng(0)
    side = size // 2 + 1
    rows = np.arange(side) - side // 2
    triangle = np.abs(rows)[:, None] <= np.arange(side)[None] / 2  # points left
    shapes = {"<": triangle, ">": triangle[:, ::-1], "^": triangle.T}
    images = np.zeros((n * len(classes), 1, size, size), np.uint8)
    for i in range(len(images)):
        y, x = random.integers(size // 4 - 3, size // 4 + 3, 2)
        images[i, 0, y : y + side, x : x + side] = 200 * shapes[classes[i % len(classes)]]
    return Split(torch.from_numpy(images), torch.arange(len(images)) % len(classes))


@pytest.mark.parametrize("size", [28, 56])
def test_arrows_to_the_left_and_right_are_mirror_images(size: int) -> None:
    assert find_mirrored_classes(arrows("<^>", n=100, size=size), 3) == ((0, 2),)


def test_a_class_that_looks_like_another_in_one_direction_only_is_no_mirror_image() -> None:
    # All arrows point left; mirrored, they are nearest to the class that has both directions.
    left, both = arrows("<", n=100), arrows("<>", n=50)
    split = Split(torch.cat([left.images, both.images]), torch.arange(200) // 100)
    assert find_mirrored_classes(split, 2) == ()


def test_a_class_without_images_among_the_compared_ones_is_no_pair() -> None:
    assert find_mirrored_classes(arrows("<>", n=20), 3) == ((0, 1),)


def test_a_line_names_the_classes_that_are_mirror_images() -> None:
    assert describe_mirrored_classes(["b", "c", "d", "p", "q"], []) is None
    line = describe_mirrored_classes(["b", "c", "d", "p", "q"], [(0, 2), (3, 4)])
    assert line is not None
    assert "'b' and 'd', 'p' and 'q'" in line


def test_a_data_set_has_its_kind(digits: Dataset) -> None:
    assert (digits.kind, digits.mirrored_classes) == ("digit", ())
