"""The exponential moving average of a network's weights, which is what samples, evaluation and export use."""

import copy

import torch
from torch import nn

WARM_UP = 8  # until the decay reaches its maximum, the average spans about an eighth of the steps so far


class Ema:
    """A second network whose parameters follow the first's.  Buffers are copied, not averaged.

    decay: the maximum; step n uses min(decay, n / (n + 8)), so that a short run forgets its early weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self._averages, self._sources = list(self.model.parameters()), list(model.parameters())
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Follows optimiser step number `steps`, counted from 1."""
        torch._foreach_lerp_(self._averages, self._sources, 1 - min(self.decay, steps / (steps + WARM_UP)))
        for average, source in self._buffers:
            average.copy_(source)
