"""Pictures of more than eight bits a channel -> eight bits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile


def to_eight_bits(image: ImageFile.ImageFile) -> Image.Image:
    """The picture with eight bits a channel; of 16 bits, the upper eight."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_reduce_levels(np.asarray(image)))
    return image


def _reduce_levels(levels: NDArray[Any]) -> NDArray[np.uint8]:
    if levels.dtype.kind in "iu" and levels.min() >= 0 and levels.max() < 2**16:
        return (levels >> 8 if levels.max() > 255 else levels).astype(np.uint8)
    levels = np.nan_to_num(levels.astype(np.float32), copy=False)  # in place: it may be large
    np.clip(levels, -1e30, 1e30, out=levels)  # so that differences are finite
    low, high = levels.min(), levels.max()
    levels -= low
    levels *= 255 / ((high - low) or 1)
    return levels.astype(np.uint8)
