"""Bits per dimension of images under a model, by the probability-flow ODE.

Song et al. (2021), section 4.3, over the angle phi = atan2(sigma, alpha) instead of time: z = x / |(alpha, sigma)|
turns with dz/dphi = cos(phi) noise - sin(phi) clean, which is regular from clean to pure noise, so
log p(z_0) = log N(z_end; 0, I) + the integral of div(dz/dphi).  Exact for a Gaussian: tests/test_likelihood.py.
"""

import math

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.diffusion.grids import angle
from tiny_diffusion.diffusion.levels import Level
from tiny_diffusion.diffusion.predictions import recover
from tiny_diffusion.diffusion.process import Diffusion, Model
from tiny_diffusion.randomness import stream


def bits_per_dimension(
    model: Model, diffusion: Diffusion, images: Tensor, *, seed: int = 0, steps: int = 50, first: int = 0
) -> Tensor:
    """(B,) float64 for uint8 images (B, C, H, W), on their device; uniformly dequantised, Theis et al. (2016).

    steps: of Heun's method.  The divergence is estimated with one Rademacher vector an image (Hutchinson 1990), so the
    mean over images is unbiased.  first: the number of the first image, which its random numbers are keyed by.
    """
    draws = [stream(seed, "likelihood", first + i) for i in range(len(images))]
    shape = images.shape[1:]

    def drawn(of) -> Tensor:
        return torch.from_numpy(np.stack([of(draw) for draw in draws])).to(images.device)

    uniform = drawn(lambda draw: draw.random(shape, dtype=np.float32))
    probe = drawn(lambda draw: draw.integers(0, 2, shape).astype(np.float32) * 2 - 1)
    z = (images.float() + uniform - 0.5) / 127.5 - 1  # around what the network was trained on
    log_density = log_likelihood(model, diffusion, z, probe, steps)
    dimensions = images[0].numel()
    return -log_density / (dimensions * math.log(2)) + math.log2(127.5)


def log_likelihood(model: Model, diffusion: Diffusion, clean: Tensor, probe: Tensor, steps: int) -> Tensor:
    """(B,) float64: the natural logarithm of the density at images (B, C, H, W), about in [-1, 1].

    The process starts at its cleanest level, as if the images were as noisy as that already: what is modelled is the
    density of such images.  probe: of the Hutchinson estimate, of the images' shape.
    """
    schedule = diffusion.schedule
    times = angle(schedule, steps)[::-1].copy()
    times[0] = 0.0
    levels = [schedule.level(t) for t in times]
    z, integral = clean, torch.zeros(len(clean), dtype=torch.float64, device=clean.device)
    here = levels[0].angle
    speed, divergence = _turn(model, diffusion, z, levels[0], probe)
    for level in levels[1:]:
        there = level.angle
        ahead, ahead_divergence = _turn(model, diffusion, z + (there - here) * speed, level, probe)
        z = z + (there - here) * (speed + ahead) / 2
        integral += (there - here) * (divergence + ahead_divergence).double() / 2
        speed, divergence = _turn(model, diffusion, z, level, probe)
        here = there
    gaussian = -0.5 * (z.double().square() + math.log(2 * math.pi)).flatten(1).sum(1)
    return gaussian + integral


def _turn(model: Model, diffusion: Diffusion, z: Tensor, level: Level, probe: Tensor) -> tuple[Tensor, Tensor]:
    """dz/dphi and an estimate of its divergence, probe . J probe."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        x = z * level.radius
        time = torch.full((len(x),), level.time, device=x.device)
        output = model(x, time, None)
        clean, noise = recover(diffusion.prediction, level.alpha, level.sigma, x, output)
        speed = level.velocity(clean, noise)
        (gradient,) = torch.autograd.grad((speed * probe).sum(), z)
    return speed.detach(), (gradient * probe).flatten(1).sum(1).detach()
