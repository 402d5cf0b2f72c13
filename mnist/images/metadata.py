"""Metadata of picture files: the EXIF orientation, and files without their metadata."""

import struct
import zlib
from collections.abc import Callable

from PIL import Image

_ORIENTATION = 0x0112
# Orientation -> Image.Transpose.
_TRANSPOSES = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_ANCILLARY = 0x20  # the bit of a chunk's first letter
_JPEG_EXIF, _JPEG_JFIF, _JPEG_ADOBE, _JPEG_COMMENT = 0xE1, 0xE0, 0xEE, 0xFE
# Least lengths of the segments that say how colours are coded (ITU-T T.871 and T.872).
_JPEG_MIN_LENGTHS = {_JPEG_JFIF: 16, _JPEG_ADOBE: 14}
_GIF_EXTENSION, _GIF_GRAPHIC_CONTROL = 0x21, 0xF9
_TIFF_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
# Type -> bytes of a value.
_TIFF_SIZES = dict(zip(range(1, 14), (1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), strict=True))
# Tags without which pixels cannot be decoded (TIFF 6.0): size, depth, compression, colours, strips
# and tiles, predictor, palette, samples, JPEG and YCbCr.
_TIFF_PIXEL_TAGS = {
    *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320),
    *(322, 323, 324, 325, 332, 338, 339, 347, *range(512, 522), *range(529, 533)),
}


def rotate_upright(image: Image.Image, decoded: Image.Image) -> Image.Image:
    """`decoded`, the pixels of `image`, rotated by the EXIF orientation of `image`.

    EXIF that cannot be read counts as none.
    """
    try:
        transpose = _TRANSPOSES.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - Pillow raises anything for malformed EXIF
        transpose = None
    return decoded if transpose is None else decoded.transpose(Image.Transpose(transpose))


def strip_metadata(data: bytes) -> bytes:
    """The file without colour profiles, texts and other metadata, but with EXIF.

    For PNG, JPEG, GIF and TIFF, which Pillow rejects because of some metadata. Nothing is
    decompressed. Returns `data` itself if there is nothing to remove, or the file is malformed.
    """
    strip: Callable[[bytes], bytes] = next(
        (strip for magic, strip in _STRIPPERS.items() if data.startswith(magic)), bytes
    )
    try:
        stripped = strip(data)
    except (struct.error, IndexError):  # it ends early
        return data
    return data if stripped == data else stripped


def _strip_png(data: bytes) -> bytes:
    view, at = memoryview(data), len(_PNG_MAGIC)
    kept = [view[:at]]
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk = view[at : at + 12 + length]
        is_pixels = not kind[0] & _PNG_ANCILLARY or kind == b"tRNS"
        is_cut = len(chunk) < 12 + length
        if is_pixels or is_cut or (kind == b"eXIf" and _has_right_checksum(chunk)):
            kept.append(chunk)
        at += 12 + length
        if kind == b"IEND":
            break
    return b"".join(kept)


def _has_right_checksum(chunk: memoryview) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])


def _strip_jpeg(data: bytes) -> bytes:
    view, at = memoryview(data), 2
    kept = [view[:at]]
    while data[at] == 0xFF and data[at + 1] not in (0xDA, 0xD9):  # start of scan, end
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if not _is_jpeg_metadata(marker, length, view[at + 4 : at + 10]):
            kept.append(view[at : at + 2 + length])
        at += 2 + length
    kept.append(view[at:])
    return b"".join(kept)


def _is_jpeg_metadata(marker: int, length: int, head: memoryview) -> bool:
    if marker == _JPEG_EXIF:
        return head != b"Exif\0\0"
    if marker in _JPEG_MIN_LENGTHS:
        return length < _JPEG_MIN_LENGTHS[marker]
    return 0xE0 <= marker <= 0xEF or marker == _JPEG_COMMENT


def _strip_gif(data: bytes) -> bytes:
    """Without comments and other extensions before the first picture, but with its transparency."""
    has_palette, bits = data[10] >> 7, (data[10] & 7) + 1
    at = 13 + has_palette * 3 * 2**bits
    kept = [data[:at]]
    while data[at] == _GIF_EXTENSION:
        start, label = at, data[at + 1]
        at += 2
        while data[at]:  # a block's length; 0 ends the extension
            at += 1 + data[at]
        at += 1
        if label == _GIF_GRAPHIC_CONTROL:
            kept.append(data[start:at])
    return b"".join([*kept, data[at:]])


def _strip_tiff(data: bytes) -> bytes:
    return _filter_tags(
        data,
        lambda tag, kind, n, _: tag in _TIFF_PIXEL_TAGS or (tag, kind, n) == (_ORIENTATION, 3, 1),
    )


def drop_dangling_tags(data: bytes) -> bytes:
    """A TIFF without the metadata whose values lie past its end; any other file unchanged.

    Pillow reads no tag after one of these, and may take floats for integers then.
    """
    if data[:4] not in _TIFF_ORDERS:
        return data

    def keep(tag: int, kind: int, n: int, value: int) -> bool:
        size = n * _TIFF_SIZES.get(kind, 0)
        return tag in _TIFF_PIXEL_TAGS or size <= 4 or value + size <= len(data)

    try:
        return _filter_tags(data, keep)
    except struct.error:  # it ends early
        return data


def _filter_tags(data: bytes, keep: Callable[[int, int, int, int], bool]) -> bytes:
    """The TIFF with the tags whose number, type, count and value or offset are to `keep`."""
    order = _TIFF_ORDERS[data[:4]]
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    entries = range(start + 2, start + 2 + 12 * count, 12)
    kept = [
        data[at : at + 12] for at in entries if keep(*struct.unpack_from(f"{order}HHII", data, at))
    ]
    if len(kept) == count:
        return data
    table = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)  # no second picture
    return data[:start] + table + data[start + len(table) :]


_STRIPPERS = {
    _PNG_MAGIC: _strip_png,
    b"\xff\xd8\xff": _strip_jpeg,
    b"GIF8": _strip_gif,
    **dict.fromkeys(_TIFF_ORDERS, _strip_tiff),
}
