"""Decoded image files: all kept in memory, or read again each time.

Both are taken from by index and place, and give the same pixels: what is kept where changes no result.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.data.files.decode import ImageSpec, UnreadableImage, decode
from tiny_diffusion.data.files.folders import ImageFiles
from tiny_diffusion.data.files.scan import Progress, refuse_unreadable
from tiny_diffusion.data.files.threads import in_threads
from tiny_diffusion.errors import FileError


class VariableSizeImages:
    """Images that cover the wanted size and are longer one way, for random crops.

    pixels: (sum of sizes,) uint8, one image after the other.  sides: (N, 2) int64, height and width of each.
    """

    def __init__(self, pixels: Tensor, sides: Tensor, look: ImageSpec):
        self.pixels, self.sides, self.look = pixels, sides, look
        self._starts = torch.cumsum(look.channels * sides.prod(1), 0) - look.channels * sides.prod(1)

    def __len__(self) -> int:
        return len(self.sides)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self), self.look.channels, *self.look.size)

    def take(self, indices: np.ndarray, places: np.ndarray | None = None) -> Tensor:
        """(B, C, H, W) uint8.  places: (B, 2) in [0, 1), where in its image each is cut out; None: the centre."""
        chosen = []
        for i, place in zip(indices.tolist(), _places(indices, places), strict=True):
            (height, width), start = self.sides[i].tolist(), int(self._starts[i])
            image = self.pixels[start : start + self.look.channels * height * width].view(-1, height, width)
            chosen.append(_cut(image, place, self.look.size))
        return torch.stack(chosen)


class LazyImages:
    """Image files decoded as they are asked for, by threads that run ahead of the network.

    bad: those of the files that are known to be unreadable, and why.  One that turns out to be so gives its place to
    the next, of its own class if there is one; when too many do, FileError.
    """

    def __init__(self, files: ImageFiles, look: ImageSpec, workers: int, bad: Mapping[int, str] | None = None):
        self.files, self.look, self.workers = files, look, workers
        self.bad = dict(bad or {})
        self._readable = [i for i in range(len(files)) if i not in self.bad]
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="images") if workers else None

    def __len__(self) -> int:
        return len(self._readable)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self), self.look.channels, *self.look.size)

    def start(self, indices: np.ndarray, places: np.ndarray | None = None) -> Callable[[], Tensor]:
        """Begins to decode these; what is returned waits for them: see `take`."""
        pairs = list(zip(indices.tolist(), _places(indices, places), strict=True))
        if self._pool is None:
            return lambda: torch.stack([self._one(*pair) for pair in pairs])
        futures: Sequence[Future] = [self._pool.submit(self._one, *pair) for pair in pairs]
        return lambda: torch.stack([future.result() for future in futures])

    def take(self, indices: np.ndarray, places: np.ndarray | None = None) -> Tensor:
        """(B, C, H, W) uint8.  places: (B, 2) in [0, 1), where in its image each is cut out; None: the centre."""
        return self.start(indices, places)()

    def _one(self, index: int, place: Sequence[float]) -> Tensor:
        for i in self._turns(index):
            if i in self.bad:
                continue
            try:
                return _cut(torch.from_numpy(decode(self.files.path(i), self.look)), place, self.look.size)
            except UnreadableImage as error:
                self._pass_over(i, str(error))
            except FileNotFoundError as error:
                if not self.files.root.is_dir():
                    raise FileError(f"--data_dir {self.files.root} has vanished.") from error
                self._pass_over(i, "gone")
        raise FileError(f"none of the images in {self.files.root} can be read.")

    def _turns(self, index: int) -> Iterator[int]:
        """The file of this index; then those that may take its place."""
        files, labels = self._readable, self.files.labels
        yield files[index]
        others = [(index + further) % len(files) for further in range(1, len(files))]
        for of_its_class in (True, False):
            yield from (files[i] for i in others if (labels[files[i]] == labels[files[index]]) == of_its_class)

    def _pass_over(self, index: int, reason: str) -> None:
        with self._lock:
            self.bad[index] = reason
            refuse_unreadable(self.files, dict(self.bad))


def decode_all(
    files: ImageFiles, look: ImageSpec, workers: int, progress: Progress
) -> tuple[Tensor, Tensor | None, dict[int, str]]:
    """Every image of the set in memory: pixels (N, C, H, W), or (sum,) with their sides (N, 2) for random crops.

    The last: the files that could not be read after all, by index.  They have no pixels.
    """

    def one(index: int) -> tuple[np.ndarray | None, str]:
        try:
            return decode(files.path(index), look), ""
        except UnreadableImage as error:
            return None, str(error)
        except FileNotFoundError:
            return None, "gone"

    def images() -> Iterator[Tensor]:
        decoded = in_threads(one, range(len(files)), workers)
        for index, (image, reason) in enumerate(progress(decoded, len(files), "decoding the images")):
            if image is None:
                bad[index] = reason
            else:
                yield torch.from_numpy(image)

    bad: dict[int, str] = {}
    if look.cropped:
        pixels, count = torch.empty((len(files), look.channels, *look.size), dtype=torch.uint8), 0
        for count, image in enumerate(images(), 1):
            pixels[count - 1] = image
        return pixels[:count], None, bad
    kept = list(images())
    sides = torch.tensor([image.shape[1:] for image in kept], dtype=torch.int64).view(-1, 2)
    return torch.cat([torch.empty(0, dtype=torch.uint8), *(image.flatten() for image in kept)]), sides, bad


def _places(indices: np.ndarray, places: np.ndarray | None) -> list[list[float]]:
    return [[0.5, 0.5]] * len(indices) if places is None else places.tolist()


def _cut(image: Tensor, place: Sequence[float], size: tuple[int, int]) -> Tensor:
    """This much of (C, H, W), from this place on: 0 is the top left corner, 0.5 the centre."""
    top, left = (
        min(int(share * (side - wanted + 1)), side - wanted)
        for share, side, wanted in zip(place, image.shape[1:], size, strict=True)
    )
    return image[:, top : top + size[0], left : left + size[1]]
