"""Pictures of more than eight bits a channel -> eight bits."""

from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

# Bits of a sensor's levels; 16 are those of a file that is full.
DEPTHS = (10, 12, 14, 16)
# The upper eight of 16 bits are no more than this for a depth below 16 (rounded up in PPM).
MAX_SHALLOW = 2**6

_FULL = 2**16 - 1


def to_eight_bits(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """The picture in the file `data`, opened but not decoded as `image`, with eight bits a channel.

    Levels are scaled by the bits that they use, the least of DEPTHS: a file of 16 bits may hold the
    12 of a camera. Where the file names its depth (a PGM's maxval) or repeats eight bits (all
    levels are multiples of 257), that counts instead. Floats and larger integers are stretched to
    0..255. Other pictures are returned as they are.
    """
    coding = _read_coding(image)
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_reduce_levels(np.asarray(image), _find_declared_bits(coding)))
    is_deep = ";16" in coding[0] or (image.format == "PPM" and coding[-1] == str(_FULL))
    if is_deep and image.mode in ("RGB", "RGBA"):
        return _reduce_colours(image, data)
    return image


def _read_coding(image: ImageFile.ImageFile) -> tuple[str, ...]:
    """Pillow's names for how pixels are stored, such as ("RGB;16B",), or ("L", "4095") for PGM."""
    args = image.tile[0].args if image.tile else None
    return tuple(map(str, args if isinstance(args, tuple) else (args,)))


def _find_declared_bits(coding: tuple[str, ...]) -> int | None:
    """The depth of grey levels that the file names, as Pillow gives them."""
    if coding[0].endswith(";12"):
        return 12
    # From a PGM with another maxval, Pillow scales levels to 0..65535.
    return 16 if coding[0] == "L" and coding[-1] != str(_FULL) else None


def _reduce_levels(levels: NDArray[Any], bits: int | None = None) -> NDArray[np.uint8]:
    if levels.dtype.kind in "iu" and levels.min() >= 0 and levels.max() <= _FULL:
        bits = bits or _find_bits(levels)
        return (levels >> (bits - 8)).astype(np.uint8)
    levels = np.nan_to_num(levels.astype(np.float32), copy=False)  # in place: it may be large
    np.clip(levels, -1e30, 1e30, out=levels)  # so that differences are finite
    low, high = levels.min(), levels.max()
    levels -= low
    levels *= 255 / ((high - low) or 1)
    return levels.astype(np.uint8)


def _find_bits(*channels: NDArray[Any]) -> int:
    top = max(int(levels.max()) for levels in channels)
    bits = next(bits for bits in (8, *DEPTHS) if top < 2**bits)
    is_repeated = 8 < bits < 16 and not any((levels % 257).any() for levels in channels)
    return 16 if is_repeated else bits


def _reduce_colours(image: Image.Image, data: bytes) -> Image.Image:
    """The 16 bits of colours, of which Pillow keeps the upper eight, by the bits in use."""
    # Decodes the file, and raises an error for a damaged one.
    extrema = cast(tuple[tuple[int, int], ...], image.getextrema())
    if max(high for _, high in extrema[:3]) > MAX_SHALLOW:
        return image
    # OpenCV reads one byte past the last number of a plain PPM.
    deep = cv2.imdecode(np.frombuffer(data + b"\n", np.uint8), cv2.IMREAD_UNCHANGED)
    if deep is None or deep.shape[:2] != image.size[::-1] or deep.dtype != np.uint16:
        return image
    blue, green, red, *alpha = np.moveaxis(deep, 2, 0)
    bits = _find_bits(red, green, blue)
    bands = [_reduce_levels(levels, bits) for levels in (red, green, blue)]
    bands += [_reduce_levels(levels) for levels in alpha]
    return Image.merge("RGBA" if alpha else "RGB", list(map(Image.fromarray, bands)))
