"""Finds ink in a grey picture: strokes, without light, shadows, rules, frames and specks."""

import math
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Grey = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Box = tuple[slice, slice]

# Longest side at which the background is estimated, as light changes slowly across a picture.
BACKGROUND_SIDE = 56
# Largest width, as a share of the side, that the background estimate bridges: wider than a bold
# stroke, narrower than a shadow.
MAX_BRIDGE = 0.4
# Least difference between ink and background, of 255: above the grain of a photo of empty paper,
# below a faint pencil. If the first threshold does not reach it, the pixels above are split again,
# and the second value applies: a small digit has fewer pixels than uneven light along the rim. With
# 20 as the second value, empty paper under uneven light was no longer blank (2026-11-28).
MIN_CONTRAST = (20, 50)
# Ink begins this many median deviations from the background (6 equals 4 standard deviations of
# normal noise), and at least at 16 of 255, above the ripples of JPEG around strokes.
NOISE_DEVIATIONS, NOISE_FLOOR = 6, 16
# Pieces with a smaller share of the largest piece's pixels are specks; the bar of a 5 has more.
MAX_SPECK = 0.04
# With more pieces, the picture is a texture without a frame, and checking each piece is slow.
MAX_PIECES = 100
# Least share of the picture's side of a piece that may be the digit.
MIN_DIGIT_SIDE = 0.15
# Share of the side next to an edge that has only frames, rules and neighbours, but no whole digit.
MARGIN = 0.12
# Largest ratio of the thicknesses of strokes of one digit.
MAX_STROKE_RATIO = 1.6
# A piece over half as long as the picture is a bar if its width is at most this share of that.
MAX_BAR_WIDTH = 0.1
# A rule of the paper: its greatest thickness as a share of the side (lines of 2 in 140 pixels, with
# blurred edges), the least share of the side that it covers, as it runs from edge to edge, and its
# greatest rise or fall, as a share of that length.
MAX_RULE, MIN_RULE_LENGTH, MAX_RULE_SLOPE = 0.04, 0.95, 0.12


def find_ink(grey: Grey) -> Grey:
    """The ink in a picture uint8 (H, W) of any polarity: high on exact 0.

    Ink differs from the local background, which is found by closing (or opening), by Otsu's
    threshold (1979, doi:10.1109/TSMC.1979.4310076). Specks, rules and frames are removed. Without
    any ink, all pixels are 0.
    """
    relief = _subtract_background(grey)
    counts = np.bincount(relief.ravel(), minlength=256)
    below = counts.cumsum()
    threshold = -1
    for min_contrast in MIN_CONTRAST:
        threshold = _find_threshold(counts, threshold + 1)
        n_background = below[threshold]
        background, ink = np.searchsorted(
            below, (n_background / 2, (n_background + below[-1]) / 2)
        ).tolist()
        if ink - background >= min_contrast:
            break
    else:
        return np.zeros_like(grey)
    levels = np.arange(256)
    deviations = np.bincount(abs(levels - background)[: threshold + 1], counts[: threshold + 1])
    noise = int(np.searchsorted(deviations.cumsum(), n_background / 2))
    low = background + min(max(NOISE_FLOOR, NOISE_DEVIATIONS * noise), (threshold - background) / 2)
    tones = np.clip((levels - low) * (255 / (ink - low)), 0, 255).astype(np.uint8)
    toned = np.asarray(cv2.LUT(relief, tones), np.uint8)
    return toned * _select_pieces(_remove_rules(toned > 0), relief > threshold)


# --- the background ------------------------------------------------------------------------------


def _subtract_background(grey: Grey) -> Grey:
    """The difference of each pixel from the background, in the direction of the ink."""
    height, width = grey.shape
    factor = math.ceil(max(grey.shape) / BACKGROUND_SIDE)
    below, right = -height % factor, -width % factor  # whole squares are three times as fast
    padded = cv2.copyMakeBorder(grey, 0, below, 0, right, cv2.BORDER_REPLICATE)
    small = (padded.shape[1] // factor, padded.shape[0] // factor)
    thumb = cv2.resize(padded, small, interpolation=cv2.INTER_AREA).astype(np.float32)
    slope = _fit_slope(thumb)
    level = thumb - slope
    dark = _ink_is_dark(level)
    # With light from one side, the dark corner is bridged like a stroke, unless the slope is
    # subtracted first; at the edge of a shadow, subtracting makes it worse. The candidate with less
    # ink is the right one.
    candidates = _bridge(thumb, dark), _bridge(level, dark) + slope
    background = min(candidates, key=lambda candidate: cv2.norm(candidate, thumb, cv2.NORM_L1))
    ground = cv2.resize(np.clip(background, 0, 255).astype(np.uint8), padded.shape[::-1])
    ground = ground[:height, :width]
    relief = cv2.subtract(ground, grey) if dark else cv2.subtract(grey, ground)  # clipped at 0
    return np.asarray(relief, np.uint8)


def _fit_slope(thumb: NDArray[np.float32]) -> NDArray[np.float32]:
    """The plane that fits a picture best, minus its mean: the slope of light from one side."""
    down, right = (np.arange(side, dtype=np.float32) - (side - 1) / 2 for side in thumb.shape)
    gradients = [
        ramp @ sums / (thumb.size / len(ramp) * (ramp @ ramp) or 1)
        for ramp, sums in ((down, thumb.sum(1)), (right, thumb.sum(0)))
    ]
    return np.asarray((gradients[0] * down)[:, None] + gradients[1] * right, np.float32)


def _ink_is_dark(level: NDArray[np.float32]) -> bool:
    """Whether most pixels of a picture and of its rim are in the lighter half."""
    light = level > (level.min() + level.max()) / 2
    rim = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])
    shares = [np.count_nonzero(part) / part.size for part in (light, rim)]
    return bool(shares[0] + shares[1] / 3 > 2 / 3)  # a frame must not outvote the paper


def _bridge(level: NDArray[np.float32], dark: bool) -> NDArray[np.float32]:
    """The picture without dark (or light) parts narrower than MAX_BRIDGE."""
    window = max(3, int(MAX_BRIDGE * max(level.shape)) | 1)
    kernel = np.ones((window, window), np.uint8)
    operation = cv2.MORPH_CLOSE if dark else cv2.MORPH_OPEN
    return np.asarray(cv2.morphologyEx(level, operation, kernel), np.float32)


def _find_threshold(counts: NDArray[np.int64], start: int = 0) -> int:
    """Otsu's threshold for levels from `start` on."""
    levels = np.arange(start, 256.0)
    below = counts[start:].cumsum()
    mass = (counts[start:] * levels).cumsum()
    shares = np.maximum(below * (below[-1] - below), 1)
    return start + int(np.argmax((mass * below[-1] - mass[-1] * below) ** 2 / shares))


# --- rules ---------------------------------------------------------------------------------------


def _remove_rules(mask: Mask) -> Mask:
    """Remove thin lines that run from edge to edge, unless no digit remains inside the edges."""
    spans = [bool(lines[:, 0].any() and lines[:, -1].any()) for lines in (mask, mask.T)]
    if not any(spans):
        return mask
    cleaned = mask.copy()
    for lines, across in zip((cleaned, cleaned.T), spans, strict=True):
        if across:
            _erase_rules(lines)
    return cleaned if _longest_inner_piece(cleaned) >= MIN_DIGIT_SIDE * max(mask.shape) else mask


def _longest_inner_piece(mask: Mask) -> int:
    """The longest side of any piece that touches no edge; 0 without such a piece."""
    _, _, boxes, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    height, width = mask.shape
    left, top, across, down = boxes[1:, :4].T
    free = (left > 0) & (top > 0) & (left + across < width) & (top + down < height)
    return int(np.maximum(across, down)[free].max(initial=0))


class _Rules(NamedTuple):
    """Parallel lines: vertical `shifts` (W,) per column, and `bands` of rows (start, end)."""

    shifts: NDArray[np.int64]
    bands: list[tuple[int, int]]


def _erase_rules(mask: Mask) -> None:
    """Erase parallel thin lines between left and right edge, except where strokes cross them."""
    y, x = np.nonzero(mask)
    taller = mask.copy()
    taller[1:] |= mask[:-1]  # sloping lines fall in steps, some of them half a pixel off
    stepped = np.nonzero(taller)
    max_slope = int(MAX_RULE_SLOPE * mask.shape[1])
    slopes = sorted(range(-max_slope, max_slope + 1), key=abs)  # horizontal ones first
    candidates = [_find_rules(mask.shape, stepped if slope else (y, x), slope) for slope in slopes]
    rules = max(candidates, key=lambda lines: sum(end - start for start, end in lines.bands))
    for start, end in rules.bands:
        if rules.shifts.any():  # include the steps beside a sloping line
            start, end = start - 1, end + 1
        inside = np.flatnonzero((start <= y - rules.shifts[x]) & (y - rules.shifts[x] < end))
        beside = np.array([[start - 1], [end]]) + rules.shifts[x[inside]]
        visible = (beside >= 0) & (beside < len(mask))
        crosses = (visible & mask[beside.clip(0, len(mask) - 1), x[inside]]).any(0)
        mask[y[inside[~crosses]], x[inside[~crosses]]] = False


def _find_rules(shape: tuple[int, ...], ink: tuple[NDArray[np.int64], ...], slope: int) -> _Rules:
    """The lines in ink at pixels (y, x) that fall by `slope` pixels from left to right."""
    height, width = shape
    y, x = ink
    shifts = np.rint(np.arange(width) * (slope / width)).astype(np.int64) - max(0, slope)
    full = np.bincount(y - shifts[x], minlength=height) > MIN_RULE_LENGTH * width
    if not full.any():
        return _Rules(shifts, [])
    changes = np.flatnonzero(np.diff(full, prepend=False, append=False)).tolist()
    bands = [
        (start, end)
        for start, end in zip(changes[::2], changes[1::2], strict=True)
        if end - start < MAX_RULE * max(shape)
        and start + shifts.min() > 0  # at the edge may be the bar of a 7 that fills the picture
        and end + shifts.max() < height
    ]
    # A single sloping line may also be the bar of a 7.
    return _Rules(shifts, bands if len(bands) > 1 or not slope else [])


# --- pieces --------------------------------------------------------------------------------------


def _select_pieces(mask: Mask, strong: Mask) -> Mask:
    """The connected pieces of a mask that may belong to a digit: no specks, rules or frames."""
    count, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8, ltype=cv2.CV_16U)
    if count == 2:  # background and one piece, as in most pictures
        return np.asarray(mask & (mask & strong).any())
    counted = cv2.calcHist([labels], [0], strong.view(np.uint8), [count], [0, count])
    pixels = np.asarray(counted).ravel()
    pixels[0] = 0
    large = np.flatnonzero(pixels > MAX_SPECK * pixels.max())
    if len(large) == 1:
        return labels == large[0]
    if 1 < len(large) <= MAX_PIECES:
        _, labels, boxes, _ = cv2.connectedComponentsWithStats(
            mask.view(np.uint8), connectivity=8, ltype=cv2.CV_16U
        )
        selected = {i: _make_box(boxes[i]) for i in large.tolist()}
        frames = _find_frames(mask, labels, selected)
        others = [max(labels[box].shape) for i, box in selected.items() if i not in frames]
        if max(others, default=0) >= MIN_DIGIT_SIDE * max(mask.shape):
            pixels[frames] = 0
    return (pixels > MAX_SPECK * pixels.max())[labels]


def _find_frames(mask: Mask, labels: NDArray[Any], boxes: dict[int, Box]) -> list[int]:
    """The pieces that are frames or enter from an edge, such as the corner of a shadow.

    A piece enters if it touches an edge and is no longer than some piece that touches none, unless
    it is a stroke of the same digit: long, and about as thick.
    """
    pieces = {i: labels[box] == i for i, box in boxes.items()}
    longest = {i: max(piece.shape) for i, piece in pieces.items()}
    free = (i for i, box in boxes.items() if not _touches(box, mask.shape))
    reference = max(free, key=longest.__getitem__, default=0)
    depths = cv2.distanceTransform(mask.view(np.uint8), cv2.DIST_L2, 3)
    thickness = {i: 2 * float(depths[box][pieces[i]].max()) for i, box in boxes.items()}

    def enters(i: int) -> bool:
        if not reference or longest[i] > longest[reference] or not _touches(boxes[i], mask.shape):
            return False
        least = thickness[reference] / MAX_STROKE_RATIO
        most = min(thickness[reference] * MAX_STROKE_RATIO, longest[i] / 2)
        return not least < thickness[i] < most

    return [i for i, box in boxes.items() if enters(i) or _is_frame(pieces[i], box, mask.shape)]


def _touches(box: Box, shape: tuple[int, ...]) -> bool:
    return any(side.start == 0 or side.stop == n for side, n in zip(box, shape, strict=True))


def _make_box(stats: NDArray[np.int32]) -> Box:
    left, top, width, height = stats[:4].tolist()
    return slice(top, top + height), slice(left, left + width)


def _is_frame(piece: Mask, box: Box, shape: tuple[int, ...]) -> bool:
    """Whether a piece spans two edges, stays in one margin, or is a bar or a hollow rectangle.

    A digit alone in its picture may also be any of these.
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
    is_bar = max(piece.shape) > half and min(piece.shape) <= MAX_BAR_WIDTH * max(piece.shape)
    return is_bar or (is_hollow and min(piece.shape) > half)
