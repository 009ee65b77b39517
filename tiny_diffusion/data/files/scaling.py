"""Scales images to cover a size, and converts large ones tile by tile, so that little but the file takes memory."""

import math
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_LENGTH = 4  # times the wanted side, for images that are not cropped: a strip of 1x5000 pixels would fill the memory
REDUCING_GAP = 3.0  # an image is averaged to this many times its new size before it is resampled
SUPPORT = 1.5  # pixels of the new image that a bicubic kernel reaches beyond an edge
TILE_PIXELS = 1 << 20  # converted at once
TILE_BYTES = 40 * TILE_PIXELS  # that converting them takes

Box = tuple[float, float, float, float]  # left, top, right, bottom


def scale_to_cover(sides: tuple[float, float], size: tuple[int, int]) -> float:
    """The factor by which an image of these sides just covers the size."""
    return max(wanted / side for wanted, side in zip(size, sides, strict=True))


def covering(sides: tuple[float, float], size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image of these sides, scaled to cover the size: one side may be longer."""
    scale = scale_to_cover(sides, size)
    return tuple(
        min(max(wanted, round(side * scale)), MAX_LENGTH * wanted) for wanted, side in zip(size, sides, strict=True)
    )


class Resizing(NamedTuple):
    """Scales the box of an image to a size (width, height): what Pillow's resize does with a reducing_gap.

    factors: (columns, rows) that are averaged to one pixel before.  region: the part of the image that is averaged.
    """

    size: tuple[int, int]
    box: Box
    factors: tuple[int, int]
    region: tuple[int, int, int, int]

    @classmethod
    def of(cls, image_size: tuple[int, int], box: Box, size: tuple[int, int]) -> "Resizing":
        """image_size, size: (width, height) before and after."""
        scales = [(box[i + 2] - box[i]) / size[i] for i in (0, 1)]
        factors = tuple(int(scale / REDUCING_GAP) or 1 for scale in scales)
        if factors == (1, 1):
            return cls(size, box, factors, (0, 0, *image_size))
        first = [max(0, int(box[i] - SUPPORT * scales[i])) for i in (0, 1)]
        last = [min(image_size[i], math.ceil(box[i + 2] + SUPPORT * scales[i])) for i in (0, 1)]
        return cls(size, box, factors, (*first, *last))

    @property
    def reduced(self) -> tuple[int, int]:
        """Width and height of the averaged region."""
        return tuple(math.ceil((self.region[i + 2] - self.region[i]) / self.factors[i]) for i in (0, 1))

    @property
    def bytes(self) -> int:
        """How many bytes converting and scaling take, besides the image itself."""
        return 8 * self.reduced[0] * self.reduced[1] + TILE_BYTES

    def tile(self) -> tuple[int, int]:
        """Columns and rows of about TILE_PIXELS that are converted at once: multiples of the factors."""
        columns = max(1, min(self.region[2], TILE_PIXELS // self.factors[1]) // self.factors[0]) * self.factors[0]
        columns += self.factors[0] if columns < self.region[2] <= columns + self.factors[0] else 0
        return columns, max(1, TILE_PIXELS // columns // self.factors[1]) * self.factors[1]

    def apply(self, image: "Image", convert: Callable[["Image"], "Image"]) -> "Image":
        """The image converted and scaled.  convert: changes the mode of an image, each pixel by itself."""
        from PIL import Image

        left, top, right, bottom = self.region
        columns, rows = self.tile()
        if columns >= image.width and rows >= image.height:
            converted = convert(image)
            reduced = converted if self.factors == (1, 1) else converted.reduce(self.factors, box=self.region)
        else:
            reduced = None
            for x, y in product(range(left, right, columns), range(top, bottom, rows)):
                tile = convert(image.crop((x, y, min(x + columns, right), min(y + rows, bottom)))).reduce(self.factors)
                reduced = reduced or Image.new(tile.mode, self.reduced)
                reduced.paste(tile, ((x - left) // self.factors[0], (y - top) // self.factors[1]))
        box = tuple((self.box[i] - self.region[i % 2]) / self.factors[i % 2] for i in range(4))
        if (*self.size, *box) == (*reduced.size, 0, 0, *reduced.size):
            return reduced
        return reduced.resize(self.size, Image.Resampling.BICUBIC, box=box)
