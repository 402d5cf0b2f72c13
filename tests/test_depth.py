"""mnist.images.depth: pictures of 10 to 16 bits come out like the same picture of 8 bits."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from mnist import images
from tests.test_metadata import with_tag

RGB = (2, 1, 0)


def make_disc(channels: int = 1) -> np.ndarray:
    """A bright disc on a dark ground, with noise: levels (40, 40, channels), 0 to 1."""
    y, x = np.mgrid[-1:1:40j, -1:1:40j]
    noise = np.random.default_rng(0).normal(0, 0.02, (40, 40, channels))
    scene = np.where(x**2 + y**2 < 0.4, 0.9, 0.1)[..., None] * np.linspace(1, 0.5, channels)
    levels = (scene + noise).clip(0.02, 1)
    levels[20, 20] = 1
    return levels


def png(levels: np.ndarray) -> bytes:
    """A PNG of 16 bits: grey, grey with alpha, RGB or RGBA by the number of channels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    height, width, channels = levels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def tiff(levels: np.ndarray) -> bytes:
    order = RGB[: levels.shape[2]] if levels.shape[2] == 3 else (0,)
    return cv2.imencode(".tif", np.ascontiguousarray(levels[..., order]))[1].tobytes()


def pnm(levels: np.ndarray, maxval: int = 65535) -> bytes:
    height, width, channels = levels.shape
    header = f"P{6 if channels == 3 else 5}\n{width} {height}\n{maxval}\n"
    return header.encode() + levels.astype(">u2").tobytes()


def plain_pnm(levels: np.ndarray, maxval: int = 65535) -> bytes:
    height, width, channels = levels.shape
    header = f"P{3 if channels == 3 else 2}\n{width} {height}\n{maxval}\n"
    return (header + " ".join(map(str, levels.ravel()))).encode()


def read(data: bytes, channels: int, recipe: str = "plain") -> np.ndarray:
    return images.normalise(data, size=40, channels=channels, recipe=recipe).astype(int)


def expected(channels: int, recipe: str = "plain") -> np.ndarray:
    """The same picture of eight bits, as the model sees it."""
    eight = np.rint(make_disc(channels) * 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(eight.squeeze()).save(stream, "PNG")
    return read(stream.getvalue(), channels if recipe == "plain" else 1, recipe)


def quantise(levels: np.ndarray, bits: int) -> np.ndarray:
    return np.rint(levels * (2**bits - 1)).astype(np.uint16)


@pytest.mark.parametrize("write", [png, tiff, pnm, plain_pnm])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_levels_are_scaled_by_the_bits_in_use(write, channels: int, bits: int) -> None:
    data = write(quantise(make_disc(channels), bits))
    assert np.abs(read(data, channels) - expected(channels)).max() <= 1
    assert np.abs(read(data, 1, "digit") - expected(channels, "digit")).mean() < 2


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_a_pgm_s_maxval_is_its_depth(bits: int) -> None:
    for channels in (1, 3):
        for write in (pnm, plain_pnm):
            dark = quantise(make_disc(channels) / 5, bits)  # uses fewer bits than maxval says
            result = read(write(dark, 2**bits - 1), channels)
            assert np.abs(result - make_disc(channels).transpose(2, 0, 1) * 51).max() <= 1.5


def test_sixteen_bits_in_use_are_unchanged() -> None:
    for channels in (1, 3):
        dim = quantise(make_disc(channels) * 0.3, 16)
        for write in (png, tiff, pnm):
            assert np.abs(read(write(dim), channels) - (dim >> 8).transpose(2, 0, 1)).max() <= 1


def test_repeated_eight_bits_are_unchanged() -> None:
    for channels in (1, 3):
        dark = np.rint(make_disc(channels) * 40).astype(np.uint16)
        for write in (png, tiff, pnm):
            assert np.abs(read(write(dark * 257), channels) - dark.transpose(2, 0, 1)).max() <= 1


@pytest.mark.parametrize("channels", [2, 4])
def test_colours_and_transparency_have_depths_of_their_own(channels: int) -> None:
    levels = quantise(make_disc(channels), 12)
    levels[..., -1] = 65535
    result = read(png(levels), 3)
    colours = np.rint(make_disc(channels)[..., :-1] * 255).transpose(2, 0, 1)
    assert np.abs(result - np.broadcast_to(colours, (3, 40, 40))).max() <= 1


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_deep_tiff_is_turned_once(channels: int, orientation: int) -> None:
    levels = quantise(make_disc(channels), 12)
    levels[:5] = 4000
    data = with_tag(tiff(levels), 274, 3, 1, orientation)
    upright = read(tiff(levels), channels)
    turned = np.rot90(upright, 2 if orientation == 3 else -1, (1, 2))
    assert np.abs(read(data, channels) - turned).max() <= 1


def test_a_damaged_deep_picture_is_refused() -> None:
    for write in (png, tiff, pnm):
        data = write(quantise(make_disc(3), 12))
        with pytest.raises(images.ImageError):
            read(data[: len(data) // 2], 3)
