"""mnist.outliers: pictures without a class, in the form of the training images."""

from dataclasses import replace

import numpy as np
import pytest

from mnist import images, outliers
from mnist.data import Dataset
from mnist.search import runs

DRAWINGS = (outliers.draw_strokes, outliers.draw_signs, outliers.draw_shapes, outliers.draw_noise)


@pytest.mark.parametrize("draw", DRAWINGS)
def test_each_kind_differs_from_picture_to_picture(draw: outliers.Draw) -> None:
    rng = np.random.default_rng(0)
    drawn = [draw(rng) for _ in range(30)]
    assert {picture.dtype for picture in drawn} == {np.dtype(np.uint8)}
    assert sum(picture.any() for picture in drawn) > 20
    assert len({picture.tobytes() for picture in drawn}) > 20


def test_outliers_have_the_form_of_training_images(digits: Dataset) -> None:
    made = outliers.make(digits.train.images.numpy(), 100, 0)
    assert (made.dtype, made.shape) == (np.uint8, (100, 1, 28, 28))
    for picture in made[:, 0]:
        assert picture.any()
        follows = images.centre(picture)
        assert np.count_nonzero(follows) == pytest.approx(np.count_nonzero(picture), rel=0.7)
    assert len({picture.tobytes() for picture in made}) > 80


def test_the_seed_determines_the_outliers(digits: Dataset) -> None:
    known = digits.train.images.numpy()
    one, two, other = (outliers.make(known, 20, seed) for seed in (0, 0, 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_no_outlier_is_similar_to_a_training_image(digits: Dataset) -> None:
    known = digits.train.images.numpy()
    made = outliers.make(known, 200, 0)
    rows = [part.reshape(len(part), -1).astype(float) for part in (made, known)]
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in rows]
    assert (unit[0] @ unit[1].T).max() <= outliers.MAX_SIMILARITY + 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_joined_images_show_parts_of_both_or_all(digits: Dataset, seed: int) -> None:
    pair = digits.train.images[:2, 0].numpy()
    joined = outliers.join(pair, np.random.default_rng(seed))
    assert joined.dtype == np.uint8
    assert joined.flags["C_CONTIGUOUS"]
    assert joined.any()
    assert not any(np.array_equal(joined, image) for image in pair)


@pytest.mark.parametrize(
    ("shown", "n"), [(0, 1), (0.25, 1), (5, 2), (250, 125), (11_750, 5_875), (60_000, 6_000)]
)
def test_a_training_has_outliers_however_few_it_shows(shown: float, n: int) -> None:
    assert outliers.count(shown) == n


def test_outliers_are_made_where_a_run_needs_them(digits: Dataset) -> None:
    run = runs.Run("linear", {}, 20, 0, final=True, outliers=True)
    made = runs._make_outliers(run, digits, 5)
    assert made is not None
    assert made.shape == (5, 1, 28, 28)
    assert runs._make_outliers(replace(run, outliers=False), digits, 5) is None
    assert runs._make_outliers(run, replace(digits, recipe="plain"), 5) is None
