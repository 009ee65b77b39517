"""Converts an image of any mode to 8-bit grey or RGB: depth, transparency, palettes, colour spaces."""

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF
GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def is_grey(image: "Image") -> bool:
    """Whether the mode, or every colour of the palette, is grey."""
    if image.mode != "P" or image.palette is None:
        return image.mode in GREY_MODES
    order, colours = image.palette.getdata()
    stride = {"RGB": 3, "BGR": 3, "BGRX": 4}.get(order, 0)
    return bool(stride) and colours[0::stride] == colours[1::stride] == colours[2::stride]


def to_eight_bits(image: "Image", channels: int, background: tuple[int, int, int]) -> "Image":
    """The image in mode L if it is grey or channels is 1, else RGB.  Transparent pixels show the background."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        values, hidden = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(_tiff_levels(image, values) if image.format == "TIFF" else _grey_levels(values))
        if hidden is not None:
            image.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    elif image.mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    elif image.format == "BMP" and image.mode == "RGBA" and image.getextrema()[3] == (0, 0):
        image = image.convert("RGB")  # many programs leave the fourth byte of a pixel empty
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


def _tiff_levels(image: "Image", values: np.ndarray) -> np.ndarray:
    """The greys of a TIFF as uint8, by its bits, its sign and whether 0 is white."""
    bits = image.tag_v2.get(BITS, (16,))[0]
    if bits <= 16 and image.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == 2:  # signed: the smallest value is black
        values = values.astype(np.int32) + 2 ** (bits - 1)
    levels = _grey_levels(values, 2 ** min(bits, 16) - 1)
    return 255 - levels if image.tag_v2.get(PHOTOMETRIC) == 0 else levels


def _grey_levels(values: np.ndarray, white: int = 65535) -> np.ndarray:
    """16-bit, 32-bit and float greys as uint8.

    white: the largest integer value.  White of floats is the first of 1, 255 and 65535 that no value exceeds.  Where
    values exceed these, white is the largest value.
    """
    floats = values.dtype.kind == "f"
    with np.errstate(invalid="ignore"):  # damaged files hold signalling NaNs
        values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    largest = values.max(initial=0)
    white = next((top for top in ((1, 255, 65535) if floats else (white,)) if largest <= top), largest)
    return np.rint((values * (255 / white)).clip(0, 255)).astype(np.uint8)
