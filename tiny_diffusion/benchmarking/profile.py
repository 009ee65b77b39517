"""Where the time of a training step goes, by kind of work and by convolution.

torch's profiler times every operation, and adds some microseconds to each: what it adds to a step is measured and taken
off again, an equal share from every operation.
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

KINDS = {  # of operations, by a part of their name; the first that fits
    "convolution": ("convolution", "conv2d"),
    "attention": ("scaled_dot_product", "_attention"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"),
    "norm": ("group_norm",),
    "activation": ("silu",),
}
PRODUCTS = ("convolution", "attention", "matrix products")
OPTIMISER, AVERAGE, DATA, REST = "optimiser", "averaged weights", "data", "everything else"
ROWS = (*KINDS, OPTIMISER, AVERAGE, DATA, REST)


@dataclass(frozen=True)
class Layer:
    """The convolutions of one shape.  count: how many.  gflops: 10^9 operations a second, forward and backward."""

    shape: str
    count: int
    share: float
    forward_gflops: float
    backward_gflops: float


@dataclass(frozen=True)
class StepProfile:
    """shares: of a step's time, by ROWS; they add up to 1.  products: the share of convolutions and matrix products,
    the optimiser's own among them.  seconds: of a step that nobody watches.  watched: of one under the profiler."""

    seconds: float
    watched: float
    shares: dict[str, float]
    products: float
    layers: list[Layer]


def profile_step(trainer: Trainer, steps: int = 10) -> StepProfile:
    """Runs three times so many steps, of which it times a third, and watches another, turn by turn."""
    run, device = trainer.run(), trainer.device
    convolutions = _convolutions_of(trainer, run)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    alone, watched, events = [], [], []
    with _named_places(trainer):
        for _ in range(steps):
            next(run)  # after the profiler's own work the caches are cold, and threads asleep
            alone.append(_seconds(run, device))
            with profile(activities=activities, record_shapes=True) as profiler:
                watched.append(_seconds(run, device))
            events += profiler.events()
    return _summary(events, sum(alone), sum(watched), steps, convolutions, cuda=device.type == "cuda")


def _seconds(run: Iterator, device: torch.device) -> float:
    started = time.perf_counter()
    next(run)
    wait_for(device)
    return time.perf_counter() - started


def _summary(events, alone: float, watched: float, steps: int, convolutions: dict, cuda: bool) -> StepProfile:
    operations = [event for event in events if event.name.startswith("aten::")]
    # On a GPU the watching is on the CPU's side, and the kernels' own times are as they are.
    added = 0.0 if cuda else max(0.0, watched - alone) / max(1, len(events))
    times, products = dict.fromkeys(ROWS, 0.0), 0.0
    forward, backward = defaultdict(float), defaultdict(float)
    for event in operations:
        own = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        own = max(0.0, own - added)
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.name for part in parts)), REST)
        place = _place(event)
        times[place or kind] += own
        products += own if kind in PRODUCTS else 0.0
        if kind == "convolution" and event.input_shapes:
            backwards = "backward" in event.name
            key = _key(*(event.input_shapes[1:3] if backwards else event.input_shapes[:2]))
            (backward if backwards else forward)[key] += own
    times[REST] += max(0.0, alone - sum(times.values()))  # Python, and what waits
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
        seconds=alone / steps,
        watched=watched / steps,
        shares={row: seconds / whole for row, seconds in times.items()},
        products=products / whole,
        layers=sorted(layers, key=lambda layer: -layer.share),
    )


def _place(event) -> str | None:
    """The part of the step that an operation was called from, of those that `_named_places` names."""
    while event is not None:
        if event.name in (OPTIMISER, AVERAGE, DATA):
            return event.name
        event = event.cpu_parent
    return None


@contextmanager
def _named_places(trainer: Trainer) -> Iterator[None]:
    """Within it, what the optimiser, the average and the data do bears their names in a profile."""
    places = [
        (trainer, "clip_gradients", OPTIMISER),
        (trainer.optimizer, "step", OPTIMISER),
        (trainer.ema, "update", AVERAGE),
        (trainer.batches, "at", DATA),
    ]
    for owner, name, label in places:
        setattr(owner, name, _labelled(getattr(owner, name), label))
    try:
        yield
    finally:
        for owner, name, _ in places:
            delattr(owner, name)


def _labelled(method, label: str):
    def labelled(*arguments):
        with record_function(label):
            return method(*arguments)

    return labelled


@dataclass
class _Convolutions:
    """Those of one input and weight shape in one step: how many, and the 10^9 operations of their forward passes."""

    count: int = 0
    gflop: float = 0.0


def _convolutions_of(trainer: Trainer, run: Iterator) -> dict[tuple, _Convolutions]:
    """By shape, noted during one step: the profiler tells what goes in, but not the stride."""
    seen: dict[tuple, _Convolutions] = defaultdict(_Convolutions)

    def note(layer: nn.Conv2d, inputs: tuple, output: Tensor) -> None:
        found = seen[_key(inputs[0].shape, layer.weight.shape)]
        found.count += 1
        found.gflop += 2 * output.numel() * layer.weight[0].numel() / 1e9

    hooks = [layer.register_forward_hook(note) for layer in trainer.model.modules() if isinstance(layer, nn.Conv2d)]
    next(run)
    for hook in hooks:
        hook.remove()
    return seen


def _key(image, weight) -> tuple:
    return tuple(image[2:]), tuple(weight)
