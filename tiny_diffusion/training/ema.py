"""The exponential moving average of a network's weights: what is sampled, measured and exported."""

import copy

import torch
from torch import nn

WARM_UP = 8  # the average spans an eighth of the steps so far until it reaches its longest memory


class Ema:
    """A second network whose parameters follow the first's.  Buffers are copied, not averaged.

    decay: the longest memory; step n uses min(decay, n / (n + 8)), so that early weights are forgotten in a short run.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self._averages, self._sources = list(self.model.parameters()), list(model.parameters())
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """After optimiser step number `steps`, counted from 1."""
        torch._foreach_lerp_(self._averages, self._sources, 1 - min(self.decay, steps / (steps + WARM_UP)))
        for average, source in self._buffers:
            average.copy_(source)
