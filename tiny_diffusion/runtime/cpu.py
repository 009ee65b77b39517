"""CPU tuning before `import torch`: OpenMP spinning and malloc thresholds.  benchmarks/RESULTS.md has the gains."""

import os
import sys
import time
from pathlib import Path

SPINS_ALONE, SPINS_SHARED = "5000", "1000"  # before GNU OpenMP's threads sleep
LOAD = Path("/proc/loadavg")  # Linux: "0.20 0.18 0.12 1/80 11206", the fourth being running/all
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MAX_KEPT = (2**30, 2**25)  # bytes; the second is the maximum of some versions of glibc


def tune_cpu() -> None:
    """Sets GOMP_SPINCOUNT and the malloc thresholds, unless the environment sets them already."""
    # OpenMP's threads spin while they wait for one another.  With the default count a training step beside another busy
    # program takes twenty times as long; with a small one, waking the threads takes a fifth of a step.  `import torch`
    # reads the variable.
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = SPINS_SHARED if others_running() else SPINS_ALONE
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        keep_freed_memory()


def others_running(readings: int = 5) -> bool:
    """Whether other programs ran during all of the last 10 ms; True where the system has no /proc/loadavg."""
    try:
        for _ in range(readings):
            if int(LOAD.read_text().split()[3].split("/")[0]) <= 1:  # this process alone
                return False
            time.sleep(0.002)
    except (OSError, ValueError, IndexError):
        pass
    return True


def keep_freed_memory() -> None:
    """Keeps freed memory in the process.  By default glibc returns it to the system after each step, and mapping and
    zeroing its pages again takes up to a fifth of a training step."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        any(mallopt(M_MMAP_THRESHOLD, size) for size in MAX_KEPT)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
