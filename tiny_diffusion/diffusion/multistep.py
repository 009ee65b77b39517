"""Multistep samplers: they interpolate the latest estimates of the denoiser and integrate the polynomial.

It is a polynomial in the angle of a level, which is finite even where no image is left (alpha = 0).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tiny_diffusion.diffusion.levels import Array, Denoise, Draw, Level, Step

ETA = 1.5  # of sa_solver: the best of 0.6 to 3 at 5 to 50 evaluations, see benchmarks/RESULTS.md
GAUSS_POINTS, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(12)  # for integrals over [-1, 1], here exact to rounding


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the denoiser estimated at one level, whose angle is a node of the interpolation."""

    angle: float
    clean: Array
    noise: Array


def abm(denoise: Denoise, x: Array, levels: Sequence[Level], order: int = 3) -> Iterator[Step]:
    """Adams-Bashforth predicts each step, and Adams-Moulton corrects it with the estimate made at its end.

    Multistep as iPNDM (Zhang & Chen, 2023, section 3.3), with UniPC's corrector, which needs no evaluation of its own
    (Zhao et al., 2023, algorithm 1).  n steps are n evaluations; the first one is DDIM's.
    """
    y = x / levels[0].radius
    history: list[Estimate] = []  # the newest first
    for level, following in pairwise(levels):
        clean, noise = denoise(x, level)
        if following.sigma == 0:
            yield Step(following, clean, clean)
            continue
        history = [Estimate(level.angle, clean, noise), *history[: order - 1]]
        if len(history) > 1:
            y = y + velocity_integral(history, history[1].angle, level.angle)  # replaces the prediction
        x = following.radius * (y + velocity_integral(history, level.angle, following.angle))
        yield Step(following, x, clean)


def sa_solver(
    denoise: Denoise, x: Array, levels: Sequence[Level], draw: Draw | None = None, eta: float = ETA, order: int = 2
) -> Iterator[Step]:
    """The Adams-Bashforth predictor of SA-Solver for the reverse SDE: Xue et al. (2023), whose tau is eta.

    eta: how much noise each step replaces: 0 is the probability flow, 1 the reverse of the noising process.  Fresh
    noise lets later steps correct earlier errors.  draw: called once a step where eta > 0.
    Unlike the paper's, the interpolation is over the angle; log(alpha/sigma) is infinite at alpha = 0.
    """
    history: list[Estimate] = []  # the newest first
    for level, following in pairwise(levels):
        clean, noise = denoise(x, level)
        if following.sigma == 0:
            yield Step(following, clean, clean)
            continue
        history = [Estimate(level.angle, clean, noise), *history[: order - 1]]
        shrink = level.alpha * following.sigma / (level.sigma * following.alpha)  # e^-h, 0 at alpha = 0
        x = following.sigma / level.sigma * shrink ** (eta**2) * x + data_term(history, shrink, following, eta)
        if eta:
            x = x + following.sigma * math.sqrt(1 - shrink ** (2 * eta**2)) * draw()
        yield Step(following, x, clean)


def velocity_integral(history: Sequence[Estimate], start: float, end: float) -> Array:
    """The integral of the velocity, cos(angle) * noise - sin(angle) * clean, from one angle to another.

    history: the estimates that are interpolated, the newest first.
    """
    estimates = well_spaced(history, abs(end - start))
    angles = quadrature_points(start, end)
    weights = lagrange_weights([e.angle for e in estimates], angles) * GAUSS_WEIGHTS * (end - start) / 2
    noise_weights = (weights * np.cos(angles)).sum(axis=1).tolist()
    clean_weights = (weights * np.sin(angles)).sum(axis=1).tolist()
    total = 0.0
    for estimate, for_noise, for_clean in zip(estimates, noise_weights, clean_weights, strict=True):
        total = total + for_noise * estimate.noise - for_clean * estimate.clean
    return total


def data_term(history: Sequence[Estimate], shrink: float, end: Level, eta: float) -> Array:
    """The data term of one step of sa_solver: the integral of the interpolated x_0 estimates.

    It is end.alpha * (1 + eta^2) times the integral of x_0 * w^(eta^2) from w = shrink to 1, where w is sigma/alpha at
    the end over sigma/alpha on the way.  history: the newest first, made where the step starts.
    """
    estimates = well_spaced(history, abs(history[0].angle - end.angle))
    w = quadrature_points(shrink, 1.0)
    density = GAUSS_WEIGHTS * w ** (eta**2)
    # Scaled to the exact integral, because w^(eta^2) is no polynomial: a constant x_0 has no error of quadrature.
    density = density / density.sum() * end.alpha * (1 - shrink ** (1 + eta**2))
    weights = lagrange_weights([e.angle for e in estimates], np.arctan2(end.sigma, end.alpha * w)) * density
    return sum(weight * e.clean for weight, e in zip(weights.sum(axis=1).tolist(), estimates, strict=True))


def well_spaced(history: Sequence[Estimate], step: float) -> list[Estimate]:
    """The estimates before the first gap of at most half a step: extrapolating from closer nodes amplifies errors."""
    estimates = list(history[:1])
    for estimate in history[1:]:
        if 2 * abs(estimate.angle - estimates[-1].angle) <= step:
            break
        estimates.append(estimate)
    return estimates


def quadrature_points(start: float, end: float) -> np.ndarray:
    """Where Gauss-Legendre quadrature from start to end evaluates its integrand."""
    return start + (end - start) * (1 + GAUSS_POINTS) / 2


def lagrange_weights(nodes: Sequence[float], at: np.ndarray) -> np.ndarray:
    """(len(nodes), len(at)): the Lagrange polynomial of each node, which is 1 there and 0 at the others."""
    weights = np.ones((len(nodes), len(at)))
    for row, node in zip(weights, nodes, strict=True):
        for other in nodes:
            if other != node:
                row *= (at - other) / (node - other)
    return weights
