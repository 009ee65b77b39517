"""Batches: which images step k trains on, as a function of (seed, k).

One endless stream of permutations, one an epoch, cut into batches across epoch ends; nothing to save and nothing to
replay when a run resumes.  Where several processes train, each has its share of the rows of every batch.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.data.files.stores import LazyImages
from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.data.pixels import to_float
from tiny_diffusion.randomness import stream
from tiny_diffusion.runtime.world import SINGLE_PROCESS, World

AHEAD = 3  # steps


class Batches:
    """batch_size: images a step over all processes.  rows: those of each batch that are this process's.

    Images in memory stay on `device` as uint8 and are gathered there; those that are decoded as they are read are begun
    AHEAD steps before they are needed.
    """

    def __init__(
        self, data: ImageSet, batch_size: int, seed: int, *, device: torch.device | str = "cpu", hflip: bool = False,
        world: World = SINGLE_PROCESS,
    ):  # fmt: skip
        self.data = data.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self.hflip = hflip
        self.world = world
        self.rows = world.local_slice(batch_size)
        self._orders: dict[int, np.ndarray] = {}
        self._begun: dict[int, Callable[[], Tensor]] = {}

    def __len__(self) -> int:
        """Images an epoch."""
        return len(self.data)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's rows of step `step` (from 0): x_0 (B, C, H, W) float32 in [-1, 1] and labels (B,) int64."""
        chosen = self.indices(step)[self.rows]
        clean = to_float(self._images(step, chosen).to(self.device, non_blocking=True))
        if self.hflip:
            flipped = stream(self.seed, "flips", step).random(self.batch_size)[self.rows] < 0.5
            clean = torch.where(torch.from_numpy(flipped).to(clean.device)[:, None, None, None], clean.flip(-1), clean)
        return clean, self.data.labels[torch.from_numpy(chosen).to(self.device, non_blocking=True)]

    def _images(self, step: int, chosen: np.ndarray) -> Tensor:
        if not isinstance(self.data.images, LazyImages):
            return self.data.take(chosen, self._places(step))
        for later in range(step, step + 1 + AHEAD):
            if later not in self._begun:
                self._begun[later] = self.data.images.start(self.indices(later)[self.rows], self._places(later))
        self._begun = {later: wait for later, wait in self._begun.items() if later >= step}
        return self._begun[step]()

    def _places(self, step: int) -> np.ndarray | None:
        """Where in its image each crop of a step lies."""
        if isinstance(self.data.images, Tensor) or self.data.images.look.cropped:
            return None
        return stream(self.seed, "crops", step).random((self.batch_size, 2))[self.rows]

    def indices(self, step: int) -> np.ndarray:
        """Which images, over all processes: items step * B .. (step + 1) * B of the stream of permutations."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(places, len(self))
        return np.concatenate([self._order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = stream(self.seed, "order", epoch).permutation(len(self))
        return self._orders[epoch]
