"""The error of a model by noise level: where it fails, and where it has memorised its training images."""

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.data.pixels import to_float
from tiny_diffusion.diffusion.process import Diffusion, Model
from tiny_diffusion.diffusion.schedules import Schedule
from tiny_diffusion.evaluation.reference import Real
from tiny_diffusion.randomness import torch_stream

LOG_SNRS = tuple(np.linspace(8, -8, 17).tolist())
MAX_IMAGES = 256  # of each set


def error_curves(
    model: Model, diffusion: Diffusion, real: Real, device: torch.device, seed: int = 0
) -> dict[str, list[float]]:
    """The errors of `error_by_level` on training images and, if there are any, on held-out ones, by name.

    device: that of the model, whose null class is used if it has classes.
    """
    sets = {f"{real.images.name}, {real.split}": real.images, "held out": real.heldout}
    return {
        name: error_by_level(model, diffusion, images.subset(MAX_IMAGES).images.to(device), seed)
        for name, images in sets.items()
        if images is not None
    }


def log_snrs_of(schedule: Schedule) -> list[float]:
    """Those of LOG_SNRS that lie between the first and the last level of the schedule."""
    return [log_snr for log_snr in LOG_SNRS if schedule.log_snr[-1] <= log_snr <= schedule.log_snr[0]]


def error_by_level(model: Model, diffusion: Diffusion, images: Tensor, seed: int = 0) -> list[float]:
    """The mean squared error of the x_0 estimate at each of `log_snrs_of`, divided by the variance of the images.

    images: uint8 (N, C, H, W) on the model's device.  0 is perfect; 1 is as good as the mean image.
    """
    clean = to_float(images)
    variance = float((clean - clean.mean(0)).square().mean())
    errors = []
    for log_snr in log_snrs_of(diffusion.schedule):
        level = diffusion.schedule.level(float(diffusion.schedule.t_at(np.float64(log_snr))))
        noise = torch.empty_like(clean).normal_(
            generator=torch_stream(seed, "likelihood", LOG_SNRS.index(log_snr), clean.device)
        )
        denoise = diffusion.denoiser(model, clip=False)
        estimate, _ = denoise(level.alpha * clean + level.sigma * noise, level)
        errors.append(float((estimate - clean).square().mean()) / max(variance, 1e-12))
    return errors
