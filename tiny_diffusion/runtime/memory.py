"""Memory: which errors say that it has run out, how to give back what a failed attempt leaves, how to ask for less."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
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


def split_until_it_fits(attempt: Callable[[int], Result], parts: int, most: int, device: torch.device) -> Result:
    """attempt(parts), and where memory runs out again in twice as many parts, up to `most`.

    Raises the attempt's error where it is made in `most` parts, and any other as it comes.
    """
    while True:
        try:
            return attempt(parts)
        except (MemoryError, RuntimeError) as error:
            if parts >= most or not ran_out_of_memory(error):
                raise
        # Not in the handler: until that is left, the error holds on to all that the attempt had computed.
        release(device)
        parts = min(2 * parts, most)


class SplitBatches:
    """A model for images of which a whole batch may not fit: where memory runs out, it goes on in twice as many parts.

    Raises the model's error where a single image does not fit, and any other as it comes.
    """

    def __init__(self, model: Callable[..., Tensor]):
        self.model, self.parts = model, 1

    def __call__(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        def attempt(parts: int) -> Tensor:
            self.parts = parts
            if parts == 1:
                return self.model(x, time, label)
            labels = (None,) * parts if label is None else label.tensor_split(parts)
            rows = zip(x.tensor_split(parts), time.tensor_split(parts), labels, strict=True)
            return torch.cat([self.model(*part) for part in rows])

        return split_until_it_fits(attempt, self.parts, len(x), x.device)
