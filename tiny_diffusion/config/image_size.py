"""The size of images: as it is written, and the options that follow from it where nobody says them."""

import math
from collections.abc import Sequence

REFERENCE_SIDE = 32  # up to here the schedules are as their papers have them


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Of an image_size, which is the side alone for square images."""
    return size if isinstance(size, tuple) else (size, size)


def square(size: object) -> object:
    """(64, 64) as 64: one image size, one value."""
    return size[0] if isinstance(size, tuple) and len(size) == 2 and size[0] == size[1] else size


def default_shift(size: tuple[int, int]) -> float:
    """ln(32 / side): the same noise hides less of a larger image, whose pixels repeat each other.

    Hoogeboom et al. (2023), eq. 4, have twice this, for pixels that repeat each other exactly; in minutes of training
    at 64 pixels less was better (benchmarks/RESULTS.md).
    """
    side = math.sqrt(size[0] * size[1])
    return math.log(REFERENCE_SIDE / side) if side > REFERENCE_SIDE else 0.0


def default_patch_size(size: tuple[int, int]) -> int:
    """4 from 128 pixels on and 2 below, as far as they divide height and width."""
    wanted = 4 if max(size) >= 128 else 2
    return next(patch for patch in (wanted, 2, 1) if not any(side % patch or side // patch < 2 for side in size))


def default_channel_mult(sides: Sequence[float]) -> tuple[int, ...]:
    """As many levels as bring the coarsest to about 8 pixels, where attention is cheap, and leave it at least 2."""
    wanted = (1, 2) if max(sides) <= 16 else (1, 2, 2) if max(sides) <= 32 else (1, 2, 2, 2)
    halvings = max(0, math.ceil(math.log2(min(sides))) - 1)
    return wanted[: halvings + 1]
