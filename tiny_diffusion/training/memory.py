"""Memory: which errors say that it has run out, and how to give back what a failed attempt leaves.

Knows neither what was attempted nor how it could take less.
"""

import gc

import torch

SIGNS = (  # in what a RuntimeError says; an "illegal memory access" is none
    "out of memory",  # CUDA, MPS
    "can't allocate memory",  # the CPU on Linux and macOS
    "not enough memory",  # the CPU on Windows
    "bad_alloc",  # C++
    "alloc_failed",  # cuBLAS, cuDNN
    "invalid buffer size",  # MPS, of one tensor
)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether it was for want of memory."""
    message = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in message for sign in SIGNS)
    )


def release(device: torch.device) -> None:
    """Gives back to the device what no tensor holds any more."""
    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()
