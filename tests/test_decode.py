"""Decoding: every format, mode and orientation gives the right pixels, and a hostile file an UnreadableImage."""

import io
import itertools
import json
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_helpers import FORMATS, chunk, encoded, plain, png, smooth, write
from PIL import Image

from tiny_diffusion.data.catalog import COLOURS, background_colour
from tiny_diffusion.data.files.decode import ENDINGS, ImageSpec, UnreadableImage, decode, read_header
from tiny_diffusion.data.files.folders import list_images
from tiny_diffusion.data.files.memory import Budget, bytes_to_decode
from tiny_diffusion.data.files.scaling import MAX_LENGTH, TILE_BYTES

every_format = pytest.mark.parametrize("ending", FORMATS)
rng = np.random.default_rng  # each test seeds its own


def pixels(content, size=None, channels=3, background=(255, 255, 255), cropped=True):
    """The image of a file (H, W, C), in its own size unless another is given."""
    spec = ImageSpec(size or read_header(content).size, channels, background, cropped)
    return decode(content, spec).transpose(1, 2, 0)


def assert_near(got, wanted, levels):
    """Asserts that no pixel differs by more than this many grey levels."""
    difference = np.abs(np.asarray(got, np.float64) - np.asarray(wanted, np.float64))
    assert difference.max() <= levels, difference.max()


# Formats and endings


@every_format
def test_every_format_keeps_its_pixels(ending):
    if ending == "gif":
        image = Image.fromarray(rng(0).choice(np.array([0, 51, 153, 255], np.uint8), (9, 7, 3)))  # 64 colours fit
    else:
        image = Image.fromarray(smooth(9, 7))
    assert_near(pixels(encoded(image, ending)), np.asarray(image), 3 if ending in ("jpg", "avif") else 0)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("written", [str.lower, str.title])
def test_an_ending_counts_in_any_letter_case(ending, written, tmp_path):
    write(tmp_path / f"Picture 1{written(ending)}", encoded(plain(100)))
    files = list_images(tmp_path)
    assert len(files) == 1 and files.others == 0
    assert (decode(files.path(0), ImageSpec((8, 8), 1)) == 100).all()


def test_the_content_decides_the_format_and_not_the_ending(tmp_path):
    for ending, other in itertools.product(FORMATS, repeat=2):
        path = write(tmp_path / f"{ending}.{other}", encoded(plain(100), ending))
        assert read_header(path).format == FORMATS[ending][0]
        assert_near(decode(path, ImageSpec((8, 8), 1)), 100, 1)


@every_format
def test_the_header_gives_format_size_and_grey(ending):
    for image, grey in (
        (plain(7, 5, 9), ending not in ("webp", "avif")),
        (smooth(5, 9), False),
    ):  # always RGB
        assert read_header(encoded(image, ending))[:4] == (FORMATS[ending][0], (5, 9), grey, False)


def test_the_header_of_a_png_is_read_without_its_pixels():
    """So that a folder of large images is scanned quickly."""
    broken = png(300, 200, 8, 2, b"these are no rows")
    assert read_header(broken).size == (200, 300)
    with pytest.raises(UnreadableImage):
        decode(broken, ImageSpec((8, 8), 3))


@pytest.mark.parametrize("brand, reason", [(b"heic", "pip install pillow-heif"), (b"mif1", "HEIC"), (b"avif", "AVIF")])
def test_a_photograph_of_a_telephone_that_cannot_be_read_says_what_to_install(brand, reason, tmp_path, monkeypatch):
    """An ISO media file begins with a box of its brand: ISO/IEC 14496-12."""
    monkeypatch.setattr("PIL.Image.open", unidentified)
    content = struct.pack(">I", 24) + b"ftyp" + brand + bytes(12)
    for source in (content, write(tmp_path / "photo.heic", content)):
        with pytest.raises(UnreadableImage, match=reason):
            read_header(source)


def unidentified(*args, **kwargs):
    raise Image.UnidentifiedImageError("cannot identify image file")


# Modes

GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURED = rng(1).integers(0, 256, (16, 16, 3)).astype(np.uint8)


@pytest.mark.parametrize("ending", ["png", "bmp", "gif", "tif"])
def test_one_bit_is_black_or_white(ending):
    bits = rng(0).random((16, 16)) < 0.5
    assert_near(pixels(encoded(Image.fromarray(bits), ending)), np.where(bits, 255, 0)[..., None], 0)


@pytest.mark.parametrize("ending", ["png", "bmp", "gif", "webp", "tif"])
def test_a_grey_is_the_same_in_one_channel_and_in_three(ending):
    content = encoded(GREYS, ending)
    assert_near(pixels(content, channels=1), GREYS[..., None], 0)
    assert_near(pixels(content, channels=3), GREYS[..., None], 0)


def test_colour_in_one_channel_is_its_luma():
    """ITU-R 601-2."""
    assert_near(pixels(encoded(COLOURED), channels=1)[..., 0], COLOURED @ [0.299, 0.587, 0.114], 1)


def with_palette(alpha=None):
    """An image of 256 colours, and what they are."""
    colours = rng(2).integers(0, 256, (256, 3)).astype(np.uint8)
    image = Image.fromarray(GREYS)
    image.putpalette(colours.tobytes())
    return image, colours[GREYS]


@pytest.mark.parametrize("ending", ["png", "bmp", "gif", "tif"])
def test_a_palette_is_looked_up(ending):
    image, colours = with_palette()
    assert image.mode == "P"
    assert_near(pixels(encoded(image, ending)), colours, 0)


def test_a_cmyk_jpeg_as_adobe_writes_it_inverted():
    """Each ink and black take away their share of the light: (255 - C)(255 - K) / 255."""
    for inks in ((0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (50, 100, 200, 30)):
        content = encoded(Image.new("CMYK", (16, 16), inks), "jpg")
        assert b"Adobe" in content and Image.open(io.BytesIO(content)).mode == "CMYK"
        assert_near(pixels(content), [(255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3]], 4)


def test_a_cmyk_tiff():
    inks = rng(3).integers(0, 256, (8, 8, 4)).astype(np.uint8)
    wanted = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255
    assert_near(pixels(encoded(Image.fromarray(inks, "CMYK"), "tif")), wanted, 2)


def test_a_ycbcr_tiff():
    """The JPEG form of BT.601."""
    y, cb, cr = (np.full((4, 4), value, np.uint8) for value in (120, 110, 150))
    wanted = 120 + 1.402 * 22, 120 - 0.344136 * -18 - 0.714136 * 22, 120 + 1.772 * -18
    content = encoded(Image.merge("YCbCr", [Image.fromarray(part) for part in (y, cb, cr)]), "tif")
    assert Image.open(io.BytesIO(content)).mode == "YCbCr"
    assert_near(pixels(content), wanted, 2)


def test_a_lab_tiff():
    """Greys: Y = ((L + 16) / 116)^3, and from linear light to sRGB.  a beyond 0 is reddish, b beyond 0 yellowish."""
    for lightness in (0, 51, 128, 204, 255):
        linear = ((lightness / 2.55 + 16) / 116) ** 3 if lightness > 20.4 else lightness / 2.55 / 903.3
        wanted = 255 * (1.055 * linear ** (1 / 2.4) - 0.055 if linear > 0.0031308 else 12.92 * linear)
        assert_near(pixels(encoded(Image.new("LAB", (4, 4), (lightness, 128, 128)), "tif")), wanted, 2)
    red, green, blue = pixels(encoded(Image.new("LAB", (4, 4), (140, 170, 160)), "tif"))[0, 0].astype(int)
    assert red > green + 50 > blue


EVERY_16_BIT = np.arange(65536, dtype=np.uint16).reshape(256, 256)
IN_8_BITS = np.rint(EVERY_16_BIT / 257)[..., None]


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_greys_are_rounded_to_the_nearest_eight_bit_one(ending):
    content = encoded(EVERY_16_BIT, ending)
    assert read_header(content).grey
    assert_near(pixels(content, channels=1), IN_8_BITS, 0)
    assert_near(pixels(content, channels=3), IN_8_BITS, 0)


def test_sixteen_bit_greys_of_either_byte_order():
    for mode, order in (("I;16", "<u2"), ("I;16B", ">u2")):
        image = Image.frombytes(mode, (256, 256), EVERY_16_BIT.astype(order).tobytes())
        assert_near(pixels(encoded(image, "tif"), channels=1), IN_8_BITS, 0)


def test_a_dark_sixteen_bit_image_is_not_brightened():
    assert_near(pixels(encoded(np.full((4, 4), 257, np.uint16)), channels=1), 1, 0)


def test_sixteen_bit_colours():
    values = rng(4).integers(0, 65536, (4, 4, 3)).astype(">u2")
    content = png(4, 4, 16, 2, b"".join(b"\0" + row.tobytes() for row in values))
    assert_near(pixels(content), values / 257, 1)


def test_thirty_two_bit_integers_count_to_16_bits_or_to_the_largest_there_is():
    values = EVERY_16_BIT.astype(np.int32)
    assert_near(pixels(encoded(values, "tif"), channels=1), IN_8_BITS, 0)
    assert_near(pixels(encoded(values * 1000, "tif"), channels=1), np.rint(values / 65535 * 255)[..., None], 0)
    assert_near(pixels(encoded(np.array([[-5, 0, 257]], np.int32), "tif"), channels=1)[0, :, 0], [0, 0, 1], 0)


@pytest.mark.parametrize(
    "white, top", [(1, 1), (1, 0.5), (255, 255), (255, 3), (65535, 65535), (65535, 300), (1e7, 1e7)]
)
def test_floats_count_to_the_first_usual_white_that_holds_them_all(white, top):
    values = np.linspace(0, top, 64, dtype=np.float32).reshape(8, 8)
    assert_near(pixels(encoded(values, "tif"), channels=1)[..., 0], values / white * 255, 0.51)


def tiff(values, order, bits, white_is_zero, sample_format):
    """A TIFF of one strip, which lies behind the tags.  sample_format: 1 unsigned, 2 signed, 3 float."""
    height, width = values.shape
    if bits == 12:
        packed = "".join(format(value, "012b") for value in values.flat)
        data = bytes(int(packed[i : i + 8], 2) for i in range(0, len(packed), 8))
    else:
        kind = {1: "u", 2: "i", 3: "f"}[sample_format]
        data = values.astype(f"{order}{kind}{bits // 8}").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 277: 1, 278: height}
    tags |= {273: 8 + 2 + 10 * 12 + 4, 279: len(data), 339: sample_format}
    content = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(tags))
    for tag, value in sorted(tags.items()):
        content += struct.pack(f"{order}HHIHxx", tag, 3, 1, value)
    return content + bytes(4) + data


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "bits, sample_format, low, high", [(12, 1, 0, 4095), (16, 1, 0, 65535), (16, 2, -32768, 32767), (32, 3, 0, 1)]
)
def test_a_tiff_of_any_depth_goes_from_black_to_white(bits, sample_format, low, high, order, white_is_zero):
    """By its tags: BitsPerSample, SampleFormat and PhotometricInterpretation, where 0 may be white (TIFF 6.0)."""
    values = np.linspace(low, high, 64).reshape(8, 8)
    values = values if sample_format == 3 else values.round().astype(int)
    content = tiff(values, order, bits, white_is_zero, sample_format)
    levels = 255 * (values - low) / (high - low)
    assert read_header(content).grey
    assert_near(pixels(content, channels=1)[..., 0], 255 - levels if white_is_zero else levels, 0.51)


def test_floats_that_are_no_numbers_are_black():
    values = np.array([[0.5, np.nan, np.inf, -np.inf, -1.0, 1.0]], np.float32)
    assert_near(pixels(encoded(values, "tif"), channels=1)[0, :, 0], [127.5, 0, 0, 0, 0, 255], 0.51)


# Transparency

BACKGROUNDS = [*COLOURS, "#ff8000", "#0102FE"]
on_backgrounds = pytest.mark.parametrize("background", ["black", "#ff8000"])


def over(colours, alpha, background):
    """The colours composited over the background, with a share of alpha / 255."""
    share = np.asarray(alpha, np.float64)[..., None] / 255
    return np.asarray(colours, np.float64) * share + np.array(background) * (1 - share)


@pytest.fixture
def alpha():
    return rng(5).integers(0, 256, (16, 16)).astype(np.uint8)


def test_colours_by_name_and_by_number():
    assert [background_colour(name)[0] for name in BACKGROUNDS] == [
        (255, 255, 255), (0, 0, 0), (128, 128, 128), (255, 128, 0), (1, 2, 254),
    ]  # fmt: skip
    for wrong in ("whit", "#ff80", "#ff80000", "#gggggg", "ff8000", "", 3, None):
        colour, reason = background_colour(wrong)
        assert colour is None and "white" in reason and "#rrggbb" in reason


@on_backgrounds
@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_colours_with_alpha_lie_over_the_background(ending, background, alpha):
    content = encoded(np.dstack([COLOURED, alpha]), ending)
    behind, _ = background_colour(background)
    assert read_header(content).transparent
    assert_near(pixels(content, background=behind), over(COLOURED, alpha, behind), 1)


@on_backgrounds
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_greys_with_alpha_lie_over_the_background(ending, background, alpha):
    content = encoded(Image.merge("LA", [Image.fromarray(GREYS), Image.fromarray(alpha)]), ending)
    header = read_header(content)
    assert header.grey and header.transparent
    behind, _ = background_colour(background)
    wanted = over(np.dstack([GREYS] * 3), alpha, behind)
    assert_near(pixels(content, background=behind), wanted, 1)
    assert_near(pixels(content, background=behind, channels=1)[..., 0], wanted @ [0.299, 0.587, 0.114], 2)


@on_backgrounds
@pytest.mark.parametrize("ending", ["png", "gif"])
def test_a_transparent_colour_of_a_palette_shows_the_background(ending, background):
    image, colours = with_palette()
    behind, _ = background_colour(background)
    content = encoded(image, ending, transparency=77)
    assert_near(pixels(content, background=behind), over(colours, np.where(GREYS == 77, 0, 255), behind), 0)


@on_backgrounds
def test_a_palette_with_an_alpha_for_each_colour(background):
    image, colours = with_palette()
    behind, _ = background_colour(background)
    alpha_of = bytes(reversed(range(256)))
    content = encoded(image, transparency=alpha_of)
    assert_near(pixels(content, background=behind), over(colours, np.frombuffer(alpha_of, np.uint8)[GREYS], behind), 1)


def test_a_palette_with_alpha_beside_it(alpha):
    image, colours = with_palette()
    image = image.convert("PA")
    image.putalpha(Image.fromarray(alpha))
    content = encoded(image, "tif")
    assert Image.open(io.BytesIO(content)).mode == "PA"
    assert_near(pixels(content, background=(255, 128, 0)), over(colours, alpha, (255, 128, 0)), 1)


@on_backgrounds
def test_one_colour_that_stands_for_transparency(background):
    """The tRNS chunk of a PNG without a palette."""
    behind, _ = background_colour(background)
    colours = np.where(GREYS[..., None] % 2 == 0, (10, 20, 30), (40, 50, 60)).astype(np.uint8)
    content = encoded(colours, transparency=(10, 20, 30))
    assert_near(pixels(content, background=behind), over(colours, GREYS % 2 * 255, behind), 0)
    content = encoded(GREYS, transparency=200)
    assert_near(
        pixels(content, background=behind), over(np.dstack([GREYS] * 3), np.where(GREYS == 200, 0, 255), behind), 0
    )
    values = np.where(GREYS % 2 == 0, 257, 514).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    content = png(16, 16, 16, 0, rows, before=chunk(b"tRNS", struct.pack(">H", 257)))
    assert_near(pixels(content, background=behind), over(np.full((16, 16, 3), 2), GREYS % 2 * 255, behind), 0)


@pytest.mark.parametrize("bits, hidden, shown", [(1, 1, 0), (2, 3, 1), (4, 15, 3), (8, 200, 10)])
def test_a_transparent_grey_of_any_depth(bits, hidden, shown):
    """The left half has the transparent grey, whose value is of the file's own depth."""
    row = "".join(format(value, f"0{bits}b") for value in [hidden] * 4 + [shown] * 4)
    row = b"\0" + bytes(int(row[i : i + 8], 2) for i in range(0, len(row), 8))
    content = png(8, 8, bits, 0, row * 8, before=chunk(b"tRNS", struct.pack(">H", hidden)))
    greys = np.full((8, 8, 3), 255 * shown / (2**bits - 1))
    alpha = np.where(np.arange(8) < 4, 0, 255) * np.ones((8, 1))
    assert_near(pixels(content, background=(255, 0, 255)), over(greys, alpha, (255, 0, 255)), 0.5)


def test_a_transparent_colour_of_16_bits():
    colours = np.where(np.arange(8)[:, None] < 4, (0x8000, 0, 0), (0, 0, 0)).astype(">u2")
    content = png(8, 8, 16, 2, (b"\0" + colours.tobytes()) * 8, before=chunk(b"tRNS", struct.pack(">3H", 0x8000, 0, 0)))
    assert read_header(content).transparent
    wanted = np.where(np.arange(8)[:, None] < 4, (255, 0, 255), (0, 0, 0)) * np.ones((8, 1, 1))
    assert_near(pixels(content, background=(255, 0, 255)), wanted, 0)


@pytest.mark.parametrize("alpha", [0, 1, 255])
def test_a_bmp_whose_alpha_is_zero_everywhere_is_opaque(alpha):
    """The fourth byte of a pixel is often left empty; once one pixel has an alpha, it is meant."""
    rgba = np.dstack([COLOURED, np.zeros((16, 16), np.uint8)])
    rgba[0, 0, 3] = alpha
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    about = struct.pack("<IiiHHIIiiII", 108, 16, -16, 1, 32, 3, 1024, 2835, 2835, 0, 0) + masks + bytes(52)
    content = b"BM" + struct.pack("<IHHI", 122 + 1024, 0, 0, 122) + about + rgba[..., [2, 1, 0, 3]].tobytes()
    assert Image.open(io.BytesIO(content)).mode == "RGBA"
    wanted = COLOURED if alpha == 0 else over(COLOURED, rgba[..., 3], (1, 2, 3))
    assert_near(pixels(content, background=(1, 2, 3)), wanted, 1)


def test_the_colour_of_invisible_pixels_does_not_bleed_into_their_neighbours():
    """The image is composited before it is scaled, because invisible pixels may have any colour."""
    colours = np.zeros((64, 64, 4), np.uint8)
    colours[:, :32] = 0, 255, 0, 0
    colours[:, 32:] = 255, 255, 255, 255
    assert_near(pixels(encoded(colours), (8, 8)), 255, 0)


# Orientation


def stored(upright, orientation):
    """How an image lies in a file of this EXIF orientation: which side is the 0th row, and which the 0th column."""
    rows, columns = [
        ("top", "left"), ("top", "right"), ("bottom", "right"), ("bottom", "left"),
        ("left", "top"), ("right", "top"), ("right", "bottom"), ("left", "bottom"),
    ][orientation - 1]  # fmt: skip
    lying = upright.swapaxes(0, 1) if rows in ("left", "right") else upright
    lying = lying[::-1] if rows in ("bottom", "right") else lying
    return np.ascontiguousarray(lying[:, ::-1] if columns in ("bottom", "right") else lying)


def exif(orientation):
    about = Image.Exif()
    about[0x0112] = orientation
    return about


QUADRANTS = np.kron(np.array([[40, 90], [160, 220]], np.uint8), np.ones((24, 16), np.uint8))  # 48 x 32
orientations = pytest.mark.parametrize("orientation", range(1, 9))


@orientations
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_an_image_is_turned_upright_and_its_header_gives_the_upright_size(ending, orientation):
    content = encoded(stored(QUADRANTS, orientation), ending, exif=exif(orientation))
    assert read_header(content).size == (48, 32)
    assert_near(pixels(content, channels=1)[..., 0], QUADRANTS, 2)


@orientations
def test_a_large_photograph_on_its_side_is_cropped_where_an_upright_one_would_be(orientation):
    upright = smooth(800, 500)
    turned = pixels(encoded(stored(upright, orientation), "jpg", exif=exif(orientation)), (32, 24))
    assert_near(turned, pixels(encoded(upright, "jpg"), (32, 24)), 2)


@orientations
def test_an_orientation_that_follows_the_pixels_counts_too(orientation):
    """As ImageMagick writes a PNG."""
    lying = stored(QUADRANTS, orientation)
    rows = b"".join(b"\0" + row.tobytes() for row in lying)
    content = png(lying.shape[1], lying.shape[0], 8, 0, rows, after=chunk(b"eXIf", exif(orientation).tobytes()[6:]))
    assert_near(pixels(content, (48, 32), 1)[..., 0], QUADRANTS, 0)


@pytest.mark.parametrize(
    "about", [b"", b"nonsense", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40]
)
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_damaged_exif_data_do_not_make_an_image_unreadable(ending, about):
    content = encoded(QUADRANTS, ending, exif=b"Exif\0\0" + about)
    assert read_header(content).size == (48, 32)
    assert_near(pixels(content, channels=1)[..., 0], QUADRANTS, 2)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_upright(orientation):
    assert_near(pixels(encoded(QUADRANTS, exif=exif(orientation)), channels=1)[..., 0], QUADRANTS, 0)


def test_the_size_is_upright_where_the_orientation_follows_the_pixels():
    content = png(16, 8, 8, 0, (b"\0" + bytes(16)) * 8, after=chunk(b"eXIf", exif(6).tobytes()[6:]))
    assert read_header(content).size == (16, 8) and pixels(content).shape == (16, 8, 3)


# Metadata

TWO_MEGABYTES = zlib.compress(bytes(2 << 20))
METADATA = {
    "a compressed text": chunk(b"zTXt", b"workflow\0\0" + TWO_MEGABYTES),
    "an international text": chunk(b"iTXt", b"workflow\0\1\0\0\0" + TWO_MEGABYTES),
    "a colour profile": chunk(b"iCCP", b"profile\0\0" + TWO_MEGABYTES),
    "a text with a wrong checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"!",
    "EXIF data with a wrong checksum": chunk(b"eXIf", exif(6).tobytes()[6:])[:-1] + b"!",
    "a damaged colour profile": chunk(b"iCCP", b"profile\0\0nonsense"),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA)
def test_metadata_do_not_make_a_png_unreadable(metadata, place):
    rows = b"".join(b"\0" + row.tobytes() for row in COLOURED)
    content = png(16, 16, 8, 2, rows, **{place: metadata})
    assert read_header(content)[:4] == ("PNG", (16, 16), False, False)
    assert_near(pixels(content), COLOURED, 0)


ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def icc_profile(matrix, gamma):
    """A colour profile of three primaries, columns of XYZ under D50, and a gamma: ICC.1:2001."""
    xyz = [b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in part)) for part in matrix.T]
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(78) + bytes(1)
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    parts = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), xyz, strict=True))
    parts |= {
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
        b"desc": text,
        b"wtpt": white,
        b"cprt": b"text" + bytes(8),
    }
    table, data = struct.pack(">I", len(parts)), b""
    for name, part in parts.items():
        table += name + struct.pack(">II", 132 + 12 * len(parts) + len(data), len(part))
        data += part + bytes(-len(part) % 4)
    about = struct.pack(">I4sI", 128 + len(table + data), b"lcms", 0x02100000) + b"mntrRGB XYZ " + bytes(12) + b"acsp"
    return about.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061) + bytes(48) + table + data


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_colours_of_another_space_become_srgb(ending):
    """Adobe RGB: linear light by a gamma of 2.2, through XYZ to the primaries of sRGB, and sRGB's own curve."""
    colours = rng(10).integers(60, 200, (4, 4, 3)).astype(np.uint8)
    linear = (colours / 255) ** (563 / 256) @ ADOBE_RGB.T @ np.linalg.inv(SRGB).T
    wanted = 255 * np.where(linear > 0.0031308, 1.055 * linear.clip(1e-9) ** (1 / 2.4) - 0.055, 12.92 * linear)
    large = Image.fromarray(np.kron(colours, np.ones((8, 8, 1), np.uint8)))
    content = encoded(large, ending, icc_profile=icc_profile(ADOBE_RGB, 563 / 256))
    assert_near(pixels(content)[4::8, 4::8], wanted.clip(0, 255), 4)


# Several frames


@pytest.mark.parametrize("ending", ["gif", "webp", "tif", "png"])
def test_of_an_animation_the_first_frame_counts(ending):
    frames = [Image.fromarray(plain(grey)).convert("RGB") for grey in (50, 100, 150)]
    content = encoded(frames[0], ending, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert_near(pixels(content), 50, 0)


# Cover and crop

SHAPES = [(64, 64), (100, 80), (37, 200), (500, 61), (9, 7)]
SIZES = [(64, 64), (32, 48), (17, 31), (8, 8)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_ramp_stays_the_ramp_that_covering_and_cropping_makes_of_it(shape, size, axis):
    """Pixel j of n is about (j + 1/2) / n of the way; a kernel that is fair keeps a straight line straight."""
    ramp = 255 * (np.arange(shape[axis]) + 0.5) / shape[axis]
    image = np.broadcast_to(np.expand_dims(ramp.round(), 1 - axis), shape).astype(np.uint8)
    got = pixels(encoded(np.ascontiguousarray(image)), size, channels=1)[..., 0]
    assert got.shape == size
    scale = max(size[0] / shape[0], size[1] / shape[1])
    places = shape[axis] / 2 + (np.arange(size[axis]) + 0.5 - size[axis] / 2) / scale  # in source pixels
    inside = (places > 3 * max(1, 1 / scale)) & (places < shape[axis] - 3 * max(1, 1 / scale))
    wanted = np.expand_dims(255 * places / shape[axis], 1 - axis)
    assert_near(
        np.compress(inside, got, axis),
        np.broadcast_to(np.compress(inside, wanted, axis), np.compress(inside, got, axis).shape),
        1.5,
    )


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("shape", [(301, 200), (1000, 650), (30, 40)])
@pytest.mark.parametrize("size", [(64, 64), (33, 64)])
def test_a_marker_in_the_centre_stays_there_within_half_a_pixel(ending, shape, size):
    image = plain(0, *shape)
    high, wide = (side // 5 + (side // 5 + side) % 2 for side in shape)  # as odd or even as the side
    top, left = (shape[0] - high) // 2, (shape[1] - wide) // 2
    image[top : top + high, left : left + wide] = 255
    got = pixels(encoded(image, ending), size, channels=1)[..., 0].astype(float)
    for axis in (0, 1):
        along = got.sum(1 - axis)
        centre = (along * (np.arange(size[axis]) + 0.5)).sum() / along.sum()
        assert abs(centre - size[axis] / 2) < 0.5


@every_format
def test_an_image_of_the_right_size_is_not_touched(ending):
    image = rng(6).integers(0, 256, (12, 10)).astype(np.uint8)
    content = encoded(image, ending)
    own = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    assert_near(pixels(content, (12, 10), 1)[..., 0], own, 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_not_cropped_covers_the_size_and_is_as_large_one_way(shape, size):
    got = pixels(encoded(smooth(*shape)), size, cropped=False).shape[:2]
    scale = max(size[0] / shape[0], size[1] / shape[1])
    assert got == tuple(min(round(side * scale), MAX_LENGTH * wanted) for side, wanted in zip(shape, size, strict=True))
    assert any(a == b for a, b in zip(got, size, strict=True))
    assert all(a >= b for a, b in zip(got, size, strict=True))


def test_a_constant_image_stays_constant_at_every_size():
    for ending, grey in itertools.product(("png", "jpg"), (0, 1, 127, 254, 255)):
        for shape, size in itertools.product([(5, 3), (64, 64), (250, 311)], SIZES):
            assert_near(pixels(encoded(plain(grey, *shape), ending), size, channels=1), grey, 0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
@pytest.mark.parametrize("cropped", [True, False])
def test_the_thinnest_images_are_images(shape, cropped):
    for image in (plain(100, *shape), plain((200, 100, 50), *shape)):
        got = pixels(encoded(image), (64, 48), cropped=cropped)
        assert_near(got, 100 if image.ndim == 2 else (200, 100, 50), 0)
        assert got.size <= 3 * 64 * 48 * MAX_LENGTH
        if cropped:
            assert got.shape == (64, 48, 3)


@pytest.mark.parametrize("shape, size", [((512, 512), (64, 64)), ((601, 903), (48, 100)), ((129, 131), (64, 64))])
def test_a_jpeg_decoded_at_a_fraction_looks_as_if_decoded_in_full(shape, size):
    content = encoded(smooth(*shape), "jpg", quality=90)
    in_full = encoded(Image.open(io.BytesIO(content)))
    assert_near(pixels(content, size), pixels(in_full, size), 4)


def test_a_large_jpeg_is_decoded_faster_than_in_full():
    content = encoded(smooth(1200, 1600), "jpg", quality=85)

    def seconds(work):
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    in_full = min(seconds(Image.open(io.BytesIO(content)).load) for _ in range(3))
    assert min(seconds(lambda: decode(content, ImageSpec((64, 64), 3))) for _ in range(3)) < in_full


def test_pixels_may_be_written_to():
    """torch warns about arrays that are read-only."""
    for channels, size in itertools.product((1, 3), ((8, 8), (5, 5))):
        got = decode(encoded(plain(3)), ImageSpec(size, channels))
        assert got.flags.writeable and got.flags.c_contiguous and got.dtype == np.uint8


# Hostile files


def outcome(content):
    """The image, or the reason why the file is unreadable, within seconds."""
    started = time.monotonic()
    try:
        header = read_header(content)
        image = decode(content, ImageSpec((16, 16), 3))
        assert image.shape == (3, 16, 16) and header.format
    except UnreadableImage as error:
        image = str(error)
        assert image and "\n" not in image and len(image) < 200
    assert time.monotonic() - started < 5
    return image


@pytest.fixture(scope="module")
def victims():
    """A file of each format and of rare modes."""
    image, _ = with_palette()
    files = {ending: encoded(smooth(40, 30), ending) for ending in FORMATS}
    files["palette"] = encoded(image, transparency=bytes(range(256)))
    files["deep"] = encoded(EVERY_16_BIT[::8, ::8].copy())
    files["floats"] = encoded(np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20), "tif")
    files["turned"] = encoded(smooth(40, 30), "jpg", exif=exif(6))
    files["progressive"] = encoded(smooth(40, 30), "jpg", progressive=True)
    files["lossy"] = encoded(smooth(40, 30), "webp", lossless=False)
    frames = [Image.fromarray(smooth(20, 20, seed)) for seed in range(3)]
    for ending in ("gif", "webp", "tif", "png"):
        files[f"animated {ending}"] = encoded(frames[0], ending, save_all=True, append_images=frames[1:])
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        files[compression] = encoded(smooth(40, 30), "tif", compression=compression)
    return files


@pytest.fixture(autouse=True)
def pillow_may_warn():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def test_a_truncated_file_is_an_image_or_unreadable(victims):
    for content in victims.values():
        for length in {0, 1, 2, 3, 7, 8, 12, 16, *np.linspace(17, len(content) - 1, 12).astype(int).tolist()}:
            outcome(content[:length])


def test_a_file_truncated_within_its_pixels_is_unreadable():
    noise = rng(7).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for ending in FORMATS:
        content = encoded(noise, ending)
        assert isinstance(outcome(content[: len(content) // 2]), str), ending


def test_a_file_with_wrong_bytes_is_an_image_or_unreadable(victims):
    draws = rng(8)
    for content in victims.values():
        for number in range(16):
            damaged = bytearray(content)
            places = draws.integers(0, min(len(damaged), 200) if number % 2 else len(damaged), draws.integers(1, 6))
            damaged = np.frombuffer(damaged, np.uint8).copy()
            damaged[places] = draws.integers(0, 256, len(places))
            outcome(damaged.tobytes())


NOT_IMAGES = {
    "empty": b"",
    "one byte": b"\x89",
    "text": b"Hello, I am a text file.\n" * 100,
    "a page": b"<!DOCTYPE html><html><body>404 not found</body></html>",
    "a drawing": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "zeros": bytes(10_000),
    "noise": rng(9).bytes(10_000),
    "an archive": b"PK\x03\x04" + bytes(100),
    "a beginning of PNG": b"\x89PNG\r\n\x1a\n",
    "a beginning of JPEG": b"\xff\xd8\xff\xe0",
    "a beginning of GIF": b"GIF89a",
    "a beginning of TIFF": b"II*\0",
    "a beginning of WebP": b"RIFF\0\0\0\0WEBP",
    "a beginning of BMP": b"BM",
    "a program for a printer": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would run Ghostscript
    "pixels without a format": b"P6 2 2 255\n" + bytes(12),
}


@pytest.mark.parametrize("content", NOT_IMAGES.values(), ids=NOT_IMAGES)
def test_a_file_that_is_not_an_image_is_unreadable_whatever_its_name(content, tmp_path):
    path = write(tmp_path / "x.jpg", content)
    for source in (content, path):
        for work in (read_header, lambda source: decode(source, ImageSpec((8, 8), 3))):
            with pytest.raises(UnreadableImage):
                work(source)


def test_a_folder_is_unreadable_and_a_missing_file_is_a_file_not_found(tmp_path):
    with pytest.raises(UnreadableImage):
        decode(tmp_path, ImageSpec((8, 8), 3))
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "gone.png", ImageSpec((8, 8), 3))


def claiming(ending, side):
    """A small file whose header claims this height and width."""
    content = bytearray(encoded(smooth(8, 8), ending))
    if ending == "bmp":
        content[18:26] = struct.pack("<ii", side, side)
    elif ending == "gif":
        content[6:10] = struct.pack("<HH", side, side)
    elif ending == "jpg":
        frame = content.index(b"\xff\xc0")
        content[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    elif ending == "tif":
        for tag in (256, 257):
            entry = content.index(struct.pack("<H", tag))
            content[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, side)
    elif ending == "avif":
        extents = content.index(b"ispe")
        content[extents + 8 : extents + 16] = struct.pack(">II", side, side)
    elif ending == "png":
        return png(side, side, 8, 2, b"")
    elif ending == "webp":  # the extended header says the size of the canvas
        canvas = (side - 1).to_bytes(3, "little") * 2
        return (
            b"RIFF"
            + struct.pack("<I", len(content) + 10)
            + b"WEBPVP8X"
            + struct.pack("<I", 10)
            + bytes(4)
            + canvas
            + content[12:]
        )
    return bytes(content)


@every_format
def test_a_header_that_claims_too_many_pixels_is_refused_at_once(ending):
    started = time.monotonic()
    for work in (read_header, lambda source: decode(source, ImageSpec((8, 8), 3))):
        with pytest.raises(UnreadableImage) as refused:
            work(claiming(ending, 16384 if ending == "webp" else 60_000))
        if ending not in ("webp", "avif"):  # their decoders compare the size with the image first
            assert "bomb" in str(refused.value)
    assert time.monotonic() - started < 1


MEASURE = """
import io, json, os, resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tiny_diffusion.data.files import memory
from tiny_diffusion.data.files.decode import ImageSpec, UnreadableImage, decode, read_header
def outcome(path):
    try:
        decode(path, ImageSpec((64, 64), 3))
        return "an image"
    except UnreadableImage as error:
        return str(error)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = io.BytesIO()
__import__("PIL.Image").Image.new("RGBA", (8, 8)).save(small, "PNG")
tasks = json.loads(sys.argv[1])
for number, (paths, threads, total) in enumerate(tasks, 1):
    if number < len(tasks) and (pid := os.fork()):  # whose peak starts at what is used now
        os.waitpid(pid, 0)
        continue
    memory.PIXELS.total = memory.PIXELS.free = total
    decode(small.getvalue(), ImageSpec((64, 64), 3))
    before = peak()
    with ThreadPoolExecutor(threads) as pool:
        said = " ".join(set(pool.map(outcome, map(Path, paths))))
    print(json.dumps([said, peak() - before]), flush=True)
    os._exit(0)
"""


def memory_to_decode(*tasks):
    """For each task (paths, threads, bytes that all threads may take) what becomes of the images, and by how many MB
    memory grew: the last in a new process, each before it in a fork of that."""
    words = [sys.executable, "-c", MEASURE, json.dumps([(list(map(str, paths)), *rest) for paths, *rest in tasks])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_real_decompression_bomb_is_refused_without_being_decoded(tmp_path):
    """40,000 x 5,000 white pixels in a few kB would be 600 MB."""
    row = b"\0" + b"\xff" * 5000
    path = write(tmp_path / "bomb.png", png(40_000, 5_000, 1, 0, row * 5_000))
    assert path.stat().st_size < 100_000
    ((said, megabytes),) = memory_to_decode(([path], 1, 1 << 30))
    assert "bomb" in said and megabytes < 50


# Memory


@pytest.mark.slow
@pytest.mark.parametrize("bits, colour, channels", [(16, 0, 2), (8, 6, 4)])
def test_all_threads_together_take_no_more_memory_than_they_may(bits, colour, channels, tmp_path):
    """Four images of 16 million pixels, of 32 or 64 MB as Pillow holds them, in a few kB each."""
    path = write(tmp_path / "large.png", png(4000, 4000, bits, colour, (bytes(1 + 4000 * channels)) * 4000))
    assert path.stat().st_size < 200_000
    ((said, megabytes),) = memory_to_decode(([path] * 4, 4, 120 << 20))
    assert said == "an image" and megabytes < 120 + 30


@pytest.mark.slow
def test_decoding_takes_no_more_memory_than_is_reserved_for_it(tmp_path):
    options = {
        "progressive jpg": {"progressive": True},
        "packed tif": {"compression": "tiff_lzw", "strip_size": 1 << 30},
    }
    paths, allowed = {}, {}
    for kind in (*FORMATS, *options, *(f"{ending} with alpha" for ending in ("webp", "avif") if ending in FORMATS)):
        ending = next(ending for ending in FORMATS if ending in kind)
        image = Image.new("RGBA" if "alpha" in kind else "RGB", (1500, 1500))
        path = write(tmp_path / f"{kind}.{ending}", encoded(image, ending, **options.get(kind, {})))
        with io.BytesIO(path.read_bytes()) as file, Image.open(file) as opened:
            opened.draft(None, (128, 128))
            reserved = bytes_to_decode(opened)
        paths[kind] = path
        allowed[kind] = (reserved + TILE_BYTES + 2 * path.stat().st_size) / 2**20 + 30
    for kind, (said, megabytes) in zip(
        paths, memory_to_decode(*(([path], 1, 1 << 30) for path in paths.values())), strict=True
    ):
        assert said == "an image" and megabytes < allowed[kind], kind


@every_format
def test_an_image_that_needs_too_much_memory_is_unreadable(ending, monkeypatch):
    content = encoded(smooth(256, 256), ending)
    monkeypatch.setattr("tiny_diffusion.data.files.decode.MAX_IMAGE_BYTES", 1000)
    for work in (read_header, lambda source: decode(source, ImageSpec((256, 256), 3))):
        with pytest.raises(UnreadableImage, match="MB to decode, more than"):
            work(content)


def test_what_is_reserved_never_exceeds_the_total_and_nobody_waits_forever():
    budget, held, largest = Budget(100), [], []

    def work(count):
        with budget.reserve(count):
            held.append(count)
            largest.append(sum(held))
            time.sleep(0.001)
            held.remove(count)

    counts = rng(11).integers(1, 100, 60).tolist()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, counts))
    assert max(largest) <= 100 and len(largest) == 60 and budget.free == 100


def test_what_exceeds_the_total_waits_to_be_alone():
    budget, alone = Budget(100), threading.Event()

    def work():
        with budget.reserve(1000):
            assert budget.free == 0
            alone.set()

    large = threading.Thread(target=work)
    with budget.reserve(1):
        large.start()
        assert not alone.wait(0.05)
    assert alone.wait(5)
    large.join()
    assert budget.free == 100


@pytest.mark.parametrize("shape", [(300, 700), (64, 64), (97, 1003), (5000, 2), (1, 5000)])
@pytest.mark.parametrize("cropped", [True, False])
def test_an_image_converted_tile_by_tile_is_the_same_as_one_converted_whole(cropped, shape, monkeypatch):
    draws, spec = rng(12), ImageSpec((16, 24), 3, (255, 0, 255), cropped)
    images = [draws.integers(0, 256, (*shape, channels)).astype(np.uint8) for channels in (3, 4)]
    images += [draws.integers(0, 5000, shape).astype(np.uint16), draws.random(shape, np.float32) * 3]
    files = [encoded(image, "tif" if image.dtype == np.float32 else "png") for image in images]
    files.append(encoded(Image.fromarray(images[0]).quantize(64), transparency=7))
    whole = [decode(content, spec) for content in files]
    monkeypatch.setattr("tiny_diffusion.data.files.scaling.TILE_PIXELS", 1000)
    for content, wanted in zip(files, whole, strict=True):
        np.testing.assert_array_equal(decode(content, spec), wanted)


def test_text_that_unpacks_to_gigabytes_is_refused():
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(80)) + packer.flush()
    content = png(8, 8, 8, 0, bytes(72), before=chunk(b"zTXt", b"Comment\0\0" + packed))
    assert isinstance(outcome(content), (str, np.ndarray))
