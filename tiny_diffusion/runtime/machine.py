"""What a run computes on, in words."""

import platform

import numpy as np
import torch


def processor_of(device: torch.device) -> str:
    """The name of the GPU or of the processor, or its architecture where the system does not name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions_on(device: torch.device) -> dict[str, str]:
    """What computed a checkpoint: the versions of the libraries, and the processor with its number of threads."""
    count = torch.get_num_threads()
    threads = "" if device.type == "cuda" else f", {count} thread{'' if count == 1 else 's'}"
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": processor_of(device) + threads,
    }
