"""mnist.data.splits: stratified cuts, of small data too."""

import numpy as np
import pytest

from mnist.data import splits


@pytest.mark.parametrize(
    "counts", [[8, 8], [8, 9, 200], [8] * 47, [9, 160], [8, 13, 2_000], [1_000, 1_000]]
)
def test_each_class_is_in_each_part_of_small_and_of_unbalanced_data(counts: list[int]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    train, held_out = splits.split_stratified(
        np.arange(len(labels)), labels, 1 / 8, min_per_class=2
    )
    calibration, validation = splits.split_stratified(held_out, labels, 2 / 3)
    assert sorted([*train, *calibration, *validation]) == list(range(len(labels)))
    for part in (train, validation, calibration):
        assert np.bincount(labels[part], minlength=len(counts)).min() >= 1
    assert np.bincount(labels[train]).min() >= 5


def test_a_share_is_exact_where_the_data_allow_it() -> None:
    labels = np.repeat(np.arange(10), 100)
    first, second = splits.split_stratified(np.arange(1000), labels, 0.125, min_per_class=2)
    assert (len(first), len(second)) == (875, 125)
    assert set(np.bincount(labels[second])) == {12, 13}
    assert len(splits.split_stratified(np.arange(1000), labels, 10)[1]) == 10
