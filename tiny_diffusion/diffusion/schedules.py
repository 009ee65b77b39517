"""Schedules: how much image and how much noise there is at each step of the process.

A schedule is two numbers per step, ``x_t = alpha * x_0 + sigma * noise``, tabulated at t = 0 .. T-1 and readable at any
real t between.  It knows neither images nor networks.  Tutorials state a process by its betas: their alphas_cumprod,
the running product of 1 - beta, is alpha^2.  To add one: write a function that returns the T betas, add a row to
SCHEDULES.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tiny_diffusion.diffusion.levels import Level

GIVEN = "betas"  # the name of a schedule whose betas are given one by one
MAX_BETA = 0.999  # Nichol & Dhariwal (2021): beta = 1 would erase the image at once and make the inverse singular


@dataclass(frozen=True, eq=False)
class Schedule:
    """The table of a noising process.

    log_snr: (T,) float64, log(alpha^2 / sigma^2), strictly falling; the last may be -inf (no image is left).
    straight: True for alpha + sigma = 1 (rectified flow), False for alpha^2 + sigma^2 = 1 (variance preserving).
    shift: what was added to log-SNR at every t; log_snr includes it.
    """

    name: str
    log_snr: np.ndarray
    straight: bool = False
    shift: float = 0.0

    @property
    def timesteps(self) -> int:
        """T, the number of entries."""
        return len(self.log_snr)

    @cached_property
    def alpha(self) -> np.ndarray:
        """(T,): the factor of the image, whose square is the tutorials' alphas_cumprod where there are betas."""
        return self.at(np.arange(self.timesteps))[1]

    @cached_property
    def sigma(self) -> np.ndarray:
        """(T,): the factor of the noise."""
        return self.at(np.arange(self.timesteps))[2]

    def at(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(time, alpha, sigma) at real-valued t, each of t's shape.  Between two entries log-SNR is linear in t.

        On a straight schedule sigma is linear in t instead, which is exact and reaches alpha = 0.
        Raises IndexError if any t is outside [0, T-1].
        """
        t = np.asarray(t, dtype=np.float64)
        if not np.all((t >= 0) & (t <= self.timesteps - 1)):
            raise IndexError(f"t must lie in [0, {self.timesteps - 1}], got {t.min()} to {t.max()}")
        if self.straight:
            sigma = (t + 1) / self.timesteps
            ratio = math.exp(-self.shift / 2)  # of sigma/alpha after the shift to before; Esser et al. (2024), eq. 23
            total = (1 - sigma) + ratio * sigma
            scale = ratio / total  # exactly 1 without a shift, and at the end with any
            return scale * (t + 1), (1 - sigma) / total, scale * sigma
        log_snr = np.interp(t, np.arange(self.timesteps), self.log_snr)
        return t, np.exp(-0.5 * np.logaddexp(0, -log_snr)), np.exp(-0.5 * np.logaddexp(0, log_snr))

    def level(self, t: float) -> Level:
        """The level at one real-valued t in [0, T-1]."""
        return Level(*(float(value) for value in self.at(np.float64(t))))

    def t_at(self, log_snr: np.ndarray) -> np.ndarray:
        """The inverse of `at`: the real-valued t of this log-SNR, clipped to [0, T-1]."""
        log_snr = np.asarray(log_snr, dtype=np.float64)
        if self.straight:
            t = self.timesteps * np.exp(-np.logaddexp(0, (log_snr - self.shift) / 2)) - 1
        else:
            t = np.interp(-log_snr, -self.log_snr, np.arange(self.timesteps, dtype=np.float64))
        return np.clip(t, 0, self.timesteps - 1)


def make_schedule(
    name: str,
    timesteps: int = 1000,
    beta_start: float | None = None,
    beta_end: float | None = None,
    logsnr_shift: float = 0.0,
) -> Schedule:
    """The named schedule over T timesteps.

    beta_start, beta_end: the first and last beta at T = 1000, as papers state them; they are scaled by 1000/T, so that
    any T >= 2 ends in noise.  logsnr_shift: added to log-SNR at every t; negative values add noise, which large images
    need (Hoogeboom et al. 2023, eq. 4).  Raises ValueError for an unknown name, T < 2, or betas that it does not have.
    """
    if name not in SCHEDULES:
        raise ValueError(f"{name!r} is not a schedule; there are {', '.join(SCHEDULES)}")
    if timesteps < 2:
        raise ValueError(f"a schedule has at least 2 timesteps, not {timesteps}")
    row = SCHEDULES[name]
    if row.ends is None and not (beta_start is None and beta_end is None):
        raise ValueError(f"the {name} schedule has no beta_start and no beta_end")
    if row.betas is None:
        sigma = np.arange(1, timesteps + 1) / timesteps
        with np.errstate(divide="ignore"):
            log_snr = 2 * (np.log(1 - sigma) - np.log(sigma)) + logsnr_shift
        return Schedule(name, log_snr, straight=True, shift=logsnr_shift)
    ends = zip(row.ends or (), (beta_start, beta_end), strict=False)
    betas = row.betas(timesteps, *((own if given is None else given) * 1000 / timesteps for own, given in ends))
    return from_betas(np.clip(betas, 0, MAX_BETA), name, logsnr_shift)


def from_betas(betas: np.ndarray, name: str = GIVEN, logsnr_shift: float = 0.0) -> Schedule:
    """The schedule of these betas, one per timestep, each of at least 0; only the last may be 1."""
    # alphas_cumprod = np.cumprod(1 - betas) = alpha^2; its logarithm, a sum, keeps its digits far into the noise.
    with np.errstate(divide="ignore"):
        log_alphas_cumprod = np.cumsum(np.log1p(-betas))
        log_snr = log_alphas_cumprod - np.log(-np.expm1(log_alphas_cumprod)) + logsnr_shift
    return Schedule(name, log_snr, shift=logsnr_shift)


def linear(timesteps: int, start: float, end: float) -> np.ndarray:
    """Betas in equal steps.  Ho et al. (2020), section 4."""
    return np.linspace(start, end, timesteps)


def exponential(timesteps: int, start: float, end: float) -> np.ndarray:
    """Betas in a geometric progression: slow where the image is nearly clean, fast near noise."""
    return np.geomspace(start, end, timesteps)


def cosine(timesteps: int) -> np.ndarray:
    """alphas_cumprod falls as a squared cosine.  Nichol & Dhariwal (2021), eq. 17, offset 0.008."""
    return _betas_from(lambda s: np.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2, timesteps)


def sigmoid(timesteps: int) -> np.ndarray:
    """alphas_cumprod falls as a sigmoid over [-3, 3].  Jabri et al. (2022), algorithm 1, temperature 1."""

    def alphas_cumprod(s: np.ndarray) -> np.ndarray:
        low, high, here = (1 / (1 + np.exp(-z)) for z in (-3.0, 3.0, 3 - 6 * s))
        return (here - low) / (high - low)

    return _betas_from(alphas_cumprod, timesteps)


def _betas_from(alphas_cumprod: Callable[[np.ndarray], np.ndarray], timesteps: int) -> np.ndarray:
    """beta_t = 1 - alphas_cumprod((t+1)/T) / alphas_cumprod(t/T), of a curve over s in [0, 1] that starts near 1."""
    curve = alphas_cumprod(np.arange(timesteps + 1) / timesteps)
    return 1 - curve[1:] / curve[:-1]


@dataclass(frozen=True)
class ScheduleRow:
    """betas: returns the T betas; None for alpha + sigma = 1.  ends: default (beta_start, beta_end) at T = 1000."""

    betas: Callable[..., np.ndarray] | None
    ends: tuple[float, float] | None = None


SCHEDULES = {
    "linear": ScheduleRow(linear, ends=(1e-4, 0.02)),
    "cosine": ScheduleRow(cosine),
    "sigmoid": ScheduleRow(sigmoid),
    # An end of 0.02 would leave alpha = 0.15 at the last step.  The sum of these betas is that of the linear ones.
    "exponential": ScheduleRow(exponential, ends=(1e-4, 0.065)),
    # Liu et al. (2022); Lipman et al. (2022).  sigma = (t + 1) / T and time = T * sigma, as in diffusers.
    "flow": ScheduleRow(None),
}
