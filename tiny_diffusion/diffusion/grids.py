"""Grids: which noise levels a sampler visits.

A grid is n distinct real-valued times, the noisiest first.  Sampling visits them and ends on the clean image, which is
n steps.  A schedule's shift changes the levels at these times, but not the times.  To add one: a function of (schedule,
steps), a row in GRIDS.
"""

import math
from dataclasses import replace

import numpy as np

from tiny_diffusion.diffusion.levels import CLEAN, Level
from tiny_diffusion.diffusion.schedules import Schedule

# Of sigma/alpha before a shift: beyond it x holds too little of the image to spend steps on.  Karras et al. (2022).
NOISIEST_RATIO = 80.0
# Of a leading grid's first level.  Sampling loses that share of the data's mean, if the variance is 1.
MAX_START_ALPHA = 0.1


def make_levels(schedule: Schedule, grid: str, steps: int) -> list[Level]:
    """The `steps` levels of the grid, the noisiest first, and CLEAN after them: steps + 1 in all.

    Raises ValueError if steps is not in [1, T] or the grid is unknown.
    """
    if grid not in GRIDS:
        raise ValueError(f"{grid!r} is not a grid; there are {', '.join(GRIDS)}")
    if not 1 <= steps <= schedule.timesteps:
        raise ValueError(f"steps must be from 1 to {schedule.timesteps}, the schedule's timesteps, not {steps}")
    return [*(schedule.level(t) for t in GRIDS[grid](schedule, steps)), CLEAN]


def trailing(schedule: Schedule, steps: int) -> np.ndarray:
    """Evenly spaced back from T-1, so that sampling starts from pure noise.  Lin et al. (2023), section 3.3."""
    return np.round(schedule.timesteps - np.arange(steps) * schedule.timesteps / steps) - 1


def leading(schedule: Schedule, steps: int) -> np.ndarray:
    """Multiples of T // n from 0, as in DDIM's code and diffusers, where the first of them is nearly noise.

    Where its alpha is above MAX_START_ALPHA, the network would get noise in place of an image that is partly there, so
    the grid is `trailing` instead: for few steps, and for most numbers of steps between T/2 and T.
    """
    t = np.arange(steps)[::-1] * (schedule.timesteps // steps) * 1.0
    if math.cos(_angle_before_shift(schedule, t[0])) > MAX_START_ALPHA:
        return trailing(schedule, steps)
    return t


def log_snr(schedule: Schedule, steps: int) -> np.ndarray:
    """Uniform in log-SNR.  Lu et al. (2022), section 3.4."""
    noisiest, cleanest = _log_snr_range(schedule)
    return _from_end(schedule, np.linspace(noisiest, cleanest, steps))


def rho(schedule: Schedule, steps: int, exponent: float = 7.0) -> np.ndarray:
    """Uniform in (sigma/alpha)^(1/7): many small steps near the clean image.  Karras et al. (2022), eq. 5."""
    noisiest, cleanest = (np.exp(-value / 2) for value in _log_snr_range(schedule))
    ratio = np.linspace(noisiest ** (1 / exponent), cleanest ** (1 / exponent), steps) ** exponent
    return _from_end(schedule, -2 * np.log(ratio))


def angle(schedule: Schedule, steps: int) -> np.ndarray:
    """Uniform in the angle of the level before the schedule's shift, the last step to CLEAN included."""
    noisiest, cleanest = (_angle_before_shift(schedule, t) for t in (schedule.timesteps - 1, 0))
    angles = np.linspace(noisiest, max(cleanest, noisiest / steps), steps)
    return _from_end(schedule, -2 * np.log(np.tan(angles)) + schedule.shift)


def _angle_before_shift(schedule: Schedule, t: float) -> float:
    level = schedule.level(t)
    return replace(level, alpha=level.alpha * math.exp(-schedule.shift / 2)).angle


def _log_snr_range(schedule: Schedule) -> tuple[float, float]:
    """(noisiest, cleanest) log-SNR of the grids that are uniform in a function of it."""
    return max(schedule.log_snr[-1], schedule.shift - 2 * np.log(NOISIEST_RATIO)), schedule.log_snr[0]


def _from_end(schedule: Schedule, log_snr: np.ndarray) -> np.ndarray:
    """The times of these log-SNRs; the first one becomes T-1, where sampling starts even if the range ends earlier."""
    t = schedule.t_at(log_snr)
    t[0] = schedule.timesteps - 1
    return t


GRIDS = {"trailing": trailing, "leading": leading, "angle": angle, "log_snr": log_snr, "rho": rho}
