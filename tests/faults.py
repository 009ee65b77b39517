"""What can befall a process that trains, as functions that bring it about in the process that calls them.

For forks of `warm_process`: nothing is put back.
"""

import ctypes
import errno
import itertools
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tiny_diffusion.data.batches import Batches
from tiny_diffusion.runs import session
from tiny_diffusion.runs.folder import RunFolder
from tiny_diffusion.runs.writer import RunWriter
from tiny_diffusion.training.trainer import Trainer


def no_plots() -> None:
    """They take longer than these runs."""
    RunWriter.plot_losses = lambda self: None


def save_every_step() -> None:
    """The rolling checkpoint, otherwise every two minutes."""
    session.SAVE_EVERY_S = 0.0


def slow_disk(seconds: float) -> None:
    """A save takes this long before its file is on the disk, and as long again before it has its name."""
    fsync = os.fsync

    def slow(number):
        print("disk", flush=True)
        time.sleep(seconds)
        fsync(number)
        time.sleep(seconds)

    os.fsync = slow


def slow_step(step: int, seconds: float) -> None:
    """This step of the optimiser takes so long."""
    train_step = Trainer.train_step

    def slow(self, lr):
        if self.step + 1 == step:
            print("slow", flush=True)
            time.sleep(seconds)
        return train_step(self, lr)

    Trainer.train_step = slow


def step_until_signal(step: int) -> None:
    """This step of the optimiser lasts until a signal arrives, a minute at most."""
    train_step = Trainer.train_step
    arrived, told = os.pipe()
    os.set_blocking(told, False)

    def wait(self, lr):
        if self.step + 1 == step:
            signal.set_wakeup_fd(told)
            print("slow", flush=True)
            select.select([arrived], [], [], 60)
        return train_step(self, lr)

    Trainer.train_step = wait


def killed_at(event: int) -> None:
    """Killed by itself at the n-th of the moments that matter: see `_at_moments`."""

    def moment(number):
        if number == event:
            os.kill(os.getpid(), signal.SIGKILL)

    _at_moments(moment)


def full_disk_from(event: int) -> None:
    """From the n-th of the moments that matter on, nothing more can be written."""

    def moment(number):
        if number >= event:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _at_moments(moment, deleting=False)


def _at_moments(moment: Callable[[int], None], deleting: bool = True) -> None:
    """Calls moment(1), moment(2), ... before and after each step of a save, of a picture and of a line of the log.

    A save has half of its bytes written at one of them.  deleting: and before and after files are deleted.
    """
    count = itertools.count(1)

    def watched(function):
        def call(*args, **kwargs):
            moment(next(count))
            result = function(*args, **kwargs)
            moment(next(count))
            return result

        return call

    def save(content, file, save=torch.save):
        file.write(b"half")
        file.flush()
        moment(next(count))
        file.seek(0)
        file.truncate()
        save(content, file)

    torch.save = save
    os.fsync, os.replace, RunFolder.log = map(watched, (os.fsync, os.replace, RunFolder.log))
    if deleting:
        Path.unlink = watched(Path.unlink)


def file_size_limit(size: int) -> None:
    """No file may grow beyond this many bytes: writing fails as on a full disk, halfway and for real."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_privileges() -> None:
    """What root may do against a file's permissions is given up: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH.  capset(2)."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        sets[0] &= ~0b110
        assert libc.capset(header, sets) == 0


# Of one process among several


def work_in(folder: str) -> None:
    os.chdir(folder)


def one_of_several(told: dict[str, str]) -> None:
    """What torchrun tells each process."""
    os.environ.update(told)


def on_rank(rank: int, name: str, *arguments: object) -> None:
    """A fault of this process alone."""
    if os.environ.get("RANK") == str(rank):
        globals()[name](*arguments)


def not_finite_at(step: int) -> None:
    """The images of this step, counted from 0, are NaN."""
    right = Batches.at

    def at(self, number):
        clean, label = right(self, number)
        return (clean * float("nan") if number == step else clean), label

    Batches.at = at


def memory_runs_out(step: int) -> None:
    """Once, in this step, counted from 0."""
    loss, left = Trainer.loss, [step]

    def run_out(self, *arguments):
        if self.step in left:
            left.clear()
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return loss(self, *arguments)

    Trainer.loss = run_out


def clock_ahead(seconds: float) -> None:
    """The run takes itself to be so much older."""
    elapsed = session.Session.elapsed
    session.Session.elapsed = lambda self: elapsed(self) + seconds
