"""Any raw picture (bytes) -> the uint8 array the models were trained on; nothing else knows how."""

import io
import math
import re
import struct
import warnings
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mnist.ink import GROUND_SIDE, Grey, find_ink

# Any telephone's photo passes; decoded as RGB this is 150 MB, which a server can bear.
MAX_PIXELS = 50_000_000
# Decoders that run no other program and fetch nothing. No ICO: a header of 256x256 may hold a far
# larger picture, which Pillow decodes before its size can be checked.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
# Longest side on which ink is looked for: a digit a tenth as tall as its photo keeps 11 to 22
# pixels, about the 20 that the recipe needs. 192 to 384 read photos equally well.
WORKING_SIDE = 224
# The ink's box in MNIST: 20 of 28 pixels (http://yann.lecun.com/exdb/mnist/).
BOX = 20 / 28
# Shortest longest side, as a share of that box, still taken for the recipe: all of MNIST has 19 or
# 20 of 20; a little room for other sets of its kind.
LEAST_FILL = 0.7
# Least mean width of a stroke in a box of 20. MNIST's own are 1.9 (median); thinner ones fade when
# a photo is scaled down.
MIN_STROKE = 1.8
# Mean level from which a picture on a transparent ground gets a black page, not a white one.
LIGHT = 192
RECIPES = (("digit", 1), ("plain", 1), ("plain", 3))  # with how many channels

SMALL_BYTES, SMALL_PIXELS = 16_000, 300 * 300
PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # then come width and height

_EXIF_ORIENTATION = 0x0112
_TURNS = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))  # its values -> Image.Transpose
# What Pillow warns of (odd metadata, many pixels) is not for who serves or trains a model. Here and
# once: to catch warnings around each picture swaps a global of the whole process.
warnings.filterwarnings("ignore", module=r"PIL\.")
# What is done here takes microseconds: a second thread is woken in vain, for 0.8 ms of a processor.
cv2.setNumThreads(1)


class ImageError(ValueError):
    """A picture that cannot be used; `code` is `not_an_image`, `too_many_pixels` or `blank`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def normalise(
    data: bytes,
    *,
    size: int = 28,
    channels: int = 1,
    recipe: str = "digit",
    max_pixels: int = MAX_PIXELS,
) -> Grey:
    """Read a picture in any common format and bring it to the form of the training images.

    Returns uint8 (channels, size, size). A picture that has that form already passes through bit
    for bit. By the recipe "digit", ink, as `ink.find_ink` tells it, is high (255) on 0, whatever
    the picture's polarity, and has the place and size that `centre` describes. By the recipe
    "plain" the whole picture is scaled, its aspect kept, and made square with the colour of its
    rim; its tones stay, grey (1 channel) or RGB (3).

    Raises ImageError: `not_an_image` if no decoder reads all of it, `too_many_pixels` if its header
    says more than `max_pixels`, `blank` if nothing stands out. Raises ValueError for another recipe
    or number of channels.
    """
    if (recipe, channels) not in RECIPES:
        known = ", ".join(f"{name!r} with {n}" for name, n in RECIPES)
        raise ValueError(f"recipe {recipe!r} with {channels} channels; known: {known}")
    if recipe == "plain":
        mode = "L" if channels == 1 else "RGB"
        return _plain(
            _decode(data, max_pixels, lambda image: _flat(image, mode), mode, 2 * size), size
        )
    grey = np.asarray(_decode(data, max_pixels, _grey, "L", WORKING_SIDE))
    for candidate in (grey, 255 - grey):
        if _follows(candidate, size):
            return candidate[None].copy()
    return centre(find_ink(grey), size)[None]


def is_small(data: bytes) -> bool:
    """Whether to normalise it takes a few ms, and whatever it contains, not over some tens.

    So only a PNG, by what its header says: in other formats neither bytes nor pixels bound the
    time (a JPEG of 49 KB with 4,000 scans took a second).
    """
    if not 24 < len(data) <= SMALL_BYTES or data[:16] != PNG_HEAD:
        return False
    width, height = struct.unpack_from(">II", data, 16)
    return width * height <= SMALL_PIXELS


def centre(grey: Grey, size: int = 28) -> Grey:
    """Apply MNIST's recipe to ink on black: uint8 (H, W), ink high on exact 0 -> (size, size).

    The ink's longest side becomes 20/28 of `size`, its aspect kept, its edges anti-aliased, its
    peak 255; its centre of mass lies within half a pixel of index (size/2, size/2), as in all of
    MNIST, unless ink would leave the picture. Strokes too thin to survive are thickened. An array
    that already follows the recipe is returned as it is. Raises ImageError `blank` if all is 0.
    """
    if _follows(grey, size):
        return grey.copy()
    ink = _thicken(grey[_extent(grey)])
    longest: int = max(ink.shape)
    scale = round(size * BOX) / longest
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    small = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC))
    small = np.rint(small * (255 / max(1.0, float(np.max(small))))).astype(np.uint8)
    top, left = (
        min(max(math.ceil((size - 1) / 2 - at), 0), size - side)
        for at, side in zip(_mass_centre(small), small.shape, strict=True)
    )
    out = np.zeros((size, size), np.uint8)
    out[top : top + height, left : left + width] = small
    return out


def _follows(grey: Grey, size: int) -> bool:
    # At most 45 per cent of any MNIST image is ink, so the test for half tells ink from ground.
    if grey.shape != (size, size) or not 0 < 2 * np.count_nonzero(grey) < grey.size:
        return False
    longest = max(grey[_extent(grey)].shape)
    box = round(size * BOX)
    centred = all(abs(at - size / 2) <= 1 for at in _mass_centre(grey))
    return centred and LEAST_FILL * box <= longest <= box


def _extent(grey: Grey) -> tuple[slice, slice]:
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
    # A band's area over half its outline is its width.
    stroke = 2 * np.count_nonzero(mask) / max(1, outline)
    longest: int = max(ink.shape)
    missing = round(MIN_STROKE * longest / 20 - stroke)
    if missing < 1:
        return ink
    square = np.ones((missing + 1, missing + 1), np.uint8)
    padded = cv2.copyMakeBorder(ink, missing, missing, missing, missing, cv2.BORDER_CONSTANT)
    return np.asarray(cv2.dilate(padded, square), np.uint8)


def _decode(
    data: bytes,
    max_pixels: int,
    flatten: Callable[[Image.Image], Image.Image],
    mode: str,
    least: int,
) -> Image.Image:
    """The picture as its camera was held, brought to one mode by `flatten`.

    A JPEG decodes to no more than needed: sides of at least `least`, grey if `mode` says so.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise _too_many(image.width * image.height, max_pixels)
        image.draft(mode, (least, least))
        flat = flatten(image)
        # Asked after decoding: Pillow turns a TIFF by itself and then drops the tag.
        turn = _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
        return flat if turn is None else flat.transpose(Image.Transpose(turn))
    except ImageError:
        raise
    except Image.DecompressionBombError as e:  # Pillow's own limit, about 179 million
        pixels = re.search(r"\d+", str(e))
        raise _too_many(int(pixels[0]) if pixels else max_pixels + 1, max_pixels) from e
    except Exception as e:  # decoders raise whatever malformed bytes bring about
        raise ImageError(
            "not_an_image",
            f"these {len(data):,} bytes cannot be read as a picture; send a whole PNG, JPEG, GIF, "
            "BMP, WebP, TIFF or PPM file",
        ) from e


def _too_many(pixels: int, limit: int) -> ImageError:
    return ImageError(
        "too_many_pixels",
        f"the picture has {pixels:,} pixels; the limit is {limit:,} (MAX_PIXELS)",
    )


def _blank() -> ImageError:
    return ImageError("blank", "the picture is blank: draw something dark on light or the reverse")


def _grey(image: Image.Image) -> Image.Image:
    factor = math.ceil(max(image.size) / WORKING_SIDE)
    image = _shallow(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            return _on_ground(image.reduce(factor))
    return image.convert("L").reduce(factor)


def _flat(image: Image.Image, mode: str) -> Image.Image:
    image = _shallow(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            page = Image.new("RGBA", image.size, "black" if _is_light(image) else "white")
            page.alpha_composite(image)
            image = page
    return image.convert(mode)


def _is_light(image: Image.Image) -> bool:
    """Whether what RGBA shows is too light for a white page."""
    small = image.reduce(math.ceil(max(image.size) / GROUND_SIDE))
    alpha = np.asarray(small.getchannel("A"), float)
    return bool((np.asarray(small.convert("L")) * alpha).sum() >= LIGHT * alpha.sum())


def _plain(picture: Image.Image, size: int) -> Grey:
    if picture.size != (size, size):
        picture = _fit(picture, size)
    pixels = np.asarray(picture).reshape(size, size, -1)
    if (pixels == pixels[0, 0]).all():
        raise ImageError("blank", "the picture is blank: all of it has the same colour")
    return pixels.transpose(2, 0, 1).copy()


def _fit(picture: Image.Image, size: int) -> Image.Image:
    """Scaled to a longest side of `size`, in the middle of a square of its rim's median colour."""
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)
    pixels = np.asarray(small).reshape(height, width, -1)
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = tuple(int(level) for level in np.median(rim, axis=0))
    square = Image.new(picture.mode, (size, size), ground)
    square.paste(small, ((size - width) // 2, (size - height) // 2))
    return square


def _shallow(image: Image.Image) -> Image.Image:
    """With eight bits a channel."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(image)))
    return image


def _eight_bits(deep: NDArray[Any]) -> Grey:
    if deep.dtype.kind in "iu" and deep.min() >= 0 and deep.max() < 2**16:
        return (deep >> 8 if deep.max() > 255 else deep).astype(np.uint8)
    deep = np.nan_to_num(deep.astype(np.float32), copy=False)  # in place: it may be large
    np.clip(deep, -1e30, 1e30, out=deep)  # so that differences are finite
    low, high = deep.min(), deep.max()
    deep -= low
    deep *= 255 / ((high - low) or 1)
    return deep.astype(np.uint8)


def _on_ground(image: Image.Image) -> Image.Image:
    """Composite RGBA onto what shows its ink: its own ground, or the opposite of bare strokes."""
    alpha = np.asarray(image.getchannel("A")).astype(np.uint32)
    grey = np.asarray(image.convert("RGB").convert("L"))
    if 2 * alpha.mean() > 255:
        ground = int(np.median(grey[alpha > 127]))
    else:
        ground = 255 if (grey * alpha).sum() < 128 * alpha.sum() else 0
    return Image.fromarray(((grey * alpha + ground * (255 - alpha) + 127) // 255).astype(np.uint8))
