"""Guidance: pushes the network's output away from a weaker prediction, ``none + w (label - none)``.

The weaker prediction is the same network's with the null class (classifier-free guidance, Ho & Salimans 2022), or that
of a guide, which is an earlier or smaller model (autoguidance, Karras et al. 2024).  The output is linear in the image
and the noise, so guiding it guides both.  It wraps a model for `Diffusion.denoiser`, and no sampler knows of it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tiny_diffusion.diffusion.levels import Level

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def time_of(level: Level) -> float:
    """The time of a level, from 0 (clean) to 1 (pure noise): its angle atan2(sigma, alpha) in quarter turns.

    It depends on the ratio of noise to image alone, so it means the same on every schedule, shifted or not.  On the
    cosine schedule it is t / T to within a hundredth.
    """
    return level.angle / (math.pi / 2)


def weight_at(level: Level, weight: float, interval: tuple[float, float] | None = None) -> float:
    """The weight of guidance at a level: 1, which is none, outside the interval.  Kynkäänniemi et al. (2024).

    interval: (low, high) in the time of `time_of`, both ends included; None is everywhere.
    """
    return weight if interval is None or interval[0] <= time_of(level) <= interval[1] else 1.0


def evaluations_at(level: Level, weight: float, interval: tuple[float, float] | None = None) -> int:
    """How often a network is evaluated at a level for each image: once where one prediction is the whole output."""
    return 1 if weight_at(level, weight, interval) in (0, 1) else 2


class Autoguided(nn.Module):
    """A model that a weaker one guides: its `none` is the guide's, wherever the weight of guidance is not 1.

    model, guide: networks of the same images, classes, schedule and prediction, on one device.
    """

    def __init__(self, model: nn.Module, guide: nn.Module):
        super().__init__()
        self.model, self.guide = model, guide

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return self.model(x, time, label)


def guided(
    model: Model,
    label: Tensor | None = None,
    weight: float = 1.0,
    interval: tuple[float, float] | None = None,
    guide: Model | None = None,
) -> Callable[[Tensor, Level], Tensor]:
    """``predict(x, level) -> output`` of the guided model.

    weight: w of ``none + w (label - none)``; 1 is the model with the label, 0 the weaker prediction alone, and both
    take one evaluation.   interval: as in `weight_at`.   guide: predicts `none`, with the same label, in place of the
    model with the null class.  Raises ValueError for a weight that has nothing to guide away from.
    """
    if weight != 1 and label is None and guide is None:
        raise ValueError("guidance needs labels, or a guide")

    def predict(x: Tensor, level: Level) -> Tensor:
        time = torch.full((len(x),), level.time, device=x.device)
        w = weight_at(level, weight, interval)
        if w == 1:
            return model(x, time, label)
        if w == 0:
            return model(x, time, None) if guide is None else guide(x, time, label)
        if guide is None:
            towards, none = _both_halves(model, x, time, label)
        else:
            towards, none = model(x, time, label), guide(x, time, label)
        return none + w * (towards - none)

    return predict


def _both_halves(model: Model, x: Tensor, time: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs with the labels and with the null class, by one call on a batch of twice the size.

    A model that does not say which label its null class is, by its num_classes, is called twice.
    """
    null_class = getattr(model, "num_classes", None)
    if null_class is None:
        return model(x, time, label), model(x, time, None)
    labels = torch.cat([label, torch.full_like(label, null_class)])
    towards, none = model(torch.cat([x, x]), torch.cat([time, time]), labels).chunk(2)
    return towards, none
