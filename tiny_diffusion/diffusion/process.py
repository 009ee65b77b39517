"""The diffusion process on batches of images: noising, the training loss, and the denoiser that samplers call.

It applies the tables of schedules, predictions and weights to tensors, and knows neither data sets nor optimisers.  A
model is any callable ``model(x, time, label) -> output`` with x (B, C, H, W), time (B,) and label (B,) or None.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tiny_diffusion.diffusion.guidance import Model, guided
from tiny_diffusion.diffusion.levels import Denoise, Level
from tiny_diffusion.diffusion.loss_weights import output_weight
from tiny_diffusion.diffusion.predictions import recover, target
from tiny_diffusion.diffusion.schedules import Schedule
from tiny_diffusion.diffusion.timesteps import TIMESTEP_DISTRIBUTIONS

# name: (loss, power), where loss(c * error) = c**power * loss(error), or None if no power does that for every error.
LOSSES = {"mse": (F.mse_loss, 2), "l1": (F.l1_loss, 1), "huber": (F.smooth_l1_loss, None)}


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A noising process, and what the network learns about it.  Each name is a key of its module's table."""

    schedule: Schedule
    prediction: str = "v"
    loss_weight: str = "uniform"
    timestep_distribution: str = "uniform"
    loss_kind: str = "mse"

    def timesteps(self, u: np.ndarray) -> np.ndarray:
        """Real-valued t in [0, T-1] for uniform u in (0, 1), by the timestep distribution."""
        t = TIMESTEP_DISTRIBUTIONS[self.timestep_distribution](self.schedule, u)
        return np.clip(t, 0, self.schedule.timesteps - 1)

    def add_noise(self, clean: Tensor, noise: Tensor, t: np.ndarray) -> Tensor:
        """The images at time t of the noising process: q(x_t | x_0), Ho et al. (2020), eq. 4.

        clean, noise: (B, C, H, W), clean in [-1, 1].   t: (B,) real-valued in [0, T-1].
        Raises IndexError if any t is outside the schedule.
        """
        _, alpha, sigma = self.schedule.at(t)
        return _per_image(alpha, clean) * clean + _per_image(sigma, clean) * noise

    def loss(self, model: Model, clean: Tensor, noise: Tensor, t: np.ndarray, label: Tensor | None = None) -> Tensor:
        """The weighted training loss, averaged over the batch: a scalar.  Shapes as in `add_noise`."""
        time, alpha, sigma = self.schedule.at(t)
        loss, power = LOSSES[self.loss_kind]
        weight, scale = output_weight(self.loss_weight, self.prediction, alpha, sigma)
        if power is not None:
            weight = weight * scale**power
        weight, scale = _per_image(weight, clean), _per_image(scale, clean)
        wanted = target(self.prediction, _per_image(alpha, clean), _per_image(sigma, clean), clean, noise)
        output = model(self.add_noise(clean, noise, t), _per_image(time, clean).flatten(), label).to(wanted.dtype)
        if power is None:
            output, wanted = scale * output, scale * wanted
        return (weight * loss(output, wanted, reduction="none")).mean()

    def denoiser(
        self, model: Model, label: Tensor | None = None, guidance: float = 1.0, clip: bool = True,
        autocast: torch.dtype | None = None, *, interval: tuple[float, float] | None = None, guide: Model | None = None,
    ) -> Denoise:  # fmt: skip
        """``denoise(x, level) -> (clean, noise)`` for the samplers, without gradients.

        guidance, interval, guide: the weight w of ``none + w (label - none)`` on the output, 1 being conditional, where
        it holds, and the model that predicts `none`: see diffusion/guidance.py.
        clip: clamp the estimate of x_0 to [-1, 1] and recompute the noise, because near pure noise x_0 is divided by a
        tiny alpha.  Raises ValueError for guidance without labels or guide.
        """
        predict = guided(model, label, guidance, interval, guide)

        @torch.no_grad()
        def denoise(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
            with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
                output = predict(x, level)
            clean, noise = recover(self.prediction, level.alpha, level.sigma, x, output.to(x.dtype))
            if clip:
                clean = clean.clamp(-1, 1)
                noise = (x - level.alpha * clean) / level.sigma
            return clean, noise

        return denoise


def _per_image(values: np.ndarray, images: Tensor) -> Tensor:
    """(B,) numbers as (B, 1, 1, 1), on the device and in the type of the images."""
    return torch.as_tensor(values, dtype=images.dtype).to(images.device, non_blocking=True).view(-1, 1, 1, 1)
