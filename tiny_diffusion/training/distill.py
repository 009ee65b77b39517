"""Distillation: a trained model learns to sample in one to four evaluations, by consistency tuning on data.

From any noisy image on one path the student jumps to the same point, the end of the path's segment.  A jump is the
DDIM step that the teacher's own output implies, so the student begins as the teacher and stays an ordinary model.  It
learns from pairs of neighbouring levels of one image and one noise: its jump from the noisier level shall equal its
jump from the cleaner one.  Geng et al. (2024), "Consistency Models Made Easy" (ECT), stated here in the noise angle.
"""

import contextlib
import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tiny_diffusion.config.student import GRID, Student
from tiny_diffusion.diffusion.grids import make_levels
from tiny_diffusion.diffusion.levels import Level
from tiny_diffusion.diffusion.predictions import recover
from tiny_diffusion.diffusion.process import Diffusion, Model
from tiny_diffusion.diffusion.timesteps import edm
from tiny_diffusion.training.moments import MomentMatching

MEAN, STD = -0.9, 2.0  # of ln(sigma/alpha): ECT's N(-1.1, 2^2) for pixels of standard deviation 0.6 instead of 0.5
SMALLEST_GAP = 1 / 256  # of the pair's sigma/alpha, near pure noise; five times as much near the clean image
COARSER = 8  # times the smallest gap at the start, halved after each eighth of the run until it is 1
MAX_RATIO = 1e3  # sigma/alpha from which on levels count as pure noise
MAX_WEIGHT = 10.0  # of a pair, over that of the median level
SOFTENING = 1e-4  # of the norm, sqrt(x^2 + s^2) - s, whose gradient would not be finite at 0


def distillation(student: Student, diffusion: Diffusion, model: nn.Module) -> dict[str, object]:
    """What a Trainer of the model needs to make it this student, by the names of its arguments."""
    needs_teacher = student.moments or student.guidance != 1
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if needs_teacher else None
    guide = teacher if student.guidance != 1 else None
    consistency = Consistency(diffusion, student.segments, guide, student.guidance)
    if not student.moments:
        return {"objective_at": consistency, "networks": {"teacher": teacher} if needs_teacher else {}}
    levels = make_levels(diffusion.schedule, GRID, student.steps)
    matching = MomentMatching(consistency, diffusion, levels, teacher, model.num_classes)
    matching.moments.to(next(model.parameters()).device)
    return {
        "objective_at": matching, "networks": {"teacher": teacher, "moments": matching.moments},
        "begin": matching.begin, "after_step": matching.after_step,
    }  # fmt: skip


class Consistency:
    """``Consistency(...)(progress)`` is the objective of a step at this share of the run, from 0 to 1.

    teacher: another network, whose guided direction makes the pairs in place of the image's own noise, or None.
    guidance: its weight w of ``none + w (label - none)``.
    """

    def __init__(self, diffusion: Diffusion, segments: int, teacher: nn.Module | None = None, guidance: float = 1.0):
        self.diffusion, self.teacher, self.guidance = diffusion, teacher, guidance
        ends = make_levels(diffusion.schedule, GRID, segments)[::-1]
        self.end_angle, self.end_alpha, self.end_sigma = (
            np.array([getattr(level, name) for level in ends]) for name in ("angle", "alpha", "sigma")
        )

    def clean(self, model: Model, x: Tensor, level: Level, label: Tensor | None) -> Tensor:
        """The model's estimate of the clean images of x, with gradients."""
        output = model(x, x.new_full((len(x),), float(level.time)), label).to(x.dtype)
        return recover(self.diffusion.prediction, level.alpha, level.sigma, x, output)[0]

    def __call__(self, progress: float) -> "ConsistencyLoss":
        return ConsistencyLoss(self, SMALLEST_GAP * max(1.0, COARSER / 2 ** int(8 * progress)))


@dataclass(frozen=True, eq=False)
class ConsistencyLoss:
    """The objective with pairs of one width.  gap: of sigma/alpha from the noisier level to the other, near noise."""

    task: Consistency
    gap: float

    def timesteps(self, u: np.ndarray) -> np.ndarray:
        """Real-valued t of the noisier level of each pair, for uniform u in (0, 1)."""
        schedule = self.task.diffusion.schedule
        return np.clip(edm(schedule, u, MEAN, STD), 0, schedule.timesteps - 1)

    def loss(self, model: Model, clean: Tensor, noise: Tensor, t: np.ndarray, label: Tensor | None = None) -> Tensor:
        """The mean distance of the two jumps per gap of their levels, root mean square over the pixels: a scalar.

        Shapes as in `Diffusion.loss`.  The cleaner level's jump is the target: the same weights and the same dropout,
        without gradients.
        """
        schedule = self.task.diffusion.schedule
        upper = Levels(*schedule.at(t))
        ratio = np.minimum(upper.sigma / np.maximum(upper.alpha, upper.sigma / MAX_RATIO), MAX_RATIO)
        gap = self.gap * (1 + 8 / (1 + np.exp(np.minimum(ratio, 100.0))))
        end = self._ends(upper)
        with torch.no_grad(), same_dropout(clean.device):
            target = self._target(model, clean, noise, upper, end, ratio * (1 - gap), label)
        jumped = self._jump(model, upper.noised(clean, noise), upper, end, label)
        distance = ((jumped - target).square().flatten(1).mean(1) + SOFTENING**2).sqrt() - SOFTENING
        median = np.exp(MEAN - schedule.shift / 2)
        weight = 1 / np.maximum(gap * ratio, self.gap * median / MAX_WEIGHT)
        return (torch.as_tensor(weight, dtype=distance.dtype).to(distance.device) * distance).mean()

    def _ends(self, upper: "Levels") -> "Levels":
        """The end of each level's segment: the first below it."""
        task = self.task
        index = np.searchsorted(task.end_angle, upper.angle - 1e-9) - 1
        return Levels(np.zeros(len(index)), task.end_alpha[index], task.end_sigma[index])

    def _target(
        self, model: Model, clean: Tensor, noise: Tensor, upper: "Levels", end: "Levels", ratio: np.ndarray,
        label: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The jump from the level with this ratio of sigma to alpha; where that is beyond the end, the end itself."""
        schedule, task = self.task.diffusion.schedule, self.task
        at_end = (np.arctan(ratio) <= end.angle) | (ratio < np.exp(-schedule.log_snr[0] / 2))
        lower = Levels(*schedule.at(np.where(at_end, 0.0, schedule.t_at(-2 * np.log(ratio)))))
        if task.teacher is not None:
            clean, noise = self._guided(upper.noised(clean, noise), upper, label)
        jumped = self._jump(model, lower.noised(clean, noise), lower, end, label)
        return torch.where(per_image(at_end, clean) > 0, end.noised(clean, noise), jumped)

    def _guided(self, x: Tensor, level: "Levels", label: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's estimates of (clean image, noise) under guidance, with dropped labels as without guidance."""
        time, (task, diffusion) = level.times(x), (self.task, self.task.diffusion)
        without = task.teacher(x, time, None).to(x.dtype)
        output = without + task.guidance * (task.teacher(x, time, label).to(x.dtype) - without)
        return recover(diffusion.prediction, per_image(level.alpha, x), per_image(level.sigma, x), x, output)

    def _jump(self, model: Model, x: Tensor, level: "Levels", end: "Levels", label: Tensor | None) -> Tensor:
        """cos(phi - psi) x - sin(phi - psi) v in the angles of the two levels: the DDIM step between them."""
        output = model(x, level.times(x), label).to(x.dtype)
        prediction, alpha, sigma = self.task.diffusion.prediction, per_image(level.alpha, x), per_image(level.sigma, x)
        return end.noised(*recover(prediction, alpha, sigma, x, output))


@dataclass(frozen=True, eq=False)
class Levels:
    """One noise level for each image of a batch; each array is (B,)."""

    time: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray

    @property
    def angle(self) -> np.ndarray:
        return np.arctan2(self.sigma, self.alpha)

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """The images with this noise at their levels."""
        return per_image(self.alpha, clean) * clean + per_image(self.sigma, clean) * noise

    def times(self, images: Tensor) -> Tensor:
        """(B,) what the network is given for the levels."""
        return per_image(self.time, images).flatten()


def per_image(values: np.ndarray, images: Tensor) -> Tensor:
    """(B,) numbers as (B, 1, 1, 1), on the device and in the type of the images."""
    return torch.as_tensor(values, dtype=images.dtype).to(images.device, non_blocking=True).view(-1, 1, 1, 1)


def same_dropout(device: torch.device) -> contextlib.AbstractContextManager:
    """Afterwards torch's generators are as before, so that the next forward pass drops the same activations."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
