"""Converts an image of any mode to 8-bit grey or RGB: depth, transparency, palettes, colour spaces."""

import io
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF
GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
MAX_VALUES = 1 << 20  # whose largest is looked for at once

Levels = Callable[[np.ndarray], np.ndarray]
Convert = Callable[["Image"], "Image"]


def is_grey(image: "Image") -> bool:
    """Whether the mode, or every colour of the palette, is grey."""
    if image.mode != "P" or image.palette is None:
        return image.mode in GREY_MODES
    order, colours = image.palette.getdata()
    stride = {"RGB": 3, "BGR": 3, "BGRX": 4}.get(order, 0)
    return bool(stride) and colours[0::stride] == colours[1::stride] == colours[2::stride]


def eight_bit_converter(image: "Image", channels: int, background: tuple[int, int, int]) -> Convert:
    """A function that converts this image, or any part of it: to mode L if it is grey or channels is 1, else RGB.

    Transparent pixels show the background.
    """
    is_deep, ignores_alpha = image.mode.startswith(("I", "F")), False
    levels = _levels(image) if is_deep else None
    if image.format == "BMP" and image.mode == "RGBA":  # many programs leave the fourth byte of a pixel empty
        ignores_alpha = image.getextrema()[3] == (0, 0)
    return partial(_to_eight_bits, channels=channels, background=background, levels=levels, ignores_alpha=ignores_alpha)


def _to_eight_bits(
    image: "Image", channels: int, background: tuple[int, int, int], levels: Levels | None, ignores_alpha: bool
) -> "Image":
    """levels: from values to 8 bits, of an image of more."""
    from PIL import Image

    if levels is not None:
        values, hidden = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(levels(values))
        if hidden is not None:
            image.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    elif image.mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    elif ignores_alpha:
        image = image.convert("RGB")
    image = _to_srgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    mode = "L" if channels == 1 or image.mode in GREY_MODES else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _to_srgb(image: "Image") -> "Image":
    """An RGB image with the colour profile of another space, such as Display P3, in sRGB."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "P"):
        return image
    from PIL import ImageCms

    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if own.profile.xcolor_space != "RGB " or "sRGB" in ImageCms.getProfileDescription(own):
            return image
        if image.mode == "P" or "transparency" in image.info:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        converted = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode=image.mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # a damaged profile does not hide the image
        return image
    return converted


def _levels(image: "Image") -> Levels:
    """A function from the values of a 16-bit, 32-bit or float image to uint8.

    White is the largest integer that the file's bits hold, or of floats the first of 1, 255 and 65535 that no value
    exceeds.  Where values exceed these, white is the largest value.  A TIFF's tags say whether its values have a sign,
    of which the smallest is black, and whether 0 is white.
    """
    lowest, white, inverted = 0, 65535, False
    if image.format == "TIFF":
        bits = image.tag_v2.get(BITS, (16,))[0]
        is_signed = bits <= 16 and image.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == 2
        lowest, white = -(2 ** (bits - 1)) if is_signed else 0, 2 ** min(bits, 16) - 1
        inverted = image.tag_v2.get(PHOTOMETRIC) == 0

    def numbers(values: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # damaged files hold signalling NaNs
            return np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0) - lowest

    rows = max(1, MAX_VALUES // image.width)
    parts = (image.crop((0, y, image.width, min(y + rows, image.height))) for y in range(0, image.height, rows))
    largest = max(numbers(np.asarray(part)).max(initial=0) for part in parts)
    whites = (1, 255, 65535) if image.mode.startswith("F") else (white,)
    white = next((top for top in whites if largest <= top), largest)

    def levels(values: np.ndarray) -> np.ndarray:
        shades = np.rint((numbers(values) * (255 / white)).clip(0, 255)).astype(np.uint8)
        return 255 - shades if inverted else shades

    return levels
