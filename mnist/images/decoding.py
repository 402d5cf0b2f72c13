"""Decodes picture files: bytes -> a Pillow image of eight bits a channel, upright."""

import io
import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from PIL import Image

from mnist.images import libraries
from mnist.images.depth import to_eight_bits
from mnist.images.metadata import drop_dangling_tags, rotate_upright, strip_metadata

# Enough for any phone's photo; decoded as RGB, it takes 150 MB of a server's memory.
MAX_PIXELS = 50_000_000
# Formats whose decoders start no program and download nothing. Not ICO: a header of 256x256 may
# come with a far larger picture, which Pillow decodes before its size can be checked.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")

T = TypeVar("T")


class ImageError(ValueError):
    """The picture is unusable; `code` is `not_an_image`, `too_many_pixels` or `blank`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Header(NamedTuple):
    """The header of a picture file: one of FORMATS, and the size in pixels."""

    format: str
    width: int
    height: int


def read_header(data: bytes) -> Header:
    """The header of a picture file. Raises ImageError if no decoder knows the file."""

    def read(data: bytes) -> Header:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return Header(image.format or "", *image.size)

    return _read(data, read)


def decode(
    data: bytes,
    max_pixels: int,
    flatten: Callable[[Image.Image], Image.Image],
    mode: str,
    min_side: int,
) -> Image.Image:
    """Decode a picture, `flatten` it to one mode and rotate it by its EXIF orientation.

    A JPEG is decoded at a reduced size, with sides of at least `min_side`, and in `mode`. Metadata
    that Pillow rejects is ignored. Raises ImageError: `not_an_image` if no decoder reads all
    pixels, `too_many_pixels` if the header exceeds `max_pixels`.
    """

    def read(data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise _too_many_pixels(image.width * image.height, max_pixels)
        image.draft(mode, (min_side, min_side))
        flat = flatten(_simplify(to_eight_bits(image, data), image.format))
        # After decoding, as Pillow itself rotates a TIFF and then drops the tag.
        return rotate_upright(image, flat)

    try:
        return _read(drop_dangling_tags(data), read, len(data))
    except Image.DecompressionBombError as e:  # Pillow's own limit, about 179 million
        pixels = re.search(r"\d+", str(e))
        raise _too_many_pixels(int(pixels[0]) if pixels else max_pixels + 1, max_pixels) from e


def _simplify(image: Image.Image, file_format: str | None) -> Image.Image:
    """Convert L*a*b*, which Pillow cannot flatten, and drop an alpha that viewers ignore."""
    if image.mode == "LAB":
        return image.convert("RGB")
    if file_format == "BMP" and image.mode == "RGBA" and not image.getchannel("A").getbbox():
        return image.convert("RGB")  # Windows leaves the alpha of each pixel at 0
    return image


def _read(data: bytes, read: Callable[[bytes], T], size: int | None = None) -> T:
    """`read` of the file or, where that fails, of the file without its metadata.

    `size` is the number of bytes that an error names, by default all.
    """
    libraries.configure()
    try:
        return read(data)
    except (ImageError, Image.DecompressionBombError):
        raise
    except Exception as e:  # decoders raise anything for malformed bytes
        size = size or len(data)
        stripped = strip_metadata(data)
        if stripped is not data:
            return _read(stripped, read, size)
        raise ImageError(
            "not_an_image",
            f"these {size:,} bytes cannot be read as a picture; send a whole PNG, JPEG, GIF, "
            "BMP, WebP, TIFF or PPM file",
        ) from e


def _too_many_pixels(pixels: int, limit: int) -> ImageError:
    return ImageError(
        "too_many_pixels",
        f"the picture has {pixels:,} pixels; the limit is {limit:,} (MAX_PIXELS)",
    )
