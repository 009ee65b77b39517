"""What the ranks of a run synchronise after each step, so that they all take the same steps: the clock, and stops."""

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from tiny_diffusion.config.option import specs
from tiny_diffusion.config.training import Config
from tiny_diffusion.errors import FileError
from tiny_diffusion.runs.folder import RunFolder
from tiny_diffusion.runtime.world import World


class Sync:
    """seconds: rank 0's clock at the last `update`.   stop_signal: a signal that any rank has received, or None.

    As a context manager it catches Ctrl-C and SIGTERM, which then only ask the run to stop.
    """

    def __init__(self, world: World, clock: Callable[[], float]):
        self.world, self.clock = world, clock
        self.seconds = 0.0
        self.stop_signal: int | None = None
        self._received: int | None = None  # by this rank
        self._handlers: dict[int, object] = {}

    def update(self) -> None:
        """Synchronises all ranks; each of them calls it after every step."""
        seconds = self.clock() if self.world.is_main else 0.0
        self.seconds, stop = self.world.maximum(seconds, self._received or 0)
        self.stop_signal = int(stop) or None

    def __enter__(self) -> "Sync":
        self._handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        """The first signal stops the run after the current step; a second Ctrl-C stops it at once.

        With several ranks it does not, because torchrun repeats the Ctrl-C that the terminal has already sent to each.
        """
        if self._received is not None and number == signal.SIGINT and self.world.size == 1:
            raise KeyboardInterrupt
        self._received = number


def newest_after_restart(output_dir: str, given: Mapping[str, object], extend: bool) -> tuple[bool, Path | None]:
    """After torchrun has started a failed command again: whether its run continues, and from which checkpoint.

    (False, None): the folder holds another run; do as the command says.  (True, None): nothing was saved yet.
    given: the options of the command.  extend: the run is being lengthened.
    """
    try:
        newest = RunFolder(output_dir).newest()
    except FileError:
        return False, None
    if newest is None:
        return True, None
    path, checkpoint = newest
    fixed = {name: value for name, value in given.items() if not specs(Config)[name].free}
    if not all(checkpoint.config.agrees(name, value) for name, value in fixed.items()):
        return False, None
    return (False, None) if extend and checkpoint.about["finished"] else (True, path)
