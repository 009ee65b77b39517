"""The size of images: its form in an option, and the defaults of other options that depend on it."""

import math
from collections.abc import Sequence

REFERENCE_SIDE = 32  # pixels; up to this side the schedules are those of their papers


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image_size, which is the side alone for square images."""
    return size if isinstance(size, tuple) else (size, size)


def square(size: object) -> object:
    """64 for (64, 64), so that one size is one value; anything else as it is."""
    return size[0] if isinstance(size, tuple) and len(size) == 2 and size[0] == size[1] else size


def default_shift(size: tuple[int, int]) -> float:
    """The default of logsnr_shift: ln(32 / side), for the side of a square of equal area; 0 up to 32 pixels.

    The same noise hides less of a larger image, whose neighbouring pixels are alike.  Hoogeboom et al. (2023), eq. 4,
    shift by twice this, as if neighbours were equal; in minutes of training at 64 pixels less was better
    (benchmarks/RESULTS.md).
    """
    side = math.sqrt(size[0] * size[1])
    return math.log(REFERENCE_SIDE / side) if side > REFERENCE_SIDE else 0.0


def default_patch_size(size: tuple[int, int]) -> int:
    """4 from 128 pixels on, 2 below; smaller where that does not divide height and width, or leaves one patch."""
    wanted = 4 if max(size) >= 128 else 2
    return next(patch for patch in (wanted, 2, 1) if not any(side % patch or side // patch < 2 for side in size))


def default_channel_mult(sides: Sequence[float]) -> tuple[int, ...]:
    """Enough levels that the coarsest is about 8 pixels wide, where attention is cheap, but at least 2 pixels.

    sides: height and width in patches, as the network sees the image.
    """
    wanted = (1, 2) if max(sides) <= 16 else (1, 2, 2) if max(sides) <= 32 else (1, 2, 2, 2)
    halvings = max(0, math.ceil(math.log2(min(sides))) - 1)
    return wanted[: halvings + 1]
