"""The error of a model by noise level: where it fails, and where it has learnt by heart."""

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.data.pixels import to_float
from tiny_diffusion.diffusion.process import Diffusion, Model
from tiny_diffusion.randomness import torch_stream

LOG_SNRS = tuple(np.linspace(8, -8, 17).tolist())


def error_by_level(model: Model, diffusion: Diffusion, images: Tensor, seed: int = 0) -> list[float]:
    """At each of LOG_SNRS the mean squared error of the estimated clean image, over the variance of the images.

    images: uint8 (N, C, H, W) on the model's device.  1 is as good as guessing the mean, 0 perfect.
    """
    clean = to_float(images)
    variance = float((clean - clean.mean(0)).square().mean())
    found = []
    for number, log_snr in enumerate(LOG_SNRS):
        level = diffusion.schedule.level(float(diffusion.schedule.t_at(np.float64(log_snr))))
        noise = torch.empty_like(clean).normal_(generator=torch_stream(seed, "likelihood", number, clean.device))
        denoise = diffusion.denoiser(model, clip=False)
        guess, _ = denoise(level.alpha * clean + level.sigma * noise, level)
        found.append(float((guess - clean).square().mean()) / max(variance, 1e-12))
    return found
