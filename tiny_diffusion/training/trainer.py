"""The training loop: yields a report per optimiser step and knows no files, plots or progress bars.

Everything random in step k is a function of (seed, k), so a trainer that is given the tensors and the step of another
continues it bit for bit (on the CPU).  It is drawn for the whole batch, of which each process takes its rows: several
processes compute what one does, but for dropout.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tiny_diffusion.config.training import Config
from tiny_diffusion.data.batches import Batches
from tiny_diffusion.diffusion.process import Model
from tiny_diffusion.diffusion.timesteps import stratified
from tiny_diffusion.models.build import make_diffusion, part_of
from tiny_diffusion.randomness import seed_torch, stream, torch_stream
from tiny_diffusion.runtime.memory import Result, split_until_it_fits
from tiny_diffusion.training.ema import Ema
from tiny_diffusion.training.optimizers import Optimizer

WARM_UP_STEPS = 100
FIRST_LOSS_SCALE, LOSS_SCALE_PATIENCE = 2.0**15, 1000
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class StepReport:
    """step: optimiser steps done.  epoch: passes over the data done, a fraction.  loss, grad_norm, skipped: scalars on
    the device, so that reading them is the caller's choice; skipped counts non-finite steps in a row, each undone."""

    step: int
    epoch: float
    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    lr: float
    images_per_second: float


@dataclass(frozen=True)
class RunLength:
    """How long a run is: to `steps`, or for `seconds` of its clock, from where this stretch of it began."""

    steps: int | None = None
    seconds: float | None = None
    from_step: int = 0
    from_seconds: float = 0.0

    def progress(self, step: int, seconds: float) -> float:
        """0 at the start, 1 at the end, and from the start where the end lies before it."""
        if self.steps is not None:
            done, whole = step - self.from_step, self.steps - self.from_step
        else:
            done, whole = seconds - self.from_seconds, self.seconds - self.from_seconds
        return done / whole if whole > 0 else 1.0

    def lr_scale(self, step: int, progress: float) -> float:
        """The share of the peak learning rate: a linear warm-up, then sqrt(1 - progress) down to zero."""
        warm_up = (
            WARM_UP_STEPS if self.steps is None else min(WARM_UP_STEPS, max(1, (self.steps - self.from_step) // 10))
        )
        return min(1.0, (step - self.from_step + 1) / warm_up) * math.sqrt(max(0.0, 1 - progress))


class Trainer:
    """Trains `model` in place.  clock: seconds that the run has spent so far, over all its resumptions.

    `parts` is how many micro-batches each batch is split into: `accumulate`, until `auto_batch` has had to raise it.
    """

    def __init__(
        self, model: nn.Module, config: Config, batches: Batches, length: RunLength, clock: Callable[[], float],
        num_classes: int = 0,
    ):  # fmt: skip
        self.model, self.config, self.batches, self.length, self.clock = model, config, batches, length, clock
        self.world, self.rows = batches.world, batches.rows
        self.num_classes = num_classes
        self.parts = config.accumulate
        self.diffusion = make_diffusion(config)
        self.optimizer = Optimizer(config.optimizer, model)
        self.ema = Ema(model, config.ema_decay)
        self.step = 0
        self.device = next(model.parameters()).device
        self.forward = torch.compile(model) if config.compile else model
        self.skipped = torch.zeros((), device=self.device)
        self.loss_scale = torch.tensor(
            [FIRST_LOSS_SCALE if config.precision == "fp16" else 1.0, 0.0], device=self.device
        )

    def finished(self) -> bool:
        """Whether the run has reached its length."""
        return self.length.progress(self.step, self.clock()) >= 1

    def run(self) -> Iterator[StepReport]:
        """Steps until the run has reached its length, a report after each."""
        self.model.train()
        while (progress := self.length.progress(self.step, self.clock())) < 1:
            started = time.perf_counter()
            lr = self.config.lr * self.length.lr_scale(self.step, progress)
            loss, norm = self._one_step(lr)
            speed = self.config.batch_size / (time.perf_counter() - started)
            yield StepReport(self.step, self.epoch, loss, norm, self.skipped, lr, speed)

    @property
    def epoch(self) -> float:
        """Passes over the data so far, a fraction."""
        return self.step * self.config.batch_size / len(self.batches)

    @property
    def current_epoch(self) -> int:
        """The epoch, counted from 1, in which the last step began."""
        return max(0, self.step - 1) * self.config.batch_size // len(self.batches) + 1

    @property
    def micro_batch(self) -> int:
        """The most images that go through the network at once."""
        return math.ceil(self.own_batch / self.parts)

    @property
    def own_batch(self) -> int:
        """Images a step that are this process's."""
        return self.rows.stop - self.rows.start

    def _one_step(self, lr: float) -> tuple[Tensor, Tensor]:
        loss = self._within_memory(self._gradients)
        # What follows sees the same numbers in all processes, so they clip, skip and step alike.
        self.world.all_reduce_mean_([loss, *self._held_gradients()])
        norm = self._clip()
        bad = (~torch.isfinite(loss + norm)).float()
        self.optimizer.step(lr, bad)
        self.skipped = (self.skipped + 1) * bad
        self._adapt_loss_scale(bad)
        self.step += 1
        self.ema.update(self.step)
        return loss, norm

    def _gradients(self) -> Tensor:
        """Leaves the gradients of this process's rows in place and changes nothing else.  Returns their loss."""
        clean, label = self.batches.at(self.step)
        whole = (self.config.batch_size, *clean.shape[1:])
        label = self._hide_some(label) if self.config.class_cond else None
        u = stratified(stream(self.config.seed, "timesteps", self.step), whole[0])
        t = self.diffusion.timesteps(u[self.rows])
        generator = torch_stream(self.config.seed, "noise", self.step, self.device)
        noise = clean.new_empty(whole).normal_(generator=generator)[self.rows]
        if self.config.dropout:
            seed_torch(self.config.seed, "dropout", self.step + (self.world.rank << 40))
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for rows in slices(len(clean), self.parts):
            loss = self._loss(self.forward, clean[rows], noise[rows], t[rows], None if label is None else label[rows])
            share = loss * ((rows.stop - rows.start) / len(clean))
            (share * self.loss_scale[0] if self.config.precision == "fp16" else share).backward()
            total += share.detach()
        return total

    def _loss(self, model: Model, clean: Tensor, noise: Tensor, t: np.ndarray, label: Tensor | None) -> Tensor:
        with torch.autocast(self.device.type, AUTOCAST[self.config.precision], self.config.precision != "fp32"):
            return self.diffusion.loss(model, clean, noise, t, label)

    def _within_memory(self, attempt: Callable[[], Result]) -> Result:
        """What the attempt returns.  With auto_batch, one that runs out of memory is made again in twice as many parts.

        Raises the attempt's error for any other reason, and when the parts are single images.
        """

        def in_so_many(parts: int) -> Result:
            self.parts = parts
            try:
                return attempt()
            except (MemoryError, RuntimeError):
                self.model.zero_grad(set_to_none=True)  # what it leaves takes memory, too
                raise

        most = self.own_batch if self.config.auto_batch else self.parts
        return split_until_it_fits(in_so_many, self.parts, most, self.device)

    def _hide_some(self, label: Tensor) -> Tensor:
        """Labels, a share of them replaced by the null class, so that guidance has something to differ from."""
        u = stream(self.config.seed, "labels", self.step).random(self.config.batch_size)
        hidden = torch.from_numpy(u[self.rows] < self.config.label_dropout).to(label.device)
        return label.masked_fill(hidden, self.num_classes)

    def _held_gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    def _clip(self) -> Tensor:
        """Scales the gradients to at most grad_clip in norm; the norm before."""
        gradients = self._held_gradients()
        if self.config.precision == "fp16":
            torch._foreach_div_(gradients, self.loss_scale[0])
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _adapt_loss_scale(self, bad: Tensor) -> None:
        """fp16: half after an overflow, double after LOSS_SCALE_PATIENCE good steps.  Micikevicius et al. (2018)."""
        if self.config.precision == "fp16":
            scale, good = self.loss_scale
            good = (good + 1) * (1 - bad)
            grown = (good >= LOSS_SCALE_PATIENCE).float()
            self.loss_scale = torch.stack([scale * (1 - 0.5 * bad) * (1 + grown), good * (1 - grown)])

    def seconds_per_step(self) -> float:
        """A first estimate, from passes over one micro-batch that change nothing: the second, the first warms up.

        Of several processes that of the slowest, for which the others wait.
        """
        for _ in range(2):
            seconds = self._within_memory(self._seconds_of_a_pass)
        self.model.zero_grad(set_to_none=True)
        return self.world.maximum(seconds)[0]

    def _seconds_of_a_pass(self) -> float:
        """Forward and backward, of a whole batch as one micro-batch tells it."""
        clean, label = (whole[: self.micro_batch] for whole in self.batches.at(self.step))
        started = time.perf_counter()
        t = self.diffusion.timesteps(np.full(len(clean), 0.5))
        self._loss(self.model, clean, clean, t, label if self.config.class_cond else None).backward()
        float(clean.sum())  # waits for the device
        return (time.perf_counter() - started) * self.own_batch / len(clean)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold for another trainer to continue."""
        return {
            **{f"model/{name}": tensor for name, tensor in self.model.state_dict().items()},
            **{f"ema/{name}": tensor for name, tensor in self.ema.model.state_dict().items()},
            **{f"optimizer/{name}": tensor for name, tensor in self.optimizer.tensors().items()},
            "scaler/loss_scale": self.loss_scale,
        }

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Continue another trainer of the same configuration.  Raises KeyError or RuntimeError if it was not."""
        self.model.load_state_dict(part_of(tensors, "model"))
        self.ema.model.load_state_dict(part_of(tensors, "ema"))
        self.optimizer.load(part_of(tensors, "optimizer"))
        self.loss_scale.copy_(tensors["scaler/loss_scale"])
        self.step = step

    def heldout_loss(self, images: Tensor, labels: Tensor) -> float:
        """The averaged weights' loss on these images at noise and levels that are the same every time."""
        t = self.diffusion.timesteps(stratified(stream(self.config.seed, "heldout"), len(images)))
        noise = torch.empty_like(images).normal_(generator=torch_stream(self.config.seed, "heldout", 1, self.device))
        total = 0.0
        with torch.no_grad():
            for rows in slices(len(images), math.ceil(len(images) / self.micro_batch)):
                label = labels[rows] if self.config.class_cond else None
                loss = self.diffusion.loss(self.ema.model, images[rows], noise[rows], t[rows], label)
                total += float(loss) * (rows.stop - rows.start) / len(images)
        return total


def slices(count: int, parts: int) -> list[slice]:
    """Neighbouring slices that share `count` rows as equally as can be."""
    return [slice(part[0], part[-1] + 1) for part in np.array_split(np.arange(count), parts)]
