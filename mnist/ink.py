"""What in a grey picture is ink: strokes in front of light, shadows, rules, frames and specks."""

import math
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Grey = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Box = tuple[slice, slice]

# Longest side on which the background is estimated: light changes slowly across a picture.
GROUND_SIDE = 56
# Share of the side that the background bridges: wider than a bold stroke, narrower than a shadow.
BRIDGE = 0.4
# Least difference, of 255, of ink and background: above the grain of a photo of empty paper, below
# a faint pencil. Without it, what is above the threshold is parted once more, with the second one:
# a small digit is less of a photo than what its light leaves along the rim. With 20 there, too,
# empty paper under uneven light was no longer blank (2026-11-28).
MIN_CONTRAST = (20, 50)
# Ink starts this many median deviations off the background (6 is 4 standard deviations of normal
# noise), and at least at 16 of 255, over the ripples that JPEG leaves around strokes.
NOISE_DEVIATIONS, NOISE_FLOOR = 6, 16
# A piece with a smaller share of the largest piece's pixels is a speck; the bar of a 5 has more.
SPECK = 0.04
# Of more pieces none is a frame: it is a texture, and to look at each takes time.
MOST_PIECES = 100
# A piece that is no frame and at least this share of the picture's side may be the digit.
DIGIT_SIDE = 0.15
# Share of the side next to an edge where only frames, rules and neighbours lie, no whole digit.
MARGIN = 0.12
# Strokes of one digit differ in thickness by less.
ALIKE = 1.6
# A piece over half as long as the picture, and at most so wide, as a share of its length, is a bar.
BAR = 0.1
# Most of the side that a rule of the paper is thick, lines of 2 in 140 pixels and their blurred
# edges; the least share of the side that it covers, for it runs from edge to edge; and how much it
# may rise or fall on its way, as a share of that.
RULE, RULE_LENGTH, RULE_SLOPE = 0.04, 0.95, 0.12


def find_ink(grey: Grey) -> Grey:
    """How dark each pixel of uint8 (H, W) is with ink: high on exact 0, whatever the polarity.

    Ink is what stands out from the local background, found by closing (or opening) and Otsu's
    threshold (1979, doi:10.1109/TSMC.1979.4310076); specks, rules and frames are left out. All is 0
    where nothing stands out.
    """
    relief = _relief(grey)
    counts = np.bincount(relief.ravel(), minlength=256)
    below = counts.cumsum()
    threshold = -1
    for least in MIN_CONTRAST:
        threshold = _otsu(counts, threshold + 1)
        rest = below[threshold]
        ground, full = np.searchsorted(below, (rest / 2, (rest + below[-1]) / 2)).tolist()
        if full - ground >= least:
            break
    else:
        return np.zeros_like(grey)
    levels = np.arange(256)
    deviations = np.bincount(abs(levels - ground)[: threshold + 1], counts[: threshold + 1])
    noise = int(np.searchsorted(deviations.cumsum(), rest / 2))
    low = ground + min(max(NOISE_FLOOR, NOISE_DEVIATIONS * noise), (threshold - ground) / 2)
    tones = np.clip((levels - low) * (255 / (full - low)), 0, 255).astype(np.uint8)
    toned = np.asarray(cv2.LUT(relief, tones), np.uint8)
    return toned * _pieces(_without_rules(toned > 0), relief > threshold)


# --- the background ------------------------------------------------------------------------------


def _relief(grey: Grey) -> Grey:
    """How far each pixel stands out from the background, on the side of the ink."""
    height, width = grey.shape
    factor = math.ceil(max(grey.shape) / GROUND_SIDE)
    below, right = -height % factor, -width % factor  # to whole squares: three times as fast
    whole = cv2.copyMakeBorder(grey, 0, below, 0, right, cv2.BORDER_REPLICATE)
    small = (whole.shape[1] // factor, whole.shape[0] // factor)
    thumb = cv2.resize(whole, small, interpolation=cv2.INTER_AREA).astype(np.float32)
    slope = _slope(thumb)
    level = thumb - slope
    dark = _ink_is_dark(level)
    # Light that falls from one side is bridged in its dark corner, as a stroke is, unless its slope
    # is taken away; at the edge of a shadow that makes it worse. The one with less ink is right.
    grounds = _bridged(thumb, dark), _bridged(level, dark) + slope
    best = min(grounds, key=lambda each: cv2.norm(each, thumb, cv2.NORM_L1))
    ground = cv2.resize(np.clip(best, 0, 255).astype(np.uint8), whole.shape[::-1])
    ground = ground[:height, :width]
    relief = cv2.subtract(ground, grey) if dark else cv2.subtract(grey, ground)  # from 0 on
    return np.asarray(relief, np.uint8)


def _slope(thumb: NDArray[np.float32]) -> NDArray[np.float32]:
    """The plane nearest to a picture, less its mean: light that falls from one side."""
    down, right = (np.arange(side, dtype=np.float32) - (side - 1) / 2 for side in thumb.shape)
    falls = [
        ramp @ sums / (thumb.size / len(ramp) * (ramp @ ramp) or 1)
        for ramp, sums in ((down, thumb.sum(1)), (right, thumb.sum(0)))
    ]
    return np.asarray((falls[0] * down)[:, None] + falls[1] * right, np.float32)


def _ink_is_dark(level: NDArray[np.float32]) -> bool:
    """Whether most of a picture and of its rim is in the lighter half."""
    light = level > (level.min() + level.max()) / 2
    rim = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])
    shares = [np.count_nonzero(part) / part.size for part in (light, rim)]
    return bool(shares[0] + shares[1] / 3 > 2 / 3)  # a frame all round must not outvote paper


def _bridged(level: NDArray[np.float32], dark: bool) -> NDArray[np.float32]:
    """Without what is dark (or light) and narrower than BRIDGE."""
    window = max(3, int(BRIDGE * max(level.shape)) | 1)
    how = cv2.MORPH_CLOSE if dark else cv2.MORPH_OPEN
    return np.asarray(cv2.morphologyEx(level, how, np.ones((window, window), np.uint8)), np.float32)


def _otsu(counts: NDArray[np.int64], start: int = 0) -> int:
    """The threshold between two kinds of levels, of those from `start` on."""
    levels = np.arange(start, 256.0)
    below = counts[start:].cumsum()
    mass = (counts[start:] * levels).cumsum()
    shares = np.maximum(below * (below[-1] - below), 1)
    return start + int(np.argmax((mass * below[-1] - mass[-1] * below) ** 2 / shares))


# --- rules ---------------------------------------------------------------------------------------


def _without_rules(mask: Mask) -> Mask:
    """Without thin lines that run from edge to edge, unless no digit is left within the edges."""
    spans = [bool(lines[:, 0].any() and lines[:, -1].any()) for lines in (mask, mask.T)]
    if not any(spans):
        return mask
    found = mask.copy()
    for lines, across in zip((found, found.T), spans, strict=True):
        if across:
            _erase_rules(lines)
    return found if _longest_free(found) >= DIGIT_SIDE * max(mask.shape) else mask


def _longest_free(mask: Mask) -> int:
    """The longest side of a piece that touches no edge; 0 without one."""
    _, _, boxes, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    height, width = mask.shape
    left, top, across, down = boxes[1:, :4].T
    free = (left > 0) & (top > 0) & (left + across < width) & (top + down < height)
    return int(np.maximum(across, down)[free].max(initial=0))


class _Rules(NamedTuple):
    """Lines that fall by `shifts` (W,) on their way, from and to these rows."""

    shifts: NDArray[np.int64]
    bands: list[tuple[int, int]]


def _erase_rules(mask: Mask) -> None:
    """Erase parallel thin lines from the left edge to the right one, but not what crosses them."""
    y, x = np.nonzero(mask)
    taller = mask.copy()
    taller[1:] |= mask[:-1]  # a line that falls does so in steps, some of them half a pixel off
    stepped = np.nonzero(taller)
    most = int(RULE_SLOPE * mask.shape[1])
    falls = sorted(range(-most, most + 1), key=abs)  # straight ones first
    found = [_rules(mask.shape, stepped if fall else (y, x), fall) for fall in falls]
    rules = max(found, key=lambda each: sum(end - start for start, end in each.bands))
    for start, end in rules.bands:
        if rules.shifts.any():  # what is beside a line that falls
            start, end = start - 1, end + 1
        inside = np.flatnonzero((start <= y - rules.shifts[x]) & (y - rules.shifts[x] < end))
        beside = np.array([[start - 1], [end]]) + rules.shifts[x[inside]]
        there = (beside >= 0) & (beside < len(mask))
        crosses = (there & mask[beside.clip(0, len(mask) - 1), x[inside]]).any(0)
        mask[y[inside[~crosses]], x[inside[~crosses]]] = False


def _rules(shape: tuple[int, ...], ink: tuple[NDArray[np.int64], ...], fall: int) -> _Rules:
    """Of ink at pixels (y, x), the lines that fall by so many pixels from left to right."""
    height, width = shape
    y, x = ink
    shifts = np.rint(np.arange(width) * (fall / width)).astype(np.int64) - max(0, fall)
    full = np.bincount(y - shifts[x], minlength=height) > RULE_LENGTH * width
    changes = np.flatnonzero(np.diff(full, prepend=False, append=False)).tolist()
    bands = [
        (start, end)
        for start, end in zip(changes[::2], changes[1::2], strict=True)
        if end - start < RULE * max(shape)
        and start + shifts.min() > 0  # there is the bar of a seven that fills its picture
        and end + shifts.max() < height
    ]
    # One alone that is not straight may be such a bar, too.
    return _Rules(shifts, bands if len(bands) > 1 or not fall else [])


# --- pieces --------------------------------------------------------------------------------------


def _pieces(mask: Mask, strong: Mask) -> Mask:
    """The connected pieces of a mask that can be a digit's: no specks, rules or frames."""
    count, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8, ltype=cv2.CV_16U)
    if count == 2:  # with the ground: as most pictures
        return np.asarray(mask & (mask & strong).any())
    counted = cv2.calcHist([labels], [0], strong.view(np.uint8), [count], [0, count])
    pixels = np.asarray(counted).ravel()
    pixels[0] = 0
    large = np.flatnonzero(pixels > SPECK * pixels.max())
    if len(large) == 1:
        return labels == large[0]
    if 1 < len(large) <= MOST_PIECES:
        _, labels, boxes, _ = cv2.connectedComponentsWithStats(
            mask.view(np.uint8), connectivity=8, ltype=cv2.CV_16U
        )
        shown = {i: _box(boxes[i]) for i in large.tolist()}
        frames = _frames(mask, labels, shown)
        others = [max(labels[box].shape) for i, box in shown.items() if i not in frames]
        if max(others, default=0) >= DIGIT_SIDE * max(mask.shape):
            pixels[frames] = 0
    return (pixels > SPECK * pixels.max())[labels]


def _frames(mask: Mask, labels: NDArray[Any], shown: dict[int, Box]) -> list[int]:
    """Which of the pieces are frames, or come in from an edge, as the corner of a shadow does.

    That is what touches an edge and is no longer than a piece that touches none; but not a stroke
    of the same digit: long, and about as thick.
    """
    pieces = {i: labels[box] == i for i, box in shown.items()}
    longest = {i: max(piece.shape) for i, piece in pieces.items()}
    free = (i for i, box in shown.items() if not _touches(box, mask.shape))
    whole = max(free, key=longest.__getitem__, default=0)
    depths = cv2.distanceTransform(mask.view(np.uint8), cv2.DIST_L2, 3)
    thick = {i: 2 * float(depths[box][pieces[i]].max()) for i, box in shown.items()}

    def comes_in(i: int) -> bool:
        if not whole or longest[i] > longest[whole] or not _touches(shown[i], mask.shape):
            return False
        least, most = thick[whole] / ALIKE, min(thick[whole] * ALIKE, longest[i] / 2)
        return not least < thick[i] < most

    return [i for i, box in shown.items() if comes_in(i) or _is_frame(pieces[i], box, mask.shape)]


def _touches(box: Box, shape: tuple[int, ...]) -> bool:
    return any(side.start == 0 or side.stop == n for side, n in zip(box, shape, strict=True))


def _box(found: NDArray[np.int32]) -> Box:
    left, top, width, height = found[:4].tolist()
    return slice(top, top + height), slice(left, left + width)


def _is_frame(piece: Mask, box: Box, shape: tuple[int, ...]) -> bool:
    """Whether a piece runs from edge to edge, keeps to one edge, or is a bar or a hollow rectangle.

    A digit alone may be all of these.
    """
    for side, length in zip(box, shape, strict=True):
        at_start, at_end, margin = side.start == 0, side.stop == length, MARGIN * length
        if at_start and at_end:
            return True
        if (at_start and side.stop <= margin) or (at_end and side.start >= length - margin):
            return True
    half = max(shape) / 2
    down, across = (math.ceil(MARGIN * side) for side in piece.shape)
    is_hollow = not piece[down:-down, across:-across].any()
    is_bar = max(piece.shape) > half and min(piece.shape) <= BAR * max(piece.shape)
    return is_bar or (is_hollow and min(piece.shape) > half)
