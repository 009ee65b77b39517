"""What the processes that torchrun has started for one command do apart, before anything heavy is loaded.

All of them run the command; the first one speaks and writes.  `distributed` is how they work together.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping

from tiny_diffusion.config.option import TrainActions, specs
from tiny_diffusion.errors import FileError
from tiny_diffusion.runtime.torchrun_store import first_to_report, has_begun

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


def after_a_restart(actions: TrainActions, given: Mapping[str, object]) -> TrainActions:
    """What train was asked to do; where torchrun has started it again after a failure, to go on with its run instead.

    Without a checkpoint there is nothing to go on from, and the run starts afresh.
    """
    elsewhere = actions.resume and "output_dir" not in given
    if elsewhere or actions.dry_run or not has_begun(os.environ):
        return actions
    from tiny_diffusion.config.training import Config
    from tiny_diffusion.runs.folder import RunFolder

    output_dir = given.get("output_dir", Config.output_dir)
    try:
        newest = RunFolder(output_dir).newest()
    except FileError:
        return actions
    fresh = actions.resume is None and not actions.extend
    if newest is None:
        return dataclasses.replace(actions, overwrite=True) if fresh else actions
    path, checkpoint = newest
    free = {name for name, spec in specs(Config).items() if spec.free}
    other = any(getattr(checkpoint.config, name) != value for name, value in given.items() if name not in free)
    if other or (actions.extend and checkpoint.about["finished"]):
        return actions  # as the first time: it is not this run's, or has not been lengthened yet
    print(f"started again by torchrun: --resume from {path}", file=sys.stderr)
    return dataclasses.replace(actions, resume="", extend=False, overwrite=False, init_from=None, save_config=None)
