"""mnist.compare: whether two models differ by more than noise."""

import io
from pathlib import Path

import numpy as np
import pytest

from mnist import compare, registry
from tests.test_registry import entry


def predictions(wrong: range, n: int = 100) -> bytes:
    """Two classes; the images in `wrong` are read wrong."""
    labels = np.zeros(n, np.int64)
    found = np.isin(np.arange(n), wrong)
    stream = io.BytesIO()
    np.savez(stream, probabilities=np.stack([~found, found], 1).astype(np.float32), labels=labels)
    return stream.getvalue()


def save(folder: Path, wrong: range) -> str:
    files = {"weights": (".pth", b"weights"), "predictions": (".test.npz", predictions(wrong))}
    return registry.save(folder, files, entry(), "always")


@pytest.mark.parametrize(
    ("one", "other", "p"),
    [
        (range(10), range(10), 1.0),  # the same images
        (range(10), range(10, 20), 1.0),  # as many others
        (range(0), range(5), 2 / 2**5),  # 0 against 5: both tails of five throws of a coin
        (range(8, 10), range(2, 9), 2 * (1 + 7) / 2**7),  # 1 against 6
    ],
)
def test_the_chance_is_that_of_throwing_a_coin_for_each_image_that_one_alone_got_wrong(
    tmp_path: Path, one: range, other: range, p: float
) -> None:
    names = save(tmp_path, one), save(tmp_path, other)
    assert compare.chance(tmp_path, *names) == pytest.approx(p)
