"""Editing: what else a denoiser can do than sample from noise.

Everything here wraps ``denoise(x, level) -> (clean, noise)``, or chooses the levels, the start or the noise of a
sampler, so that no sampler knows of it.  It knows no model and no files.  Coefficients are plain floats, so that x may
be a tensor or an array of shape (B, ...).  `sampling.sample` runs these on the images of a seed.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, cycle, islice, pairwise

import torch
from torch import Tensor

from tiny_diffusion.diffusion.grids import make_levels
from tiny_diffusion.diffusion.levels import CLEAN, Array, Denoise, Draw, Level, Step
from tiny_diffusion.diffusion.schedules import Schedule

FIXED_POINT_ITERATIONS = 3  # of `invert`: evaluations a step
MIDDLE_BAND = (math.radians(30), math.radians(75))  # angles at which an image's structure is decided
MAX_GAIN = 50.0  # of a correction in `known_pixels`
FIRST_ANGLES, LAST_ANGLES, FINALISTS = (84, 76, 68), (60, 52), 3  # of `likeliest_labels`; angles in degrees


def level_at(schedule: Schedule, angle: float) -> Level:
    """The level of this angle in radians, or the schedule's nearest: its first is not quite clean."""
    if angle >= math.pi / 2:
        return schedule.level(schedule.timesteps - 1)
    log_snr = -2 * math.log(math.tan(angle)) if angle > 0 else math.inf
    return schedule.level(float(schedule.t_at(log_snr)))


def levels_from(schedule: Schedule, grid: str, steps: int, strength: float) -> list[Level]:
    """The levels of SDEdit (Meng et al., 2022): from `strength` of the angle of pure noise to CLEAN, steps + 1 in all.

    They are that level and the lowest ones of a finer grid, or fewer where the schedule has no more below.  For the
    same number of evaluations this is much like the lower part of the usual grid, and `steps` stays what it costs.
    strength: from 0, which is [CLEAN], to 1, which is the whole grid.   Raises ValueError outside.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 to 1, not {strength}")
    if strength in (0, 1):
        return make_levels(schedule, grid, steps) if strength else [CLEAN]
    start = level_at(schedule, strength * math.pi / 2)

    def below(count: int) -> list[Level]:
        return [level for level in make_levels(schedule, grid, count) if level.angle < start.angle]

    fewest, most = steps, schedule.timesteps
    while fewest < most:  # the smallest grid with as many levels below as there are steps, CLEAN being one of them
        middle = (fewest + most) // 2
        fewest, most = (fewest, middle) if len(below(middle)) >= steps else (middle + 1, most)
    return [start, *below(fewest)[-steps:]]


def noised(clean: Array, noise: Array, level: Level) -> Array:
    """The images as they look at this level: alpha * clean + sigma * noise."""
    return level.alpha * clean + level.sigma * noise


def paste(known: Array, mask: Array, images: Array) -> Array:
    """The images with the known pixels in place of theirs, exactly.   mask: 1 where the pixels are unknown, else 0."""
    return mask * images + (1 - mask) * known


def known_pixels(
    denoise: Denoise, known: Array, mask: Array, corrections_at: Callable[[Level], int] = lambda level: 2
) -> Denoise:
    """The denoiser of the unknown pixels given the known ones, for any sampler: inpainting.

    known: (B, ...) images.   mask: 1 where they are unknown, else 0; of a shape that broadcasts.
    corrections_at: how many corrections there are at a level, each one evaluation more.

    Replacement, as in RePaint (Lugmayr et al., 2022), puts the known pixels into the estimate of x_0, but at high noise
    levels the estimate of the others hardly depends on them, because the network sees them under noise.  Given x_0
    there, their noisy values are of no account, so they may be anything: a correction moves them until the estimate
    agrees with the known pixels.  For Gaussian data the estimate of the unknown pixels is then exactly the mean given
    the known ones, E[x_0 | unknown part of x, known pixels], whose gradient-based form is PiGDM (Song et al., 2023).
    The step length is Barzilai & Borwein's (1988), for each image.  The noise is derived from the pasted estimate.
    """

    def conditional(x: Array, level: Level) -> tuple[Array, Array]:
        clean, _ = denoise(x, level)
        moved, gain, last = x, level.alpha, None
        for _ in range(corrections_at(level)):
            residual = (1 - mask) * (known - clean)
            if last is not None:
                step, before = last
                shrunk = _dot(step, before - residual)
                gain = (_dot(step, step) / (shrunk + (shrunk == 0))).clip(0, MAX_GAIN)
            last = gain * residual, residual
            moved = moved + last[0]
            clean, _ = denoise(moved, level)
        clean = paste(known, mask, clean)
        return clean, (x - level.alpha * clean) / level.sigma

    return conditional


def corrections(levels: Sequence[Level], count: int) -> Callable[[Level], int]:
    """`corrections_at` for `known_pixels`: `count` in all, one at each level and the others in the middle band."""
    visited = levels[:-1]
    middle = [level for level in visited if MIDDLE_BAND[0] < level.angle < MIDDLE_BAND[1]]
    given = Counter(islice(chain(visited, cycle(middle or visited)), count))
    return lambda level: given[level]


def likeliest_labels(
    denoiser: Callable[[Sequence[int]], Denoise], known: Tensor, mask: Tensor, labels: Sequence[int], schedule: Schedule
) -> tuple[list[int], int]:
    """The label of each image under which its known pixels are estimated best, and how many evaluations that took.

    denoiser: from one label for each image to a denoiser.   The others as in `known_pixels`.
    A diffusion classifier (Li et al., 2023), whose images are scaled to each level but not noised, because the errors
    of one noise differ by more than those of two labels.  The mean absolute errors of the known pixels at FIRST_ANGLES
    leave FINALISTS for each image, and those at LAST_ANGLES decide.  Each label fills the unknown pixels with its own
    estimate of the level before.
    """
    start = paste(known, mask, torch.zeros_like(known))

    def errors(own: Sequence[int], clean: Tensor, angles: Sequence[float]) -> tuple[Tensor, Tensor]:
        denoise, total = denoiser(own), 0.0
        for angle in angles:
            level = level_at(schedule, math.radians(angle))
            estimate, _ = denoise(level.alpha * clean, level)
            total = total + ((1 - mask) * (known - estimate)).abs().flatten(1).sum(1)
            clean = paste(known, mask, estimate)
        return clean, total

    first = [errors([label] * len(known), start, FIRST_ANGLES) for label in labels]
    clean, error = (torch.stack(parts) for parts in zip(*first, strict=True))  # (labels, B, ...)
    finalists = error.argsort(0)[:FINALISTS]
    images = torch.arange(len(known), device=known.device)
    own = [[labels[i] for i in row] for row in finalists.tolist()]
    last = [errors(own[k], clean[row, images], LAST_ANGLES)[1] for k, row in enumerate(finalists)]
    best = (torch.stack(last) + error.gather(0, finalists)).argmin(0).tolist()
    evaluations = len(labels) * len(FIRST_ANGLES) + len(finalists) * len(LAST_ANGLES)
    return [own[k][image] for image, k in enumerate(best)], evaluations


def invert(
    denoise: Denoise, clean: Array, levels: Sequence[Level], iterations: int = FIXED_POINT_ITERATIONS
) -> Iterator[Step]:
    """DDIM upwards: the noise from which `ddim` over the same levels makes these images.  Song et al. (2021), 4.3.

    levels: the noisiest first, CLEAN last.   Yields a Step for each level, from the cleanest; the x of the last one
    over its sigma is the noise.   denoise: without clipping.
    Each step solves ddim's own step for its start by fixed-point iterations of one evaluation (Pan et al., 2023),
    where plain DDIM inversion takes the velocity of the step's end.  y = x / radius rotates with the angle:
    y(end) = cos(rotation) y(start) - sin(rotation) v(start).
    """
    y = clean
    for below, level in pairwise(reversed(levels)):
        rotation, start = level.angle - below.angle, y
        for _ in range(iterations):
            estimate = denoise(level.radius * start, level)
            start = (y + math.sin(rotation) * level.velocity(*estimate)) / math.cos(rotation)
        y = start
        yield Step(level, level.radius * y, estimate[0])


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """From the first to the second (B, ...) on the sphere, each row for itself: Shoemake (1985).  Keeps their norm.

    share: 0 is the first and 1 is the second, exactly.  A straight line would lose norm and give grey images.
    """
    if share in (0, 1):
        return second if share else first
    cosine = _dot(first, second) / (_dot(first, first) * _dot(second, second)).sqrt()
    angle = torch.acos(cosine.clamp(-1, 1)).clamp(min=1e-4)  # below, the arc is straight
    return (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * second) / torch.sin(angle)


def between(draw: Draw, shares: Sequence[float]) -> Draw:
    """Draws for each share one tensor between the two of `draw`: (2, ...) -> (len(shares), ...).

    As the first noise, so each step's fresh noise: random samplers then pass from one image to the other smoothly.
    """

    def drawn() -> Tensor:
        pair = draw()
        return torch.cat([slerp(pair[:1], pair[1:], share) for share in shares])

    return drawn


def _dot(first: Array, second: Array) -> Array:
    """The inner product of each row: (B, 1, ...)."""
    products = (first * second).reshape(len(first), -1).sum(1)
    return products.reshape(-1, *(1 for _ in first.shape[1:]))
