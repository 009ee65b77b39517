"""What the processes of a run agree on after each step, so that they take the same steps: the time, whether to stop.

One process agrees with itself.
"""

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
    """seconds: the first process's clock, as of the last `update`.  stop_signal: one that any process has received.

    A context manager, inside which Ctrl-C and SIGTERM ask to stop and do nothing else.
    """

    def __init__(self, world: World, clock: Callable[[], float]):
        self.world, self.clock = world, clock
        self.seconds = 0.0
        self.stop_signal: int | None = None
        self._asked: int | None = None  # this process
        self._handlers: dict[int, object] = {}

    def update(self) -> None:
        """All processes meet here."""
        seconds = self.clock() if self.world.is_main else 0.0
        self.seconds, stop = self.world.maximum(seconds, self._asked or 0)
        self.stop_signal = int(stop) or None

    def __enter__(self) -> "Sync":
        self._handlers = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        """The first request is granted after the step in progress; the second Ctrl-C at once.

        Not of several processes: torchrun sends each a Ctrl-C that the terminal has sent it already.
        """
        if self._asked is not None and number == signal.SIGINT and self.world.size == 1:
            raise KeyboardInterrupt
        self._asked = number


def newest_after_restart(output_dir: str, given: Mapping[str, object], extend: bool) -> tuple[bool, Path | None]:
    """After torchrun has started a failed command again: whether its run goes on, and from which checkpoint.

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
    if any(getattr(checkpoint.config, name) != value for name, value in fixed.items()):
        return False, None
    return (False, None) if extend and checkpoint.about["finished"] else (True, path)
