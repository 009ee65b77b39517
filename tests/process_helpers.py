"""Several processes in tests: of functions, of commands (forks of the warm process), and of commands under torchrun."""

import importlib
import os
import runpy
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from warm_process import ONE_THREAD

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would tell a process of one machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def together(warm, function, size: int, *arguments, folder: Path) -> list:
    """[function(world, *arguments) of each of `size` processes]; what they return is made of tensors and plain data."""
    port = free_port()
    paths = [folder / f"{function.__name__}-{rank}.pt" for rank in range(size)]
    running = [
        warm.start_function(
            in_a_world, function.__module__, function.__name__, str(paths[rank]), *arguments,
            faults=(("one_of_several", environment(rank, size, port)),),
        )
        for rank in range(size)
    ]  # fmt: skip
    done = ended(warm, running)
    assert done.codes == [0] * size, done
    return [torch.load(path) for path in paths]


def in_a_world(module: str, name: str, path: str, *arguments: object) -> None:
    """Saves what a function gives in this process, whose environment says which one of several it is."""
    from tiny_diffusion.runtime.world import make_world

    torch.save(getattr(importlib.import_module(module), name)(make_world("cpu", os.environ), *arguments), path)


def started_together(warm, *argv: object, size: int = 2, faults: tuple = ()) -> list:
    """A command begun in `size` processes that know of one another."""
    port = free_port()
    return [
        warm.start(*argv, faults=(("one_of_several", environment(rank, size, port)), *faults)) for rank in range(size)
    ]


class Ended(NamedTuple):
    """How a command ended in each of its processes."""

    codes: list[int]
    said: list[str]


def ended(warm, running: list) -> Ended:
    return Ended([warm.wait(process) for process in running], [process.said() for process in running])


def run_together(warm, *argv: object, size: int = 2, faults: tuple = ()) -> Ended:
    return ended(warm, started_together(warm, *argv, size=size, faults=faults))


def torchrun(*argv: object, options: tuple = ("--standalone", "--nproc_per_node=2"), **more: str) -> subprocess.Popen:
    """A real torchrun of a script or module of this project, both outputs in one pipe."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, *map(str, argv)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **ONE_THREAD, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_torchrun(warm, *argv: object, options: tuple = ("--standalone", "--nproc_per_node=2")):
    """The same without the seconds that it takes to import torch: it and the processes that it starts are forks."""
    return warm.start_function(torchrun_of_forks, [*options, *map(str, argv)])


def torchrun_of_forks(words: list[str]) -> None:
    """torchrun with these words, in this process; it ends its own process, as torchrun does."""
    from torch.distributed import run

    launch = run.elastic_launch

    def launch_forks(config, entrypoint):
        config.start_method = "fork"
        return launch(config=config, entrypoint=run_as_script)

    run.elastic_launch = launch_forks
    code = 0
    try:
        run.main(words)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_as_script(unbuffered: str, script: str, *words: str) -> None:
    """A script of this project with the words that torchrun gives to a fresh Python."""
    assert unbuffered == "-u"
    sys.argv = [script, *words]
    runpy.run_path(str(ROOT / script), run_name="__main__")
