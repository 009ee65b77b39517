"""Image stores: where the pixels of a data set are, and how the images of a batch are read from there.

Every store returns the same pixels for the same files, so what is kept in memory changes no result.
"""

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.data.files.decode import ImageSpec, UnreadableImage, as_unreadable, decode
from tiny_diffusion.data.files.folders import ImageFiles, stats_of, status
from tiny_diffusion.data.files.memory import file_content
from tiny_diffusion.data.files.scan import Progress, refuse_unreadable
from tiny_diffusion.data.files.threads import in_threads
from tiny_diffusion.errors import FileError


class ImageStore(ABC):
    """Images of one shape, read by their index: `images[:10]` and `images[[3, 5]]` are tensors of several images.

    shape: (N, C, H, W).  random_crops: whether `take` uses its crop positions.  batches_ahead: how many batches
    should be started before they are needed.  unreadable: why a file cannot be read, by its index.
    """

    shape: tuple[int, int, int, int]
    random_crops = False
    batches_ahead = 0
    unreadable: Mapping[int, str] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: slice | Sequence[int] | np.ndarray | Tensor) -> Tensor:
        return self.take(np.arange(len(self))[indices])

    @abstractmethod
    def take(self, indices: np.ndarray, crop_positions: np.ndarray | None = None) -> Tensor:
        """The images of these indices: (B, C, H, W) uint8.

        crop_positions: (B, 2) in [0, 1), from the top left corner to the bottom right one.  None: the centre.
        """

    def start(self, indices: np.ndarray, crop_positions: np.ndarray | None = None) -> Callable[[], Tensor]:
        """Starts to read these images.  The returned function waits for them and returns what `take` would."""
        return partial(self.take, indices, crop_positions)

    def to(self, device: torch.device | str) -> "ImageStore":
        """The store with its pixels on this device.  Images that are decoded or cropped stay on the CPU."""
        return self


class TensorImages(ImageStore):
    """Images in memory.  pixels: (N, C, H, W) uint8, gathered on the device that they are on."""

    def __init__(self, pixels: Tensor):
        self.pixels, self.shape = pixels, tuple(pixels.shape)

    def take(self, indices: np.ndarray, crop_positions: np.ndarray | None = None) -> Tensor:
        return self.pixels[torch.from_numpy(indices).to(self.pixels.device, non_blocking=True)]

    def to(self, device: torch.device | str) -> "TensorImages":
        return TensorImages(self.pixels.to(device))


class VariableSizeImages(ImageStore):
    """Images in memory that cover the wanted size and may be longer one way, for random crops.

    pixels: (total,) uint8, one image after the other.  sides: (N, 2) int64, height and width of each image.
    """

    random_crops = True

    def __init__(self, pixels: Tensor, sides: Tensor, spec: ImageSpec):
        self.pixels, self.sides, self.spec = pixels, sides, spec
        self.shape = (len(sides), spec.channels, *spec.size)
        lengths = spec.channels * sides.prod(1)
        self._starts = torch.cumsum(lengths, 0) - lengths

    def take(self, indices: np.ndarray, crop_positions: np.ndarray | None = None) -> Tensor:
        crops = []
        for i, position in zip(indices.tolist(), _positions(indices, crop_positions), strict=True):
            (height, width), start = self.sides[i].tolist(), int(self._starts[i])
            image = self.pixels[start : start + self.spec.channels * height * width].view(-1, height, width)
            crops.append(_crop(image, position, self.spec.size))
        return torch.stack(crops)


class LazyImages(ImageStore):
    """Image files that are decoded each time they are asked for, by threads that run ahead of the network.

    unreadable: also the files that a scan has found to be so.  A file that turns out to be unreadable is replaced by
    the next one, of its own class if there is one.  Raises FileError when too many files are unreadable.
    """

    batches_ahead = 3

    def __init__(self, files: ImageFiles, spec: ImageSpec, workers: int, unreadable: Mapping[int, str] | None = None):
        self.files, self.spec = files, spec
        self.random_crops = not spec.cropped
        self.unreadable = dict(unreadable or {})
        self._file_of = [i for i in range(len(files)) if i not in self.unreadable]  # image index -> file index
        self.shape = (len(self._file_of), spec.channels, *spec.size)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="images") if workers else None

    def start(self, indices: np.ndarray, crop_positions: np.ndarray | None = None) -> Callable[[], Tensor]:
        pairs = list(zip(indices.tolist(), _positions(indices, crop_positions), strict=True))
        if self._pool is None:
            return lambda: torch.stack([self._decoded(*pair) for pair in pairs])
        futures: Sequence[Future] = [self._pool.submit(self._decoded, *pair) for pair in pairs]
        return lambda: torch.stack([future.result() for future in futures])

    def take(self, indices: np.ndarray, crop_positions: np.ndarray | None = None) -> Tensor:
        return self.start(indices, crop_positions)()

    def _decoded(self, index: int, position: Sequence[float]) -> Tensor:
        for i in self._candidates(index):
            if i in self.unreadable:
                continue
            try:
                return _crop(torch.from_numpy(decode(self.files.path(i), self.spec)), position, self.spec.size)
            except UnreadableImage as error:
                self._add_unreadable(i, str(error))
            except FileNotFoundError as error:
                if not self.files.root.is_dir():
                    raise FileError(f"--data_dir {self.files.root} has vanished.") from error
                self._add_unreadable(i, "gone")
        raise FileError(f"none of the images in {self.files.root} can be read.")

    def _candidates(self, index: int) -> Iterator[int]:
        """The file of this image, then the files that may replace it: those of its class first."""
        files, labels = self._file_of, self.files.labels
        yield files[index]
        others = [files[(index + offset) % len(files)] for offset in range(1, len(files))]
        for same_class in (True, False):
            yield from (i for i in others if (labels[i] == labels[files[index]]) == same_class)

    def _add_unreadable(self, index: int, reason: str) -> None:
        with self._lock:
            self.unreadable[index] = reason
            refuse_unreadable(self.files, dict(self.unreadable))


class Decoded(NamedTuple):
    """What `decode_all` has made of files.

    tensors: what `store_of` makes a store of, without the unreadable files.  unreadable: index -> reason.
    lasting: whether decoding again would give the same: no file has changed since it was scanned, and none was
    unreadable for a reason that may be gone next time.
    """

    tensors: dict[str, Tensor]
    unreadable: dict[int, str]
    lasting: bool


def decode_all(
    files: ImageFiles, spec: ImageSpec, workers: int, progress: Progress, digests: Sequence[bytes] = ()
) -> Decoded:
    """Decodes every image.  digests: the SHA-256 that a scan has found of each file, or () if only the
    stats of the files can show whether they have changed."""

    def decode_one(index: int) -> tuple[np.ndarray | UnreadableImage, bool]:
        path = files.path(index)
        try:
            with file_content(path) as content:
                same = hashlib.sha256(content).digest() == digests[index] if digests else None
                image = decode(content, spec)
            return image, stats_of(status(path)) == files.stats[index] if same is None else same
        except FileNotFoundError:
            return UnreadableImage("gone"), False
        except (UnreadableImage, OSError, MemoryError) as error:
            error = as_unreadable(error)
            return error, not error.passing

    def readable_images() -> Iterator[Tensor]:
        nonlocal lasting
        decoded = in_threads(decode_one, range(len(files)), workers)
        for index, (image, is_lasting) in enumerate(progress(decoded, len(files), "decoding the images")):
            lasting = lasting and is_lasting
            if isinstance(image, UnreadableImage):
                unreadable[index] = str(image)
            else:
                yield torch.from_numpy(image)

    unreadable, lasting = {}, True
    if spec.cropped:
        pixels, count = torch.empty((len(files), spec.channels, *spec.size), dtype=torch.uint8), 0
        for count, image in enumerate(readable_images(), 1):
            pixels[count - 1] = image
        return Decoded({"pixels": pixels[:count]}, unreadable, lasting)
    images = list(readable_images())
    sides = torch.tensor([image.shape[1:] for image in images], dtype=torch.int64).view(-1, 2)
    pixels = torch.cat([torch.empty(0, dtype=torch.uint8), *(image.flatten() for image in images)])
    return Decoded({"pixels": pixels, "sides": sides}, unreadable, lasting)


def store_of(tensors: Mapping[str, Tensor], spec: ImageSpec) -> ImageStore:
    """The store of the tensors that `decode_all` has made."""
    if spec.cropped:
        return TensorImages(tensors["pixels"])
    return VariableSizeImages(tensors["pixels"], tensors["sides"], spec)


def _positions(indices: np.ndarray, crop_positions: np.ndarray | None) -> list[list[float]]:
    return [[0.5, 0.5]] * len(indices) if crop_positions is None else crop_positions.tolist()


def _crop(image: Tensor, position: Sequence[float], size: tuple[int, int]) -> Tensor:
    """A crop of (C, H, W).  position: (0, 0) is the crop at the top left corner, (0.5, 0.5) the one in the centre."""
    top, left = (
        min(int(share * (side - wanted + 1)), side - wanted)
        for share, side, wanted in zip(position, image.shape[1:], size, strict=True)
    )
    return image[:, top : top + size[0], left : left + size[1]]
