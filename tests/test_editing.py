"""Editing against closed forms: Gaussian data, whose conditional distribution and whose inversion are known."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from tiny_diffusion.diffusion.editing import between, invert, known_pixels, level_at, levels_from, paste, slerp
from tiny_diffusion.diffusion.grids import GRIDS, make_levels
from tiny_diffusion.diffusion.levels import CLEAN
from tiny_diffusion.diffusion.samplers import SAMPLERS, ddim
from tiny_diffusion.diffusion.schedules import SCHEDULES, make_schedule

PIXELS, KNOWN = 8, 4  # of which the first KNOWN are given
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_grid = pytest.mark.parametrize("grid", GRIDS)


class CorrelatedGaussian:
    """The perfect denoiser of data from N(mean, covariance): neighbouring pixels are alike, as in images."""

    def __init__(self, deviation=0.5):
        distance = abs(np.subtract.outer(np.arange(PIXELS), np.arange(PIXELS)))
        self.mean = np.linspace(-0.5, 0.5, PIXELS)
        self.covariance = deviation**2 * np.exp(-distance / 4)
        self.calls = 0

    def variance(self, level):
        return level.alpha**2 * self.covariance + level.sigma**2 * np.eye(PIXELS)

    def __call__(self, x, level):
        self.calls += 1
        residual = np.linalg.solve(self.variance(level), (x - level.alpha * self.mean).T).T
        return self.mean + level.alpha * residual @ self.covariance, level.sigma * residual

    def given(self, known):
        """(mean, covariance) of the other pixels given the first ones."""
        a, b, c = slice(0, KNOWN), slice(KNOWN, None), self.covariance
        weights = np.linalg.solve(c[a, a], c[a, b]).T
        return self.mean[b] + weights @ (known[a] - self.mean[a]), c[b, b] - weights @ c[a, b]

    def flow(self, x, start, end):
        """Where the probability flow takes x: each principal component keeps its number of deviations."""
        values, vectors = np.linalg.eigh(self.covariance)
        before, after = (level.alpha**2 * values + level.sigma**2 for level in (start, end))
        moved = ((x - start.alpha * self.mean) @ vectors) * np.sqrt(after / before)
        return end.alpha * self.mean + moved @ vectors.T


@pytest.fixture
def gaussian():
    return CorrelatedGaussian()


MASK = np.repeat([0.0, 1.0], [KNOWN, PIXELS - KNOWN])
IMAGE = np.array([0.1, -0.9, 0.3, 0.4, 9.0, 9.0, 9.0, 9.0])  # those after the known ones are never looked at


def painted(gaussian, sampler, steps, corrections, count=1500):
    """Images (count, PIXELS) whose first pixels are IMAGE's."""
    rng = np.random.default_rng(0)
    denoise = known_pixels(gaussian, IMAGE, MASK, lambda level: corrections)
    levels = make_levels(make_schedule("cosine"), "angle", steps)
    options = {"draw": lambda: rng.standard_normal((count, PIXELS))} if SAMPLERS[sampler].draws else {}
    *_, last = SAMPLERS[sampler].run(denoise, rng.standard_normal((count, PIXELS)), levels, **options)
    return last.x


# Inpainting


def test_with_enough_corrections_the_estimate_is_the_mean_given_the_known_pixels(gaussian):
    """E[x_0 | noisy unknown pixels, known pixels] in closed form: what the noisy known pixels are does not matter."""
    rng = np.random.default_rng(0)
    mean, covariance = gaussian.given(IMAGE)
    for angle in (0.3, 0.8, 1.3):
        level = level_at(make_schedule("cosine"), angle)
        x = rng.standard_normal((5, PIXELS))
        clean, noise = known_pixels(gaussian, IMAGE, MASK, lambda level: 40)(x, level)
        unknown = x[:, KNOWN:]
        gain = (
            level.alpha
            * covariance
            @ np.linalg.inv(level.alpha**2 * covariance + level.sigma**2 * np.eye(PIXELS - KNOWN))
        )
        assert_allclose(clean[:, KNOWN:], mean + (unknown - level.alpha * mean) @ gain.T, atol=2e-3)
        assert_allclose(level.alpha * clean + level.sigma * noise, x, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_paints_the_closed_form_conditional_mean_and_covariance(sampler, gaussian):
    """Ten corrections a step.  What is left over is each sampler's own error, and known pixels far from the mean."""
    images = painted(gaussian, sampler, 60, 10)
    mean, covariance = gaussian.given(IMAGE)
    deviation = np.sqrt(np.diag(covariance))
    assert abs((images[:, KNOWN:].mean(0) - mean) / deviation).max() < 0.2  # replacement: 0.5 to 1
    assert abs((np.cov(images[:, KNOWN:].T) - covariance) / np.outer(deviation, deviation)).max() < 0.18


def test_two_corrections_a_step_come_nearer_than_replacement_at_equal_evaluations(gaussian):
    mean, covariance = gaussian.given(IMAGE)

    def error(steps, corrections):
        gaussian.calls = 0
        off = painted(gaussian, "sa_solver", steps, corrections)[:, KNOWN:].mean(0) - mean
        assert gaussian.calls == 60
        return abs(off / np.sqrt(np.diag(covariance))).max()

    assert error(20, 2) < 0.2 < 0.3 < error(60, 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_known_pixels_come_back_exactly(sampler, gaussian):
    assert (painted(gaussian, sampler, 5, 1, count=3)[:, :KNOWN] == IMAGE[:KNOWN]).all()


def test_without_corrections_inpainting_is_replacement(gaussian):
    x, level = np.linspace(-1, 1, PIXELS)[None], level_at(make_schedule("cosine"), 1.0)
    clean, noise = known_pixels(gaussian, IMAGE, MASK, lambda level: 0)(x, level)
    assert_allclose(clean, paste(IMAGE, MASK, gaussian(x, level)[0]))
    assert_allclose(level.alpha * clean + level.sigma * noise, x)


# Inversion


@every_schedule
def test_there_and_back_returns_the_images(name, gaussian):
    levels = make_levels(make_schedule(name), "angle", 50)
    images = (
        gaussian.mean
        + np.random.default_rng(0).standard_normal((20, PIXELS)) @ np.linalg.cholesky(gaussian.covariance).T
    )
    *_, top = invert(gaussian, images, levels)
    *_, back = ddim(gaussian, top.x, levels)
    assert top.level == levels[0]
    assert abs(back.x - images).mean() < 1e-3


def test_inversion_converges_to_the_closed_form_with_ddims_order(gaussian):
    images = np.random.default_rng(0).standard_normal((20, PIXELS))

    def noise(steps):
        levels = make_levels(make_schedule("cosine"), "angle", steps)
        *_, top = invert(gaussian, images, levels, iterations=8)
        return top.x, gaussian.flow(images, CLEAN, levels[0])

    (coarse, exact), (fine, _) = noise(100), noise(200)
    assert math.log2(abs(coarse - exact).max() / abs(fine - exact).max()) == pytest.approx(1, abs=0.2)
    assert_allclose(2 * fine - coarse, exact, atol=0.05)  # Richardson: without the error of first order


def test_inversion_costs_its_iterations_at_each_level(gaussian):
    levels = make_levels(make_schedule("cosine"), "angle", 10)
    steps = list(invert(gaussian, np.zeros((1, PIXELS)), levels, iterations=2))
    assert [step.level for step in steps] == levels[-2::-1]
    assert gaussian.calls == 20


# Where SDEdit starts


@every_grid
@every_schedule
def test_an_edit_visits_as_many_levels_as_asked_all_below_its_start(name, grid):
    schedule = make_schedule(name)
    for strength in (0.1, 0.5, 0.9):
        levels = levels_from(schedule, grid, 10, strength)
        assert len(levels) == 11 and levels[-1] == CLEAN
        assert levels[0].angle == pytest.approx(strength * math.pi / 2, abs=1e-3)
        assert all(a.angle > b.angle for a, b in zip(levels, levels[1:], strict=False))


@every_grid
@every_schedule
def test_strength_1_is_the_whole_grid_and_strength_0_no_step(name, grid):
    schedule = make_schedule(name)
    assert levels_from(schedule, grid, 7, 1.0) == make_levels(schedule, grid, 7)
    assert levels_from(schedule, grid, 7, 0.0) == [CLEAN]


@pytest.mark.parametrize("strength", [-0.1, 1.01, math.nan])
def test_a_strength_outside_0_to_1_is_refused(strength):
    with pytest.raises(ValueError, match="strength"):
        levels_from(make_schedule("cosine"), "angle", 5, strength)


def test_the_weakest_edit_still_takes_a_step():
    levels = levels_from(make_schedule("cosine", 10), "trailing", 5, 1e-6)
    assert len(levels) == 2 and levels[0].time == 0


# Interpolation


def test_noise_between_two_noises_keeps_their_length_and_begins_and_ends_with_them():
    first, second = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(slerp(first, second, 0), first) and torch.equal(slerp(first, second, 1), second)
    torch.testing.assert_close(slerp(first, first, 0.3), first, rtol=0, atol=1e-6)
    unit = [noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for noise in (first, second)]
    for share in (0.25, 0.5, 0.9):
        norm = slerp(*unit, share).flatten(1).norm(dim=1)
        torch.testing.assert_close(norm, torch.ones_like(norm))


def test_the_noise_of_every_step_is_interpolated():
    pairs = iter(torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    pair_of = list(torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    draw = between(lambda: next(pairs), [0, 0.5, 1])
    for pair in pair_of:
        frames = draw()
        assert torch.equal(frames[[0, 2]], pair)
        torch.testing.assert_close(frames[1:2], slerp(pair[:1], pair[1:], 0.5))
