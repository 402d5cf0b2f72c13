"""Colours -> grey pictures in which colours of equal luminance differ."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mnist.images.ink import Grey

# The length of the vector of luminance (ITU-R BT.601). Axes have the same length, so that noise of
# a camera is no stronger along them than in grey.
GAIN = float(np.linalg.norm((0.299, 0.587, 0.114)))
MIDDLE = 128


def project_colours(pixels: NDArray[np.uint8]) -> Iterator[Grey]:
    """Project RGB (H, W, 3) on two axes: yields uint8 (H, W), the greatest contrast first.

    The axes are the principal ones across the colour of the ground (the median), as light and
    shadow change a colour along its own direction. Yields nothing for a picture without colours.
    """
    if (pixels == pixels[..., :1]).all():
        return
    colours = pixels.reshape(-1, 3).astype(np.float32)
    ground = np.median(colours, axis=0)
    differences = colours - ground
    direction = (ground if ground.any() else np.ones(3)) / (np.linalg.norm(ground) or 3**0.5)
    across = differences - np.outer(differences @ direction, direction)
    _, axes = np.linalg.eigh(across.T @ across)  # by size; the first one is the ground's direction
    for axis in axes.T[:0:-1]:
        levels = np.rint(MIDDLE + GAIN * (across @ axis.astype(np.float32)))
        yield levels.clip(0, 255).astype(np.uint8).reshape(pixels.shape[:2])
