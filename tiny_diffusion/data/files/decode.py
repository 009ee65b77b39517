"""Decodes one image file, whatever its format, mode and orientation, to uint8 pixels (C, H, W).

Knows files and Pillow, not folders or classes.  A file that cannot be decoded, for whatever reason, raises
UnreadableImage.
"""

import io
import logging
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from tiny_diffusion.data.files.colours import is_grey, to_eight_bits
from tiny_diffusion.data.files.png import SIGNATURE, scale_transparency, without_metadata

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's other formats are rare, and for EPS it runs a program.  HEIF needs pillow-heif, AVIF a Pillow built with it.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "AVIF", "HEIF")
ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", ".heic", ".heif",
)  # fmt: skip
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # of the first box of a file
AVIF_BRANDS = (b"avif", b"avis")
MAX_PIXELS = 178_956_970  # Pillow's own limit, half a gigabyte as RGB.  A larger image is a decompression bomb
MAX_LENGTH = 4  # times the wanted side, for images that are not cropped: a strip of 1x5000 pixels would fill the memory
ORIENTATION = 0x0112  # the EXIF tag
TRANSPOSE = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # from an orientation to Pillow's Transpose that undoes it
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width
WIDTH, HEIGHT = 256, 257  # tags of a TIFF

Result = TypeVar("Result")


class UnreadableImage(ValueError):
    """The file is not an image, is damaged, or is too large to decode.  The message is the reason, in a few words."""


class Header(NamedTuple):
    """What the header of a file says.  format: PNG, JPEG, ...  size: (height, width) of the upright image."""

    format: str
    size: tuple[int, int]
    grey: bool
    transparent: bool


class ImageSpec(NamedTuple):
    """What images are decoded to.  size: (height, width).  background: (red, green, blue) behind transparent pixels.

    cropped: exactly this size, from the centre.  Otherwise scaled to cover it, so that one side may be longer.
    """

    size: tuple[int, int]
    channels: int
    background: tuple[int, int, int] = (255, 255, 255)
    cropped: bool = True


def read_header(content: bytes | Path) -> Header:
    """Reads the header of a file, without decoding its pixels.  Raises UnreadableImage, FileNotFoundError."""

    def header(image: "Image") -> Header:
        name = "JPEG" if image.format == "MPO" else image.format  # MPO: several JPEGs in a file
        return Header(name, _upright_size(image), is_grey(image), image.has_transparency_data)

    return _with_image(content, header, pixels=False)


def decode(content: bytes | Path, spec: ImageSpec) -> np.ndarray:
    """The image as uint8 (C, H, W).  Raises UnreadableImage, FileNotFoundError."""
    return _with_image(content, lambda image: _pixels(image, spec), pixels=True)


def _with_image(content: bytes | Path, work: Callable[["Image"], Result], pixels: bool) -> Result:
    """work(image).  Every error of Pillow becomes an UnreadableImage.  pixels: whether work needs them."""
    from PIL import Image

    # The error says what is wrong with a file, so Pillow's warnings and log lines would only disturb our output.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
    try:
        with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
            is_png = file.read(len(SIGNATURE)) == SIGNATURE
            with Image.open(without_metadata(file, pixels) if is_png else file, formats=_formats()) as image:
                if image.size[0] * image.size[1] > MAX_PIXELS:
                    raise UnreadableImage(f"{image.size[0]}x{image.size[1]} pixels: a decompression bomb")
                return work(image)
    except (FileNotFoundError, UnreadableImage):
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage(_why_unidentified(content)) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"a decompression bomb: over {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # a damaged file makes Pillow raise anything: struct.error, ZeroDivisionError, ...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(" ".join(reason.split())[:100]) from error


@cache
def _formats() -> tuple[str, ...]:
    """The FORMATS that this Pillow reads, with pillow-heif if it is installed."""
    from PIL import Image, TiffImagePlugin, features

    for order, suffix in ((TiffImagePlugin.II, ""), (TiffImagePlugin.MM, "B")):
        kinds = {(1, 12): ("I;16", "I;12"), (1, 16): (f"I;16{suffix}",) * 2, (2, 16): ("I", f"I;16{suffix}S")}
        for (sample_format, bits), modes in kinds.items():
            for photometric in (0, 1):  # Pillow can decode all of these and does not list all
                TiffImagePlugin.OPEN_INFO.setdefault((order, photometric, (sample_format,), 1, (bits,), ()), modes)
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError:
        pass
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN and (name != "AVIF" or features.check("avif")))


def _why_unidentified(content: bytes | Path) -> str:
    if isinstance(content, Path):
        with open(content, "rb") as file:
            content = file.read(12)
    box, brand = content[4:8], content[8:12]
    if box == b"ftyp" and brand in HEIF_BRANDS:
        return "HEIC: pip install pillow-heif, or convert it to JPEG"
    if box == b"ftyp" and brand in AVIF_BRANDS:
        return "AVIF, which this Pillow cannot read: update Pillow, or convert it to JPEG"
    return "not a PNG, JPEG, BMP, GIF, WebP, TIFF, AVIF or HEIC image"


def _orientation(image: "Image") -> int | None:
    """The EXIF orientation, 1 to 8, if there is one."""
    from PIL import Image

    try:
        return Image.Image.getexif(image).get(ORIENTATION)  # a PNG's own getexif would decode the pixels
    except Exception:  # damaged EXIF data do not make the pixels unreadable
        return None


def _upright_size(image: "Image") -> tuple[int, int]:
    """Height and width of the upright image."""
    width, height = image.size
    if image.format == "TIFF":  # Pillow swaps the sides of some when it opens them
        width, height = image.tag_v2[WIDTH], image.tag_v2[HEIGHT]
    return (width, height) if _orientation(image) in SIDEWAYS else (height, width)


def _pixels(image: "Image", spec: ImageSpec) -> np.ndarray:
    """The image scaled, cropped and turned upright: uint8 (C, H, W)."""
    height, width = _load(image, spec)
    orientation = _orientation(image)
    size = spec.size[::-1] if orientation in SIDEWAYS else spec.size  # as the image lies in the file
    scale = _scale((height, width), size)
    target = size if spec.cropped else covering((height, width), size)
    h, w = min(height, target[0] / scale), min(width, target[1] / scale)  # the part of the file's image that is kept
    left, top = (width - w) / 2, (height - h) / 2
    image = to_eight_bits(image, spec.channels, spec.background)
    if (*target, h, w) != (image.height, image.width) * 2:
        from PIL import Image

        box = (left, top, left + w, top + h)
        image = image.resize(target[::-1], Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    if orientation in TRANSPOSE:
        image = image.transpose(TRANSPOSE[orientation])
    pixels = np.array(image)
    if pixels.ndim == 2:
        return np.repeat(pixels[None], spec.channels, 0)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (H, W, C) -> (C, H, W)


def _load(image: "Image", spec: ImageSpec) -> tuple[float, float]:
    """Decodes the pixels.  Height and width of the image in them.

    libjpeg decodes to a half, a quarter or an eighth in a fraction of the time.  Twice the wanted size is kept, and the
    image may end inside the last pixel.
    """
    decoded = None
    if image.format in ("JPEG", "MPO"):
        scale = _scale(_upright_size(image), spec.size)
        decoded = image.draft(None, tuple(max(1, int(2 * side * scale)) for side in image.size))
    if image.format == "PNG":
        scale_transparency(image)
    image.load()  # also turns a TIFF upright
    width, height = decoded[1][2:] if decoded else image.size
    return height, width


def _scale(sides: tuple[float, float], size: tuple[int, int]) -> float:
    """The factor by which an image of these sides just covers the size."""
    return max(wanted / side for wanted, side in zip(size, sides, strict=True))


def covering(sides: tuple[float, float], size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image of these sides, scaled to cover the size: one side may be longer."""
    scale = _scale(sides, size)
    return tuple(
        min(max(wanted, round(side * scale)), MAX_LENGTH * wanted) for wanted, side in zip(size, sides, strict=True)
    )
