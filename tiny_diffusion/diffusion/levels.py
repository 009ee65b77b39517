"""Levels: how much image and how much noise there is; the type of a denoiser and the steps that a sampler yields."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Array = Any  # a torch tensor, a numpy array or a float


@dataclass(frozen=True, slots=True)
class Level:
    """One noise level, x = alpha * x_0 + sigma * noise, and the time that the network is given for it.

    In polar coordinates x = radius * (cos(angle) * x_0 + sin(angle) * noise).  The angle is 0 for the clean image and
    pi/2 for pure noise, where sigma/alpha is infinite.
    """

    time: float
    alpha: float
    sigma: float

    @property
    def angle(self) -> float:
        """In radians, from 0 (clean) to pi/2 (pure noise)."""
        return math.atan2(self.sigma, self.alpha)

    @property
    def radius(self) -> float:
        """sqrt(alpha^2 + sigma^2), which is 1 on every variance-preserving schedule."""
        return math.hypot(self.alpha, self.sigma)

    def velocity(self, clean: Array, noise: Array) -> Array:
        """The derivative of x / radius by the angle: v of Salimans & Ho (2022)."""
        return (self.alpha * noise - self.sigma * clean) / self.radius


CLEAN = Level(time=0.0, alpha=1.0, sigma=0.0)

Denoise = Callable[[Array, Level], tuple[Array, Array]]  # (x, level) -> estimates of (clean image, noise)
Draw = Callable[[], Array]  # -> fresh standard normal noise of the shape of x


@dataclass(frozen=True, slots=True)
class Step:
    """The level that a sampling step has reached, the noisy image x there, and the estimate of x_0 it started from."""

    level: Level
    x: Array
    clean: Array
