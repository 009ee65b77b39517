"""Bits per dimension of images under a model, by the probability-flow ODE.

Song et al. (2021), section 4.3, over the angle phi = atan2(sigma, alpha) instead of time: z = x / |(alpha, sigma)|
moves with the velocity dz/dphi = cos(phi) noise - sin(phi) x_0, which is regular from clean image to noise, so
log p(z_0) = log N(z_end; 0, I) + the integral of div(dz/dphi).  Exact for a Gaussian: tests/test_likelihood.py.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.data.files.scan import Progress
from tiny_diffusion.diffusion.levels import Level
from tiny_diffusion.diffusion.predictions import recover
from tiny_diffusion.diffusion.process import Diffusion, Model
from tiny_diffusion.diffusion.schedules import Schedule
from tiny_diffusion.randomness import stream

MAX_IMAGES = 256  # whose mean is taken
BATCH = 64
STEPS, MAX_STEPS = 100, 1600  # of Heun's method: at first, and at most
MAX_CHANGE = 0.01  # bits per dimension; the error that is left is about a third, since it falls with the steps squared
FEW = 16  # images on which the number of steps is tried


def heldout_bits(
    model: Model, diffusion: Diffusion, images: Tensor, device: torch.device, *, seed: int, progress: Progress
) -> tuple[float, float]:
    """The mean of bits per dimension over held-out uint8 images (N, C, H, W), and its standard error.

    device: that of the model.  The steps are doubled until that changes the first images' mean by at most MAX_CHANGE.
    """

    def bits_of(start: int, count: int, steps: int) -> Tensor:
        batch = images[start : start + count].to(device)
        return bits_per_dimension(model, diffusion, batch, seed=seed, steps=steps, first=start).cpu()

    steps, before, now = STEPS, bits_of(0, FEW, STEPS // 2).mean(), bits_of(0, FEW, STEPS).mean()
    while steps < MAX_STEPS and abs(now - before) > MAX_CHANGE:
        steps *= 2
        before, now = now, bits_of(0, FEW, steps).mean()
    starts = range(0, len(images), BATCH)
    bits = torch.cat([bits_of(start, BATCH, steps) for start in progress(starts, len(starts), "likelihood")])
    return float(bits.mean()), float(bits.std() / len(bits) ** 0.5)


def bits_per_dimension(
    model: Model, diffusion: Diffusion, images: Tensor, *, seed: int = 0, steps: int = STEPS, first: int = 0
) -> Tensor:
    """(B,) float64 for uint8 images (B, C, H, W), on their device; uniformly dequantised, Theis et al. (2016).

    steps: of Heun's method.  The divergence is estimated with one Rademacher vector per image (Hutchinson 1990), so the
    mean over images is unbiased.  first: the index of the first image; the random numbers of an image are keyed by its
    index.
    """
    streams = [stream(seed, "likelihood", first + i) for i in range(len(images))]
    shape = images.shape[1:]

    def for_each(of: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack([of(random) for random in streams])).to(images.device)

    uniform = for_each(lambda random: random.random(shape, dtype=np.float32))
    probe = for_each(lambda random: random.integers(0, 2, shape).astype(np.float32) * 2 - 1)
    z = (images.float() + uniform - 0.5) / 127.5 - 1  # centred on the value that the network was trained on
    log_density = log_likelihood(model, diffusion, z, probe, steps)
    dimensions = images[0].numel()
    return -log_density / (dimensions * math.log(2)) + math.log2(127.5)


def log_likelihood(model: Model, diffusion: Diffusion, clean: Tensor, probe: Tensor, steps: int) -> Tensor:
    """(B,) float64: the natural logarithm of the density at images (B, C, H, W), about in [-1, 1].

    The process starts at its cleanest level and takes the images to be as noisy as that already, so this is the density
    of such slightly noisy images.  probe: the Rademacher vectors of Hutchinson's estimate, (B, C, H, W).
    """
    levels = _levels(diffusion.schedule, steps)
    z, integral = clean, torch.zeros(len(clean), dtype=torch.float64, device=clean.device)
    here = levels[0].angle
    velocity, divergence = _velocity(model, diffusion, z, levels[0], probe)
    for level in levels[1:]:
        there = level.angle
        ahead, ahead_divergence = _velocity(model, diffusion, z + (there - here) * velocity, level, probe)
        z = z + (there - here) * (velocity + ahead) / 2
        integral += (there - here) * (divergence + ahead_divergence).double() / 2
        velocity, divergence = _velocity(model, diffusion, z, level, probe)
        here = there
    gaussian = -0.5 * (z.double().square() + math.log(2 * math.pi)).flatten(1).sum(1)
    return gaussian + integral


def _levels(schedule: Schedule, steps: int) -> list[Level]:
    """The ends of the steps, from the cleanest level of the schedule to noise, uniform in the logarithm of the angle.

    Near the clean image that is uniform in log-SNR: pixels of deviation s change most at angles about s, however small.
    """
    last = schedule.timesteps - 1
    angles = np.geomspace(schedule.level(0).angle, schedule.level(last).angle, steps + 1)
    times = schedule.t_at(-2 * np.log(np.tan(angles)))
    times[0], times[-1] = 0, last  # exactly
    return [schedule.level(t) for t in times]


def _velocity(model: Model, diffusion: Diffusion, z: Tensor, level: Level, probe: Tensor) -> tuple[Tensor, Tensor]:
    """dz/dphi (B, C, H, W), and the estimate probe . J probe of its divergence, (B,)."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        x = z * level.radius
        time = torch.full((len(x),), level.time, device=x.device)
        output = model(x, time, None)
        clean, noise = recover(diffusion.prediction, level.alpha, level.sigma, x, output)
        velocity = level.velocity(clean, noise)
        (gradient,) = torch.autograd.grad((velocity * probe).sum(), z)
    return velocity.detach(), (gradient * probe).flatten(1).sum(1).detach()
