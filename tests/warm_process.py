"""Commands and functions in processes of their own, without the seconds that it takes to import torch: forks of a warm
process.

What can be asked of a real process can be asked of these: they have exit codes, can be killed, and hold locks.
"""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

LONGEST = 600  # seconds that a command may take, lest one outlives its test
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}  # others do not survive a fork


class Running(NamedTuple):
    """A command that was started.  log: the file of what it prints, on either output."""

    pid: int
    log: Path

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def said(self) -> str:
        return self.log.read_text("utf-8")

    def until_it_says(self, text: str) -> None:
        """Waits, a minute at most."""
        for _ in range(6000):
            if text in self.said():
                return
            time.sleep(0.01)
        raise AssertionError(f"no {text!r} within a minute: {self.said()}")


class WarmProcess:
    """Forks commands off: start(...), then wait(...) for each of them."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, 0
        self.pids: set[int] = set()
        self.codes: dict[int, int] = {}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ONE_THREAD},
            cwd=Path(__file__).parent.parent,
        )

    def _ask(self, **request) -> int:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, *argv: object, faults: tuple = ()) -> Running:
        """Begins a command.  faults: the names of functions in faults.py, with their arguments, to be called before."""
        return self._fork(argv=[str(word) for word in argv], faults=faults)

    def start_function(self, function: Callable, *arguments: object, faults: tuple = ()) -> Running:
        """Begins function(*arguments), which is one of a module of the tests; the arguments are plain JSON."""
        return self._fork(function=[function.__module__, function.__name__], arguments=arguments, faults=faults)

    def _fork(self, **request) -> Running:
        self.started += 1
        log = self.folder / f"{self.started}.log"
        log.touch()
        pid = self._ask(log=str(log), **request)
        self.pids.add(pid)
        return Running(pid, log)

    def wait(self, running: Running) -> int:
        """Its exit code, or minus the number of the signal that ended it."""
        if running.pid not in self.codes:
            self.codes[running.pid] = self._ask(wait=running.pid)
        return self.codes[running.pid]

    def kill(self, running: Running) -> int:
        """Ends it at once, if it has not ended yet; its exit code."""
        if running.pid not in self.codes:
            running.kill(signal.SIGKILL)
        return self.wait(running)

    def run(self, *argv: object, faults: tuple = ()) -> tuple[int, str]:
        """The exit code of a command and what it printed."""
        running = self.start(*argv, faults=faults)
        return self.wait(running), running.said()

    def close(self) -> None:
        """Ends what has not ended yet, and this process."""
        for pid in self.pids - self.codes.keys():
            os.kill(pid, signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    import torch

    from tiny_diffusion.cli import COMMANDS
    from tiny_diffusion.data import arrays
    from tiny_diffusion.data.sources import open_dataset
    from tiny_diffusion.evaluation import error_by_noise
    from tiny_diffusion.training import precision

    torch.set_num_threads(1)
    for module, _ in COMMANDS.values():
        importlib.import_module(module)
    for module in ("runs.session", "runs.images", "visuals.images", "models.unet"):
        importlib.import_module(f"tiny_diffusion.{module}")
    for module in ("faults", "cli_helpers"):
        importlib.import_module(module)
    arrays.read_digits = functools.cache(arrays.read_digits)  # which parses a text
    precision.has_bf16 = lambda device: False  # as in conftest.py, and so is the next
    error_by_noise.MAX_IMAGES = 8
    open_dataset("digits")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
        elif (pid := os.fork()) == 0:
            _become(request)
        else:
            print(pid, flush=True)


def _become(request: dict) -> None:
    """Carries out one command or function in this process, and ends it."""
    code = 70  # of a defect
    signal.alarm(LONGEST)
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        import faults
        from cli_helpers import call

        for name, *arguments in request["faults"]:
            getattr(faults, name)(*arguments)
        if "argv" in request:
            code = call(*request["argv"])
        else:
            module, name = request["function"]
            getattr(importlib.import_module(module), name)(*request["arguments"])
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    serve()
