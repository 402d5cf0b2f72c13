"""benchmarks/: that the pictures are what they are called, and that the tables can be printed."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks import robustness, uncertain
from mnist import data, images
from tests.test_images import likeness, recipe_digits


@pytest.mark.parametrize("suite", robustness.SUITES)
def test_every_suite_still_shows_the_digit(suite: str) -> None:
    for digit in recipe_digits():
        ink = robustness.rendered(digit)
        assert ink.shape == (robustness.SIDE, robustness.SIDE)
        file = robustness.SUITES[suite](ink, np.random.default_rng(0))
        assert likeness(images.normalise(file)[0], digit) > 0.6


def test_a_suite_is_the_same_for_the_same_seed() -> None:
    digits = np.stack([*recipe_digits()])
    one, two, other = (dict(robustness.suites(digits, seed)) for seed in (0, 0, 1))
    assert one == two
    assert one["noise"] != other["noise"]
    assert one["unchanged"] == other["unchanged"]


def test_the_plain_way_inverts_paper_and_keeps_the_place() -> None:
    for digit in recipe_digits():
        for suite in ("unchanged", "inverted", "transparent"):
            file = robustness.SUITES[suite](robustness.rendered(digit), np.random.default_rng(0))
            assert np.abs(robustness.resized(file)[0].astype(int) - digit).mean() < 12


def test_robustness_prints_every_suite_and_the_pictures_of_the_wild(
    saved: Path, tmp_path: Path, digits: data.Dataset
) -> None:
    (tmp_path / "wild").mkdir()
    Image.fromarray(digits.train.images[0, 0].numpy()).save(tmp_path / "wild" / "a.png")
    Image.new("L", (50, 50), 255).save(tmp_path / "wild" / "b.png")  # blank: not right
    table = f"file,label\na.png,{digits.train.labels[0]}\nb.png,1\n"
    (tmp_path / "wild" / "labels.csv").write_text(table)
    options = ["--folder", str(saved), "--data-dir", str(tmp_path), "--images", "20"]
    done = CliRunner().invoke(robustness.main, options)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()[2:]
    assert [line[:24].strip() for line in lines] == [*robustness.SUITES, "wild"]
    assert lines[-1].split()[:2] == ["wild", "2"]
    assert 1 <= int(lines[-1].split()[2]) <= 2
    assert int(lines[0].split()[2]) <= 6  # errors of 20 that are unchanged


@pytest.mark.parametrize("kind", uncertain.NOISE)
@pytest.mark.parametrize("side", uncertain.SIDES)
def test_noise_is_a_picture_that_the_server_reads(kind: object, side: int) -> None:
    picture = kind(np.random.default_rng(0), side)
    assert (picture.dtype, picture.shape) == (np.uint8, (side, side))
    assert images.normalise(uncertain.encoded(picture)).shape == (1, 28, 28)


def test_letters_are_drawn_dark_on_light() -> None:
    found = [*uncertain.letters(np.random.default_rng(0))]
    assert len(found) == uncertain.LETTER_PICTURES
    assert all(picture[0, 0] == 255 and picture.min() < 100 for picture in found)
    seen, refused = uncertain.sent([uncertain.encoded(found[0]), uncertain.encoded(found[0] * 0)])
    assert (len(seen), refused) == (1, 1)
