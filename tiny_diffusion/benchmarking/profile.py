"""Where the time of a training step goes: by kind of operation, and by shape of convolution.

The profiler of torch times every operation, which adds some microseconds to each.  This overhead is measured for a
whole step, and an equal share of it is subtracted from every operation.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from tiny_diffusion.benchmarking.rates import wait_for
from tiny_diffusion.training.trainer import Trainer

KINDS = {  # kind -> parts of the names of its operations; an operation counts to the first kind that matches
    "convolution": ("convolution", "conv2d"),
    "attention": ("scaled_dot_product", "_attention"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"),
    "norm": ("group_norm",),
    "activation": ("silu", "relu", "threshold_backward", "gelu", "mish"),
}
PRODUCTS = ("convolution", "attention", "matrix products")
OPTIMISER, EMA, DATA, REST = "optimiser", "averaged weights", "data", "everything else"
ROWS = (*KINDS, OPTIMISER, EMA, DATA, REST)


@dataclass(frozen=True)
class Layer:
    """All convolutions of one shape in a step.

    count: how many.  share: of the step's time.  gflops: 10^9 operations per second.
    """

    shape: str
    count: int
    share: float
    forward_gflops: float
    backward_gflops: float


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a training step goes.

    seconds, profiled_seconds: of a step, without and under the profiler.  shares: row of ROWS -> its share of the time.
    products: the share of convolutions, attention and matrix products, those of the optimiser included.
    """

    seconds: float
    profiled_seconds: float
    shares: dict[str, float]
    products: float
    layers: list[Layer]


def profile_step(trainer: Trainer, steps: int = 10) -> StepProfile:
    """Profiles `steps` steps.  Before each, one step warms up and one is timed without the profiler."""
    trainer.halves.allowed = False  # the profiler sees the operations of one thread
    run, device = trainer.run(), trainer.device
    convolutions = count_convolutions(trainer, run)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    plain, profiled, events = [], [], []
    with _labelled_parts(trainer):
        for _ in range(steps):
            next(run)  # the profiler leaves cold caches and sleeping threads
            plain.append(_seconds(run, device))
            with profile(activities=activities, record_shapes=True) as profiler:
                profiled.append(_seconds(run, device))
            events += profiler.events()
    return _summary(events, sum(plain), sum(profiled), steps, convolutions, cuda=device.type == "cuda")


def _seconds(run: Iterator, device: torch.device) -> float:
    """Seconds of the next step."""
    started = time.perf_counter()
    next(run)
    wait_for(device)
    return time.perf_counter() - started


def _summary(events, plain: float, profiled: float, steps: int, convolutions: dict, cuda: bool) -> StepProfile:
    """The profile of the steps whose operations are `events`.

    plain, profiled: seconds of all steps without and under the profiler.  cuda: the operations ran on a GPU.
    """
    # On a GPU the profiler's overhead is on the CPU, and the times of the kernels are unchanged.
    overhead = 0.0 if cuda else max(0.0, profiled - plain) / max(1, len(events))
    times, products = dict.fromkeys(ROWS, 0.0), 0.0
    forward, backward = defaultdict(float), defaultdict(float)
    for event in events:
        if not event.name.startswith("aten::"):
            continue
        seconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        seconds = max(0.0, seconds - overhead)
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.name for part in parts)), REST)
        times[_part(event) or kind] += seconds
        products += seconds if kind in PRODUCTS else 0.0
        if kind == "convolution" and event.input_shapes:
            is_backward = "backward" in event.name
            key = _key(*(event.input_shapes[1:3] if is_backward else event.input_shapes[:2]))
            (backward if is_backward else forward)[key] += seconds
    times[REST] += max(0.0, plain - sum(times.values()))  # Python, and waiting
    whole = sum(times.values())
    layers = [
        Layer(
            shape=f"{size[0]}x{size[1]} pixels, {weight[1]} -> {weight[0]} channels, {weight[2]}x{weight[3]}",
            count=found.count,
            share=(forward[size, weight] + backward[size, weight]) / whole,
            forward_gflops=steps * found.gflop / forward[size, weight],
            backward_gflops=2 * steps * found.gflop / backward[size, weight],
        )
        for (size, weight), found in convolutions.items()
        if forward[size, weight] and backward[size, weight]
    ]
    return StepProfile(
        seconds=plain / steps,
        profiled_seconds=profiled / steps,
        shares={row: seconds / whole for row, seconds in times.items()},
        products=products / whole,
        layers=sorted(layers, key=lambda layer: -layer.share),
    )


def _part(event) -> str | None:
    """The label of the part of the step that called an operation; None for the network and its loss."""
    while event is not None:
        if event.name in (OPTIMISER, EMA, DATA):
            return event.name
        event = event.cpu_parent
    return None


@contextmanager
def _labelled_parts(trainer: Trainer) -> Iterator[None]:
    """Inside the block, a profile labels the operations of the optimiser, the averaged weights and the data."""
    parts = [
        (trainer, "clip_gradients", OPTIMISER),
        (trainer.optimizer, "step", OPTIMISER),
        (trainer.ema, "update", EMA),
        (trainer.batches, "at", DATA),
    ]
    for owner, name, label in parts:
        setattr(owner, name, record_function(label)(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, _ in parts:
            delattr(owner, name)


@dataclass
class Convolutions:
    """All convolutions of one input and weight shape in a step.

    count: how many.  gflop: 10^9 operations of their forward passes.
    """

    count: int = 0
    gflop: float = 0.0


def count_convolutions(trainer: Trainer, run: Iterator) -> dict[tuple, Convolutions]:
    """The convolutions of the next step, by (image size, weight shape).

    They are counted by hooks because a profile records the input of a convolution, but not its stride.
    """
    seen: dict[tuple, Convolutions] = defaultdict(Convolutions)

    def count(layer: nn.Conv2d, inputs: tuple, output: Tensor) -> None:
        found = seen[_key(inputs[0].shape, layer.weight.shape)]
        found.count += 1
        found.gflop += 2 * output.numel() * layer.weight[0].numel() / 1e9

    hooks = [layer.register_forward_hook(count) for layer in trainer.model.modules() if isinstance(layer, nn.Conv2d)]
    next(run)
    for hook in hooks:
        hook.remove()
    return seen


def _key(image, weight) -> tuple:
    """What a convolution is counted by, from the shapes of its input and its weight."""
    return tuple(image[2:]), tuple(weight)
