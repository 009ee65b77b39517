"""ImageSet, a data set that is open, and OpenRequest, what is to be opened and how."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.data.catalog import Dataset
from tiny_diffusion.data.files.cache import Cache
from tiny_diffusion.data.files.scan import Progress
from tiny_diffusion.data.files.stores import ImageStore, TensorImages


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their labels.

    images: a store, or a tensor (N, C, H, W) uint8, which becomes one.  labels: (N,) int64.
    class_names: the name of each label, or () if there are no classes.  report: lines that describe the set.
    fingerprint: of a set of files, hashes by which a resumed run notices that they changed: "files" of names, sizes and
    classes, "content" of every byte, or "" where they were not all read.
    """

    images: ImageStore
    labels: Tensor
    class_names: tuple[str, ...]
    report: tuple[str, ...] = ()
    fingerprint: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.images, Tensor):
            object.__setattr__(self, "images", TensorImages(self.images))

    @classmethod
    def empty(cls, channels: int, size: tuple[int, int], class_names: tuple[str, ...]) -> "ImageSet":
        """A set of no images.  size: (height, width) of the images it would have."""
        images = torch.empty((0, channels, *size), dtype=torch.uint8)
        return cls(TensorImages(images), torch.empty(0, dtype=torch.int64), class_names)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def class_counts(self) -> list[int]:
        """How many images each class has; empty if there are no classes."""
        return torch.bincount(self.labels, minlength=len(self.class_names)).tolist() if self.class_names else []

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set on this device, as far as its pixels are in memory."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take(self, indices: np.ndarray) -> Tensor:
        """The images of these indices, cropped from the centre: (B, C, H, W) uint8."""
        return self.images.take(indices)


def evenly_spaced(length: int, count: int) -> Tensor:
    """At most `count` indices of `length` items, evenly spaced from the first to the last: int64."""
    return torch.linspace(0, length - 1, min(length, count), dtype=torch.float64).round().long()


@dataclass(frozen=True)
class OpenRequest:
    """Which data set is to be opened, and how.

    splits: the splits to train on; heldout: open the other splits instead.  folder: the folder of data sets.
    size: (height, width).  channels: of a set of image files, if they are known.  cache: where decoded sets are kept.
    cache_bytes: the most that decoded images may take in memory.  workers: threads, or None for one for each core.
    progress: wraps the loops over files.
    """

    dataset: Dataset
    splits: tuple[str, ...]
    heldout: bool
    folder: Path
    size: tuple[int, int]
    random_crop: bool = False
    background: str = "white"
    channels: int | None = None
    cache: Cache = Cache(None)
    cache_bytes: float = 2e9
    workers: int | None = None
    progress: Progress = lambda items, count, doing: items

    @property
    def opened_splits(self) -> list[str]:
        """The splits to open, in the catalogue's order."""
        return [split for split in self.dataset.splits if (split in self.splits) != self.heldout]
