"""How fast a machine multiplies matrices, how many operations a network needs, and how to time work on a device."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tiny_diffusion.runtime.machine import wait_for

SIDE = 1024  # of the square matrices whose product is timed on a CPU


def seconds_of(work: Callable[[], object], device: torch.device, seconds: float, min_calls: int = 3) -> list[float]:
    """How many seconds each call of `work` takes.

    The first call warms up and is left out.  Then `work` is called for about `seconds`, and at least min_calls times.
    """
    taken: list[float] = []
    until = time.perf_counter() + seconds
    for call in range(10**9):
        started = time.perf_counter()
        work()
        wait_for(device)
        if call:
            taken.append(time.perf_counter() - started)
        if len(taken) >= min_calls and time.perf_counter() > until:
            break
    return taken


def matrix_rate(
    device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 1.0, side: int | None = None
) -> float:
    """GFLOP/s of the product of two square matrices, which is 2 side^3 operations; the median over `seconds`.

    side: of the matrices [SIDE, and on a GPU 8 times as much].
    """
    side = side or (SIDE if device.type == "cpu" else 8 * SIDE)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / float(np.median(seconds_of(lambda: matrix @ matrix, device, seconds))) / 1e9


def forward_gflop(model: nn.Module, *inputs: Tensor) -> float:
    """10^9 floating-point operations of a forward pass, counting convolutions and matrix products.

    The backward pass takes twice as many.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() / 1e9
