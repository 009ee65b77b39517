"""Grids: which noise levels a sampler visits.

A grid is n distinct real-valued times, noisiest first; sampling goes through them and ends on the clean image, which
makes n steps and n evaluations.  A schedule's shift moves the levels, and the times stay.  To add one: a function of
(schedule, n), a row in GRIDS.
"""

import math

import numpy as np

from tiny_diffusion.diffusion.schedules import CLEAN, Level, Schedule

# sigma/alpha, before a shift, beyond which x holds no image worth a step: Karras et al. (2022), sigma_max.
NOISIEST_RATIO = 80.0


def make_levels(schedule: Schedule, grid: str, steps: int) -> list[Level]:
    """The `steps` levels of the grid, noisiest first, and the clean image after them: steps + 1 in all.

    Raises ValueError if steps is not in [1, T] or the grid is unknown.
    """
    if grid not in GRIDS:
        raise ValueError(f"{grid!r} is not a grid; there are {', '.join(GRIDS)}")
    if not 1 <= steps <= schedule.timesteps:
        raise ValueError(f"steps must be from 1 to {schedule.timesteps}, the schedule's timesteps, not {steps}")
    return [*(schedule.level(t) for t in GRIDS[grid](schedule, steps)), CLEAN]


def trailing(schedule: Schedule, steps: int) -> np.ndarray:
    """Evenly spaced back from T-1, so that drawing starts in pure noise.  Lin et al. (2023), section 3.3."""
    return np.round(schedule.timesteps - np.arange(steps) * schedule.timesteps / steps) - 1


def leading(schedule: Schedule, steps: int) -> np.ndarray:
    """Multiples of T // n, from 0.  As in DDIM's code and diffusers: starts short of pure noise, so not the default."""
    return np.arange(steps)[::-1] * (schedule.timesteps // steps) * 1.0


def log_snr(schedule: Schedule, steps: int) -> np.ndarray:
    """Uniform in log-SNR.  Lu et al. (2022), section 3.4."""
    noisiest, cleanest = _log_snr_range(schedule)
    return _from_end(schedule, np.linspace(noisiest, cleanest, steps))


def rho(schedule: Schedule, steps: int, exponent: float = 7.0) -> np.ndarray:
    """(sigma/alpha)^(1/7) in equal steps: many small ones near the clean image.  Karras et al. (2022), eq. 5."""
    noisiest, cleanest = (np.exp(-value / 2) for value in _log_snr_range(schedule))
    ratio = np.linspace(noisiest ** (1 / exponent), cleanest ** (1 / exponent), steps) ** exponent
    return _from_end(schedule, -2 * np.log(ratio))


def angle(schedule: Schedule, steps: int) -> np.ndarray:
    """Uniform in atan2(sigma, alpha), the last step to clean included: even turns, whatever the schedule.

    The angle is that before the schedule's shift, which moves the levels as it moves the noise that matters.
    """
    ends = schedule.at(np.array([schedule.timesteps - 1.0, 0.0]))
    shifted = math.exp(-schedule.shift / 2)
    noisiest, cleanest = np.arctan2(ends[2], ends[1] * shifted)
    angles = np.linspace(noisiest, max(cleanest, noisiest / steps), steps)
    return _from_end(schedule, -2 * np.log(np.tan(angles)) + schedule.shift)


def _log_snr_range(schedule: Schedule) -> tuple[float, float]:
    return max(schedule.log_snr[-1], schedule.shift - 2 * np.log(NOISIEST_RATIO)), schedule.log_snr[0]


def _from_end(schedule: Schedule, log_snr: np.ndarray) -> np.ndarray:
    """Times of these log-SNRs, the first one moved out to T-1, where drawing starts whatever lies beyond the range."""
    t = schedule.t_at(log_snr)
    t[0] = schedule.timesteps - 1
    return t


GRIDS = {"trailing": trailing, "leading": leading, "angle": angle, "log_snr": log_snr, "rho": rho}
