"""Memory: which errors say that it ran out, and how to continue with smaller parts of a batch."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
OUT_OF_MEMORY = (  # in the message of a RuntimeError; CUDA's "illegal memory access" is not one of these
    "out of memory",  # CUDA, MPS
    "can't allocate memory",  # the CPU on Linux and macOS
    "not enough memory",  # the CPU on Windows
    "bad_alloc",  # C++
    "alloc_failed",  # cuBLAS, cuDNN
    "invalid buffer size",  # MPS, for one tensor
)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out."""
    message = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in message for words in OUT_OF_MEMORY)
    )


class BatchSplitter:
    """Runs work on a batch in `parts` micro-batches, and in twice as many after each time that memory runs out.

    parts grows up to max_parts and stays there for later batches.  on_retry is called before each retry, to free what
    the failed attempt left.
    """

    def __init__(self, parts: int, max_parts: int, device: torch.device, on_retry: Callable[[], None] | None = None):
        self.parts, self.max_parts, self.device, self.on_retry = parts, max_parts, device, on_retry

    def run(self, work: Callable[[int], Result]) -> Result:
        """work(parts).  Raises its error if it runs out of memory in max_parts parts, and any other error at once."""
        while True:
            try:
                return work(self.parts)
            except (MemoryError, RuntimeError) as error:
                if self.on_retry is not None:
                    self.on_retry()
                if self.parts >= self.max_parts or not ran_out_of_memory(error):
                    raise
            # Outside the handler, because until it is left the error keeps everything that the attempt computed.
            release_memory(self.device)
            self.parts = min(2 * self.parts, self.max_parts)


def release_memory(device: torch.device) -> None:
    """Frees what is unused, and gives cached memory back to the device."""
    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


class SplitBatches:
    """A model whose batches are split where memory runs out.  Raises its error if a single image does not fit."""

    def __init__(self, model: Callable[..., Tensor]):
        self.model, self.parts = model, 1
        self.num_classes = getattr(model, "num_classes", None)  # its null class, see diffusion/guidance.py

    def __call__(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        splitter = BatchSplitter(min(self.parts, len(x)), len(x), x.device)

        def outputs(parts: int) -> Tensor:
            if parts == 1:
                return self.model(x, time, label)
            labels = (None,) * parts if label is None else label.tensor_split(parts)
            rows = zip(x.tensor_split(parts), time.tensor_split(parts), labels, strict=True)
            return torch.cat([self.model(*part) for part in rows])

        try:
            return splitter.run(outputs)
        finally:
            self.parts = max(self.parts, splitter.parts)
