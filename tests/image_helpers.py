"""What the tests of image files share: files of every format and mode, folders of them, and what they should become."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, features

from tiny_diffusion.data.sources import open_dataset

FORMATS = {  # ending -> Pillow's name and what keeps its pixels as they are, as far as it can
    "png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 100, "subsampling": 0}),
    "bmp": ("BMP", {}),
    "gif": ("GIF", {}),
    "webp": ("WEBP", {"lossless": True, "exact": True}),
    "tif": ("TIFF", {}),
    **({"avif": ("AVIF", {"quality": 100, "subsampling": "4:4:4"})} if features.check("avif") else {}),
}


def encoded(image: Image.Image | np.ndarray, ending: str = "png", **options) -> bytes:
    """An image file of this format."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    name, exact = FORMATS[ending]
    file = io.BytesIO()
    image.save(file, name, **{**exact, **options})
    return file.getvalue()


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: a few slow waves, which every format keeps nearly as they are."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]  # fmt: skip
    a, b, c = rng.uniform(-4, 4, (3, 3, 1, 1))
    return (127.5 + 100 * np.sin(a * x + b * y + c)).round().astype(np.uint8).transpose(1, 2, 0).copy()


def plain(value: int | tuple[int, int, int], height: int = 8, width: int = 8) -> np.ndarray:
    """An image of one colour, or of one grey."""
    shape = (height, width) if isinstance(value, int) else (height, width, 3)
    return np.broadcast_to(np.array(value, np.uint8), shape).copy()


def chunk(name: bytes, content: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *, before: bytes = b"", after: bytes = b""):
    """A PNG written by hand.  rows: with a filter's number first; before, after: further chunks around the pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + pixels + after + chunk(b"IEND", b"")


def write(path: Path | str, content: bytes | np.ndarray | Image.Image = b"") -> Path:
    """A file, and the folders that it lies in.  An image is written as its ending says."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = path.suffix[1:].lower()
    ending = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "tiff": "tif"}.get(ending, ending)
    with open(os.fsencode(path), "wb") as file:
        file.write(content if isinstance(content, bytes) else encoded(content, ending))
    return path


def open_folder(folder: Path, size: int | tuple[int, int] = 8, **options):
    return open_dataset("folder", data_dir=str(folder), size=size, **options)


def means(data) -> list[int]:
    """The mean grey of each image, which tells plain ones apart."""
    return data.images[:].float().mean((1, 2, 3)).round().int().tolist()


def read_film(path: str | Path) -> tuple[np.ndarray, list[float], int | None]:
    """(frames int (T, H, W, 3), the seconds of each, loop: 0 is for ever) of a GIF or a WebP."""
    frames, seconds = [], []
    with Image.open(path) as picture:
        for i in range(picture.n_frames):
            picture.seek(i)
            frames.append(np.asarray(picture.convert("RGB")).astype(int))
            seconds.append(picture.info["duration"] / 1000)
        return np.stack(frames), seconds, picture.info.get("loop")
