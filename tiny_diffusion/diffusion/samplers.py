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
from typing import Any

import numpy as np

from tiny_diffusion.diffusion.schedules import Level

Array = Any  # a torch tensor, a numpy array or a float
Denoise = Callable[[Array, Level], tuple[Array, Array]]
Draw = Callable[[], Array]

GAUSS_NODES, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(12)  # integrals over [-1, 1], here to rounding
ETA = 1.5  # of sa_solver: the best of 0.6 to 3 at 5 to 50 evaluations, see benchmarks/RESULTS.md


@dataclass(frozen=True, slots=True)
class Step:
    """level: where x now stands.  x: the state there.  clean: the estimate of x_0 that led to it."""

    level: Level
    x: Array
    clean: Array


def ddim(denoise: Denoise, x: Array, levels: Sequence[Level], draw: Draw | None = None, eta: float = 0.0) -> Iterator:
    """Song et al. (2021), eq. 12 and 16.  eta 0 is deterministic, eta 1 is DDPM's ancestral sampling (small variance).

    draw: standard normal noise of x's shape, called once a step where eta > 0.
    """
    for level, following in pairwise(levels):
        clean, noise = denoise(x, level)
        fresh = 0.0
        if eta:
            kept = (level.alpha / following.alpha * following.sigma) ** 2
            fresh = eta**2 * (level.sigma**2 - kept) * following.sigma**2 / level.sigma**2
        x = following.alpha * clean + math.sqrt(max(following.sigma**2 - fresh, 0.0)) * noise
        if fresh > 0:
            x = x + math.sqrt(fresh) * draw()
        yield Step(following, x, clean)


def heun(denoise: Denoise, x: Array, levels: Sequence[Level]) -> Iterator:
    """Heun's method on y = x / |(alpha, sigma)| over the angle atan2(sigma, alpha); 2 n - 1 evaluations.

    Karras et al. (2022), algorithm 1, in the variables where the derivative is v and stays finite at alpha = 0.
    """
    for level, following in pairwise(levels):
        clean, noise = denoise(x, level)
        if following.sigma == 0:
            yield Step(following, clean, clean)
            continue
        y, slope, turn = x / _length(level), _velocity(level, clean, noise), _angle(following) - _angle(level)
        guess = _length(following) * (y + turn * slope)
        slope = (slope + _velocity(following, *denoise(guess, following))) / 2
        x = _length(following) * (y + turn * slope)
        yield Step(following, x, clean)


def dpmpp_2m(denoise: Denoise, x: Array, levels: Sequence[Level]) -> Iterator:
    """DPM-Solver++(2M): two-step extrapolation of x_0 in log(alpha/sigma).  Lu et al. (2022b), algorithm 2."""
    previous, last_h = None, None
    for level, following in pairwise(levels):
        clean, _ = denoise(x, level)
        if following.sigma == 0:
            yield Step(following, clean, clean)
            continue
        shrink = level.alpha * following.sigma / (level.sigma * following.alpha)  # e^-h, 0 where alpha is
        h = -math.log(shrink) if shrink > 0 else math.inf
        ahead = clean
        if previous is not None:
            ahead = clean + h / (2 * last_h) * (clean - previous)
        x = following.sigma / level.sigma * x + following.alpha * (1 - shrink) * ahead
        previous, last_h = clean, h
        yield Step(following, x, clean)


def abm(denoise: Denoise, x: Array, levels: Sequence[Level], order: int = 3) -> Iterator:
    """Adams-Bashforth predicts a step, Adams-Moulton corrects it with the slope found at its end; n evaluations.

    Multistep as iPNDM (Zhang & Chen, 2023, section 3.3), with UniPC's free corrector (Zhao et al., 2023, algorithm 1),
    over Heun's angle: clean and noise are extrapolated and the turn between them is exact, so the first step is DDIM's.
    """
    y = x / _length(levels[0])
    past: list[tuple[float, Array, Array]] = []  # (angle, clean, noise), the newest first
    for level, following in pairwise(levels):
        clean, noise = denoise(x, level)
        if following.sigma == 0:
            yield Step(following, clean, clean)
            continue
        start, end = _angle(level), _angle(following)
        past = [(start, clean, noise), *past[: order - 1]]
        if len(past) > 1:
            y = y + _turned(past, past[1][0], start)  # the step before, corrected
        x = _length(following) * (y + _turned(past, start, end))
        yield Step(following, x, clean)


def sa_solver(
    denoise: Denoise, x: Array, levels: Sequence[Level], draw: Draw | None = None, eta: float = ETA, order: int = 2
) -> Iterator:
    """Adams-Bashforth for the reverse of the noising process: the predictor of SA-Solver, Xue et al. (2023).

    eta: how much noise is drawn afresh and taken away again on the way, their tau: 0 is the probability flow, 1 the
    process itself in reverse.  What the network got wrong before is forgotten with the old noise.  Theirs but for the
    polynomial of past estimates, which is one in Heun's angle, so that levels without any image are fine.
    draw: standard normal noise of x's shape, called once a step where eta > 0.
    """
    past: list[tuple[float, Array]] = []  # (angle, clean), the newest first
    for level, following in pairwise(levels):
        clean, _ = denoise(x, level)
        if following.sigma == 0:
            yield Step(following, clean, clean)
            continue
        past = [(_angle(level), clean), *past[: order - 1]]
        shrink = level.alpha * following.sigma / (level.sigma * following.alpha)  # e^-h, 0 where alpha is
        x = following.sigma / level.sigma * shrink ** (eta**2) * x + _pulled(past, shrink, following, eta)
        if eta:
            x = x + following.sigma * math.sqrt(1 - shrink ** (2 * eta**2)) * draw()
        yield Step(following, x, clean)


def _pulled(past: Sequence[tuple[float, Array]], shrink: float, end: Level, eta: float) -> Array:
    """What a step of sa_solver adds of the image, which is a polynomial through the past.

    Its integral of alpha * (1 + eta^2) * image * w^(eta^2) dw, w being the end's sigma/alpha over that on the way.
    """
    known = _apart(past, abs(past[0][0] - _angle(end)))
    ratios = shrink + (1 - shrink) * (1 + GAUSS_NODES) / 2
    angles = np.arctan2(end.sigma, end.alpha * ratios)
    weights = GAUSS_WEIGHTS * ratios ** (eta**2)
    weights = weights / weights.sum() * end.alpha * (1 - shrink ** (1 + eta**2))
    shares = [float(np.sum(share * weights)) for share in _shares(known, angles)]
    return sum(share * clean for share, (_, clean) in zip(shares, known, strict=True))


def _turned(past: Sequence[tuple[float, Array, Array]], start: float, end: float) -> Array:
    """The integral of cos(angle) * noise - sin(angle) * clean from start to end, both polynomials through the past."""
    known = _apart(past, abs(end - start))
    angles = start + (end - start) * (1 + GAUSS_NODES) / 2
    total = 0.0
    for share, (_, clean, noise) in zip(_shares(known, angles), known, strict=True):
        share = share * GAUSS_WEIGHTS * (end - start) / 2
        total = total + float(np.sum(share * np.cos(angles))) * noise - float(np.sum(share * np.sin(angles))) * clean
    return total


def _apart(past: Sequence[tuple], step: float) -> list[tuple]:
    """Of the estimates (angle, ...) those more than half of the step from one another: extrapolated from the others,
    the network's errors would be multiplied."""
    known = list(past[:1])
    for estimate in past[1:]:
        if 2 * abs(estimate[0] - known[-1][0]) <= step:
            break
        known.append(estimate)
    return known


def _shares(known: Sequence[tuple], angles: np.ndarray) -> list[np.ndarray]:
    """Lagrange's polynomials: the share that each estimate (angle, ...) has in what lies at these angles."""
    places = [estimate[0] for estimate in known]
    return [
        np.prod([(angles - other) / (here - other) for other in places if other != here] or [angles**0], axis=0)
        for here in places
    ]


def _angle(level: Level) -> float:
    return math.atan2(level.sigma, level.alpha)


def _length(level: Level) -> float:
    return math.hypot(level.alpha, level.sigma)


def _velocity(level: Level, clean: Array, noise: Array) -> Array:
    """dy/d(angle), from y = cos(angle) * clean + sin(angle) * noise."""
    return (level.alpha * noise - level.sigma * clean) / _length(level)


@dataclass(frozen=True)
class Sampler:
    """run: the generator.  order: of convergence, None for a random process.  draws: whether it needs `draw`.

    grid: the levels that suit it, unless others are asked for.  eta: its usual one where that can be chosen, and
    max_eta: the largest.  few: whether few steps will do.  evaluations: of the network for n steps.
    """

    run: Callable[..., Iterator[Step]]
    order: int | None
    grid: str
    draws: bool = False
    eta: float | None = None
    max_eta: float = 0.0
    few: bool = True
    evaluations: Callable[[int], int] = lambda steps: steps


SAMPLERS = {
    #                   generator               order  grid
    "ddpm": Sampler(partial(ddim, eta=1.0), None, "trailing", draws=True, few=False),
    "ddim": Sampler(ddim, 1, "trailing", eta=0.0, max_eta=1.0),
    "heun": Sampler(heun, 2, "angle", evaluations=lambda steps: 2 * steps - 1),
    "dpmpp_2m": Sampler(dpmpp_2m, 2, "rho"),
    "abm": Sampler(abm, 3, "angle"),
    "sa_solver": Sampler(sa_solver, None, "angle", draws=True, eta=ETA, max_eta=10.0),
}
