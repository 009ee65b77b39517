"""A grid whose columns are classes: the name of each above its images."""

import os
from collections.abc import Sequence

import numpy as np

from tiny_diffusion.visuals.images import (
    BACKGROUND,
    CAPTION_POINTS,
    assembled,
    cell_width,
    enlarged,
    grid,
    near_square,
    save_png,
    whole_scale,
    widened,
)
from tiny_diffusion.visuals.text import text_line

MAX_COLUMN_CLASSES = 20  # more are named under each image


def class_grid(images: np.ndarray, labels: Sequence[int], names: Sequence[str]) -> np.ndarray:
    """Images (N, H, W, C) as one RGB picture (H', W', 3), those of a class in one column or several.

    labels: of each image.   names: of each label.  A class keeps the order of its images, and a column that has fewer
    than another ends early.  More than MAX_COLUMN_CLASSES classes are named under each image of a plain grid instead.
    """
    if len(set(labels)) > MAX_COLUMN_CLASSES:
        return grid(images, captions=[names[label] for label in labels])
    cells, padding = columns_of(labels), 2
    scale = whole_scale(images.shape[1:3], cells.size, cells.shape[1], padding)
    tiles = enlarged(images, scale)
    headings = [names[labels[top]] for top in cells[0]]
    tiles = widened(tiles, cell_width(tiles.shape[2], headings), BACKGROUND)
    empty = np.full_like(tiles[:1], BACKGROUND)
    placed = np.concatenate([tiles, empty])[cells.ravel()]  # an empty cell is -1, the last
    texts = np.stack([text_line(name, tiles.shape[2], CAPTION_POINTS, BACKGROUND) for name in headings])
    columns = cells.shape[1]
    top = assembled(texts, columns, padding, BACKGROUND)[:-padding]
    return np.concatenate([top, assembled(placed, columns, padding, BACKGROUND)])


def columns_of(labels: Sequence[int]) -> np.ndarray:
    """Which image stands in each cell (rows, columns) of a grid, -1 for none.  Every class has as many columns.

    With one column a class where that is about square, otherwise with several beside one another.
    """
    labels = np.asarray(labels)
    classes = np.unique(labels)
    each = max(1, round(near_square(len(labels)) / len(classes)))
    each = min(each, max(np.bincount(labels)))
    rows = -(-max(np.bincount(labels)) // each)
    cells = np.full((rows, len(classes) * each), -1)
    for block, label in enumerate(classes):
        of_class = np.flatnonzero(labels == label)
        for place, image in enumerate(of_class):
            cells[place // each, block * each + place % each] = image
    return cells[:, cells[0] >= 0]


def save_grid(
    path: str | os.PathLike, images: np.ndarray, labels: Sequence[int] | None = None, names: Sequence[str] = ()
) -> None:
    """Saves images (N, H, W, C) as one picture: by class where they have labels."""
    save_png(path, grid(images) if labels is None else class_grid(images, labels, names))
