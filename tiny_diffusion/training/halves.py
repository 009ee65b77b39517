"""The parts of a batch: one after another, or on two cores both halves at once, each in a thread of its own.

Where two cores share each operation, they wait for one another several hundred times a step; with a half of the batch
each they do so once: 1.05 to 1.1 times as fast alone, 1.8 to 2 times beside another busy program; see
benchmarks/RESULTS.md.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np
import torch

from tiny_diffusion.config.training import Config

Result = TypeVar("Result")
CORES = 2  # more have not been measured
MIN_ACTIVATIONS = 2**18  # of one layer at the finest level, over the whole batch: below it nothing is gained


class Halves:
    """Runs work on the parts of a batch, and on both halves of it at once where that is faster.

    Two gradients that are added to one tensor have the same sum in either order, so the result is the same each time.
    allowed: False for work that is not the same in any order, such as a loss that keeps averages.
    """

    def __init__(self, config: Config, device: torch.device, allowed: bool = True):
        self.config, self.device, self.allowed = config, device, allowed
        # A thread has its own count of the cores that an operation may use.
        self.thread = ThreadPoolExecutor(1, "half of a batch", initializer=torch.set_num_threads, initargs=(1,))

    def gain(self, shape: torch.Size) -> bool:
        """Whether halves of a batch of this shape, (B, C, H, W), are faster, and draw no random numbers."""
        batch, _, height, width = shape
        config = self.config
        activations = batch * config.base_channels * height * width // config.patch_size**2
        plain = config.precision == "fp32" and not (config.dropout or config.compile or config.checkpoint_activations)
        two_cores = self.device.type == "cpu" and torch.get_num_threads() == CORES
        return self.allowed and plain and two_cores and batch > 1 and activations >= MIN_ACTIVATIONS

    def run(self, work: Callable[[slice], Result], shape: torch.Size, parts: int = 1) -> list[Result]:
        """The results of work(rows) for the rows of each part.  Halves are taken only where one part is asked for.

        Raises the error of a half after both have ended.
        """
        if parts > 1 or not self.gain(shape):
            return [work(rows) for rows in slices(shape[0], parts)]
        first_rows, second_rows = slices(shape[0], 2)
        torch.set_num_threads(1)
        second = self.thread.submit(work, second_rows)
        try:
            first = work(first_rows)
        finally:
            wait([second])
            torch.set_num_threads(CORES)
        return [first, second.result()]


def slices(count: int, parts: int) -> list[slice]:
    """Neighbouring slices that divide `count` rows as equally as possible."""
    return [slice(part[0], part[-1] + 1) for part in np.array_split(np.arange(count), parts)]
