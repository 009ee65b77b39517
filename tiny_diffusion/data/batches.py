"""Batches: which images step k trains on, as a function of (seed, k).

One endless stream of permutations, one an epoch, cut into batches across epoch ends; nothing to save and nothing to
replay when a run resumes.
"""

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.data.sources import ImageSet
from tiny_diffusion.randomness import stream


class Batches:
    """batch_size: images a step over all processes.  The images stay on `device` as uint8 and are gathered there."""

    def __init__(
        self, data: ImageSet, batch_size: int, seed: int, *, device: torch.device | str = "cpu", hflip: bool = False
    ):
        self.images = data.images.to(device)
        self.labels = data.labels.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.hflip = hflip
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Images an epoch."""
        return len(self.images)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Step `step` (from 0): x_0 (B, C, H, W) float32 in [-1, 1] and labels (B,) int64."""
        chosen = torch.from_numpy(self.indices(step)).to(self.images.device, non_blocking=True)
        clean = to_float(self.images[chosen])
        if self.hflip:
            flipped = torch.from_numpy(stream(self.seed, "flips", step).random(len(chosen)) < 0.5).to(clean.device)
            clean = torch.where(flipped[:, None, None, None], clean.flip(-1), clean)
        return clean, self.labels[chosen]

    def indices(self, step: int) -> np.ndarray:
        """Which images: items step * B .. (step + 1) * B of the stream of permutations."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(places, len(self))
        return np.concatenate([self._order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = stream(self.seed, "order", epoch).permutation(len(self))
        return self._orders[epoch]


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)
