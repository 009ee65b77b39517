"""Opens data sets as uint8 images, whatever their format on disk.

Knows nothing of batches or training.  A set that is already there is never downloaded again, and its folder may be
read-only.  To add a format: a function of an OpenRequest, a row in OPENERS.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from tiny_diffusion.data.arrays import cifar10, idx, sklearn_digits
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.data.files.open import flowers102, folder
from tiny_diffusion.data.image_set import ImageSet, OpenRequest


def open_dataset(
    name: str,
    *,
    heldout: bool = False,
    data_dir: str | None = None,
    size: int | tuple[int, int] | None = None,
    splits: Sequence[str] | None = None,
    **options,
) -> ImageSet:
    """The named set: the splits that train (the usual ones unless they are named), or those that are held out.

    data_dir: then $TINY_DIFFUSION_DATA, then data.  size: the side, or (height, width), that images are scaled to cover
    and cropped to; None: the set's own.  options: see OpenRequest.  There may be no held-out images: a set of length 0.
    Raises FileError, with what to do, if the set is neither there nor to be had.
    """
    dataset = DATASETS[name]
    size = size or dataset.size
    height_width = size if isinstance(size, tuple) else (size, size)
    splits = dataset.train if splits is None else tuple(splits)
    opening = OpenRequest(dataset, splits, heldout, data_folder(data_dir), height_width, **options)
    if dataset.splits and not opening.parts:
        return ImageSet.empty(dataset.channels, height_width, dataset.classes)
    return OPENERS[dataset.format](opening)


def data_folder(data_dir: str | None) -> Path:
    return Path(data_dir or os.environ.get("TINY_DIFFUSION_DATA") or "data")


OPENERS = {
    "sklearn_digits": sklearn_digits,
    "idx": idx,
    "cifar10": cifar10,
    "flowers102": flowers102,
    "folder": folder,
}
