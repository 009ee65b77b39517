"""How the process waits and how it keeps memory, settled before torch is imported: see benchmarks/RESULTS.md."""

import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT = (2**30, 2**25)  # bytes; the second is the most that some versions of glibc take


def settle() -> None:
    """Nothing that the environment has settled already is changed."""
    # OpenMP's threads spin while they wait for one another; beside another busy program that made a training step more
    # than twenty times slower, and spinning briefly costs nothing.  Read by import torch.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        _keep_memory()


def _keep_memory() -> None:
    """Freed memory stays with the process.  glibc gives what is free after a step back to the system, which maps and
    zeroes it anew for the next, page by page: up to a fifth of a training step."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
