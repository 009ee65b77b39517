"""Arrays to pictures: grids, strips and frames, and the files they are saved in (PNG, GIF, npz, folders).

It knows no diffusion: images are uint8 arrays of shape (N, H, W, C) with C = 1 or 3.  A file is written under a
temporary name and then renamed, so a reader finds the old one or the new one, never a part of one.
"""

import itertools
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from tiny_diffusion.files import atomic_write
from tiny_diffusion.visuals.text import text_line, text_width

BACKGROUND = 80  # a grey that black and white images both stand out from
TILE_PIXELS = 56  # smaller images are enlarged to at least this ...
PICTURE_PIXELS = 1600  # ... unless the whole would grow beyond this
CAPTION_POINTS, HEADING_POINTS = 12, 14


def grid(
    images: np.ndarray,
    *,
    columns: int | None = None,
    padding: int = 2,
    scale: int | None = None,
    captions: Sequence[str] | None = None,
    background: int = BACKGROUND,
) -> np.ndarray:
    """Images (N, H, W, C) as one RGB picture (H', W', 3), left to right and top to bottom.

    scale: whole factor by which each pixel is repeated.   captions: N strings, drawn under the images.
    Columns and scale default to what near_square and whole_scale choose.
    """
    if len(images) == 0:
        raise ValueError("a grid needs at least one image")
    columns = columns or near_square(len(images))
    tiles = enlarged(images, scale or whole_scale(images.shape[1:3], len(images), columns, padding))
    if captions is not None:
        assert len(captions) == len(images), f"{len(captions)} captions for {len(images)} images"
        tiles = widened(tiles, cell_width(tiles.shape[2], captions), background)
        texts = [text_line(c, tiles.shape[2], CAPTION_POINTS, background) for c in captions]
        tiles = np.concatenate([tiles, np.stack(texts)], axis=1)
    return assembled(tiles, columns, padding, background)


def neighbour_grid(samples: np.ndarray, neighbours: np.ndarray, distances: Sequence[float]) -> np.ndarray:
    """Samples (N, H, W, C) in rows of 8, and below each row the training images nearest to them, as `grid` does."""
    tiles, captions = [], []
    for start in range(0, len(samples), 8):
        row = slice(start, start + 8)
        tiles += [samples[row], neighbours[row]]
        captions += ["sample"] * len(samples[row]) + [f"{distance:.0f} away" for distance in distances[row]]
    return grid(np.concatenate(tiles), columns=min(8, len(samples)), captions=captions)


def strip(rows: Sequence[np.ndarray], headings: Sequence[str] | None = None) -> np.ndarray:
    """Denoising as one RGB picture: each step (n, H, W, C) becomes a column, each image a row followed through time.

    headings: one string per step, such as "t=999".
    """
    n, columns, padding = len(rows[0]), len(rows), 2
    images = np.stack(rows, axis=1).reshape(n * columns, *rows[0].shape[1:])  # image-major: rows stay together
    tiles = enlarged(images, whole_scale(images.shape[1:3], n * columns, columns, padding))
    if headings is None:
        return assembled(tiles, columns, padding, BACKGROUND)
    assert len(headings) == columns, f"{len(headings)} headings for {columns} steps"
    tiles = widened(tiles, cell_width(tiles.shape[2], headings), BACKGROUND)
    texts = np.stack([text_line(h, tiles.shape[2], CAPTION_POINTS, BACKGROUND) for h in headings])
    top = assembled(texts, columns, padding, BACKGROUND)[:-padding]
    return np.concatenate([top, assembled(tiles, columns, padding, BACKGROUND)])


def denoising_frame(
    noisy: np.ndarray, clean: np.ndarray, arrange: Callable[[np.ndarray], np.ndarray] = grid
) -> np.ndarray:
    """One frame of an animation: a grid of x_t at left, of the current estimate of x_0 at right.

    noisy, clean: uint8 (N, H, W, C).   arrange: images -> grid.   Returns RGB (H', W', 3), of one size for one shape.
    """
    panels = []
    for heading, images in (("x_t", noisy), ("estimate of x_0", clean)):
        panel = widened(arrange(images), text_width(heading, HEADING_POINTS), BACKGROUND)
        panels.append(np.concatenate([text_line(heading, panel.shape[1], HEADING_POINTS, BACKGROUND), panel]))
    gap = np.full((len(panels[0]), 12, 3), BACKGROUND, np.uint8)
    return np.concatenate([panels[0], gap, panels[1]], axis=1)


def near_square(n: int) -> int:
    """Columns for n images: of the shapes up to 3 times wider than high, the one with the fewest empty cells."""
    shapes = [(c, math.ceil(n / c)) for c in range(math.isqrt(n - 1) + 1, math.isqrt(3 * n) + 3)]
    return min((c * r - n, c) for c, r in shapes if c <= 3 * r)[1]


def whole_scale(size: tuple[int, int], n: int, columns: int, padding: int) -> int:
    """The factor that enlarges images of this (height, width) to TILE_PIXELS within a grid of PICTURE_PIXELS."""
    rows = math.ceil(n / columns)
    room = min((PICTURE_PIXELS - padding * (k + 1)) // (k * s) for k, s in ((rows, size[0]), (columns, size[1])))
    return max(1, min(math.ceil(TILE_PIXELS / max(size)), room))


def enlarged(images: np.ndarray, scale: int) -> np.ndarray:
    """Each pixel as a scale x scale block, grey as RGB: (N, H, W, C) -> (N, H * scale, W * scale, 3)."""
    assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3), (images.dtype, images.shape)
    n, h, w, _ = images.shape
    return np.broadcast_to(images.repeat(scale, axis=1).repeat(scale, axis=2), (n, h * scale, w * scale, 3))


def assembled(tiles: np.ndarray, columns: int, padding: int, background: int) -> np.ndarray:
    n, h, w, _ = tiles.shape
    rows = math.ceil(n / columns)
    picture = np.full((rows * (h + padding) + padding, columns * (w + padding) + padding, 3), background, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = (padding + k * (size + padding) for k, size in zip(divmod(i, columns), (h, w), strict=True))
        picture[y : y + h, x : x + w] = tile
    return picture


def widened(tiles: np.ndarray, width: int, background: int) -> np.ndarray:
    """Tiles (..., H, W, 3) with background at both sides, so that each is at least this wide."""
    extra = max(0, width - tiles.shape[-2])
    sides = [(0, 0)] * (tiles.ndim - 2) + [(extra // 2, extra - extra // 2), (0, 0)]
    return np.pad(tiles, sides, constant_values=background)


def cell_width(tile: int, texts: Sequence[str]) -> int:
    """Room for the longest text, but at most 1.5 times the image's width, or long names would spread the images."""
    return max(tile, min(tile * 3 // 2, max(text_width(t, CAPTION_POINTS) for t in texts)))


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Saves one uint8 image, (H, W, 3) or grey (H, W, 1), without loss."""
    from PIL import Image

    with atomic_write(path) as file:
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, format="PNG")


def save_npz(
    path: str | os.PathLike, images: Iterable[np.ndarray], count: int | None = None, **more: np.ndarray
) -> None:
    """Saves images as one array ``arr_0``, uint8 (N, H, W, C): the format that guided-diffusion's evaluations read.

    images: (H, W, C) each; they are written one by one, as they come.   count: N, by default len(images).
    more: other arrays, by name.
    """
    count, images = len(images) if count is None else count, iter(images)
    first = next(images)
    assert first.dtype == np.uint8, first.dtype
    about = {"descr": "|u1", "fortran_order": False, "shape": (count, *first.shape)}
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, about)
            for image in itertools.chain([first], images):
                array.write(image.tobytes())
                count -= 1
        for name, values in more.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(values), allow_pickle=False)
    assert count == 0, f"{count} images are missing"


def save_folder(folder: str | os.PathLike, images: np.ndarray, indices: Sequence[int] | None = None) -> list[str]:
    """Saves one PNG per image, named by its index (by default 0, 1, ...): 00000.png.  Returns the names of the files.

    Other files in the folder stay as they are.
    """
    names = [f"{index:05d}.png" for index in (range(len(images)) if indices is None else indices)]
    for name, image in zip(names, images, strict=True):
        save_png(Path(folder) / name, image)
    return names
