"""Text in pictures: names in any script, in a font that has their letters, shortened to fit."""

import math
from collections.abc import Set
from functools import cache

import numpy as np

from tiny_diffusion.errors import printable

MAX_LETTERS = 200  # of one text; the time that measuring takes grows with the square of the length
LIGHT, DARK = 240, 15  # grey levels of text on a dark and on a light background
MISSING = "□"  # in place of a letter that no font has


def text_width(text: str, points: int) -> int:
    """Pixels that a line of this text takes, with 2 of margin at each side."""
    text = printable(text, MAX_LETTERS)
    return math.ceil(_font(text, points).getlength(text)) + 4


def text_line(text: str, width: int, points: int, background: int) -> np.ndarray:
    """One centred line, uint8 (height, width, 3), shortened with an ellipsis where it does not fit.

    background: the grey level it lies on.
    """
    from PIL import Image, ImageDraw

    shown = text = printable(text, MAX_LETTERS)
    while shown and text_width(shown, points) > width:
        text = text[:-1].rstrip()
        shown = text + "…" if text else ""
    line = Image.new("L", (width, points * 4 // 3 + 1), background)
    ink = LIGHT if background < 128 else DARK
    ImageDraw.Draw(line).text((width / 2, points), shown, ink, _font(shown, points), anchor="ms")
    return np.repeat(np.asarray(line)[..., None], 3, axis=2)


def in_one_font(text: str) -> tuple[str, str]:
    """At most 80 letters of the text, with MISSING for those that its font lacks, and the path of the font."""
    text = printable(text)
    path = _font_with(frozenset(text))
    return "".join(letter if ord(letter) in _letters_of(path) else MISSING for letter in text), path


def _font(text: str, points: int):
    """Pillow's own font for ASCII, and the installed font that has most of the letters for any other text."""
    from PIL import ImageFont

    path = None if text.replace("…", "").isascii() else _font_with(frozenset(text) - {"…", " "})
    return ImageFont.truetype(path, points) if path else ImageFont.load_default(points)


@cache
def _font_with(letters: frozenset[str]) -> str:
    """The path of a font.  matplotlib brings DejaVu (Latin, Greek, Cyrillic, Arabic) and finds the installed ones."""
    from matplotlib import font_manager

    def missing(path: str) -> int:
        return len({ord(letter) for letter in letters} - _letters_of(path))

    paths = [font_manager.findfont("DejaVu Sans")]
    if missing(paths[0]):
        paths += sorted({font.fname for font in font_manager.fontManager.ttflist if font.style == "normal"})
    return min(paths, key=missing)


@cache
def _letters_of(path: str) -> Set[int]:
    """The code points that a font has; none if it cannot be read."""
    from matplotlib import ft2font

    try:
        return ft2font.FT2Font(path).get_charmap().keys()
    except (OSError, RuntimeError):
        return frozenset()
