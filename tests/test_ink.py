"""mnist.images.ink: its steps one by one, with pictures drawn by hand."""

from collections.abc import Iterable

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from mnist.images import ink
from mnist.images.ink import Box, Mask

PAGE = 100  # pixels of a side


def box(top: int, bottom: int, left: int, right: int) -> Box:
    return slice(top, bottom), slice(left, right)


def mask(*boxes: Box, side: int = PAGE) -> Mask:
    """A picture with these filled boxes."""
    drawn = np.zeros((side, side), bool)
    for part in boxes:
        drawn[part] = True
    return drawn


STROKE = box(30, 70, 45, 55)


# --- the background


def test_the_slope_is_that_of_the_plane_that_fits_best() -> None:
    thumb = np.random.default_rng(0).uniform(0, 255, (20, 30)).astype(np.float32)
    down, right = np.indices(thumb.shape).reshape(2, -1)
    columns = np.stack([down, right, np.ones_like(down)], 1)
    factors, *_ = np.linalg.lstsq(columns, thumb.ravel(), rcond=None)
    plane = (columns @ factors).reshape(thumb.shape)
    assert np.allclose(ink._fit_slope(thumb), plane - plane.mean(), atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (20, 1)])
def test_a_picture_of_one_row_or_column_has_no_slope_across(shape: tuple[int, int]) -> None:
    thumb = np.full(shape, 100, np.float32)
    assert np.array_equal(ink._fit_slope(thumb), np.zeros(shape))


FRAME = (
    box(0, 2, 0, PAGE),
    box(PAGE - 2, PAGE, 0, PAGE),
    box(0, PAGE, 0, 2),
    box(0, PAGE, 98, 100),
)


@pytest.mark.parametrize(
    ("boxes", "is_dark"),
    [
        ((STROKE,), True),
        ((STROKE, *FRAME), True),  # the frame does not outvote the paper
        ((box(0, 100, 0, 66),), False),  # a third light, with its rim
        ((box(10, 90, 10, 65),), True),  # over half light, and all of the rim
        ((box(1, 99, 1, 71),), False),  # a third light, and all of the rim
    ],
)
def test_ink_is_dark_where_the_paper_and_its_rim_are_light(
    boxes: Iterable[Box], is_dark: bool
) -> None:
    drawn = mask(*boxes)
    assert ink._ink_is_dark(np.where(drawn, 60, 200).astype(np.float32)) == is_dark


def test_ink_is_light_on_dark_paper() -> None:
    assert not ink._ink_is_dark(np.where(mask(STROKE), 200, 60).astype(np.float32))


@pytest.mark.parametrize("dark", [True, False])
@pytest.mark.parametrize(("side", "bridged"), [(50, 20), (56, 22), (8, 2)])
def test_strokes_narrower_than_two_fifths_of_the_side_are_bridged(
    side: int, bridged: int, dark: bool
) -> None:
    low, high = (0, 200) if dark else (200, 0)
    for width, is_bridged in ((bridged, True), (bridged + 1, False)):
        level = np.full((side, side), high, np.float32)
        level[:, (side - width) // 2 :][:, :width] = low
        result = ink._bridge(level, dark)
        assert (result == high).all() == is_bridged


@pytest.mark.parametrize(("paper", "drawn"), [(200, 50), (40, 240)])
@pytest.mark.parametrize("shape", [(56, 56), (100, 90), (57, 113), (224, 30)])
def test_relief_is_the_difference_from_even_paper(
    shape: tuple[int, int], paper: int, drawn: int
) -> None:
    grey = np.full(shape, paper, np.uint8)
    stroke = box(shape[0] // 3, shape[0] // 2, shape[1] // 2, shape[1] // 2 + 4)
    grey[stroke] = drawn
    relief = ink._subtract_background(grey).astype(int)
    expected = np.zeros(shape, int)
    expected[stroke] = abs(paper - drawn)
    assert np.abs(relief - expected).max() <= 1


@pytest.mark.parametrize("light", [1, -1])
def test_light_from_one_side_leaves_no_relief(light: int) -> None:
    down, right = np.mgrid[-1:1:112j, -1:1:112j]
    page = 150 + 40 * light * right + 20 * down
    page[40:70, 50:56] -= 80
    relief = ink._subtract_background(page.astype(np.uint8))
    assert relief[40:70, 50:56].min() >= 75
    relief[40:70, 50:56] = 0
    assert relief.max() <= 6


# --- the threshold


@pytest.mark.parametrize("start", [0, 100])
@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_separates_the_levels_best(seed: int, start: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 100, 256)
    levels = np.arange(256)

    def variance_between(threshold: int) -> float:
        low = slice(start, threshold + 1)
        high = slice(threshold + 1, 256)
        n, m = counts[low].sum(), counts[high].sum()
        if not n or not m:
            return 0
        means = [(counts[part] @ levels[part]) / counts[part].sum() for part in (low, high)]
        return n * m * (means[0] - means[1]) ** 2

    assert ink._find_threshold(counts, start) == max(range(start, 256), key=variance_between)


@pytest.mark.parametrize(("paper", "sign"), [(200, -1), (40, 1)])
def test_ink_needs_a_contrast_of_20(paper: int, sign: int) -> None:
    for contrast, is_ink in ((19, False), (20, True), (100, True)):
        grey = np.full((PAGE, PAGE), paper, np.uint8)
        grey[STROKE] = paper + sign * contrast
        result = ink.find_ink(grey)
        expected = np.where(mask(STROKE) & is_ink, 255, 0)
        assert np.abs(result - expected).max() <= 1  # of rounding


def test_a_small_digit_among_weak_shades_needs_a_contrast_of_50() -> None:
    """The first threshold separates the shades from the paper; they are too weak to be ink."""
    for contrast, is_ink in ((45, False), (60, True)):
        grey = np.full((PAGE, PAGE), 200, np.uint8)
        grey[::4] = 188
        grey[::4, ::2] = 185
        digit = box(40, 60, 48, 52)
        grey[digit] = 200 - contrast
        result = ink.find_ink(grey)
        assert bool(result.any()) == is_ink
        if is_ink:
            assert np.count_nonzero(result[digit]) == 80
            assert np.count_nonzero(result) < 90


def test_grey_edges_of_ink_keep_their_share_of_its_contrast() -> None:
    grey = np.full((PAGE, PAGE), 200, np.uint8)
    grey[STROKE] = 100
    grey[30:70, [44, 55]] = 150  # half covered
    result = ink.find_ink(grey)
    assert result[STROKE].min() >= 254
    edges = result[30:70, [44, 55]]
    assert (edges == edges[0, 0]).all()
    assert 100 <= edges[0, 0] <= 130


@pytest.mark.parametrize(
    ("deviation", "tone"),
    [
        (0, 255 * (100 - 26) // (240 - 26)),  # ink begins 16 levels above the paper,
        (2, 255 * (100 - 26) // (240 - 26)),
        (4, 255 * (100 - 34) // (240 - 34)),  # or six deviations,
        (9, 255 * (100 - 55) // (240 - 55)),  # or half-way to the threshold, 100
    ],
)
def test_ink_begins_above_the_noise_of_the_paper(
    deviation: int, tone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = np.array([10, 10 - deviation, 10 + deviation], np.uint8)
    relief = np.resize(levels, (PAGE, PAGE))  # two thirds of the paper deviate by so much
    relief[30:60, 30:60] = 240
    relief[30:60, 60:62] = 100  # the edge of a stroke
    monkeypatch.setattr(ink, "_subtract_background", lambda grey: grey)
    result = ink.find_ink(relief)
    assert result[30:60, 30:60].min() >= 254
    assert set(result[30:60, 60:62].ravel().tolist()) <= {tone, tone - 1}
    result[30:60, 30:62] = 0
    assert not result.any()


# --- rules


@pytest.mark.parametrize(
    ("boxes", "longest"),
    [
        ((), 0),
        ((box(10, 15, 20, 28),), 8),
        ((box(10, 22, 20, 28),), 12),
        ((box(10, 12, 20, 22), box(12, 15, 22, 25)), 5),  # connected by a corner
        ((box(10, 12, 20, 22), box(30, 33, 20, 22)), 3),
        ((box(0, 50, 20, 28), box(50, 100, 50, 52)), 0),
        ((box(20, 28, 0, 50), box(50, 52, 50, 100)), 0),
        ((box(1, 50, 20, 28),), 49),
        ((box(50, 99, 20, 28),), 49),
        ((box(20, 28, 1, 50),), 49),
        ((box(20, 28, 50, 99),), 49),
    ],
)
def test_only_pieces_off_the_edges_can_be_all_of_a_digit(
    boxes: Iterable[Box], longest: int
) -> None:
    assert ink._longest_inner_piece(mask(*boxes)) == longest


def find_rules(drawn: Mask, slope: int = 0) -> list[tuple[int, int]]:
    return ink._find_rules(drawn.shape, np.nonzero(drawn), slope).bands


@pytest.mark.parametrize(
    ("boxes", "bands"),
    [
        ((box(10, 12, 0, 100), box(50, 51, 0, 100)), [(10, 12), (50, 51)]),
        ((box(10, 13, 0, 100),), [(10, 13)]),
        ((box(10, 14, 0, 100),), []),  # too thick
        ((box(10, 12, 0, 96),), [(10, 12)]),
        ((box(10, 12, 0, 95),), []),  # too short
        ((box(1, 2, 0, 100), box(98, 99, 0, 100)), [(1, 2), (98, 99)]),
        ((box(0, 1, 0, 100), box(99, 100, 0, 100)), []),  # at the edges
    ],
)
def test_rules_are_thin_lines_from_edge_to_edge(
    boxes: Iterable[Box], bands: list[tuple[int, int]]
) -> None:
    assert find_rules(mask(*boxes)) == bands


@pytest.mark.parametrize("slope", [8, -8])
def test_of_sloping_rules_there_are_at_least_two(slope: int) -> None:
    def draw(*starts: int) -> Mask:
        drawn = mask()
        x = np.arange(PAGE)
        for start in starts:
            drawn[start + np.rint(x * slope / PAGE).astype(int), x] = True
        return drawn

    assert len(find_rules(draw(30, 60), slope)) == 2
    assert find_rules(draw(30, 60), -slope) == []
    assert find_rules(draw(30), slope) == []


def test_rules_are_erased_but_not_the_strokes_that_cross_them() -> None:
    for drawn, crossed in (
        (mask(box(20, 22, 0, 100), STROKE), mask(STROKE)),
        (mask(box(50, 52, 0, 100), STROKE), mask(STROKE)),
        (mask(box(0, 100, 20, 22), STROKE), mask(STROKE)),
        (mask(box(0, 100, 50, 52), box(45, 55, 30, 70)), mask(box(45, 55, 30, 70))),
    ):
        before = drawn.copy()
        assert np.array_equal(ink._remove_rules(drawn), crossed)
        assert np.array_equal(drawn, before)


def test_a_line_stays_without_other_large_ink() -> None:
    for other in (box(40, 55, 45, 55), box(40, 54, 45, 54)):
        drawn = mask(box(20, 22, 0, 100), other)
        longest = other[0].stop - other[0].start
        expected = mask(other) if longest >= 0.15 * PAGE else drawn
        assert np.array_equal(ink._remove_rules(drawn), expected)


# --- pieces


@pytest.mark.parametrize(
    ("part", "is_frame"),
    [
        (box(0, 100, 40, 60), True),  # from edge to edge
        (box(40, 60, 0, 100), True),
        (box(0, 99, 40, 60), False),
        (box(0, 12, 30, 45), True),  # in a margin
        (box(0, 13, 30, 45), False),
        (box(88, 100, 30, 45), True),
        (box(87, 100, 30, 45), False),
        (box(1, 12, 30, 45), False),
        (box(20, 80, 40, 46), True),  # a bar
        (box(20, 80, 40, 47), False),
        (box(20, 70, 40, 45), False),
    ],
)
def test_a_frame_spans_edges_stays_in_a_margin_or_is_a_bar(part: Box, is_frame: bool) -> None:
    piece = mask(part)[part]
    assert ink._is_frame(piece, part, (PAGE, PAGE)) == is_frame
    turned = part[::-1]
    assert ink._is_frame(piece.T, turned, (PAGE, PAGE)) == is_frame


@pytest.mark.parametrize(
    ("height", "width", "line", "is_frame"),
    [(60, 60, 4, True), (51, 60, 4, True), (50, 60, 4, False), (60, 60, 40, False)],
)
def test_a_large_hollow_rectangle_is_a_frame(
    height: int, width: int, line: int, is_frame: bool
) -> None:
    part = box(20, 20 + height, 15, 15 + width)
    piece = np.ones((height, width), bool)
    if 2 * line < height:
        piece[line:-line, line:-line] = False
    assert ink._is_frame(piece, part, (PAGE, PAGE)) == is_frame


@pytest.mark.parametrize(
    ("part", "touches"),
    [
        (box(1, 99, 1, 99), False),
        (box(0, 99, 1, 99), True),
        (box(1, 100, 1, 99), True),
        (box(1, 99, 0, 99), True),
        (box(1, 99, 1, 100), True),
    ],
)
def test_a_piece_touches_each_of_the_four_edges(part: Box, touches: bool) -> None:
    assert ink._touches(part, (PAGE, PAGE)) == touches


def select(drawn: Mask, strong: Mask | None = None) -> Mask:
    return ink._select_pieces(drawn, drawn if strong is None else strong)


def test_specks_are_pieces_with_at_most_a_twenty_fifth_of_the_pixels() -> None:
    digit = box(30, 60, 40, 50)  # 300 pixels
    speck, bar = box(70, 74, 20, 23), box(10, 11, 70, 83)  # 12 and 13
    assert np.array_equal(select(mask(digit, speck)), mask(digit))
    assert np.array_equal(select(mask(digit, bar)), mask(digit, bar))
    assert np.array_equal(select(mask(digit, speck, bar)), mask(digit, bar))


def test_a_piece_counts_by_its_strong_pixels() -> None:
    digit, other = box(30, 60, 40, 50), box(70, 90, 20, 30)
    strong = mask(digit, box(70, 71, 20, 30))
    assert np.array_equal(select(mask(digit, other), strong), mask(digit))
    assert not select(mask(digit), mask()).any()
    assert np.array_equal(select(mask(digit), mask(box(30, 31, 40, 41))), mask(digit))


@pytest.mark.parametrize(
    ("other", "is_ink"),
    [
        (box(0, 30, 70, 80), True),  # as thick as the digit: a stroke of it
        (box(0, 34, 70, 84), True),
        (box(0, 34, 70, 87), False),  # too thick
        (box(0, 30, 70, 77), True),
        (box(0, 30, 70, 75), False),  # too thin
        (box(0, 18, 70, 80), False),  # shorter than twice its thickness
        (box(1, 30, 70, 75), True),  # off the edge
        (box(0, 45, 70, 75), True),  # longer than the digit
    ],
)
def test_a_piece_that_enters_from_an_edge_is_no_ink(other: Box, is_ink: bool) -> None:
    digit = box(35, 75, 40, 50)
    for turned in (False, True):
        drawn, alone = mask(digit, other), mask(digit)
        drawn, alone = (drawn.T.copy(), alone.T.copy()) if turned else (drawn, alone)
        assert np.array_equal(select(drawn), drawn if is_ink else alone)


def test_without_a_piece_as_large_as_a_digit_frames_stay() -> None:
    frame, small = box(0, 100, 80, 90), box(40, 55, 40, 45)
    assert np.array_equal(select(mask(frame, small)), mask(small))
    small = box(40, 54, 40, 45)
    assert np.array_equal(select(mask(frame, small)), mask(frame, small))


def test_boxes_are_rows_and_columns() -> None:
    stats: NDArray[np.int32] = cv2.connectedComponentsWithStats(
        mask(box(10, 15, 20, 28)).view(np.uint8)
    )[2]
    assert ink._make_box(stats[1]) == box(10, 15, 20, 28)
