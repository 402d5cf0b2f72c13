"""mnist.images.colours: ink that is as bright as its ground is read by its colour."""

import cv2
import numpy as np
import pytest
from PIL import Image

from mnist import images
from mnist.images.colours import project_colours
from tests.test_images import assert_reads_as_the_seven, encode, refused, seven

EQUALLY_BRIGHT = [  # ink, ground: the same grey
    ((255, 0, 0), (0, 130, 0)),
    ((0, 130, 0), (255, 0, 0)),
    ((40, 40, 250), (64, 64, 64)),
    ((200, 60, 60), (60, 110, 180)),
    ((128, 128, 128), (40, 170, 140)),
]


@pytest.mark.parametrize(("ink", "ground"), EQUALLY_BRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_ink_as_bright_as_its_ground_is_read(
    ink: tuple[int, int, int], ground: tuple[int, int, int], kind: str
) -> None:
    drawing = seven(ink=ink, ground=ground, mode="RGB")
    assert np.ptp(np.asarray(drawing.convert("L"))) < 20
    assert_reads_as_the_seven(encode(drawing, kind), least=0.93)


def test_random_colours_are_separated() -> None:
    dice = np.random.default_rng(0)
    for _ in range(60):
        ink, ground = (tuple(dice.integers(0, 256, 3).tolist()) for _ in range(2))
        if np.linalg.norm(np.subtract(ink, ground)) > 60:
            assert_reads_as_the_seven(encode(seven(ink=ink, ground=ground, mode="RGB")))


def make_paper(colour: tuple[int, ...], seed: int) -> Image.Image:
    """Empty paper under uneven light, with the grain of a sensor in each channel."""
    down, right = np.mgrid[-1:1:280j, -1:1:280j]
    light = (0.75 + 0.15 * (down + right)) * (1 - 0.1 * (down**2 + right**2))
    grain = np.random.default_rng(seed).normal(0, 25, (280, 280, 3))
    paper = np.array(colour) * light[..., None] + cv2.GaussianBlur(grain, (0, 0), 1)
    return Image.fromarray(paper.clip(0, 255).astype(np.uint8))


def test_empty_coloured_paper_is_blank() -> None:
    dice = np.random.default_rng(1)
    for seed in range(12):
        paper = make_paper(tuple(dice.integers(0, 256, 3)), seed)
        for data in (encode(paper), encode(paper, "JPEG", quality=60)):
            assert refused(data).code == "blank"
    flat = Image.new("RGB", (90, 90), (10, 200, 90))
    assert refused(encode(flat)).code == "blank"


def test_colours_are_ignored_if_grey_has_ink(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: np.ndarray) -> None:
        raise AssertionError("the colours were examined")

    monkeypatch.setattr(images, "project_colours", never)
    assert images.normalise(encode(seven(ink=(200, 30, 30), ground="white", mode="RGB"))).any()


def test_grey_has_no_colours() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (9, 9, 1), np.uint8)
    assert list(project_colours(np.repeat(grey, 3, 2))) == []
    assert len(list(project_colours(np.zeros((4, 4, 3), np.uint8) + np.uint8([9, 0, 0])))) == 2
    black = np.zeros((4, 4, 3), np.uint8)
    black[0, 0] = (0, 9, 0)
    assert len(list(project_colours(black))) == 2
