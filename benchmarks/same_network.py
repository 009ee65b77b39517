"""How fast the same network trains here and in diffusers, with equal weights: python benchmarks/same_network.py

Needs diffusers (pip install diffusers).  Each side trains as usual: ours with its loss and its optimizers, in the
memory format of train.py; diffusers' UNet2DModel with add_noise, mean squared error and torch.optim.AdamW, in its
default memory format and in channels_last.  Each runs in a process of its own, ours with the memory settings of
train.py (runtime/cpu.py).  First both networks must give the same output.  Then they take turns of a few steps each,
one at a time, so that other load on the machine slows all of them.  A ratio says how many times as fast the row is:
the median and the extremes over the rounds.  --cpu_time measures CPU time instead of elapsed time, for one thread on a
busy machine.
"""

import argparse
import copy
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from time_to_quality import count, headings
from torch import Tensor, nn

from tiny_diffusion.config.training import resolve
from tiny_diffusion.models.build import make_diffusion, to_device
from tiny_diffusion.models.unet import UNet
from tiny_diffusion.runtime import cpu
from tiny_diffusion.training.optimizers import Optimizer

Clock = Callable[[], float]  # seconds
Step = Callable[[], tuple[float, float]]  # one step -> seconds of forward and backward, and of the whole step
SIZE = 28
HEAD_CHANNELS = 8  # the default of diffusers
WIDTHS = {
    "(32, 64, 64), two layers a block, attention at the two lower levels": ((32, 64, 64), 2, (1, 2)),
    "(64, 64, 128), one layer a block, attention at the lowest level": ((64, 64, 128), 1, (2,)),
}
OURS = {"ours, muon": "muon", "ours, adamw": "adamw"}
THEIRS = ("diffusers", "diffusers, channels_last")
HEADINGS = (
    "", "images/s", *(f"ratio to {name}" for name in THEIRS),
    "forward and backward alone: images/s", *(f"ratio to {name}" for name in THEIRS),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=count, default=os.cpu_count(), help="of torch [all cores]")
    parser.add_argument("--batch_size", type=count, default=128)
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--steps", type=count, default=3, help="of each side in a round [3]")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds instead of the clock's; one thread")
    asked = parser.parse_args()
    if asked.cpu_time and asked.threads > 1:
        parser.error(f"--cpu_time with --threads {asked.threads} would add up the threads' seconds. Use --threads 1.")
    os.environ.setdefault("GOMP_SPINCOUNT", cpu.SPINS_ALONE)  # for all processes
    try:
        import diffusers
    except ModuleNotFoundError:
        sys.exit("diffusers is not installed: pip install diffusers")
    timed = "processor" if asked.cpu_time else "clock"
    print(f"{asked.threads} threads, batches of {asked.batch_size}, {timed} time, torch {torch.__version__}, ", end="")
    print(f"diffusers {diffusers.__version__}")
    for name in WIDTHS:
        print(f"\n{name}\n\n{headings(HEADINGS)}", flush=True)
        steps, processes = {}, []
        for key in (*OURS, *THEIRS):
            here, there = multiprocessing.Pipe()
            arguments = (name, key, asked.batch_size, asked.threads, asked.cpu_time, there)
            processes.append(multiprocessing.get_context("spawn").Process(target=serve, args=arguments, daemon=True))
            processes[-1].start()
            steps[key] = partial(ask, here)
        times = take_turns(steps, asked.rounds, asked.steps)
        for process in processes:
            process.kill()
        for key in steps:
            print(f"| {key} | {' | '.join(columns(times, key, asked))} |", flush=True)


def ask(pipe: Connection) -> tuple[float, float]:
    """The seconds of one step of the process at the other end."""
    pipe.send("a step")
    return pipe.recv()


def serve(name: str, key: str, size: int, threads: int, cpu_time: bool, pipe: Connection) -> None:
    """One side in its own process: trains one step for each message that it receives."""
    clock = time.process_time if cpu_time else time.perf_counter
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if key in OURS:
        cpu.tune_cpu()
    network, twin = pair(*WIDTHS[name])
    if key in OURS:
        step = our_step(network, OURS[key], size, clock)
    else:
        layout = torch.contiguous_format if key == THEIRS[0] else torch.channels_last
        step = their_step(twin, layout, size, clock)
    while pipe.recv():
        pipe.send(step())


def pair(widths: tuple[int, ...], layers: int, attention: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """Our network and that of diffusers, with equal weights and equal output."""
    from diffusers import UNet2DModel

    ours = UNet(
        1,
        base_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        layers_per_block=layers,
        attention_levels=attention,
        attention_heads=widths[-1] // HEAD_CHANNELS,
        patch_size=1,
    )
    attends = [level in attention for level in range(len(widths))]
    theirs = UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=widths,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        layers_per_block=layers,
        attention_head_dim=HEAD_CHANNELS,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )
    with torch.no_grad():
        for parameter in ours.parameters():  # a new network outputs zero, and equal zeros prove nothing
            parameter.add_(0.05 * torch.randn_like(parameter))
        theirs.load_state_dict(ours.state_dict(), strict=True)
        x, t = torch.randn(4, 1, SIZE, SIZE).double(), torch.tensor([0.0, 10.0, 500.0, 999.0])
        expected = copy.deepcopy(theirs).double()(x, t).sample
        assert expected.std() > 0.05, "the networks output almost nothing"
        torch.testing.assert_close(to_device(copy.deepcopy(ours).double(), x.device)(x, t), expected)
    return ours, theirs


def our_step(network: nn.Module, optimizer_name: str, batch_size: int, clock: Clock) -> Step:
    """Trains a copy of the network with one of our optimizers."""
    model = to_device(copy.deepcopy(network), torch.device("cpu"))
    optimizer, diffusion = Optimizer(optimizer_name, model), make_diffusion(resolve({"dataset": "mnist"}))
    clean, noise = batch(batch_size)
    t = diffusion.timesteps(torch.linspace(0.001, 0.999, batch_size, dtype=torch.float64).numpy())
    good = torch.zeros(())

    def step() -> tuple[float, float]:
        started = clock()
        model.zero_grad(set_to_none=True)
        diffusion.loss(model, clean, noise, t).backward()
        between = clock()
        optimizer.step(1e-5, good)
        return between - started, clock() - started

    return step


def their_step(network: nn.Module, layout: torch.memory_format, batch_size: int, clock: Clock) -> Step:
    """Trains a copy of diffusers' network in this memory format."""
    from diffusers import DDPMScheduler

    model = copy.deepcopy(network).to(memory_format=layout)
    optimizer, schedule = torch.optim.AdamW(model.parameters(), lr=1e-5), DDPMScheduler(num_train_timesteps=1000)
    clean, noise = (images.to(memory_format=layout) for images in batch(batch_size))
    t = torch.linspace(0, 999, batch_size).long()

    def step() -> tuple[float, float]:
        started = clock()
        optimizer.zero_grad()
        F.mse_loss(model(schedule.add_noise(clean, noise, t), t).sample, noise).backward()
        between = clock()
        optimizer.step()
        return between - started, clock() - started

    return step


def batch(batch_size: int) -> tuple[Tensor, Tensor]:
    """Random images in [-1, 1] and noise, each (B, 1, SIZE, SIZE)."""
    return torch.rand(batch_size, 1, SIZE, SIZE) * 2 - 1, torch.randn(batch_size, 1, SIZE, SIZE)


def take_turns(steps: dict[str, Step], rounds: int, each: int) -> dict[str, list[tuple[float, float]]]:
    """The mean seconds of a step in each round, of forward and backward and of the whole, after a first step."""
    times = {key: [] for key in steps}
    for step in steps.values():
        step()
    for turn in range(rounds):
        # The order alternates, so that no side always follows the same other one.
        for key in list(steps)[:: 1 if turn % 2 == 0 else -1]:
            parts = zip(*(steps[key]() for _ in range(each)), strict=True)
            times[key].append(tuple(statistics.mean(part) for part in parts))
    return times


def columns(times: dict[str, list[tuple[float, float]]], key: str, asked: argparse.Namespace) -> list[str]:
    """The cells of one row: images/s and ratios of the whole step, then of forward and backward alone."""
    found = []
    for part in (1, 0):
        found.append(f"{asked.batch_size / statistics.median(pair[part] for pair in times[key]):.1f}")
        for other in THEIRS:
            ratios = [theirs[part] / ours[part] for ours, theirs in zip(times[key], times[other], strict=True)]
            span = f" ({min(ratios):.2f} to {max(ratios):.2f})"
            found.append("" if key == other else f"{statistics.median(ratios):.2f}{span}")
    return found


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
