"""The memory of decoding: how much an image takes, and how much all threads take together.

A PNG of half a megabyte may hold 180 million pixels, and a folder may hold one for each thread.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGE_BYTES = 3 << 29  # of one image while it is decoded: 1.5 GiB
PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}  # in Pillow; other modes: 4
DECODER_BYTES = {"WEBP": 16, "AVIF": 12, "HEIF": 12, "GIF": 4, "BMP": 3}  # a pixel, besides those: measured, rounded up
BITS, SAMPLES, STRIP_ROWS, TILE_ROWS, ORIENTATION = 258, 277, 278, 323, 274  # tags of a TIFF
START_OF_SCAN = b"\xff\xda"  # of a JPEG


class Budget:
    """Bytes that threads share: each waits until what it needs is free.  What exceeds the total waits to be alone."""

    def __init__(self, total: int):
        self.total = self.free = total
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Holds this many bytes until the block ends."""
        count = min(count, self.total)
        with self._changed:
            self._changed.wait_for(lambda: count <= self.free)
            self.free -= count
        try:
            yield
        finally:
            with self._changed:
                self.free += count
                self._changed.notify_all()


# A thread reserves for the file first and then for its pixels, so no two threads wait for each other.
FILES = Budget(256 << 20)
PIXELS = Budget(1 << 30)


@contextmanager
def file_content(path: Path) -> Iterator[bytes]:
    """The bytes of a file, as part of FILES: twice its length, because decoders copy it."""
    with open(path, "rb") as file, FILES.reserve(2 * path.stat().st_size):
        yield file.read()


def bytes_to_decode(image: "Image") -> int:
    """About how many bytes the pixels of an open image and its decoder will take, after `draft`."""
    pixels = image.width * image.height
    needed = pixels * (PIXEL_BYTES.get(image.mode, 4) + DECODER_BYTES.get(image.format, 0))
    if image.format in ("JPEG", "MPO") and _has_several_scans(image):
        scale = image.decoderconfig[0] if image.decoderconfig else 1
        needed += 2 * len(image.layer) * pixels * scale**2  # libjpeg keeps every coefficient until the last scan
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if tags.get(ORIENTATION, 1) != 1:
        needed += pixels * PIXEL_BYTES.get(image.mode, 4)  # Pillow turns it into a second image
    if tags and image.tile and image.tile[0][0] == "libtiff":
        rows = min(tags.get(TILE_ROWS, tags.get(STRIP_ROWS, image.height)), image.height)
        needed += rows * image.width * tags.get(SAMPLES, 1) * max(tags.get(BITS, (1,))) // 8
    return needed


def _has_several_scans(image: "Image") -> bool:
    """Whether another scan follows the first one, at which Pillow stops to read the header."""
    return isinstance(image.fp, io.BytesIO) and image.fp.getvalue().find(START_OF_SCAN, image.fp.tell()) >= 0
