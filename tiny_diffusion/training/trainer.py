"""The training loop: yields a report per optimiser step, and knows no files, plots or progress bars.

Everything random in step k is a function of (seed, k), so a trainer with the tensors and the step of another continues
it bit for bit (on the CPU).  It is drawn for the global batch, of which each rank takes its rows, so several ranks
compute what one computes, except for dropout.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tiny_diffusion.config.training import Config
from tiny_diffusion.data.batches import Batches
from tiny_diffusion.diffusion.process import Model
from tiny_diffusion.diffusion.timesteps import stratified
from tiny_diffusion.models.build import make_diffusion, part_of
from tiny_diffusion.randomness import seed_torch, stream, torch_stream
from tiny_diffusion.runtime.memory import BatchSplitter
from tiny_diffusion.training.ema import Ema
from tiny_diffusion.training.halves import Halves, slices
from tiny_diffusion.training.loss_scaling import LossScaler
from tiny_diffusion.training.optimizers import Optimizer
from tiny_diffusion.training.precision import autocast
from tiny_diffusion.training.run_length import RunLength


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimiser step.

    step: steps done, this one included.   epoch: passes over the data done, a fraction.   lr: the learning rate.
    loss, grad_norm (before clipping), skipped (non-finite steps in a row, each undone): scalars on the device.  To read
    one waits for the device, so when to read them is the caller's choice.   started: time.perf_counter() before it.
    """

    step: int
    epoch: float
    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    lr: float
    started: float


class Objective(Protocol):
    """What a step minimises, and at which noise levels: a Diffusion is one, and training/distill.py has another."""

    def timesteps(self, u: np.ndarray) -> np.ndarray: ...

    def loss(
        self, model: Model, clean: Tensor, noise: Tensor, t: np.ndarray, label: Tensor | None = None
    ) -> Tensor: ...


class Trainer:
    """Trains `model` in place.

    clock: the seconds that the run has spent, over all its sessions.   num_classes: of class-conditional models.
    objective_at: the objective at a share of the run from 0 to 1 [always the diffusion's own].
    networks: others that the objective needs, by name, which are saved with the run.
    begin: called before the first step, with the batches.   after_step: called after each, with its objective too.
    """

    def __init__(
        self, model: nn.Module, config: Config, batches: Batches, length: RunLength, clock: Callable[[], float],
        num_classes: int = 0, objective_at: Callable[[float], Objective] | None = None,
        networks: Mapping[str, nn.Module] | None = None, begin: Callable[[Batches], None] | None = None,
        after_step: Callable[[Objective, Batches], None] | None = None,
    ):  # fmt: skip
        self.model, self.config, self.batches, self.length, self.clock = model, config, batches, length, clock
        self.world, self.rows = batches.world, batches.rows
        self.num_classes = num_classes
        self.device = next(model.parameters()).device
        self.diffusion = make_diffusion(config)
        self.optimizer = Optimizer(config.optimizer, model)
        self.objective_at = objective_at or (lambda progress: self.diffusion)
        self.objective = self.objective_at(0.0)
        self.ema = Ema(model, config.ema_decay)
        self.networks = {"model": model, "ema": self.ema.model, **(networks or {})}
        self.begin, self.after_step = begin, after_step
        self.scaler = LossScaler(config.precision == "fp16", self.device)
        max_parts = self.local_batch if config.auto_batch else config.accumulate
        self.splitter = BatchSplitter(config.accumulate, max_parts, self.device, on_retry=self.drop_gradients)
        self.forward = torch.compile(model) if config.compile else model
        self.halves = Halves(config, self.device, allowed=objective_at is None)
        self.step = 0
        self.skipped = torch.zeros((), device=self.device)

    def finished(self) -> bool:
        """Whether the run has reached its length."""
        return self.length.progress(self.step, self.clock()) >= 1

    def run(self) -> Iterator[StepReport]:
        """Trains until the run has reached its length; yields a report after each step."""
        self.model.train()
        if self.begin is not None and not self.step:
            self.begin(self.batches)
        while (progress := self.length.progress(self.step, self.clock())) < 1:
            started = time.perf_counter()
            lr = self.config.lr * self.length.lr_scale(self.step, progress)
            self.objective = self.objective_at(progress)
            loss, norm = self.train_step(lr)
            yield StepReport(self.step, self.epoch, loss, norm, self.skipped, lr, started)

    @property
    def epoch(self) -> float:
        """Passes over the data so far, a fraction."""
        return self.step * self.config.batch_size / len(self.batches)

    @property
    def current_epoch(self) -> int:
        """The epoch, counted from 1, in which the last step began; the last that it ended, if it ended several."""
        return max(max(0, self.step - 1) * self.config.batch_size // len(self.batches) + 1, int(self.epoch))

    @property
    def parts(self) -> int:
        """How many micro-batches each batch is split into: --accumulate, or more after --auto_batch raised it."""
        return self.splitter.parts

    @property
    def micro_batch(self) -> int:
        """The largest number of images that go through the network at once."""
        return math.ceil(self.local_batch / self.parts)

    @property
    def local_batch(self) -> int:
        """This rank's images per step."""
        return self.rows.stop - self.rows.start

    def train_step(self, lr: float) -> tuple[Tensor, Tensor]:
        """One optimiser step at this learning rate: the loss, and the norm of the gradients before clipping."""
        loss = self.splitter.run(self.compute_gradients)
        # From here on all ranks see the same numbers, so they clip, skip and step alike.
        self.world.all_reduce_mean_([loss, *self._gradients()])
        norm = self.clip_gradients()
        bad = (~torch.isfinite(loss + norm)).float()
        self.optimizer.step(lr, bad)
        self.skipped = (self.skipped + 1) * bad
        self.scaler.update(bad)
        self.step += 1
        self.ema.update(self.step)
        if self.after_step is not None:
            self.after_step(self.objective, self.batches)
        return loss, norm

    def compute_gradients(self, parts: int) -> Tensor:
        """Computes the gradients of this rank's rows, in so many micro-batches, and returns the loss."""
        clean, label = self.batches.at(self.step)
        batch_shape = (self.config.batch_size, *clean.shape[1:])
        label = self._drop_labels(label) if self.config.class_cond else None
        u = stratified(stream(self.config.seed, "timesteps", self.step), self.config.batch_size)
        t = self.objective.timesteps(u[self.rows])
        generator = torch_stream(self.config.seed, "noise", self.step, self.device)
        noise = clean.new_empty(batch_shape).normal_(generator=generator)[self.rows]
        if self.config.dropout:
            seed_torch(self.config.seed, "dropout", self.step + (self.world.rank << 40))
        self.drop_gradients()

        def backward(rows: slice) -> Tensor:
            loss = self.loss(self.forward, clean[rows], noise[rows], t[rows], None if label is None else label[rows])
            share = loss * ((rows.stop - rows.start) / len(clean))
            self.scaler.scale(share).backward()
            return share.detach()

        return sum(self.halves.run(backward, clean.shape, parts), torch.zeros((), device=self.device))

    def loss(self, model: Model, clean: Tensor, noise: Tensor, t: np.ndarray, label: Tensor | None) -> Tensor:
        """The objective in the run's precision.  Shapes as in Diffusion.loss."""
        with autocast(self.config.precision, self.device):
            return self.objective.loss(model, clean, noise, t, label)

    def drop_gradients(self) -> None:
        """Frees the gradients."""
        self.model.zero_grad(set_to_none=True)

    def _drop_labels(self, label: Tensor) -> Tensor:
        """Labels, a share of them replaced by the null class.  Ho & Salimans (2022), algorithm 1."""
        u = stream(self.config.seed, "labels", self.step).random(self.config.batch_size)
        dropped = torch.from_numpy(u[self.rows] < self.config.label_dropout).to(label.device)
        return label.masked_fill(dropped, self.num_classes)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    def clip_gradients(self) -> Tensor:
        """Scales the gradients to a norm of at most grad_clip; returns the norm before."""
        gradients = self._gradients()
        self.scaler.unscale_(gradients)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that another trainer needs to continue, as a flat table of "part/tensor" names."""
        return {
            **{
                f"{part}/{name}": tensor
                for part, network in self.networks.items()
                for name, tensor in network.state_dict().items()
            },
            **{f"optimizer/{name}": tensor for name, tensor in self.optimizer.tensors().items()},
            "scaler/loss_scale": self.scaler.state,
        }

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Continues another trainer of the same configuration.  Raises KeyError or RuntimeError if it was not."""
        for part, network in self.networks.items():
            network.load_state_dict(part_of(tensors, part))
        self.optimizer.load(part_of(tensors, "optimizer"))
        self.scaler.state.copy_(tensors["scaler/loss_scale"])
        self.step = step

    def heldout_loss(self, images: Tensor, labels: Tensor, t: np.ndarray | None = None) -> float:
        """The loss of the averaged weights on these images, with the same noise each time.

        t: the time of each image [the same ones each time, distributed as in training].
        """
        objective = self.objective_at(1.0)
        if t is None:
            t = objective.timesteps(stratified(stream(self.config.seed, "heldout"), len(images)))
        noise = torch.empty_like(images).normal_(generator=torch_stream(self.config.seed, "heldout", 1, self.device))
        total = 0.0
        with torch.no_grad():
            for rows in slices(len(images), math.ceil(len(images) / self.micro_batch)):
                label = labels[rows] if self.config.class_cond else None
                loss = objective.loss(self.ema.model, images[rows], noise[rows], t[rows], label)
                total += float(loss) * (rows.stop - rows.start) / len(images)
        return total
