"""How the process waits and how it keeps memory, settled before torch is imported: see benchmarks/RESULTS.md."""

import os
import sys
import time
from pathlib import Path

SPINS_ALONE, SPINS_SHARED = "5000", "1000"  # of GNU OpenMP's threads before they sleep
LOAD = Path("/proc/loadavg")  # Linux: "0.20 0.18 0.12 1/80 11206", the fourth being running/all
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MAX_KEPT = (2**30, 2**25)  # bytes; the second is the most that some versions of glibc take


def tune_cpu() -> None:
    """Nothing that the environment has settled already is changed."""
    # OpenMP's threads spin while they wait for one another.  As long as they do by default, and a training step beside
    # another busy program takes twenty times as long; too briefly, and waking them takes a fifth of it.  Read by import
    # torch.
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = SPINS_SHARED if others_running() else SPINS_ALONE
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        _keep_memory()


def others_running(readings: int = 5) -> bool:
    """Whether other programs have been running all of the last hundredth of a second.  Where nobody tells: yes."""
    try:
        for _ in range(readings):
            if int(LOAD.read_text().split()[3].split("/")[0]) <= 1:  # this process itself
                return False
            time.sleep(0.002)
    except (OSError, ValueError, IndexError):
        pass
    return True


def _keep_memory() -> None:
    """Freed memory stays with the process.  glibc gives what is free after a step back to the system, which maps and
    zeroes it anew for the next, page by page: up to a fifth of a training step."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        any(mallopt(M_MMAP_THRESHOLD, size) for size in MAX_KEPT)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
