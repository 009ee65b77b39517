"""What the processes that torchrun has started for one command do apart, before anything heavy is loaded.

All of them run the command; the first one speaks and writes.  `distributed` is how they work together.
"""

import contextlib
import os
from collections.abc import Iterator

from tiny_diffusion.runtime.torchrun_store import first_to_report

# Commands whose work several ranks share; any other runs on rank 0 alone.
DISTRIBUTED_COMMANDS = ("train", "sample", "evaluate")


def is_distributed() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_main() -> bool:
    """Whether this is the process that speaks and writes."""
    return not is_distributed() or os.environ.get("RANK", "0") == "0"


def run_alone() -> None:
    """Forgets the other processes, here and in what is started from here: none of them will be there to be met."""
    os.environ.pop("WORLD_SIZE", None)


@contextlib.contextmanager
def only_main_prints() -> Iterator[None]:
    """In the block only the first process prints."""
    if is_main():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def should_report(message: str, because_of_another: bool) -> bool:
    """Whether this process is to print why it ends: most often all end for the same reason, which is said once."""
    return not is_distributed() or first_to_report(message, because_of_another, os.environ)
