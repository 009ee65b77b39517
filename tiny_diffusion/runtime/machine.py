"""What a run computes on: its name, its instructions, and when its work is done."""

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


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bfloat16 (on x86 AVX512_BF16 or AMX), and no emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    instructions = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return any(instructions.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


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
