"""One image file to pixels: whatever its format, mode and orientation, as uint8 (C, H, W).

Knows files and Pillow, not folders or classes.  A file that cannot be read, for whatever reason, is an UnreadableImage.
"""

import io
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")  # Pillow's others are seldom meant, and EPS runs a program
ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff")
MAX_PIXELS = 178_956_970  # Pillow's own bound: half a gigabyte as RGB.  A larger one is a decompression bomb
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # from its value to Pillow's Transpose
SIDEWAYS = (5, 6, 7, 8)
WIDTH, HEIGHT = 256, 257  # tags of a TIFF
LONGEST = 4  # of the wanted side, where images are not cropped to it: a strip of 1x5000 pixels would fill the memory
GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")


class UnreadableImage(ValueError):
    """A file that is no image, a damaged one, or one too large to be unpacked.  The message is the reason, in short."""


class Header(NamedTuple):
    """What a file says of itself.  kind: PNG, JPEG, ...  size: height and width as it is meant to be seen."""

    kind: str
    size: tuple[int, int]
    grey: bool
    transparent: bool


class ImageSpec(NamedTuple):
    """What images are made to look like.  size: height, width.  background: (red, green, blue) behind transparency.

    cropped: exactly this size, from the centre.  Otherwise scaled to cover it, and one side may be longer.
    """

    size: tuple[int, int]
    channels: int
    background: tuple[int, int, int] = (255, 255, 255)
    cropped: bool = True


def read_header(content: bytes | Path) -> Header:
    """What the file says of itself, before its pixels are unpacked."""
    return _opened(
        content, lambda image: Header(image.format, _size(image), _is_grey(image), image.has_transparency_data)
    )


def decode(content: bytes | Path, look: ImageSpec) -> np.ndarray:
    """The image as uint8 (C, H, W)."""
    return _opened(content, lambda image: _pixels(image, look))


def _opened(content: bytes | Path, work):
    """work(image).  Raises UnreadableImage, and FileNotFoundError where there is no file any more."""
    from PIL import Image

    # What is wrong with a file is in the error, or does not matter: no warnings and no log lines between ours.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
            if image.size[0] * image.size[1] > MAX_PIXELS:
                raise UnreadableImage(f"{image.size[0]}x{image.size[1]} pixels: a decompression bomb")
            return work(image)
    except (FileNotFoundError, UnreadableImage):
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage("not a PNG, JPEG, BMP, GIF, WebP or TIFF image") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"a decompression bomb: over {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # a hostile file makes Pillow raise anything: struct.error, ZeroDivisionError, ...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(" ".join(reason.split())[:100]) from error


def _orientation(image: "Image") -> int | None:
    from PIL import Image

    try:
        return Image.Image.getexif(image).get(ORIENTATION)  # not a PNG's own, which unpacks the pixels
    except Exception:  # damaged EXIF data hide no pixel
        return None


def _size(image: "Image") -> tuple[int, int]:
    """Height and width as the image is meant to be seen."""
    width, height = image.size
    if image.format == "TIFF":  # Pillow has turned some of them already
        width, height = image.tag_v2[WIDTH], image.tag_v2[HEIGHT]
    return (width, height) if _orientation(image) in SIDEWAYS else (height, width)


def _is_grey(image: "Image") -> bool:
    if image.mode != "P" or image.palette is None:
        return image.mode in GREY_MODES
    order, colours = image.palette.getdata()
    each = {"RGB": 3, "BGR": 3, "BGRX": 4}.get(order, 0)
    return bool(each) and colours[0::each] == colours[1::each] == colours[2::each]


def _pixels(image: "Image", look: ImageSpec) -> np.ndarray:
    from PIL import Image

    drafted = None
    if image.format in ("JPEG", "MPO"):
        # It unpacks to a half, a quarter or an eighth at a fraction of the time; twice what is needed is kept.
        scale = _scale(_size(image), look.size)
        drafted = image.draft(None, tuple(max(1, int(2 * side * scale)) for side in image.size))
    image.load()  # which turns a TIFF
    width, height = drafted[1][2:] if drafted else image.size  # a drafted one may end within its last pixel
    orientation = _orientation(image)
    size = look.size[::-1] if orientation in SIDEWAYS else look.size  # as the image lies in its file
    scale = _scale((height, width), size)
    to = size if look.cropped else covering((height, width), size)
    h, w = min(height, to[0] / scale), min(width, to[1] / scale)
    left, top = (width - w) / 2, (height - h) / 2
    image = _plain(image, look)
    if (*to, h, w) != (image.height, image.width) * 2:
        box = (left, top, left + w, top + h)
        image = image.resize(to[::-1], Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    pixels = np.array(image)
    if pixels.ndim == 2:
        return np.repeat(pixels[None], look.channels, 0)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (H, W, C) -> (C, H, W)


def _scale(sides: tuple[int, int], size: tuple[int, int]) -> float:
    """By what an image of these sides covers the size."""
    return max(wanted / side for wanted, side in zip(size, sides, strict=True))


def covering(sides: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """What an image of these sides becomes when it is scaled to cover this size: as large, or longer one way."""
    scale = _scale(sides, size)
    return tuple(
        min(max(wanted, round(side * scale)), LONGEST * wanted) for wanted, side in zip(size, sides, strict=True)
    )


def _plain(image: "Image", look: ImageSpec) -> "Image":
    """The image in mode L if it is grey or to be grey, else RGB; on the background where it is transparent."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        values, hidden = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(_eight_bits(values))
        if hidden is not None:
            image.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    elif image.mode == "LAB":
        from PIL import ImageCms

        to_rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *to_rgb, outputMode="RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*look.background, 255)), image)
    wanted = "L" if look.channels == 1 or image.mode in GREY_MODES else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """16-bit, 32-bit and float greys as uint8: by what 16 bits can hold, or by what is there if that is another."""
    floats = values.dtype.kind == "f"
    with np.errstate(invalid="ignore"):  # of signalling NaNs, which damaged files hold
        values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    top = values.max(initial=0)
    white = next((white for white in ((1, 255, 65535) if floats else (65535,)) if top <= white), top)
    return np.rint((values * (255 / white)).clip(0, 255)).astype(np.uint8)
