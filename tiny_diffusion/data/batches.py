"""Batches: which images training step k uses, as a function of (seed, k).

Each epoch is a permutation of the images.  The permutations follow one another in an endless stream, which is cut into
batches across the ends of epochs, so a resumed run has no state to restore.  With several ranks, each rank takes its
slice of every batch.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.data.pixels import to_float
from tiny_diffusion.randomness import stream
from tiny_diffusion.runtime.world import SINGLE_PROCESS, World


class Batches:
    """The batches of a training run.

    batch_size: images in a step, over all ranks.  rows: the slice of each batch that belongs to this rank.
    Images in memory stay on `device` as uint8 and are gathered there.
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
        self._orders: dict[int, np.ndarray] = {}  # by epoch
        self._started: dict[int, tuple[np.ndarray, Callable[[], Tensor]]] = {}  # by step: see _start

    def __len__(self) -> int:
        """Images in an epoch."""
        return len(self.data)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's rows of step `step` (from 0): x_0 (B, C, H, W) float32 in [-1, 1] and labels (B,) int64."""
        indices, images = self._start(step)
        clean = to_float(images().to(self.device, non_blocking=True))
        if self.hflip:
            flipped = stream(self.seed, "flips", step).random(self.batch_size)[self.rows] < 0.5
            clean = torch.where(torch.from_numpy(flipped).to(clean.device)[:, None, None, None], clean.flip(-1), clean)
        return clean, self.data.labels[torch.from_numpy(indices).to(self.device, non_blocking=True)]

    def _start(self, step: int) -> tuple[np.ndarray, Callable[[], Tensor]]:
        """This rank's indices of a step, and a function that waits for their images (B, C, H, W) uint8.

        Starts later steps too, if the store has to decode their images.
        """
        images = self.data.images
        for k in range(step, step + 1 + images.batches_ahead):
            if k not in self._started:
                indices = self.indices(k)[self.rows]
                self._started[k] = indices, images.start(indices, self._crop_positions(k))
        self._started = {k: started for k, started in self._started.items() if k >= step}
        return self._started[step]

    def _crop_positions(self, step: int) -> np.ndarray | None:
        """(B, 2) in [0, 1): where in its image each crop of this rank lies, or None if nothing is cropped at random."""
        if not self.data.images.random_crops:
            return None
        return stream(self.seed, "crops", step).random((self.batch_size, 2))[self.rows]

    def indices(self, step: int) -> np.ndarray:
        """The images of a step, over all ranks: items step * B .. (step + 1) * B of the stream of permutations."""
        items = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(items, len(self))
        return np.concatenate([self._order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = stream(self.seed, "order", epoch).permutation(len(self))
        return self._orders[epoch]
