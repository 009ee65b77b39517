"""What a machine can do, and what a network asks of it."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

MATRIX = 1024  # rows and columns of the matrices whose product is the yardstick


def seconds_of(work: Callable[[], object], device: torch.device, seconds: float, least: int = 3) -> list[float]:
    """How long each call took, over about so many seconds and at least so many calls; the first is not counted."""
    taken: list[float] = []
    until = time.perf_counter() + seconds
    for call in range(10**9):
        started = time.perf_counter()
        work()
        wait_for(device)
        if call:
            taken.append(time.perf_counter() - started)
        if len(taken) >= least and time.perf_counter() > until:
            break
    return taken


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 1.0) -> float:
    """GFLOP/s of a product of two square matrices: twice MATRIX^3 operations, the median of many."""
    side = MATRIX if device.type == "cpu" else 8 * MATRIX
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / float(np.median(seconds_of(lambda: matrix @ matrix, device, seconds))) / 1e9


def forward_gflop(model: nn.Module, *inputs: Tensor) -> float:
    """10^9 floating-point operations of a forward pass: those of convolutions and matrix products, as torch counts.

    Its backward pass takes twice as many.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() / 1e9
