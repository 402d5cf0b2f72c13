"""mnist.images.metadata: whatever a file says besides its pixels, the picture is read."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, PngImagePlugin

from mnist import images
from mnist.images.metadata import strip_metadata
from serve import feedback

GARBAGE = b"Exif\0\0no TIFF at all"
TAG = b"Exif\0\0MM\0*\0\0\0\x08\0\1%b\0\0\0\0"  # EXIF of one tag
BOMB = zlib.compress(bytes(2_000_000))


def make_seven(kind: str, **options: object) -> bytes:
    picture = Image.new("L", (120, 120), 255)
    ImageDraw.Draw(picture).line([(30, 20), (80, 20), (50, 100)], fill=0, width=10)
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


PNG, JPEG, TIFF, WEBP = map(make_seven, ("PNG", "JPEG", "TIFF", "WEBP"))
EXPECTED = {kind: images.normalise(make_seven(kind)) for kind in ("PNG", "JPEG", "TIFF", "WEBP")}


def chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    """A PNG chunk, by default with the right checksum."""
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def with_chunk(added: bytes, at_end: bool = False) -> bytes:
    at = PNG.index(b"IEND" if at_end else b"IDAT") - 4
    return PNG[:at] + added + PNG[at:]


def with_segment(marker: int, content: bytes) -> bytes:
    return JPEG[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + JPEG[2:]


def with_tag(data: bytes, tag: int, kind: int, count: int, value: int) -> bytes:
    """A TIFF with another entry in its table, which moves to the end."""
    (start,) = struct.unpack_from("<I", data, 4)
    (n,) = struct.unpack_from("<H", data, start)
    entries = [data[start + 2 + 12 * i :][:12] for i in range(n)]
    entries.append(struct.pack("<HHII", tag, kind, count, value))
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    table = struct.pack("<H", n + 1) + b"".join(entries) + bytes(4)
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + table


PNG_METADATA = {
    "EXIF": chunk(b"eXIf", GARBAGE),
    "a large colour profile": chunk(b"iCCP", b"x\0\0" + BOMB),
    "a colour profile of another compression": chunk(b"iCCP", b"x\0\7" + BOMB),
    "a colour profile without a name": chunk(b"iCCP", b""),
    "a large text": chunk(b"zTXt", b"Comment\0\0" + BOMB),
    "a text of another compression": chunk(b"zTXt", b"Comment\0\7x"),
    "a large international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe<"),
    "a raw profile": chunk(b"tEXt", b"Raw profile type exif\0no\nhex\nat\nall"),
    "a text's checksum": chunk(b"tEXt", b"Comment\0x", checksum=1),
    "a gamma's checksum": chunk(b"gAMA", bytes(4), checksum=1),
    "a resolution that is cut": chunk(b"pHYs", b"x"),
    "a gamma that is cut": chunk(b"gAMA", b""),
    "an animation that is cut": chunk(b"acTL", b"x"),
}


@pytest.mark.parametrize("name", PNG_METADATA)
@pytest.mark.parametrize("at_end", [False, True])
def test_a_png_is_read_whatever_its_metadata(name: str, at_end: bool) -> None:
    data = with_chunk(PNG_METADATA[name], at_end)
    assert np.array_equal(images.normalise(data), EXPECTED["PNG"])


JPEG_METADATA = {
    "EXIF": (0xE1, GARBAGE),
    "EXIF that is cut": (0xE1, b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"),
    "EXIF of four bytes": (0xE1, b"Exif\0\0MM\0*"),
    "EXIF past its end": (0xE1, b"Exif\0\0MM\0*\0\0\xff\xff"),
    "an orientation in words": (0xE1, TAG % b"\1\x12\0\2\0\0\0\4top\0"),
    "JFIF that is cut": (0xE0, b"JFIF\0"),
    "Adobe's segment, cut": (0xEE, b"Adobe"),
    "several pictures": (0xE2, b"MPF\0MM\0*"),
    "a colour profile": (0xE2, b"ICC_PROFILE\0\x01"),
    "Photoshop's blocks": (0xED, b"Photoshop 3.0\x008BIM\x04"),
    "a comment": (0xFE, b""),
}


@pytest.mark.parametrize("name", JPEG_METADATA)
def test_a_jpeg_is_read_whatever_its_metadata(name: str) -> None:
    assert np.array_equal(images.normalise(with_segment(*JPEG_METADATA[name])), EXPECTED["JPEG"])


GIF_METADATA = {
    "an empty comment": b"\x21\xfe\0",
    "an empty extension": b"\x21\xff\0",
    "an unknown extension": b"\x21\x42\0",
    "a loop that is cut": b"\x21\xff\x0bNETSCAPE2.0\1\1\0",
}


@pytest.mark.parametrize("name", GIF_METADATA)
def test_a_gif_is_read_whatever_its_metadata(name: str) -> None:
    gif = make_seven("GIF", transparency=3)
    at = 13 + 3 * 2 ** ((gif[10] & 7) + 1)
    result = images.normalise(gif[:at] + GIF_METADATA[name] + gif[at:])
    assert np.array_equal(result, images.normalise(gif))


TIFF_METADATA = {
    "EXIF": (34665, 4, 1, 2**31),
    "GPS": (34853, 4, 1, 2**32 - 1),
    "a colour profile past the end": (34675, 7, 1_000_000, 100),
    "a description past the end": (270, 2, 5_000, 2**31),
    "a resolution past the end": (282, 5, 1, 2**31),
    "XMP": (700, 1, 7, 2**31),
    "an orientation in words": (274, 2, 3, 0x7878),
    "a type that is not known": (305, 99, 7, 3),
}


@pytest.mark.parametrize("name", TIFF_METADATA)
def test_a_tiff_is_read_whatever_its_metadata(name: str) -> None:
    assert np.array_equal(images.normalise(with_tag(TIFF, *TIFF_METADATA[name])), EXPECTED["TIFF"])


def test_a_tag_past_the_end_hides_no_later_one() -> None:
    stream = io.BytesIO()
    slope = np.tile(np.linspace(0, 1, 40, dtype=np.float32), (40, 1))
    Image.fromarray(slope).save(stream, "TIFF")  # of floats, as tag 339 says
    floats = stream.getvalue()
    expected = images.normalise(floats, recipe="plain")
    result = images.normalise(
        with_tag(floats, *TIFF_METADATA["a resolution past the end"]), recipe="plain"
    )
    assert np.array_equal(result, expected)


def test_a_webp_is_read_whatever_its_metadata() -> None:
    for name in ("exif", "xmp", "icc_profile"):
        data = make_seven("WEBP", **{name: GARBAGE})
        assert np.array_equal(images.normalise(data), EXPECTED["WEBP"])


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_orientation_counts_beside_metadata_that_is_refused(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = make_seven(kind, exif=exif)
    at, refused = {
        "PNG": (33, PNG_METADATA["a large colour profile"]),
        "JPEG": (2, b"\xff\xe0\0\7JFIF\0"),
    }[kind]
    data = turned[:at] + refused + turned[at:]
    assert np.array_equal(images.normalise(data), images.normalise(turned))
    assert not np.array_equal(images.normalise(data), EXPECTED[kind])


def test_pixels_are_refused_as_before() -> None:
    cut = with_chunk(PNG_METADATA["EXIF"])
    idat = PNG.index(b"IDAT")
    for data in (
        cut[: len(cut) // 2],
        PNG[: idat + 30],
        PNG[:20] + b"\xff" + PNG[21:],  # the header's checksum is wrong
        with_chunk(chunk(b"tRNS", b"\0\0", checksum=1)),
        with_chunk(PNG_METADATA["a large text"])[:-12] + b"\0\0\xff\xfftEXtcut",
        with_segment(0xE1, GARBAGE)[:-200],
        TIFF[: len(TIFF) // 2],
    ):
        with pytest.raises(images.ImageError) as caught:
            images.normalise(data)
        assert caught.value.code == "not_an_image"
        assert f"{len(data):,} bytes" in str(caught.value)


def test_a_bomb_in_a_text_takes_little_memory() -> None:
    once = zlib.compress(bytes(100_000_000), 9)
    bombs = [chunk(b"iCCP", b"x\0\0" + once), chunk(b"zTXt", b"x\0\0" + once)]
    bombs.append(chunk(b"iTXt", b"x\0\1\0\0\0" + once))
    bombs.append(chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1_000_000))) * 100)
    for bomb in bombs:
        data = with_chunk(bomb)
        tracemalloc.start()
        assert np.array_equal(images.normalise(data), EXPECTED["PNG"])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10_000_000 + PngImagePlugin.MAX_TEXT_MEMORY


def test_a_file_without_metadata_is_left_as_it_is() -> None:
    others = [make_seven("GIF"), make_seven("BMP"), WEBP]
    for data in (PNG, JPEG, *others, b"", b"II*\0", TIFF[:9], PNG[:9], JPEG[:5]):
        assert strip_metadata(data) is data


def test_a_header_is_read_whatever_the_metadata() -> None:
    for name in PNG_METADATA:
        assert images.read_header(with_chunk(PNG_METADATA[name])) == ("PNG", 120, 120)


def test_a_correction_keeps_its_ending_whatever_the_metadata(tmp_path: Path) -> None:
    picture = with_chunk(PNG_METADATA["a large colour profile"])
    kept = feedback.keep(tmp_path, 10_000, picture, "7", images.MAX_PIXELS)
    assert (kept.suffix, kept.read_bytes()) == (".png", picture)


def test_the_first_of_two_pictures_in_a_jpeg_is_read() -> None:
    stream = io.BytesIO()
    first = Image.open(io.BytesIO(make_seven("JPEG")))
    first.save(stream, "MPO", save_all=True, append_images=[Image.new(first.mode, first.size)])
    picture = stream.getvalue()
    with Image.open(io.BytesIO(picture)) as opened:
        assert (opened.format, opened.n_frames) == ("MPO", 2)
        opened.load()
        stream = io.BytesIO()
        opened.save(stream, "PNG")
    shift = np.abs(images.normalise(picture).astype(int) - images.normalise(stream.getvalue()))
    assert shift.max() <= 2  # two decoders of JPEG


def test_the_first_of_two_orientations_in_a_tag_counts() -> None:
    turned = images.normalise(with_tag(TIFF, 274, 3, 1, 6))
    assert not np.array_equal(turned, EXPECTED["TIFF"])
    assert np.array_equal(images.normalise(with_tag(TIFF, 274, 3, 2, 6 | 6 << 16)), turned)
    one, two = (
        images.normalise(with_segment(0xE1, TAG % (b"\1\x12\0\3\0\0\0" + values)))
        for values in (b"\1\0\6\0\0", b"\2\0\6\0\6")
    )
    assert not np.array_equal(one, EXPECTED["JPEG"])
    assert np.array_equal(two, one)


@pytest.mark.parametrize(
    "data",
    [b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), make_seven("AVIF")],
    ids=["HEIC", "AVIF"],
)
def test_formats_of_phones_that_are_not_read_are_refused(data: bytes) -> None:
    with pytest.raises(images.ImageError, match="cannot be read as a picture") as caught:
        images.normalise(data)
    assert caught.value.code == "not_an_image"


def test_a_jpeg_without_its_end_is_refused() -> None:
    with pytest.raises(images.ImageError) as caught:
        images.normalise(JPEG[:-2])
    assert caught.value.code == "not_an_image"
