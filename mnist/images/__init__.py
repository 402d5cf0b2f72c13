"""Normalisation: any raw picture (bytes) -> the uint8 array that a model takes as its input."""

import math
import struct

import cv2
import numpy as np
from PIL import Image

from mnist.images.colours import project_colours
from mnist.images.decoding import MAX_PIXELS, ImageError, decode
from mnist.images.decoding import read_header as read_header
from mnist.images.ink import BACKGROUND_SIDE, Grey, find_ink

# Longest side at which find_ink works: a digit a tenth as tall as its photo keeps 11 to 22 pixels,
# about the 20 that the recipe needs. With 192 to 384, photos are read equally well.
WORKING_SIDE = 224
# The ink's box in MNIST: 20 of 28 pixels (http://yann.lecun.com/exdb/mnist/).
BOX = 20 / 28
# Least share of that box that the ink of a picture in the recipe's form fills: all of MNIST has 19
# or 20 of 20; similar data sets may have a little less.
MIN_FILL = 0.7
# Least mean width of a stroke in a box of 20. MNIST's are 1.9 (median); thinner strokes fade when a
# photo is scaled down.
MIN_STROKE = 1.8
# Mean level from which a transparent picture gets a black background instead of a white one.
LIGHT_LEVEL = 192
RECIPES = (("digit", 1), ("plain", 1), ("plain", 3))  # recipe, channels

SMALL_BYTES, SMALL_PIXELS = 16_000, 300 * 300
PNG_HEADER = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # followed by width and height


def normalise(
    data: bytes,
    *,
    size: int = 28,
    channels: int = 1,
    recipe: str = "digit",
    max_pixels: int = MAX_PIXELS,
) -> Grey:
    """Read a picture in any common format and bring it into the form of the training images.

    Returns uint8 (channels, size, size). A picture that already has this form is returned bit for
    bit. With the recipe "digit", the ink that `ink.find_ink` finds is high (255) on 0, whatever the
    picture's polarity, in the position and size that `centre` describes; where ink and background
    are equally bright, they are separated by their colours. With the recipe "plain", the whole
    picture is scaled with its aspect ratio and padded to a square with the colour of its rim, in
    grey (1 channel) or RGB (3).

    Raises ImageError: `not_an_image` if no decoder reads all of it, `too_many_pixels` if its header
    exceeds `max_pixels`, `blank` if it shows nothing. Raises ValueError for another recipe or
    number of channels.
    """
    if (recipe, channels) not in RECIPES:
        names = ", ".join(f"{name!r} with {n}" for name, n in RECIPES)
        raise ValueError(f"recipe {recipe!r} with {channels} channels; known: {names}")
    if recipe == "plain":
        mode = "L" if channels == 1 else "RGB"
        image = decode(data, max_pixels, lambda image: _flatten(image, mode), mode, 2 * size)
        return _make_plain(image, size)
    grey = np.asarray(decode(data, max_pixels, _to_grey, "L", WORKING_SIDE))
    for candidate in (grey, 255 - grey):
        if _follows_recipe(candidate, size):
            return candidate[None].copy()
    ink = find_ink(grey)
    if not ink.any():
        ink = _find_coloured_ink(data, max_pixels)
    return centre(ink, size)[None]


def is_small(data: bytes) -> bool:
    """Whether normalise() takes a few ms, and at most some tens of ms for any content.

    Only for PNG files, by their header: in other formats neither bytes nor pixels limit the time (a
    JPEG of 49 KB with 4,000 scans took a second).
    """
    if not 24 < len(data) <= SMALL_BYTES or data[:16] != PNG_HEADER:
        return False
    width, height = struct.unpack_from(">II", data, 16)
    return width * height <= SMALL_PIXELS


def centre(grey: Grey, size: int = 28) -> Grey:
    """Apply MNIST's recipe to ink on black: uint8 (H, W), ink high on exact 0 -> (size, size).

    The ink's longest side becomes 20/28 of `size`, with its aspect ratio, anti-aliased edges and a
    peak of 255; its centre of mass is within half a pixel of index (size/2, size/2), as in all of
    MNIST, unless ink would leave the picture. Strokes too thin to survive are thickened. An array
    that already follows the recipe is returned unchanged. Raises ImageError `blank` if all is 0.
    """
    if _follows_recipe(grey, size):
        return grey.copy()
    ink = _thicken(grey[_bounding_box(grey)])
    longest: int = max(ink.shape)
    scale = round(size * BOX) / longest
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    small = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC))
    small = np.rint(small * (255 / max(1.0, float(np.max(small))))).astype(np.uint8)
    top, left = (
        min(max(math.ceil((size - 1) / 2 - coordinate), 0), size - side)
        for coordinate, side in zip(_mass_centre(small), small.shape, strict=True)
    )
    out = np.zeros((size, size), np.uint8)
    out[top : top + height, left : left + width] = small
    return out


def _follows_recipe(grey: Grey, size: int) -> bool:
    # At most 45 per cent of any MNIST image is ink, so less than half tells ink from background.
    if grey.shape != (size, size) or not 0 < 2 * np.count_nonzero(grey) < grey.size:
        return False
    longest = max(grey[_bounding_box(grey)].shape)
    box = round(size * BOX)
    centred = all(abs(coordinate - size / 2) <= 1 for coordinate in _mass_centre(grey))
    return centred and MIN_FILL * box <= longest <= box


def _bounding_box(grey: Grey) -> tuple[slice, slice]:
    left, top, width, height = cv2.boundingRect(grey)
    if not width:
        raise _blank()
    return slice(top, top + height), slice(left, left + width)


def _mass_centre(grey: Grey) -> tuple[float, float]:
    moments = cv2.moments(grey)
    return moments["m01"] / moments["m00"], moments["m10"] / moments["m00"]


def _thicken(ink: Grey) -> Grey:
    mask = cv2.copyMakeBorder(ink, 1, 1, 1, 1, cv2.BORDER_CONSTANT) > 127
    outline = sum(np.count_nonzero(lines[1:] != lines[:-1]) for lines in (mask, mask.T))
    # The width of a band is its area divided by half its outline.
    stroke = 2 * np.count_nonzero(mask) / max(1, outline)
    longest: int = max(ink.shape)
    growth = round(MIN_STROKE * longest / 20 - stroke)
    if growth < 1:
        return ink
    kernel = np.ones((growth + 1, growth + 1), np.uint8)
    padded = cv2.copyMakeBorder(ink, growth, growth, growth, growth, cv2.BORDER_CONSTANT)
    return np.asarray(cv2.dilate(padded, kernel), np.uint8)


def _blank() -> ImageError:
    return ImageError("blank", "the picture is blank: draw something dark on light or the reverse")


def _to_grey(image: Image.Image) -> Image.Image:
    factor = math.ceil(max(image.size) / WORKING_SIDE)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            return _composite_ink(image.reduce(factor))
    return image.convert("L").reduce(factor)


def _find_coloured_ink(data: bytes, max_pixels: int) -> Grey:
    """The ink of a picture whose ink and ground are equally bright; all 0 without any."""
    image = decode(data, max_pixels, lambda image: _flatten(image, "RGB"), "RGB", WORKING_SIDE)
    pixels = np.asarray(image.reduce(math.ceil(max(image.size) / WORKING_SIDE)))
    inks = map(find_ink, project_colours(pixels))
    return next((ink for ink in inks if ink.any()), np.zeros(pixels.shape[:2], np.uint8))


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            background = Image.new("RGBA", image.size, "black" if _is_light(image) else "white")
            background.alpha_composite(image)
            image = background
    return image.convert(mode)


def _is_light(image: Image.Image) -> bool:
    """Whether the visible part of RGBA is too light for a white background."""
    small = image.reduce(math.ceil(max(image.size) / BACKGROUND_SIDE))
    alpha = np.asarray(small.getchannel("A"), float)
    return bool((np.asarray(small.convert("L")) * alpha).sum() >= LIGHT_LEVEL * alpha.sum())


def _make_plain(image: Image.Image, size: int) -> Grey:
    if image.size != (size, size):
        image = _fit_square(image, size)
    pixels = np.asarray(image).reshape(size, size, -1)
    if (pixels == pixels[0, 0]).all():
        raise ImageError("blank", "the picture is blank: all of it has the same colour")
    return pixels.transpose(2, 0, 1).copy()


def _fit_square(image: Image.Image, size: int) -> Image.Image:
    """Scale to a longest side of `size`, centred on a square of the rim's median colour."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)
    pixels = np.asarray(small).reshape(height, width, -1)
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = tuple(int(level) for level in np.median(rim, axis=0))
    square = Image.new(image.mode, (size, size), ground)
    square.paste(small, ((size - width) // 2, (size - height) // 2))
    return square


def _composite_ink(image: Image.Image) -> Image.Image:
    """Composite RGBA onto a background that shows its ink: its own, or the opposite of strokes."""
    alpha = np.asarray(image.getchannel("A")).astype(np.uint32)
    grey = np.asarray(image.convert("RGB").convert("L"))
    if 2 * alpha.mean() > 255:
        ground = int(np.median(grey[alpha > 127]))
    else:
        ground = 255 if (grey * alpha).sum() < 128 * alpha.sum() else 0
    return Image.fromarray(((grey * alpha + ground * (255 - alpha) + 127) // 255).astype(np.uint8))
