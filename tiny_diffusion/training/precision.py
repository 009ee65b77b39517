"""The arithmetic of a run's network: fp32, bf16 or fp16, and which of them `--precision auto` becomes.

Weights, their average, the optimiser and the loss are float32 in each; autocast lowers convolutions and matrix products
only.  `auto` is bf16 where the processor has instructions for it and a check at the start of the run finds the network
faster in it and equal to float32 within the tolerances below.  torch has had slow and wrong bf16 convolutions
(pytorch issues 183815, 169688 and 163347), so the instructions alone say little.  It is decided once: checkpoints hold
the decision.
"""

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tiny_diffusion.config.training import Config
from tiny_diffusion.runtime.machine import has_bf16, wait_for
from tiny_diffusion.runtime.memory import release_memory
from tiny_diffusion.runtime.world import World

AUTOCAST = {"fp32": None, "auto": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # auto: nobody has decided
MIN_SPEED_UP = 1.1  # of bf16, to be chosen
# Largest error relative to float32, by norms.  Rounding alone makes 0.02 of the output; of a gradient 0.04 in usual
# networks, up to 0.14 in those of 8 channels.  A wrong kernel makes an error of about 1.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 0.05, 0.3
SMALL_GRADIENT = 0.05  # of all gradients together: the error of a smaller one is relative to this
CHECK_SECONDS, CHECK_SHARE = 3.0, 0.02  # how long the check may take, and as a share of --minutes
ROUNDS = 5  # passes in each precision that are timed
FEW_IMAGES = 4  # in the first passes, which show how many images the others have time for


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a network computes in this precision."""
    return torch.autocast(device.type, AUTOCAST[precision], AUTOCAST[precision] is not None)


def decide_precision(config: Config, model: nn.Module, channels: int, world: World) -> tuple[Config, list[str]]:
    """The configuration without `auto`, and a line for the log: what was decided, and why.  No line without `auto`.

    Rank 0 checks for all ranks, and they all call this.   model: on its device; it is not changed.
    """
    reason = reason_for_fp32(config, next(model.parameters()).device)
    checks = not world.maximum(float(reason is not None))[0]
    takes_bf16 = False
    if checks and world.is_main:
        share = CHECK_SHARE * 60 * config.minutes if config.minutes is not None else CHECK_SECONDS
        count = math.ceil(config.batch_size / world.size / config.accumulate)  # go through the network at once
        takes_bf16, reason = check_bf16(model, (count, channels, *config.size), min(CHECK_SECONDS, share))
    precision = "bf16" if world.maximum(float(takes_bf16))[0] else "fp32"
    if config.precision != "auto":
        return config, []
    reason = reason or "another rank's processor has no bf16 instructions"
    return dataclasses.replace(config, precision=precision), [f"precision {precision}: {reason}"]


def reason_for_fp32(config: Config, device: torch.device) -> str | None:
    """Why there is nothing to check; None if there is."""
    if config.precision != "auto":
        return "--precision says which"
    if config.deterministic:
        return "--deterministic leaves nothing to a clock"
    if device.type == "mps":
        return "bf16 is not checked on mps; --precision bf16 takes it"
    return None if has_bf16(device) else f"this {device.type} has no bf16 instructions"


def check_bf16(model: nn.Module, shape: Sequence[int], seconds: float) -> tuple[bool, str]:
    """Whether bf16 is faster and right on this network, and the reason in words.  Takes about so many seconds.

    shape: (B, C, H, W), where B is the most images that go through at once; a slow network is checked with fewer.
    """
    try:
        probe = Probe(model, shape)
        few = min(FEW_IMAGES, shape[0])
        warm_up, pair = (sum(probe.seconds(precision, few) for precision in ("fp32", "bf16")) for _ in range(2))
        in_time = few * (seconds - warm_up - pair) / ((ROUNDS + 1) * pair)
        images = max(few, min(shape[0], int(in_time)))
        error = first_difference(probe.run("fp32", images), probe.run("bf16", images))
        if error:
            return False, f"bf16 is wrong here, {error}"
        times = [[probe.seconds(precision, images) for precision in ("fp32", "bf16")] for _ in range(ROUNDS)]
    except RuntimeError as error:  # memory ran out, or a kernel is missing
        release_memory(next(model.parameters()).device)
        return False, f"bf16 cannot be checked here ({str(error).splitlines()[0]})"
    ratio = statistics.median(single / half for single, half in times)
    if ratio < MIN_SPEED_UP:
        return False, f"bf16 is {ratio:.2f} times as fast here, and would have to be {MIN_SPEED_UP:g} times"
    return True, f"{ratio:.2f} times as fast as fp32 here, with the same results; --precision fp32 turns it off"


class Probe:
    """A copy of a network, and passes of random images forward and backward through it.

    What a new network has at zero gets random weights, or there would be no outputs and hardly any gradients.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int]):
        self.network, random = copy.deepcopy(model).train(), torch.Generator().manual_seed(0)
        for module in self.network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for parameter in self.network.parameters():
            if parameter.dim() > 1 and not parameter.any():
                values = torch.randn(parameter.shape, generator=random) * parameter[0].numel() ** -0.5
                parameter.data.copy_(values)
        self.device = next(self.network.parameters()).device
        self.images, self.target = (torch.randn(*shape, generator=random).to(self.device) for _ in range(2))
        self.time = torch.linspace(0, 999, shape[0], device=self.device)
        classes = getattr(model, "num_classes", 0)
        self.label = torch.arange(shape[0], device=self.device) % classes if classes else None

    def run(self, precision: str, count: int) -> list[Tensor]:
        """The output for the first images, and the gradients of its mean squared error by all weights."""
        self.network.zero_grad(set_to_none=True)
        label = None if self.label is None else self.label[:count]
        with autocast(precision, self.device):
            output = self.network(self.images[:count], self.time[:count], label).float()
        (output - self.target[:count]).square().mean().backward()
        gradients = (parameter.grad for parameter in self.network.parameters())
        return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]

    def seconds(self, precision: str, count: int) -> float:
        """How long `run` takes, until the device is done."""
        started = time.perf_counter()
        self.run(precision, count)
        wait_for(self.device)
        return time.perf_counter() - started


def first_difference(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> str | None:
    """In words, how an output and the gradients differ by more than the tolerances; None if they do not."""
    for index, (one, error) in enumerate(zip(wanted, errors_of(wanted, got), strict=True)):
        if not error <= (GRADIENT_TOLERANCE if index else OUTPUT_TOLERANCE):  # NaN is an error too
            what = f"a gradient of shape {'x'.join(map(str, one.shape))}" if index else "the output"
            return f"{what} differs from that of fp32 by {error:.2f} of its norm"
    return None


def errors_of(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> list[float]:
    """The relative error, by norms, of an output and of each gradient, as `Probe.run` returns them."""
    small = SMALL_GRADIENT * float(torch.stack([one.norm() for one in wanted[1:]]).norm())
    least = [1e-30] + [max(small, 1e-30)] * (len(wanted) - 1)
    pairs = zip(wanted, got, least, strict=True)
    return [float((other - one).norm()) / max(float(one.norm()), low) for one, other, low in pairs]
