"""What `sample` writes: a grid, an animation, an array, a folder of images, and the frames beside them."""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from tiny_diffusion.files import clear_partials

FILM_ENDINGS = (".gif", ".webp", ".mp4")
IMAGES_IN_FRAMES = 256  # of --show_intermediate; they stay in memory, with all their steps


def write(output: Path, ending: str, batches: Iterator, count: int, film, labels, names: Sequence[str]) -> None:
    """Writes the images, in a folder or an array as they come: these may be more than memory holds.

    batches: (indices, uint8 images (N, H, W, C)).   labels: of the images, or None.   names: of the labels.
    """
    import numpy as np

    from tiny_diffusion.visuals.class_grid import save_grid
    from tiny_diffusion.visuals.images import save_npz

    if ending == ".png":
        save_grid(output, np.concatenate([images for _, images in batches]), labels, names)
    elif ending == ".npz":
        more = {} if labels is None else {"labels": np.array(labels, np.int64), "class_names": np.array(names)}
        save_npz(output, (image for _, images in batches for image in images), count, **more)
    elif ending in FILM_ENDINGS:
        deque(batches, maxlen=0)
        film.save(output)
    else:
        _write_folder(output, batches, labels, names)
    print(f"{count:,} images: {output}", file=sys.stderr)


def _write_folder(folder: Path, batches: Iterator, labels, names: Sequence[str]) -> None:
    """Writes a PNG for each image, and the labels of those that were written, also where sampling is stopped."""
    from tiny_diffusion.data.files.labels import FolderLabels
    from tiny_diffusion.visuals.images import save_folder

    others, known, done = _images_in(folder), FolderLabels(folder), 0
    try:
        for indices, images in batches:
            files = save_folder(folder, images, indices)
            known.add(files, labels and labels[done : done + len(files)], names)
            others, done = others.difference(files), done + len(files)
    finally:
        known.save()
    if others:
        print(f"{folder} also holds {len(others):,} other images, which were there before", file=sys.stderr)


def _images_in(folder: Path) -> set[str]:
    """The names of the images that lie in a folder already."""
    from tiny_diffusion.data.files.decode import ENDINGS

    return {path.name for path in folder.iterdir() if path.name.lower().endswith(ENDINGS)}


def write_frames(output: Path, film, count: int) -> None:
    """Writes intermediate/ beside the output: in a folder of images it would be taken for more of them."""
    parent = output.parent if output.name not in ("", "..") else output.resolve().parent
    clear_partials(parent / "intermediate")
    frames = film.save_frames(parent / "intermediate")
    of = f", of the first {film.max_images} images" if count > film.max_images else ""
    print(f"{frames} frames of the denoising{of}: {parent / 'intermediate'}", file=sys.stderr)
