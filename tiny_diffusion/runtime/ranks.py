"""Rank helpers that do not import torch: which rank this process is, and which rank prints.

torchrun starts the same command once per rank.  runtime/world.py is how the ranks work together.
"""

import contextlib
import os
from collections.abc import Iterator

from tiny_diffusion.runtime.torchrun_store import first_to_report

# Commands whose work several ranks share; any other runs on rank 0 alone.
DISTRIBUTED_COMMANDS = ("train", "distill", "sample", "evaluate")


def is_distributed() -> bool:
    """Whether torchrun started more than one rank."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes."""
    return not is_distributed() or os.environ.get("RANK", "0") == "0"


def run_alone() -> None:
    """Unsets WORLD_SIZE, so that this process and its children run alone."""
    os.environ.pop("WORLD_SIZE", None)


@contextlib.contextmanager
def only_main_prints() -> Iterator[None]:
    """Inside the block only rank 0 prints."""
    if is_main():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def should_report(message: str, because_of_another: bool) -> bool:
    """Whether this rank is to print its error.  When ranks fail for one common reason, it is printed once."""
    return not is_distributed() or first_to_report(message, because_of_another, os.environ)
