"""Opens data sets as uint8 images, whatever their format on disk.

Knows nothing of batches or training.  A set that is already there is never downloaded again, and its folder may be
read-only.  To add a format: a function of an OpenRequest and a row in OPENERS.
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
    """The training images of a data set, or its held-out images, of which there may be none.

    data_dir: the folder of data sets; None: $TINY_DIFFUSION_DATA, then data.  size: the side, or (height, width), that
    images are scaled to cover and cropped to; None: the set's own.  splits: the splits to train on; None: the usual.
    options: the other fields of OpenRequest.
    Raises FileError, with what to do, if the set is not there and cannot be downloaded.
    """
    dataset = DATASETS[name]
    size = size or dataset.size
    height_width = size if isinstance(size, tuple) else (size, size)
    splits = dataset.train if splits is None else tuple(splits)
    request = OpenRequest(dataset, splits, heldout, data_folder(data_dir), height_width, **options)
    if dataset.splits and not request.opened_splits:
        return ImageSet.empty(dataset.channels, height_width, dataset.classes)
    return OPENERS[dataset.format](request)


def data_folder(data_dir: str | None) -> Path:
    """--data_dir, then $TINY_DIFFUSION_DATA, then data."""
    return Path(data_dir or os.path.expanduser(os.environ.get("TINY_DIFFUSION_DATA", "")) or "data")


OPENERS = {
    "sklearn_digits": sklearn_digits,
    "idx": idx,
    "cifar10": cifar10,
    "flowers102": flowers102,
    "folder": folder,
}
