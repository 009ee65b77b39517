"""Decodes one image file, whatever its format, mode and orientation, to uint8 pixels (C, H, W).

Knows files and Pillow, not folders or classes.  A file that cannot be decoded, for whatever reason, raises
UnreadableImage.
"""

import errno
import io
import logging
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from tiny_diffusion.data.files.colours import BITS, SAMPLE_FORMAT, eight_bit_converter, is_grey
from tiny_diffusion.data.files.memory import MAX_IMAGE_BYTES, PIXELS, bytes_to_decode, file_content
from tiny_diffusion.data.files.png import SIGNATURE, scale_transparency, without_metadata
from tiny_diffusion.data.files.scaling import Resizing, covering, scale_to_cover

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
ORIENTATION = 0x0112  # the EXIF tag
TRANSPOSE = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # from an orientation to Pillow's Transpose that undoes it
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width
WIDTH, HEIGHT = 256, 257  # tags of a TIFF
LASTING_ERRORS = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)

Result = TypeVar("Result")


class UnreadableImage(ValueError):
    """The file is not an image, is damaged, or is too large to decode.  The message is the reason, in a few words.

    passing: the file may be readable next time, because the disk or the memory failed and not the file.
    """

    def __init__(self, reason: str, passing: bool = False):
        super().__init__(reason)
        self.passing = passing


class Header(NamedTuple):
    """What the header of a file says.  format: PNG, JPEG, ...  size: (height, width) of the upright image.

    deep: whether it has 16 bits a channel.
    """

    format: str
    size: tuple[int, int]
    grey: bool
    transparent: bool
    deep: bool = False


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
        about = Header(name, _upright_size(image), is_grey(image), image.has_transparency_data, _is_deep(image))
        image.draft(None, (1, 1))  # a JPEG may be decoded to an eighth
        _checked_bytes(image)
        return about

    return _with_image(content, header, pixels=False)


def decode(content: bytes | Path, spec: ImageSpec) -> np.ndarray:
    """The image as uint8 (C, H, W).  Raises UnreadableImage, FileNotFoundError."""
    if isinstance(content, Path):
        try:
            with file_content(content) as found:
                return decode(found, spec)
        except FileNotFoundError:
            raise
        except (OSError, MemoryError) as error:
            raise as_unreadable(error) from error
    return _with_image(content, lambda image: _pixels(image, spec), pixels=True)


def as_unreadable(error: Exception) -> UnreadableImage:
    """The same error as an UnreadableImage, with its reason in one line."""
    if isinstance(error, UnreadableImage):
        return error
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    passing = isinstance(error, MemoryError) or getattr(error, "errno", None) not in (None, *LASTING_ERRORS)
    return UnreadableImage(" ".join(reason.split())[:100], passing)


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
        raise as_unreadable(error) from error


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


def _is_deep(image: "Image") -> bool:
    """Whether the file has integers of 16 bits."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS, (1,))) == 16 and max(image.tag_v2.get(SAMPLE_FORMAT, (1,))) <= 2
    return image.format == "PNG" and bool(image.tile) and "16" in str(image.tile[0][3])


def _upright_size(image: "Image") -> tuple[int, int]:
    """Height and width of the upright image."""
    width, height = image.size
    if image.format == "TIFF":  # Pillow swaps the sides of some when it opens them
        width, height = image.tag_v2[WIDTH], image.tag_v2[HEIGHT]
    return (width, height) if _orientation(image) in SIDEWAYS else (height, width)


def _pixels(image: "Image", spec: ImageSpec) -> np.ndarray:
    """The image scaled, cropped and turned upright: uint8 (C, H, W).  Waits until there is memory for it."""
    height, width = _draft(image, spec)
    orientation = None if image.format == "TIFF" else _orientation(image)  # Pillow turns a TIFF upright
    size = spec.size[::-1] if orientation in SIDEWAYS else spec.size  # as the image lies in the file
    scale = scale_to_cover((height, width), size)
    target = size if spec.cropped else covering((height, width), size)
    h, w = min(height, target[0] / scale), min(width, target[1] / scale)  # the part of the file's image that is kept
    left, top = (width - w) / 2, (height - h) / 2
    resizing = Resizing.of(image.size, (left, top, left + w, top + h), target[::-1])
    with PIXELS.reserve(_checked_bytes(image) + resizing.bytes):
        image.load()
        image = resizing.apply(image, eight_bit_converter(image, spec.channels, spec.background))
        if orientation in TRANSPOSE:
            image = image.transpose(TRANSPOSE[orientation])
        pixels = np.array(image)
    if pixels.ndim == 2:
        return np.repeat(pixels[None], spec.channels, 0)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (H, W, C) -> (C, H, W)


def _draft(image: "Image", spec: ImageSpec) -> tuple[float, float]:
    """Prepares decoding.  Height and width of the image in the pixels that it will be decoded to.

    libjpeg decodes to a half, a quarter or an eighth in a fraction of the time.  Twice the wanted size is kept, and the
    image may end inside the last pixel.
    """
    decoded = None
    if image.format in ("JPEG", "MPO"):
        scale = scale_to_cover(_upright_size(image), spec.size)
        decoded = image.draft(None, tuple(max(1, int(2 * side * scale)) for side in image.size))
    if image.format == "PNG":
        scale_transparency(image)
    width, height = decoded[1][2:] if decoded else image.size
    return height, width


def _checked_bytes(image: "Image") -> int:
    """How many bytes decoding takes.  Raises UnreadableImage if that is too many."""
    if (needed := bytes_to_decode(image)) > MAX_IMAGE_BYTES:
        raise UnreadableImage(f"takes {needed >> 20:,} MB to decode, more than {MAX_IMAGE_BYTES >> 20:,}")
    return needed
