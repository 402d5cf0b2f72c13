import contextlib
import io
import random
import struct
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from mnist import images
from mnist.images import ImageError, centre, is_small, normalise


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seven(size=(280, 280), ink=0, ground=255, width=20, box=(80, 50, 200, 230), mode="L"):
    image = Image.new(mode, size, ground)
    left, top, right, bottom = box
    corners = [(left, top), (right, top), (left + (right - left) // 3, bottom)]
    ImageDraw.Draw(image).line(corners, fill=ink, width=width, joint="curve")
    return image


def recipe_digits():
    shapes = [
        lambda pen: pen.ellipse((60, 20, 140, 180), outline=255, width=22),
        lambda pen: pen.line((100, 10, 90, 190), fill=255, width=26),
        lambda pen: pen.line((50, 20, 150, 20, 80, 180), fill=255, width=20),
        lambda pen: pen.arc((40, 40, 160, 160), 30, 330, fill=255, width=24),
    ]
    for shape in shapes:
        image = Image.new("L", (200, 200))
        shape(ImageDraw.Draw(image))
        yield centre(np.asarray(image))


def mass_centre(digit):
    y, x = np.indices(digit.shape)
    return (digit * y).sum() / digit.sum(), (digit * x).sum() / digit.sum()


def extent(digit):
    y, x = np.nonzero(digit)
    return y.max() - y.min() + 1, x.max() - x.min() + 1


def similarity(a, b):
    """Correlation of two pictures, at best within a pixel's shift: 1 for the same."""
    shifted = [np.roll(a, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return max(np.corrcoef(image.ravel(), b.ravel())[0, 1] for image in shifted)


REFERENCE = normalise(encode(seven()))[0]


def assert_reads_as_the_seven(data, least=0.95):
    digit = normalise(data)
    assert digit.shape == (1, 28, 28)
    assert digit.dtype == np.uint8
    assert similarity(digit[0], REFERENCE) > least


def refused(data, **options):
    with pytest.raises(ImageError) as caught:
        normalise(data, **options)
    return caught.value


def test_only_a_small_png_is_known_to_take_little():
    assert is_small(encode(seven()))
    assert not is_small(encode(seven((400, 400))))
    assert not is_small(encode(seven()) + bytes(20_000))
    assert not is_small(encode(seven(), "JPEG", progressive=True))
    assert not is_small(encode(seven())[:20])


def test_a_drawing_gets_a_longest_side_of_20_and_its_mass_in_the_middle():
    for box in [(80, 50, 200, 230), (5, 5, 60, 40), (150, 180, 270, 260)]:
        digit = normalise(encode(seven(box=box, width=9)))[0]
        assert max(extent(digit)) == 20
        assert np.allclose(mass_centre(digit), 14, atol=0.51)
        assert digit.max() == 255
        assert digit[0].max() == digit[:, 0].max() == 0


def test_the_aspect_is_kept():
    height, width = extent(normalise(encode(seven(box=(100, 40, 160, 240), width=12)))[0])
    assert height == 20
    assert width == pytest.approx(20 * 72 / 212, abs=1.5)


def test_another_size_scales_the_recipe():
    digit = normalise(encode(seven()), size=56)
    assert digit.shape == (1, 56, 56)
    assert max(extent(digit[0])) == 40
    assert np.allclose(mass_centre(digit[0]), 28, atol=0.51)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_a_picture_that_follows_the_recipe_passes_through_bit_for_bit(mode):
    for digit in recipe_digits():
        assert np.array_equal(normalise(encode(Image.fromarray(digit).convert(mode)))[0], digit)


def test_the_recipe_passes_through_in_every_polarity_and_as_bare_strokes():
    for digit in recipe_digits():
        assert np.array_equal(normalise(encode(Image.fromarray(255 - digit)))[0], digit)
        for colour in (0, 255):
            strokes = Image.new("RGBA", (28, 28), (colour,) * 3)
            strokes.putalpha(Image.fromarray(digit))
            assert np.array_equal(normalise(encode(strokes))[0], digit)


def test_centring_twice_changes_nothing():
    for digit in recipe_digits():
        assert np.array_equal(centre(digit), digit)


def test_a_shifted_digit_is_brought_back_unscaled():
    for digit in recipe_digits():
        shifted = np.roll(digit, (-2, -2), (0, 1))
        assert np.array_equal(centre(shifted), digit)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_real_mnist_images_pass_through_bit_for_bit(mode, mnist):
    for digit in mnist.validation.images[:300, 0].numpy():
        assert np.array_equal(centre(digit), digit)
        assert np.array_equal(normalise(encode(Image.fromarray(digit).convert(mode)))[0], digit)


@pytest.mark.parametrize(("ink", "ground"), [(255, 0), (40, 110), (200, 120), (180, 220)])
def test_polarity_and_contrast_do_not_matter(ink, ground):
    assert_reads_as_the_seven(encode(seven(ink=ink, ground=ground)), least=0.99)


@pytest.mark.parametrize("ink", [(0, 0, 0, 255), (255, 255, 255, 255), (200, 30, 30, 255)])
def test_strokes_on_a_transparent_canvas_are_ink(ink):
    assert_reads_as_the_seven(encode(seven(mode="RGBA", ink=ink, ground=(0, 0, 0, 0))), least=0.99)


def test_a_card_with_transparent_corners_keeps_its_own_ground():
    card = seven(mode="RGBA", ink="white", ground="black")
    shape = Image.new("L", card.size)
    ImageDraw.Draw(shape).rounded_rectangle((0, 0, 279, 279), 60, fill=255)
    card.putalpha(shape)
    assert_reads_as_the_seven(encode(card), least=0.99)


FORMATS = [
    ("PNG", "1"), ("PNG", "P"), ("PNG", "LA"), ("JPEG", "L"), ("JPEG", "RGB"), ("JPEG", "CMYK"),
    ("GIF", "P"), ("BMP", "RGB"), ("WEBP", "RGB"), ("TIFF", "CMYK"), ("TIFF", "F"), ("PPM", "RGB"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "mode"), FORMATS)
def test_every_common_format_and_mode_reads_the_same(kind, mode):
    assert_reads_as_the_seven(encode(seven().convert(mode), kind), least=0.98)


def bitmap_without_alpha(image):
    """A BMP as Windows writes it: with a mask for alpha, which is 0 everywhere."""
    pixels = np.zeros((image.height, image.width, 4), np.uint8)
    pixels[..., :3] = np.asarray(image.convert("RGB"))[::-1, :, ::-1]
    sizes = struct.pack("<IiiHHII", 108, *image.size, 1, 32, 3, pixels.nbytes)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = sizes + struct.pack("<4I", 2835, 2835, 0, 0) + masks + b"BGRs" + bytes(48)
    return struct.pack("<2sIII", b"BM", 122 + pixels.nbytes, 0, 122) + head + pixels.tobytes()


def palette_with_alpha(image):
    """A PNG of strokes whose palette has an alpha for each colour."""
    indexed = image.point(lambda level: level > 127).convert("P")
    indexed.putpalette([0, 0, 0, 0, 0, 0])
    return encode(indexed, transparency=bytes([255, 0]))


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize(
    "write",
    [
        lambda image: encode(image.convert("RGB").convert("LAB"), "TIFF"),
        lambda image: encode(image.convert("CMYK"), "JPEG", quality=95),  # inverted, as Adobe's
        lambda image: encode(image.convert("YCbCr"), "TIFF"),
        bitmap_without_alpha,
        palette_with_alpha,
        lambda image: encode(image.convert("RGB"), transparency=(255, 255, 255)),
    ],
    ids=["LAB", "CMYK", "YCbCr", "BMP", "palette", "transparent colour"],
)
def test_unusual_colours_and_transparency_read_the_same(write, channels):
    image = seven()
    if channels is None:
        assert_reads_as_the_seven(write(image), least=0.98)
    else:
        options = {"channels": channels, "recipe": "plain"}
        read, expected = (normalise(data, **options) for data in (write(image), encode(image)))
        assert np.abs(read.astype(int) - expected).mean() < 2


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 4000), (2, 2)])
def test_a_picture_of_any_shape_is_read_or_blank(size):
    pixels = np.random.default_rng(0).integers(0, 256, size[::-1], np.uint8)
    for options in ({}, {"recipe": "plain"}, {"recipe": "plain", "channels": 3}):
        with contextlib.suppress(ImageError):
            assert normalise(encode(Image.fromarray(pixels)), **options).shape[1:] == (28, 28)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_eight(kind):
    for digit in recipe_digits():
        deep = Image.fromarray(digit.astype(np.uint16) * 257)
        assert np.array_equal(normalise(encode(deep, kind))[0], digit)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("top", [300, 1023, 4095])
def test_ink_needs_few_of_the_levels_of_sixteen_bits(kind, top):
    deep = (np.asarray(seven()) / 255 * top).astype(np.uint16)
    assert_reads_as_the_seven(encode(Image.fromarray(deep), kind), least=0.99)


def test_the_first_frame_of_an_animation_counts():
    other = Image.new("L", (280, 280), 255)
    ImageDraw.Draw(other).ellipse((80, 50, 200, 230), fill=0)
    assert_reads_as_the_seven(encode(seven(), "GIF", save_all=True, append_images=[other]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_camera_s_rotation_is_undone(kind):
    for orientation, transpose in [
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert_reads_as_the_seven(encode(seven().transpose(transpose), kind, exif=exif))


def uneven_photo(ink, ground, seed=0):
    """A drawing lit from a corner, with a soft shadow and the grain of a sensor."""
    drawing = seven((600, 600), ink, ground, 40, (180, 120, 420, 480))
    y, x = np.mgrid[-1:1:600j, -1:1:600j]
    light = 0.75 + 0.2 * x - 0.1 * y - 0.15 / (1 + np.exp(-12 * (y - 0.4)))
    grain = np.random.default_rng(seed).normal(0, 6, light.shape)
    photo = np.asarray(drawing.filter(ImageFilter.GaussianBlur(1.5))) * light + grain
    return Image.fromarray(photo.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(("ink", "ground"), [(60, 230), (230, 60)])
def test_a_photo_under_uneven_light_is_read_as_ink_on_black(ink, ground):
    data = encode(uneven_photo(ink, ground), "JPEG", quality=80)
    assert_reads_as_the_seven(data, least=0.9)
    assert normalise(data)[0][:, [0, 1, -2, -1]].max() == 0


@pytest.mark.parametrize("turns", range(3))
def test_the_edge_of_a_shadow_is_not_ink(turns):
    shade = Image.new("L", (280, 280), 230)
    ImageDraw.Draw(shade).polygon([(0, 0), (279, 0), (279, 90), (0, 230)], fill=120)
    shade = shade.filter(ImageFilter.GaussianBlur(4))
    lit = np.rot90(np.asarray(shade), turns) * (np.asarray(seven()) / 255 * 0.8 + 0.2)
    assert_reads_as_the_seven(encode(Image.fromarray(lit.astype(np.uint8))))


def test_a_small_digit_under_light_that_falls_to_one_side_is_read():
    page = Image.new("L", (1120, 840), 255)
    page.paste(seven((200, 200), width=12, box=(60, 40, 140, 160)), (500, 200))
    down, right = np.mgrid[-1 : 1 : 840 * 1j, -1 : 1 : 1120 * 1j]
    light = 0.7 + 0.14 * (down + right) - 0.05 * (down**2 + right**2)
    grain = np.random.default_rng(0).normal(0, 8, light.shape)
    photo = (np.asarray(page) * 0.7 + 76) * light + grain
    photo = Image.fromarray(photo.clip(0, 255).astype(np.uint8))
    assert_reads_as_the_seven(encode(photo, "JPEG"), least=0.9)


def test_a_digit_smaller_than_the_dark_corners_of_a_photo_is_read():
    page = Image.new("L", (840, 700), 255)
    page.paste(seven((100, 100), width=7, box=(25, 15, 75, 85)), (150, 420))
    down, right = np.mgrid[-1 : 1 : 700 * 1j, -1 : 1 : 840 * 1j]
    light = (0.7 + 0.25 * down) * (1 - 0.12 * (down**2 + right**2))
    photo = (np.asarray(page) * 0.6 + 100) * light
    assert_reads_as_the_seven(encode(Image.fromarray(photo.astype(np.uint8))), least=0.8)


def test_a_large_photo_with_a_small_digit_is_read():
    photo = seven((4000, 3000), 40, 210, 60, (2600, 400, 2920, 880), "RGB")
    assert_reads_as_the_seven(encode(photo, "JPEG"), least=0.9)


def test_a_hair_thin_line_survives_the_reduction():
    stroke = normalise(encode(seven((1000, 1000), width=4, box=(200, 100, 700, 900))))[0]
    assert max(extent(stroke)) == 20
    assert np.count_nonzero(stroke > 127) > 1.4 * np.count_nonzero((stroke > 127).any(1))


def test_specks_are_not_ink():
    drawing = seven()
    pen = ImageDraw.Draw(drawing)
    for x, y in [(8, 9), (260, 20), (30, 250), (250, 262), (20, 140)]:
        pen.ellipse((x, y, x + 5, y + 5), fill=0)
    assert_reads_as_the_seven(encode(drawing), least=0.99)


def five(bar=True, at=0):
    """280x280; its bar touches nothing, and reaches the right edge where it is `at` 90."""
    drawing = Image.new("L", (280, 280), 255)
    pen = ImageDraw.Draw(drawing)
    pen.line((100 + at, 60, 100 + at, 130, 170 + at, 150, 160 + at, 210, 90 + at, 220), 0, 14)
    if bar:
        pen.line((125 + at, 55, 190 + at, 50), fill=0, width=14)
    return drawing


def test_the_loose_bar_of_a_five_is_ink():
    with_bar, without = (normalise(encode(five(bar)))[0] for bar in (True, False))
    assert extent(with_bar)[1] > extent(without)[1]


def test_a_rule_that_crosses_one_of_two_strokes_takes_none_away():
    drawing = five()
    ImageDraw.Draw(drawing).line((0, 180, 279, 180), fill=150, width=3)
    assert similarity(normalise(encode(drawing))[0], normalise(encode(five()))[0]) > 0.95


def test_a_loose_bar_at_the_edge_of_the_picture_is_ink():
    assert similarity(normalise(encode(five(at=90)))[0], normalise(encode(five()))[0]) > 0.9


def test_among_very_many_pieces_none_is_a_frame():
    dots = np.zeros((224, 224), np.uint8)
    dots[::8, ::8] = 255
    assert extent(normalise(encode(Image.fromarray(dots)))[0]) == (20, 20)


RULES = {
    "lines above and below": lambda pen: [
        pen.line((0, y, 279, y), fill=90, width=3) for y in (25, 255)
    ],
    "a frame at the edge": lambda pen: pen.rectangle((0, 0, 279, 279), outline=0, width=8),
    "a drawn box": lambda pen: pen.rectangle((20, 12, 262, 268), outline=0, width=5),
    "a neighbour's edge": lambda pen: pen.rectangle((262, 60, 279, 200), fill=0),
    "a table's lines, held askew": lambda pen: [
        pen.line(ends, fill=40, width=5) for ends in ((0, 18, 279, 6), (20, 0, 14, 279))
    ],
    "a thick line askew": lambda pen: pen.polygon(
        [(246, 0), (258, 0), (264, 279), (250, 279)], fill=0
    ),
    "a bar beside it": lambda pen: pen.line((252, 30, 246, 250), fill=0, width=10),
    "a dark table beyond the paper": lambda pen: pen.polygon(
        [(0, 0), (279, 0), (279, 22), (0, 34)], fill=60
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_and_frames_are_not_ink(rule):
    drawing = seven()
    RULES[rule](ImageDraw.Draw(drawing))
    assert_reads_as_the_seven(encode(drawing), least=0.98)


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("level", [90, 180])
def test_the_rules_of_the_paper_behind_a_digit_are_not_ink(level, both_ways):
    paper = Image.new("L", (280, 280), 255)
    pen = ImageDraw.Draw(paper)
    for at in range(20, 280, 50):
        pen.line((0, at, 279, at), fill=level, width=3)
        if both_ways:
            pen.line((at, 0, at, 279), fill=level, width=3)
    digit = Image.fromarray(np.minimum(np.asarray(paper), np.asarray(seven())))
    assert_reads_as_the_seven(encode(digit), least=0.95)
    assert_reads_as_the_seven(encode(digit, "JPEG", quality=50), least=0.95)


@pytest.mark.parametrize("fall", [-24, -6, 12])
def test_rules_that_are_not_straight_are_not_ink(fall):
    paper = Image.new("L", (280, 280), 255)
    pen = ImageDraw.Draw(paper)
    for at in range(-20, 300, 45):
        pen.line((0, at, 279, at + fall), fill=120, width=2)
    for blur in (0, 1):
        behind = paper.filter(ImageFilter.GaussianBlur(blur))
        digit = Image.fromarray(np.minimum(np.asarray(behind), np.asarray(seven())))
        assert_reads_as_the_seven(encode(digit), least=0.95)


def test_a_stroke_from_edge_to_edge_is_no_rule():
    drawing = seven((60, 80), width=9, box=(0, 6, 59, 75))
    pen = ImageDraw.Draw(drawing)
    pen.line((0, 75, 59, 75), fill=0, width=9)
    rows = normalise(encode(drawing))[0].max(1) > 127
    assert rows[4:7].any()
    assert rows[21:24].any()


def test_a_second_stroke_that_leaves_the_picture_is_ink():
    drawing = Image.new("L", (280, 280), 255)
    pen = ImageDraw.Draw(drawing)
    pen.line((100, 60, 80, 160, 150, 165), fill=0, width=14, joint="curve")
    alone = extent(normalise(encode(drawing))[0])
    pen.line((185, 90, 180, 279), fill=0, width=14)
    assert extent(normalise(encode(drawing))[0]) != alone


@pytest.mark.parametrize(
    ("bar", "stem"),
    [
        ((0, 120, 119, 120), (110, 0, 60, 140, 50, 199)),
        ((0, 1, 119, 1), (110, 0, 60, 100, 50, 180)),
        ((0, 16, 119, 8), (110, 8, 60, 100, 50, 180)),
    ],
)
def test_thin_strokes_from_edge_to_edge_are_a_digit(bar, stem):
    drawing = Image.new("L", (120, 200), 255)
    pen = ImageDraw.Draw(drawing)
    for line in (bar, stem):
        pen.line(line, fill=0, width=4)
    result = normalise(encode(drawing))[0]
    assert (result > 127).any(0).sum() >= 10  # as wide as its bar


def test_a_digit_that_fills_its_picture_is_no_frame():
    drawing = seven((60, 80), width=9, box=(0, 3, 59, 79))
    assert max(extent(normalise(encode(drawing))[0])) == 20


def test_files_that_are_no_pictures_are_refused():
    whole = encode(seven())
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for data in (b"", b"hello", whole[: len(whole) // 2], whole[:40], eps):
        error = refused(data)
        assert error.code == "not_an_image"
        assert f"{len(data):,} bytes" in str(error)


def test_too_many_pixels_are_refused_with_both_figures_and_the_setting():
    error = refused(encode(seven()), max_pixels=10_000)
    assert error.code == "too_many_pixels"
    for part in ("78,400", "10,000", "MAX_PIXELS"):
        assert part in str(error)
    assert normalise(encode(seven()), max_pixels=78_400).any()


@pytest.mark.parametrize("side", [8_000, 12_000, 40_000])
def test_a_bomb_is_refused_from_its_header(side):
    header = b"P5 %d %d 255\n" % (side, side)
    error = refused(header + bytes(100))
    assert error.code == "too_many_pixels"
    assert f"{side * side:,}" in str(error)


def blanks():
    noise = np.random.default_rng(1).normal(200, 4, (300, 300)).clip(0, 255).astype(np.uint8)
    slope = np.tile(np.linspace(120, 220, 280).astype(np.uint8), (280, 1))
    yield from (Image.new("L", (280, 280), level) for level in (0, 128, 255))
    yield from (Image.new("L", (1, 1)), Image.new("RGBA", (28, 28)), Image.new("L", (5000, 1), 9))
    yield from (Image.fromarray(noise), Image.fromarray(slope), seven(ink=240, ground=245))
    down, right = np.mgrid[-1 : 1 : 280 * 1j, -1 : 1 : 280 * 1j]
    light = (0.75 + 0.15 * (down + right)) * (1 - 0.1 * (down**2 + right**2))
    dice = np.random.default_rng(0)
    grain = cv2.GaussianBlur(dice.normal(0, 25, light.shape), (0, 0), 1)
    yield Image.fromarray((200 * light + grain).clip(0, 255).astype(np.uint8))


def test_a_picture_with_nothing_drawn_is_blank():
    for image in blanks():
        assert refused(encode(image)).code == "blank"
    with pytest.raises(ImageError) as caught:
        centre(np.zeros((28, 28), np.uint8))
    assert caught.value.code == "blank"


def test_damaged_bytes_raise_nothing_but_image_errors_and_warn_of_nothing():
    dice = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    small = seven((40, 40), width=4, box=(10, 8, 30, 34))
    originals = [encode(small, kind, exif=exif) for kind in ("PNG", "JPEG", "TIFF", "WEBP")]
    originals += [encode(small, kind) for kind in ("GIF", "BMP", "PPM")]
    codes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for original in originals:
            for _ in range(100):
                damaged = bytearray(original[: dice.choice([None, dice.randrange(len(original))])])
                for _ in range(dice.randrange(5) if damaged else 0):
                    damaged[dice.randrange(min(300, len(damaged)))] = dice.randrange(256)
                try:
                    assert normalise(bytes(damaged)).shape == (1, 28, 28)
                except ImageError as error:
                    codes.add(error.code)
    assert "not_an_image" in codes


def test_an_unknown_recipe_is_named():
    with pytest.raises(ValueError, match="'sepia'"):
        normalise(encode(seven()), recipe="sepia")


def photo(size=(400, 200), mode="RGB"):
    """A bright red disc on a blue ground."""
    image = Image.new("RGB", size, (0, 0, 200))
    middle, radius = (size[0] // 2, size[1] // 2), min(size) // 3
    ImageDraw.Draw(image).circle(middle, radius, fill=(250, 20, 20))
    return image.convert(mode)


def plain(image, size=28, channels=3, kind="PNG", **options):
    data = encode(image, kind, **options)
    return normalise(data, size=size, channels=channels, recipe="plain")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_plain_picture_of_the_right_size_passes_through_bit_for_bit(channels):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    if channels == 1:
        noise = noise[..., :1]
    result = plain(Image.fromarray(noise.squeeze()), 32, channels)
    assert result.dtype == np.uint8
    assert result.flags.writeable  # torch warns of others
    assert np.array_equal(result, noise.transpose(2, 0, 1))
    opaque = Image.fromarray(noise.squeeze()).convert("RGBA")
    assert np.array_equal(plain(opaque, 32, channels), result)


def test_a_plain_picture_keeps_its_aspect_and_is_padded_with_its_own_ground():
    for size in [(400, 200), (200, 400), (90, 45)]:
        result = plain(photo(size))
        assert result.shape == (3, 28, 28)
        red = result[0] > 128
        assert extent(red) == pytest.approx((28 / 3, 28 / 3), abs=1.5)
        assert np.allclose(mass_centre(red.astype(int)), 13.5, atol=0.6)
        for corner in result[:, [0, 0, -1, -1], [0, -1, 0, -1]].T:
            assert corner.tolist() == [0, 0, 200]


def test_a_plain_picture_keeps_its_polarity():
    light, dark = Image.new("L", (90, 90), 10), Image.new("L", (90, 90), 245)
    for image, ink in ((light, 245), (dark, 10)):
        ImageDraw.Draw(image).rectangle((30, 30, 60, 60), fill=ink)
    assert plain(light, channels=1)[0, 14, 14] > 200 > plain(light, channels=1)[0, 0, 0]
    assert plain(dark, channels=1)[0, 14, 14] < 50 < plain(dark, channels=1)[0, 0, 0]


def test_a_plain_picture_is_anti_aliased():
    stripes = np.tile(np.array([0, 255], np.uint8), (560, 280))
    stripes[:280] = 255
    result = plain(Image.fromarray(stripes), channels=1)[0]
    assert np.abs(result[16:-2, 2:-2].astype(int) - 128).max() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_camera_s_rotation_of_a_plain_picture_is_undone(kind):
    upright = photo((300, 300))
    ImageDraw.Draw(upright).rectangle((0, 0, 299, 40), fill="white")  # the sky
    exif = Image.Exif()
    exif[0x0112] = 6
    result = plain(upright.transpose(Image.Transpose.ROTATE_90), kind=kind, exif=exif)
    assert result[:, :3].min() > 200
    assert result[1, 5:].max() < 100


def test_a_cut_out_lies_on_a_page_that_shows_it():
    for colour, page in (((30, 90, 30), 255), ((250, 250, 240), 0)):
        cut_out = Image.new("RGBA", (100, 100))
        ImageDraw.Draw(cut_out).ellipse((20, 20, 80, 80), fill=colour)
        result = plain(cut_out)
        assert result[:, 14, 14].tolist() == pytest.approx(list(colour), abs=3)
        assert result[:, 0, 0].tolist() == [page] * 3


@pytest.mark.parametrize(("kind", "mode"), FORMATS)
def test_a_plain_picture_reads_the_same_in_every_common_format_and_mode(kind, mode):
    if mode not in ("1", "F"):
        expected = plain(photo().convert("L"), channels=1)[0].astype(int)
        result = plain(photo(mode=mode), channels=1, kind=kind)[0]
        assert np.abs(result - expected).mean() < 8


def test_a_plain_picture_of_one_colour_is_blank():
    for image in (Image.new("RGB", (28, 28), "green"), Image.new("RGBA", (60, 20))):
        error = refused(encode(image), recipe="plain", channels=3)
        assert error.code == "blank"


def test_a_plain_photo_is_read_and_refused_like_a_digit():
    data = encode(photo((4000, 3000)), "JPEG")
    assert normalise(data, recipe="plain", channels=3).shape == (3, 28, 28)
    assert refused(data, recipe="plain", max_pixels=1_000).code == "too_many_pixels"
    assert refused(data[:900], recipe="plain").code == "not_an_image"


def png_of(length, width=30, height=30):
    """Bytes that begin like a PNG of this size."""
    head = images.PNG_HEADER + width.to_bytes(4) + height.to_bytes(4)
    return (head + bytes(length))[:length]


@pytest.mark.parametrize(
    ("data", "small"),
    [
        (png_of(25), True),
        (png_of(24), False),
        (png_of(16_000), True),
        (png_of(16_001), False),
        (png_of(99, 300, 300), True),
        (png_of(99, 301, 300), False),
        (png_of(99, 1, 90_000), True),
        (png_of(99, 90_001, 1), False),
        (b"\0" + png_of(99)[1:], False),
        (png_of(99).replace(b"IHDR", b"CgBI"), False),
    ],
)
def test_a_small_png_has_few_bytes_and_few_pixels(data, small):
    assert is_small(data) == small


def bar(top, bottom, left=12, right=16, level=200):
    """28x28; pale, so that an array that is not returned as it is gets a peak of 255."""
    grey = np.zeros((28, 28), np.uint8)
    grey[top:bottom, left:right] = level
    return grey


@pytest.mark.parametrize(
    ("grey", "follows"),
    [
        (bar(4, 24), True),
        (bar(4, 25), False),  # too long
        (bar(7, 21), True),
        (bar(7, 20), False),  # too short
        (bar(5, 25), True),  # its mass is half a pixel off
        (bar(6, 26), False),  # one and a half
        (bar(4, 24, 11, 16), True),
        (bar(4, 24, 13, 18), True),  # one pixel
        (bar(4, 24, 14, 18), False),  # one and a half
        (bar(4, 24, 10, 14), False),
        (bar(4, 24, 5, 24), True),  # 380 pixels of 784
        (bar(4, 24, 4, 24), False),  # over half of the picture
        (bar(4, 24).repeat(2, 0).repeat(2, 1), False),
    ],
)
def test_only_an_array_in_the_recipe_s_form_is_returned_as_it_is(grey, follows):
    result = centre(grey)
    assert result.shape == (28, 28)
    assert np.array_equal(result, grey) == follows
    if follows:
        assert not np.shares_memory(result, grey)
    else:
        assert result.max() == 255


@pytest.mark.parametrize(("height", "width"), [(100, 1), (100, 3), (1, 100), (60, 2), (100, 9)])
def test_a_thin_stroke_gets_about_the_width_of_mnist_s(height, width):
    ink = np.full((height, width), 255, np.uint8)
    thick = images._thicken(ink)
    # Its box becomes 20 pixels long, its width at least 1.8 of them.
    rows, columns = extent(thick)
    assert min(rows, columns) == pytest.approx(images.MIN_STROKE * max(height, width) / 20, abs=1)
    assert rows - height == columns - width > 0
    assert np.count_nonzero(thick) == rows * columns


@pytest.mark.parametrize(("height", "width"), [(100, 10), (40, 4), (20, 20), (1, 1)])
def test_a_stroke_of_that_width_stays_as_it_is(height, width):
    ink = np.full((height, width), 255, np.uint8)
    assert np.array_equal(images._thicken(ink), ink)


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_ink_whose_mass_is_far_from_its_middle_stays_inside_the_picture(corner):
    """A thin L with a heavy corner."""
    ink = np.zeros((200, 200), np.uint8)
    ink[:, :14] = ink[:14] = 255
    ink[:90, :90] = 255
    ink = np.rot90(ink, {(0, 0): 0, (1, 0): 1, (1, 1): 2, (0, 1): 3}[corner])
    result = centre(np.ascontiguousarray(ink))
    assert extent(result) == (20, 20)
    y, x = np.nonzero(result)
    assert (y.min() == 8, x.min() == 8) == (corner[0] == 0, corner[1] == 0)
    assert (y.max() == 19, x.max() == 19) == (corner[0] == 1, corner[1] == 1)


@pytest.mark.parametrize(
    ("level", "shown_on"), [(0, 255), (100, 255), (127, 255), (128, 0), (255, 0)]
)
def test_strokes_on_a_transparent_canvas_get_the_opposite_ground(level, shown_on):
    canvas = Image.new("RGBA", (60, 60), (255 - level, 0, 0, 0))
    ImageDraw.Draw(canvas).rectangle((20, 10, 30, 50), fill=(level, level, level, 255))
    grey = np.asarray(images._composite_ink(canvas))
    assert (grey[10:51, 20:31] == level).all()
    grey = grey.copy()
    grey[10:51, 20:31] = shown_on
    assert (grey == shown_on).all()


def test_half_transparent_strokes_are_mixed_with_their_ground():
    canvas = Image.new("RGBA", (60, 60))
    ImageDraw.Draw(canvas).rectangle((20, 10, 30, 50), fill=(40, 40, 40, 100))
    grey = np.asarray(images._composite_ink(canvas))
    assert grey[30, 25] == round((40 * 100 + 255 * 155) / 255)
    assert grey[0, 0] == 255


def test_a_card_is_mostly_opaque_and_its_ground_is_its_most_frequent_level():
    card = Image.new("RGBA", (60, 60), (90, 90, 90, 255))
    pen = ImageDraw.Draw(card)
    pen.rectangle((20, 10, 30, 50), fill=(200, 200, 200, 255))
    pen.rectangle((0, 0, 59, 5), fill=(0, 0, 0, 0))
    grey = np.asarray(images._composite_ink(card))
    assert (grey[0, 0], grey[55, 55], grey[30, 25]) == (90, 90, 200)


@pytest.mark.parametrize(("level", "ground"), [(191, 255), (192, 0)])
def test_a_cut_out_gets_a_black_page_only_if_it_is_light(level, ground):
    cut_out = Image.new("RGBA", (60, 60))
    ImageDraw.Draw(cut_out).rectangle((20, 20, 39, 39), fill=(level,) * 3)
    assert plain(cut_out, 60)[:, 0, 0].tolist() == [ground] * 3


@pytest.mark.parametrize(
    ("size", "rows", "columns"), [((40, 20), (7, 21), (0, 28)), ((20, 40), (0, 28), (7, 21))]
)
def test_a_plain_picture_is_centred_on_the_median_of_its_rim(size, rows, columns):
    image = Image.new("L", size, 100)
    ImageDraw.Draw(image).rectangle(
        (size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4), fill=250
    )
    image.putpixel((0, 0), 0)
    result = plain(image, channels=1)[0].astype(int)
    inside = np.zeros((28, 28), bool)
    inside[slice(*rows), slice(*columns)] = True
    assert (result[~inside] == 100).all()
    assert result[14, 14] == 250
    centre_of_mass = mass_centre(np.where(result > 150, result, 0))
    assert centre_of_mass == pytest.approx((13.5, 13.5), abs=0.6)


def test_a_recipe_is_known_with_its_channels_only():
    for recipe, channels in (("digit", 3), ("plain", 2), ("sepia", 1)):
        with pytest.raises(
            ValueError, match=f"'{recipe}' with {channels} channels; known: 'digit' with 1, "
        ):
            normalise(encode(seven()), recipe=recipe, channels=channels)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_ground_of_a_plain_picture_is_that_of_its_longer_edges(transposed):
    picture = np.full((14, 28), 200, np.uint8)
    picture[[0, -1]] = 10
    picture = picture.T if transposed else picture
    result = plain(Image.fromarray(picture), channels=1)[0]
    result = result.T if transposed else result
    assert np.array_equal(result[7:21], picture.T if transposed else picture)
    assert set(result[[*range(7), *range(21, 28)]].ravel()) == {10}


@pytest.mark.parametrize(("opaque", "ground"), [(40, 255), (49, 255), (51, 60), (60, 60)])
def test_a_picture_that_is_mostly_opaque_is_a_card(opaque, ground):
    picture = Image.new("RGBA", (100, 100))
    ImageDraw.Draw(picture).rectangle((0, 0, 99, opaque - 1), fill=(60, 60, 60, 255))
    assert np.asarray(images._composite_ink(picture))[99, 99] == ground
