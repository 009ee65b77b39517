"""Samplers: from noise to image, one level at a time.

A sampler knows neither the schedule nor what the network predicts.  It is given ``denoise(x, level) -> (clean, noise)``
and the levels to visit, the last of them CLEAN, and yields a Step after each.  Coefficients are plain floats, so x may
be a tensor, an array or a number.  To add one: write a generator, add a row to SAMPLERS.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from tiny_diffusion.diffusion.levels import Array, Denoise, Draw, Level, Step
from tiny_diffusion.diffusion.multistep import ETA, abm, sa_solver


def ddim(
    denoise: Denoise, x: Array, levels: Sequence[Level], draw: Draw | None = None, eta: float = 0.0
) -> Iterator[Step]:
    """Song et al. (2021), eq. 12 and 16.  eta 0 is deterministic, eta 1 is DDPM's ancestral sampling (small variance).

    draw: called once a step where eta > 0.
    """
    for level, following in pairwise(levels):
        clean, noise = denoise(x, level)
        fresh = 0.0  # the part of following.sigma^2 that is drawn anew
        if eta:
            kept = (level.alpha / following.alpha * following.sigma) ** 2
            fresh = eta**2 * (level.sigma**2 - kept) * following.sigma**2 / level.sigma**2
        x = following.alpha * clean + math.sqrt(max(following.sigma**2 - fresh, 0.0)) * noise
        if fresh > 0:
            x = x + math.sqrt(fresh) * draw()
        yield Step(following, x, clean)


def heun(denoise: Denoise, x: Array, levels: Sequence[Level]) -> Iterator[Step]:
    """Heun's method on y = x / radius over the angle of the level; n steps are 2 n - 1 evaluations.

    Karras et al. (2022), algorithm 1, in the variables where the derivative is v and stays finite at alpha = 0.
    """
    for level, following in pairwise(levels):
        clean, noise = denoise(x, level)
        if following.sigma == 0:
            yield Step(following, clean, clean)
            continue
        y, slope, step = x / level.radius, level.velocity(clean, noise), following.angle - level.angle
        guess = following.radius * (y + step * slope)
        slope = (slope + following.velocity(*denoise(guess, following))) / 2
        x = following.radius * (y + step * slope)
        yield Step(following, x, clean)


def dpmpp_2m(denoise: Denoise, x: Array, levels: Sequence[Level]) -> Iterator[Step]:
    """DPM-Solver++(2M): two-step extrapolation of x_0 in log(alpha/sigma).  Lu et al. (2022b), algorithm 2."""
    previous, last_h = None, None
    for level, following in pairwise(levels):
        clean, _ = denoise(x, level)
        if following.sigma == 0:
            yield Step(following, clean, clean)
            continue
        shrink = level.alpha * following.sigma / (level.sigma * following.alpha)  # e^-h, 0 at alpha = 0
        h = -math.log(shrink) if shrink > 0 else math.inf
        ahead = clean
        if previous is not None:
            ahead = clean + h / (2 * last_h) * (clean - previous)
        x = following.sigma / level.sigma * x + following.alpha * (1 - shrink) * ahead
        previous, last_h = clean, h
        yield Step(following, x, clean)


@dataclass(frozen=True)
class Sampler:
    """run: the generator.  order: of convergence; None for a random process.  draws: whether `run` needs `draw`.

    grid: the grid to use unless another is asked for.  eta: its default, None where eta cannot be chosen.
    max_eta: the largest allowed; a larger one spreads samples too far.
    steps: how many to take unless another number is asked for (benchmarks/RESULTS.md has the quality by steps); None is
    one for each timestep.
    evaluations_per_step: calls of the denoiser for each step but the last, which has one.
    """

    run: Callable[..., Iterator[Step]]
    order: int | None
    grid: str
    draws: bool = False
    eta: float | None = None
    max_eta: float = 0.0
    steps: int | None = 20
    evaluations_per_step: int = 1

    def evaluations(self, steps: int) -> int:
        """Calls of the denoiser for this many steps."""
        return self.evaluations_per_step * (steps - 1) + 1

    def usual_steps(self, timesteps: int) -> int:
        """The steps to take unless another number is asked for, on a schedule of so many timesteps."""
        return min(self.steps or timesteps, timesteps)


SAMPLERS = {
    #               generator          order  grid
    "ddpm": Sampler(partial(ddim, eta=1.0), None, "trailing", draws=True, steps=None),
    "ddim": Sampler(ddim, 1, "trailing", eta=0.0, max_eta=1.0),
    "heun": Sampler(heun, 2, "angle", evaluations_per_step=2),
    "dpmpp_2m": Sampler(dpmpp_2m, 2, "rho"),
    "abm": Sampler(abm, 3, "angle", steps=10),
    # For Gaussian data of deviation 0.5, 1.5 spreads samples up to 6 % too far, 2 up to 13 %, 10 up to three times.
    "sa_solver": Sampler(sa_solver, None, "angle", draws=True, eta=ETA, max_eta=1.5, steps=10),
}
