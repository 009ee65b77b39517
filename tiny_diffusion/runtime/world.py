"""The device of this process, and how it works with the other ranks.

torchrun starts several processes and gives each its rank in its environment.  All ranks run the same command with
the same options and differ only in their share of the images.  Rank 0 also does what one process can do alone, such as
writing.  A single process is a World of size 1, whose methods change nothing.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

import torch
from torch import Tensor

from tiny_diffusion.errors import LostProcessError, OptionError
from tiny_diffusion.runtime.program import module_or_script
from tiny_diffusion.runtime.torchrun_store import attempt_name, open_store

TIMEOUT = timedelta(hours=6)  # for a rank that others wait for: rank 0 may be downloading or evaluating


@dataclass(frozen=True)
class World:
    """This process's device and rank among `size` ranks.  All ranks must call its methods in the same order.

    Every method raises LostProcessError if another rank is gone.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes, prints and downloads."""
        return self.rank == 0

    def local_slice(self, count: int) -> slice:
        """This rank's consecutive rows of `count`.  The ranks' numbers of rows differ by at most one."""
        return self._shares(count)[self.rank]

    def _shares(self, count: int) -> list[slice]:
        ends = [-(-count * rank // self.size) for rank in range(self.size + 1)]
        return [slice(start, end) for start, end in pairwise(ends)]

    def all_reduce_mean_(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its mean over the ranks, in one message.

        For gradients, after the backward pass.  DistributedDataParallel sends them during the pass, so a rank could not
        repeat its pass in smaller parts when memory runs out.
        """
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _lost_ranks() as dist:
            dist.all_reduce(flat)
        parts = flat.div_(self.size).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """All `count` rows in order, on the CPU of every rank.   rows: this rank's `local_slice` of them.

        A rank whose slice is empty may pass any row.
        """
        rows = rows.cpu()
        if self.size == 1:
            return rows
        shares = self._shares(count)
        longest = max(share.stop - share.start for share in shares)
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in shares]
        with _lost_ranks() as dist:
            dist.all_gather(gathered, padded)
        return torch.cat([held[: share.stop - share.start] for held, share in zip(gathered, shares, strict=True)])

    def maximum(self, *values: float) -> list[float]:
        """The maximum of each value over the ranks.  It is exchanged between CPUs and waits for no GPU."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        with _lost_ranks() as dist:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def barrier(self) -> None:
        """Waits until all ranks have come this far."""
        self.maximum(0.0)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 runs the block first, then the others, which find what it downloaded or decoded."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def all_equal(self, about: object) -> bool:
        """Whether all ranks pass the same value, compared by its repr."""
        digest = int.from_bytes(hashlib.sha256(repr(about).encode()).digest()[:6], "big")  # exact as a float
        largest, negated = self.maximum(digest, -digest)
        return largest == -negated


SINGLE_PROCESS = World(torch.device("cpu"))


def make_world(device: str, environment: Mapping[str, str]) -> World:
    """This rank among those that torchrun started, after waiting for all of them; a World of one without torchrun.

    Raises OptionError for a device that this machine lacks, or an environment that is not torchrun's.
    """
    size, rank, local_rank, local_size = _torchrun_numbers(environment)
    if size == 1:
        return World(choose_device(device))
    if device == "mps":
        raise OptionError("--device mps is one GPU, which several processes cannot share. Start it without torchrun.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    own_device = choose_device(device)
    if device == "cuda":
        if (gpus := torch.cuda.device_count()) < local_size:
            raise OptionError(
                f"{local_size} processes were started on this machine, and it has {gpus} GPUs. "
                f"Start --nproc_per_node={gpus}, or add --device cpu."
            )
        own_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(own_device)

    import atexit

    import torch.distributed as dist

    # NCCL averages gradients between GPUs; Gloo exchanges what is on CPUs: clocks, stops and images.
    options = {"backend": "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", "timeout": TIMEOUT}
    with _lost_ranks():
        if (store := open_store(environment)) is not None:
            store.set_timeout(TIMEOUT)
            own_store = dist.PrefixStore(attempt_name(store, rank, size), store)
            options |= {"store": own_store, "rank": rank, "world_size": size}
        dist.init_process_group(**options)
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return World(own_device, rank, size)


def choose_device(device: str) -> torch.device:
    """auto: CUDA, then MPS, then the CPU.  Raises OptionError for a device that this machine lacks."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if not available[device]:
        there = ", ".join(name for name, ok in available.items() if ok)
        raise OptionError(
            f"--device {device} is not available: this machine has {there}. Leave --device out to let it choose."
        )
    return torch.device(device)


def make_deterministic(device: torch.device) -> None:
    """Makes CUDA choose deterministic algorithms.  On a CPU they are deterministic already."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def check_batch_size(batch_size: int, accumulate: int, processes: int) -> None:
    """Raises OptionError unless every rank gets equally many images of a batch, and one for each of its parts."""
    if batch_size % processes or batch_size < accumulate * processes:
        quotients = batch_size // processes, -(-batch_size // processes)
        below, above = (max(accumulate, quotient) * processes for quotient in quotients)
        below = below if below < batch_size else 0
        parts = f" in --accumulate {accumulate} parts each" if accumulate > 1 else ""
        dividing = [n for n in range(1, processes) if batch_size % n == 0 and batch_size >= accumulate * n]
        raise OptionError(
            f"--batch_size {batch_size} cannot be shared equally by {processes} processes{parts}. "
            f"Use {f'{below} or ' if below else ''}{above}, or start {' or '.join(map(str, dividing))} "
            f"process{'' if dividing == [1] else 'es'}."
        )


@contextmanager
def _lost_ranks() -> Iterator:
    """torch.distributed, whose errors about a lost rank become one LostProcessError."""
    import torch.distributed as dist

    try:
        yield dist
    except RuntimeError as error:
        first_line = str(error).strip().partition("\n")[0]
        reason = re.sub(r"\[/\S*\] ", "", first_line).split(". ")[0][:160]  # without the position in torch's C++ code
        raise LostProcessError(
            f"another process of this run has ended or cannot be reached ({reason}). What was saved before is "
            "untouched; --resume continues from it."
        ) from error


def _torchrun_numbers(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    """torchrun's (world size, rank, local rank, local world size)."""
    try:
        size = int(environment.get("WORLD_SIZE", "1"))
        if size == 1:
            return 1, 0, 0, 1
        rank = int(environment["RANK"])
        if not (0 <= rank < size and environment["MASTER_ADDR"] and int(environment["MASTER_PORT"])):
            raise ValueError
        return size, rank, int(environment["LOCAL_RANK"]), int(environment["LOCAL_WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise OptionError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']!r}, but the rest of what torchrun sets is missing or wrong. "
            f"Start several processes by torchrun --nproc_per_node=2 {module_or_script('train')} ..., "
            "or unset WORLD_SIZE."
        ) from error
