"""Where this process computes: the one place besides the command line that chooses a device."""

from dataclasses import dataclass

import torch
from torch import nn

from tiny_diffusion.errors import OptionError


@dataclass(frozen=True)
class World:
    """rank of size processes, and the device of this one."""

    device: torch.device
    rank: int = 0
    size: int = 1


def make_world(device: str, environment: dict[str, str]) -> World:
    """auto: CUDA, then MPS, then the CPU.  Raises OptionError for a device that this machine lacks."""
    if (processes := environment.get("WORLD_SIZE", "1")) != "1":
        raise OptionError(
            f"WORLD_SIZE is {processes}, but training on several processes is not there yet. Start it without torchrun."
        )
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if not available[device]:
        there = ", ".join(name for name, ok in available.items() if ok)
        raise OptionError(
            f"--device {device} is not available: this machine has {there}. Leave --device out to let it choose."
        )
    return World(torch.device(device))


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, in the memory format that its convolutions are fastest in."""
    model = model.to(device)
    return model if device.type == "mps" else model.to(memory_format=torch.channels_last)
