"""Timestep distributions: how often training sees each noise level.

Each is a quantile function: it maps uniform u in (0, 1) to real-valued t, so that stratified u give stratified t.
To add one: a function of (schedule, u), a row in TIMESTEP_DISTRIBUTIONS.
"""

from statistics import NormalDist

import numpy as np

from tiny_diffusion.diffusion.schedules import Schedule

MEAN, STD = 0.0, 1.0  # of ln(sigma/alpha) in `edm`; benchmarks/RESULTS.md compares others


def stratified(stream: np.random.Generator, count: int) -> np.ndarray:
    """(count,) random numbers, one in each of as many equal parts of (0, 1), shuffled.  Kingma et al. (2021), I.1."""
    return (stream.permutation(count) + stream.uniform(1e-6, 1 - 1e-6, count)) / count


def uniform(schedule: Schedule, u: np.ndarray) -> np.ndarray:
    """Every entry of the table equally often.  Ho et al. (2020), algorithm 1."""
    return np.floor(u * schedule.timesteps)


def logit_normal(schedule: Schedule, u: np.ndarray) -> np.ndarray:
    """t/T is the logistic function of a standard normal: mostly middle levels.  Esser et al. (2024), eq. 19."""
    return np.floor(schedule.timesteps / (1 + np.exp(-_normal_quantile(u))))


def edm(schedule: Schedule, u: np.ndarray, mean: float = MEAN, std: float = STD) -> np.ndarray:
    """ln(sigma/alpha) is normal with this mean before the schedule's shift.  Karras et al. (2022), table 1."""
    return schedule.t_at(-2 * (mean + std * _normal_quantile(u)) + schedule.shift)


def _normal_quantile(u: np.ndarray) -> np.ndarray:
    quantile = NormalDist().inv_cdf
    return np.array([quantile(p) for p in u.ravel()]).reshape(u.shape)


TIMESTEP_DISTRIBUTIONS = {"uniform": uniform, "logit_normal": logit_normal, "edm": edm}
