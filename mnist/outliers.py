"""Pictures that show no class, for training: strokes, signs, shapes, noise, joined images.

A network that was trained on its classes only is confident for any picture. If it is also trained
on pictures without a class, it learns to be uncertain about them and about unseen pictures of other
kinds (outlier exposure: Hendrycks et al. 2019, arXiv 1812.04606).
"""

import itertools
import math
from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from mnist.images import ImageError, centre, libraries
from mnist.images.ink import Grey, find_ink

SIDE = 84  # pixels of a drawing before it is centred
NOISE_SIDES = (28, 56)
MAX_SIMILARITY = 0.8  # largest cosine between an outlier and a training image
COMPARED = 5_000  # training images that an outlier is compared with
COMPARISONS = 500  # outliers that are compared at a time: 10 MB

MAX_OUTLIERS, MIN_SHOWN = 6_000, 2  # in a training: different ones, and how often each is shown

Draw = Callable[[Generator], Grey]
"""Ink, high on 0, of any size; it may be blank."""


def count(shown: float) -> int:
    """The number of different outliers for a training that shows `shown` of them."""
    return min(max(round(shown / MIN_SHOWN), 1), MAX_OUTLIERS)


def make(images: NDArray[np.uint8], n: int, seed: int) -> NDArray[np.uint8]:
    """Make n pictures uint8 (n, 1, S, S) without a class, from training images (N, 1, S, S).

    Ink on black, centred by MNIST's recipe like the training images. A picture that is too similar
    to one of the first COMPARED training images is left out.
    """
    rng = np.random.default_rng(seed)
    size = images.shape[-1]
    draws: tuple[Draw, ...] = (
        draw_strokes,
        draw_signs,
        draw_shapes,
        draw_noise,
        lambda rng: join(images[rng.integers(len(images), size=2), 0], rng),
    )
    libraries.configure()
    known = _to_unit_length(images[:COMPARED])
    drawings = (_draw_centred(draw, rng, size) for draw in itertools.cycle(draws))
    inked = (picture for picture in drawings if picture is not None)
    chosen = np.empty((0, 1, size, size), np.uint8)
    while len(chosen) < n:
        missing = min(n - len(chosen), COMPARISONS)
        candidates = np.stack(list(itertools.islice(inked, missing)))[:, None]
        similarity = (_to_unit_length(candidates) @ known.T).max(1)
        chosen = np.concatenate([chosen, candidates[similarity <= MAX_SIMILARITY]])
    return chosen


def draw_strokes(rng: Generator) -> Grey:
    """Draw up to seven lines, arcs and curves of about the same width."""
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    width = int(rng.integers(2, 12))
    for _ in range(rng.integers(1, 8)):
        points = rng.uniform(4, SIDE - 4, (4, 2))
        kind, pen = rng.integers(3), max(1, width + int(rng.integers(-1, 2)))
        if kind == 0:
            curve = points[:2]
        elif kind == 1:
            curve = _ellipse(rng, (4, 34), rng.uniform(60, 360))
        else:  # Bezier, of degree 3
            t = np.linspace(0, 1, 16)[:, None]
            weights = [math.comb(3, k) * t**k * (1 - t) ** (3 - k) for k in range(4)]
            curve = np.hstack(weights) @ points
        line = np.rint(curve).astype(np.int32)
        cv2.polylines(canvas, [line], False, 255, pen, cv2.LINE_AA)
    return canvas


def draw_signs(rng: Generator) -> Grey:
    """Draw two to six straight or bent strokes between points of a grid, as letters have them."""
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    width = int(rng.integers(3, 12))
    grid = np.stack(np.meshgrid([14, 42, 70], [14, 42, 70]), -1).reshape(-1, 2)
    grid = grid[:: int(rng.integers(1, 3))] + rng.normal(0, 2, 2)
    for _ in range(rng.integers(2, 7)):
        start, end = grid[rng.choice(len(grid), 2, replace=False)]
        bend = rng.uniform(-0.6, 0.6) if rng.random() < 0.3 else 0.0
        t = np.linspace(0, 1, 12)[:, None]
        sideways = (end - start)[::-1] * (1, -1)
        curve = start + t * (end - start) + 4 * t * (1 - t) * bend * sideways
        cv2.polylines(canvas, [np.rint(curve).astype(np.int32)], False, 255, width, cv2.LINE_AA)
    return canvas


def draw_shapes(rng: Generator) -> Grey:
    """Draw up to four filled polygons and ellipses, half of them with a texture."""
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    for i in range(rng.integers(1, 5)):
        level = 255 if i == 0 or rng.random() < 0.6 else int(rng.integers(200))
        if rng.random() < 0.5:
            outline = rng.uniform(2, SIDE - 2, (rng.integers(3, 8), 2))
        else:
            outline = _ellipse(rng, (6, 38), 360)
        cv2.fillPoly(canvas, [np.rint(outline).astype(np.int32)], level, cv2.LINE_AA)
    if rng.random() < 0.5:
        cells = rng.random((int(rng.integers(2, 12)),) * 2).astype(np.float32)
        texture = cv2.resize(cells, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        canvas = (canvas * np.clip(1.5 * texture, 0.1, 1)).astype(np.uint8)
    return canvas


def draw_noise(rng: Generator) -> Grey:
    """The ink in a picture of noise: of single pixels, of blobs, or of specks on a ground."""
    side, kind = int(rng.choice(NOISE_SIDES)), rng.integers(4)
    if kind == 0:
        grey = rng.integers(256, size=(side, side)).astype(np.uint8)
    elif kind == 1:
        grey = rng.normal(128, rng.uniform(10, 70), (side, side)).clip(0, 255).astype(np.uint8)
    elif kind == 2:
        points = rng.normal(size=(side, side)).astype(np.float32)
        field = np.asarray(cv2.GaussianBlur(points, (0, 0), side * rng.uniform(0.01, 0.2)))
        grey = (255 * (field - field.min()) / np.ptp(field)).astype(np.uint8)
    else:
        grey = np.full((side, side), rng.integers(256), np.uint8)
        specks = rng.random((side, side)) < rng.uniform(0.005, 0.3)
        grey[specks] = rng.integers(256, size=int(specks.sum()))
    return find_ink(grey)


def join(pair: NDArray[np.uint8], rng: Generator) -> Grey:
    """Join two images uint8 (2, S, S): halves, shuffled quarters, one over or beside the other."""
    first, second = pair
    half, kind = len(first) // 2, rng.integers(4)
    if kind == 0:
        joined = np.concatenate([first[:half], second[half:]])
        joined = joined[::-1] if rng.random() < 0.5 else joined
    elif kind == 1:
        parts = [first[:half, :half], first[:half, half:], first[half:, :half], first[half:, half:]]
        order = rng.permutation(4)
        joined = np.block([[parts[order[0]], parts[order[1]]], [parts[order[2]], parts[order[3]]]])
    elif kind == 2:
        joined = np.maximum(first, np.rot90(second))
    else:
        joined = np.zeros((2 * half, 3 * half), np.uint8)
        joined[:, : 2 * half] = first[: 2 * half, : 2 * half]
        joined[:, half:] = np.maximum(joined[:, half:], second[: 2 * half, : 2 * half])
    return np.ascontiguousarray(joined.T if rng.random() < 0.5 else joined)


def _ellipse(rng: Generator, radii: tuple[int, int], degrees: float) -> NDArray[np.float64]:
    """Points (N, 2) on an arc of these degrees, with random centre, radii and rotation."""
    centre_point = rng.uniform(SIDE / 5, SIDE * 4 / 5, 2)
    angle = np.radians(np.linspace(0, degrees, 40)) + rng.uniform(0, 2 * np.pi)
    along = np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(*radii, 2)
    turn = rng.uniform(0, np.pi)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return along @ rotation + centre_point


def _draw_centred(draw: Draw, rng: Generator, size: int) -> Grey | None:
    """A drawing in the form of the training images; None if it is blank."""
    try:
        return centre(draw(rng), size)
    except ImageError:
        return None


def _to_unit_length(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    rows = images.reshape(len(images), -1).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-9)
