"""What a data set is once it is open, and what is said to open one."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.data.catalog import Dataset
from tiny_diffusion.data.files.cache import Cache
from tiny_diffusion.data.files.scan import Progress
from tiny_diffusion.data.files.stores import LazyImages, VariableSizeImages


@dataclass(frozen=True, eq=False)
class ImageSet:
    """images: (N, C, H, W) uint8, a tensor or pictures that are taken from likewise.  labels: (N,) int64.

    class_names: one a label; none where there are no classes.  report: lines that say what was found.
    """

    images: Tensor | VariableSizeImages | LazyImages
    labels: Tensor
    class_names: tuple[str, ...]
    report: tuple[str, ...] = ()

    @classmethod
    def empty(cls, channels: int, size: tuple[int, int], class_names: tuple[str, ...]) -> "ImageSet":
        """Of no images: what is held out of a set that trains whole.  size: height and width they would have."""
        images = torch.empty((0, channels, *size), dtype=torch.uint8)
        return cls(images, torch.empty(0, dtype=torch.int64), class_names)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same on this device: what is a tensor; files are decoded on the CPU."""
        images = self.images.to(device) if isinstance(self.images, Tensor) else self.images
        return ImageSet(images, self.labels.to(device), self.class_names, self.report)

    def take(self, indices: np.ndarray, places: np.ndarray | None = None) -> Tensor:
        """The images of these indices, (B, C, H, W) uint8.  places: (B, 2) in [0, 1), of random crops."""
        if isinstance(self.images, Tensor):
            return self.images[torch.from_numpy(indices).to(self.images.device, non_blocking=True)]
        return self.images.take(indices, places)


def evenly_spaced(length: int, count: int) -> Tensor:
    """At most `count` indices of `length` items, evenly spaced from the first to the last: int64."""
    return torch.linspace(0, length - 1, min(length, count), dtype=torch.float64).round().long()


def thin_out(items: Tensor, count: int) -> Tensor:
    """At most `count` of the items, evenly spaced: a folder's images are sorted by class."""
    return items[evenly_spaced(len(items), count)] if len(items) > count else items


@dataclass(frozen=True)
class OpenRequest:
    """What is to be opened and how; the defaults are those of a plain look into a set.

    splits: the parts that train; heldout: the others instead.  size: height and width.  folder: where data sets lie.
    channels: of a set of image files, where they are known.  cache: where decoded sets are kept.
    cache_bytes: what may be kept in memory.
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
    def parts(self) -> list[str]:
        """The splits to open, in the catalogue's order."""
        return [split for split in self.dataset.splits if (split in self.splits) != self.heldout]
