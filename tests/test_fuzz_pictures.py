"""Random metadata of pictures and random folders: right answers, or the project's own errors.

FUZZ_EXAMPLES=2000 pytest tests/test_fuzz_pictures.py  # by hand; CI runs a few examples
"""

import io
import logging
import os
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnist import data, images, predict
from mnist.data import folders
from tests import test_metadata as metadata

hypothesis = pytest.importorskip(
    "hypothesis", reason="schemathesis brings it; requirements-dev.txt"
)
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "15"))
FUZZ = settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES < 100)

# --- metadata

BYTES = st.binary(max_size=40)
PREFIXES = st.sampled_from(
    (
        *(b"", b"x\0\0", b"Comment\0\0", b"Comment\0\1\0\0\0", b"XML:com.adobe.xmp\0\0\0\0\0"),
        *(b"Raw profile type exif\0", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"),
        *(b"JFIF\0", b"Adobe", b"MPF\0II*\0", b"ICC_PROFILE\0", b"Photoshop 3.0\x008BIM"),
        b"http://ns.adobe.com/xap/1.0/\0",
    )
)
CONTENTS = st.builds(
    lambda prefix, content, packed: (
        prefix + (zlib.compress(content * 40_000) if packed else content)
    ),
    PREFIXES,
    BYTES,
    st.booleans(),
)
KINDS = st.sampled_from(
    (
        *(b"eXIf", b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"sBIT"),
        *(b"tIME", b"bKGD", b"hIST", b"acTL", b"fcTL", b"fdAT", b"abCd"),
    )
)


@FUZZ
@given(st.lists(st.tuples(KINDS, CONTENTS, st.booleans(), st.booleans()), max_size=4))
def test_a_png_is_read_with_any_ancillary_chunks(
    chunks: list[tuple[bytes, bytes, bool, bool]],
) -> None:
    content = metadata.PNG
    for kind, inner, is_right, at_end in chunks:
        added = metadata.chunk(kind, inner, None if is_right else 1)
        at = content.index(b"IEND" if at_end else b"IDAT") - 4
        content = content[:at] + added + content[at:]
    assert_read(content, "PNG")


@FUZZ
@given(st.lists(st.tuples(st.sampled_from([*range(0xE0, 0xF0), 0xFE]), CONTENTS), max_size=4))
def test_a_jpeg_is_read_with_any_segments(segments: list[tuple[int, bytes]]) -> None:
    content = metadata.JPEG
    for marker, added in segments:
        head = struct.pack(">BBH", 0xFF, marker, len(added) + 2)
        content = content[:2] + head + added + content[2:]
    assert_read(content, "JPEG")


@FUZZ
@given(
    st.lists(
        st.tuples(
            st.sampled_from([269, 270, 271, 282, 283, 296, 305, 306, 315, 700, 33432, 34665])
            | st.sampled_from([34675, 34853, 37724, 42112, 50341]),
            st.integers(0, 20),
            st.integers(0, 2**32 - 1) | st.integers(0, 20),
            st.integers(0, 2**32 - 1) | st.integers(0, 2_000),
        ),
        max_size=4,
    )
)
def test_a_tiff_is_read_with_any_tags(tags: list[tuple[int, int, int, int]]) -> None:
    content = metadata.TIFF
    for tag in tags:
        content = metadata.with_tag(content, *tag)
    assert_read(content, "TIFF")


@FUZZ
@given(CONTENTS, CONTENTS, CONTENTS)
def test_a_webp_is_read_with_any_metadata(exif: bytes, xmp: bytes, profile: bytes) -> None:
    assert_read(metadata.make_seven("WEBP", exif=exif, xmp=xmp, icc_profile=profile), "WEBP")


def assert_read(content: bytes, kind: str) -> None:
    result = images.normalise(content)
    assert np.array_equal(result, metadata.EXPECTED[kind])
    assert images.read_header(content)[1:] == (120, 120)


# --- folders


def _encode(seed: int, kind: str) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (12, 12), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind)
    return stream.getvalue()


GOOD = [_encode(seed, kind) for seed in range(12) for kind in ("PNG", "JPEG")]
FILES = st.sampled_from([*GOOD, b"", b"no picture", GOOD[0][:50]])
FOLDERS = st.sampled_from(
    (
        *("train", "training", "Test", "testing", "val", "cat", "dog", "p\u00e2t", "pa\u0302t"),
        *("shots.png", "__MACOSX", "@eaDir", ".hidden", "two\nlines", os.fsdecode(b"k\xe4se")),
    )
)
NAMES = st.sampled_from(
    (
        *("a.png", "b.JPG", "c.jfif", "d.pnm", "._a.png", "Thumbs.db", "desktop.ini", "notes.txt"),
        *("noending", ".png", "e\nf.png", os.fsdecode(b"k\xe4se.png"), "gone.png"),
    )
)
PATHS = st.tuples(st.lists(FOLDERS, max_size=3), NAMES)


def plant(root: Path, files: list[tuple[tuple[list[str], str], bytes, int]]) -> None:
    """Write the files, each several times, wherever no other entry has the name."""
    for (inner, name), content, copies in files:
        folder = root.joinpath(*inner)
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(copies):
            path = folder / (name if copies == 1 else f"{i}{name}")
            if name == "gone.png" and not path.is_symlink():
                path.symlink_to(root / "nowhere")
            elif not path.is_symlink():
                path.write_bytes(content)


TREES = st.lists(st.tuples(PATHS, FILES, st.sampled_from([1, 10])), max_size=12)


@FUZZ
@given(TREES, st.lists(FOLDERS, min_size=2, max_size=3, unique=True), st.booleans())
def test_a_folder_is_a_data_set_or_gets_one_line(
    files: list[tuple[tuple[list[str], str], bytes, int]], classes: list[str], split: bool
) -> None:
    lines = list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    folders.log.addHandler(handler)
    folders._warn.cache_clear()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "pets"
        root.mkdir()
        for part in ("train", "test") if split else (".",):
            good = [(([part, name], "x.png"), content, 1) for name in classes for content in GOOD]
            plant(
                root, [((path, f"{i}{name}"), c, 1) for i, ((path, name), c, _) in enumerate(good)]
            )
        plant(root, files)
        try:
            dataset = data.load(f"folder:{root}", Path(temporary) / "data", image_size=8)
            assert len(dataset.open_test()) > 0
            assert len(dataset.classes) >= 2
        except data.DataError as error:
            lines.append(str(error))
    folders.log.removeHandler(handler)
    for line in lines:
        assert line.count("\n") == 0, line
        assert "remove that folder" not in line or "0 pictures" in line


@FUZZ
@given(TREES)
def test_predictions_of_a_folder_are_answers_or_lines(
    files: list[tuple[tuple[list[str], str], bytes, int]],
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        plant(Path(temporary), files)
        stream = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stderr", stream)
            patch.setattr("sys.stdout", io.StringIO())
            assert predict.run_cli([temporary]) in (0, 1)
        assert "Traceback" not in stream.getvalue()
        assert all(line.startswith("predict: ") for line in stream.getvalue().splitlines())
