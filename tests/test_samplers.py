"""Samplers against closed forms: Gaussian data, whose exact answer is known, and a few images, which must come back."""

import itertools
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from import_helpers import integrate
from numpy.testing import assert_allclose

from tiny_diffusion.diffusion.grids import GRIDS, make_levels
from tiny_diffusion.diffusion.levels import CLEAN, Level
from tiny_diffusion.diffusion.multistep import (
    Estimate,
    abm,
    data_term,
    lagrange_weights,
    sa_solver,
    velocity_integral,
    well_spaced,
)
from tiny_diffusion.diffusion.samplers import SAMPLERS, ddim, dpmpp_2m, heun
from tiny_diffusion.diffusion.schedules import SCHEDULES, make_schedule

every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_grid = pytest.mark.parametrize("grid", GRIDS)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
# A sampler sees levels only.  These two end at alpha = 5e-5 and at alpha = 0.
BOTH_KINDS = ["cosine", "flow"]
both_kinds = pytest.mark.parametrize("name", BOTH_KINDS)
own_grid = pytest.mark.parametrize("sampler, grid", [(name, row.grid) for name, row in SAMPLERS.items()])
# For laws that hold on any levels: even steps, and steps that grow a hundredfold.
two_grids = pytest.mark.parametrize("grid", ["trailing", "rho"])
DETERMINISTIC = [name for name, row in SAMPLERS.items() if row.order]
deterministic = pytest.mark.parametrize("sampler", DETERMINISTIC)
OTHERS = [name for name in SCHEDULES if name not in BOTH_KINDS]
variance_preserving = pytest.mark.parametrize("name", ["linear", "cosine"])


class Gaussian:
    """The perfect denoiser of data from N(mean, std^2), in closed form; mean and std may be arrays.

    x may also stand for a random variable: an array of the coefficients of 1 (the constant, `unit`) and of independent
    standard normals.  Means and variances are then exact, without sampling.
    """

    def __init__(self, mean, std, unit=1.0):
        self.mean, self.std, self.unit = mean, std, unit

    def variance(self, level):
        return (level.alpha * self.std) ** 2 + level.sigma**2

    def __call__(self, x, level):
        centred = x - level.alpha * self.mean * self.unit
        clean = self.mean * self.unit + level.alpha * self.std**2 / self.variance(level) * centred
        return clean, level.sigma / self.variance(level) * centred

    def flow(self, x, start, end):
        """Where the probability flow takes x: it keeps its number of standard deviations from the mean."""
        growth = np.sqrt(self.variance(end) / self.variance(start))
        return end.alpha * self.mean + growth * (x - start.alpha * self.mean)


class FewImages:
    """The perfect denoiser of a data set of a few images: their average, weighted by their posterior given x."""

    def __init__(self, images):
        self.images = images  # (K, D)

    def __call__(self, x, level):
        squares = ((x[:, None] - level.alpha * self.images) ** 2).sum(-1)  # (B, K)
        logits = -squares / (2 * level.sigma**2)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        clean = weights / weights.sum(1, keepdims=True) @ self.images
        return clean, (x - level.alpha * clean) / level.sigma


def wobbly(x, level):
    """A nonlinear denoiser, perfect for no data, whose estimates satisfy x = alpha * clean + sigma * noise."""
    clean = (0.7 * np.sin(x) if not isinstance(x, torch.Tensor) else 0.7 * torch.sin(x)) + 0.1 * level.alpha
    return clean, (x - level.alpha * clean) / level.sigma


def last(steps):
    *_, step = steps
    return step


def run(sampler, denoise, x, levels, seed=0, **options):
    """All steps of the named sampler, with its own random stream if it draws noise."""
    if SAMPLERS[sampler].draws or options.get("eta"):
        rng = np.random.default_rng(seed)
        options["draw"] = lambda: rng.standard_normal(np.shape(x))
    return list(SAMPLERS[sampler].run(denoise, x, levels, **options))


# What every sampler does


@own_grid
@both_kinds
def test_n_steps_visit_n_levels_in_order_with_the_declared_number_of_evaluations(name, sampler, grid):
    for timesteps, n in [(2, 1), (2, 2), *((10, n) for n in range(1, 11))]:
        levels, seen = make_levels(make_schedule(name, timesteps), grid, n), []

        def denoise(x, level, seen=seen):
            seen.append(level)
            return wobbly(x, level)

        steps = run(sampler, denoise, 0.4, levels)
        assert [step.level for step in steps] == levels[1:]
        assert list(dict.fromkeys(seen)) == levels[:-1]
        assert len(seen) == SAMPLERS[sampler].evaluations(n)


@every_sampler
def test_a_chain_of_a_thousand_steps_has_the_declared_number_of_evaluations(sampler):
    count = 0

    def denoise(x, level):
        nonlocal count
        count += 1
        return wobbly(x, level)

    assert len(run(sampler, denoise, 0.4, make_levels(make_schedule("cosine"), "trailing", 1000))) == 1000
    assert count == SAMPLERS[sampler].evaluations(1000)


@every_sampler
@both_kinds
def test_the_last_step_lands_on_the_estimate_of_the_image(name, sampler):
    step = run(sampler, wobbly, 0.4, make_levels(make_schedule(name), "trailing", 7))[-1]
    assert step.level == CLEAN
    assert step.x == step.clean


@every_sampler
@both_kinds
def test_each_step_yields_the_estimate_of_the_image_at_the_level_it_left(name, sampler):
    levels = make_levels(make_schedule(name), "trailing", 7)
    steps = run(sampler, wobbly, 0.4, levels)
    states = [0.4, *(step.x for step in steps)]
    for x, level, step in zip(states, levels, steps, strict=False):
        assert step.clean == wobbly(x, level)[0]


@every_sampler
@both_kinds
def test_floats_arrays_and_tensors_give_the_same_numbers(name, sampler):
    levels = make_levels(make_schedule(name), "trailing", 9)
    start = np.array([0.4, -1.3, 2.0])

    def final(x, fresh):
        draws = {"draw": lambda: next(fresh)} if SAMPLERS[sampler].draws else {}
        return last(SAMPLERS[sampler].run(wobbly, x, levels, **draws)).x

    noise = np.random.default_rng(0).standard_normal((9, 3))
    array = final(start, iter(noise))
    double = final(torch.from_numpy(start), iter(torch.from_numpy(noise)))
    single = final(torch.from_numpy(start).float(), iter(torch.from_numpy(noise).float()))
    floats = [final(float(x), iter(noise[:, i].tolist())) for i, x in enumerate(start)]
    assert double.dtype == torch.float64 and single.dtype == torch.float32
    assert_allclose(floats, array, rtol=1e-12)
    assert_allclose(double.numpy(), array, rtol=1e-12)
    assert_allclose(single.numpy(), array, rtol=1e-3, atol=1e-4)


@every_sampler
def test_a_sampler_does_not_change_the_x_it_is_given(sampler):
    x = np.array([0.4, -1.3])
    run(sampler, wobbly, x, make_levels(make_schedule("cosine"), "trailing", 5))
    assert x.tolist() == [0.4, -1.3]


@deterministic
def test_a_sampler_that_declares_no_draws_is_deterministic(sampler):
    assert not SAMPLERS[sampler].draws
    levels = make_levels(make_schedule("cosine"), "trailing", 5)
    assert last(SAMPLERS[sampler].run(wobbly, 0.4, levels)).x == last(SAMPLERS[sampler].run(wobbly, 0.4, levels)).x


# dpmpp_2m and abm extrapolate, which the steps of a grid make easy or hard.
@pytest.mark.parametrize(
    "sampler, grid",
    sorted({(name, row.grid) for name, row in SAMPLERS.items()} | set(itertools.product(("dpmpp_2m", "abm"), GRIDS))),
)
@both_kinds
def test_the_perfect_denoiser_of_a_few_images_returns_those_images(name, sampler, grid):
    """Exactly, and not always the same one."""
    images = np.sign(np.random.default_rng(1).standard_normal((3, 16)))
    x = np.random.default_rng(2).standard_normal((24, 16))
    drawn = run(sampler, FewImages(images), x, make_levels(make_schedule(name), grid, 30))[-1].x
    distances = np.abs(drawn[:, None] - images).max(-1)  # (B, K)
    assert distances.min(1).max() < 1e-6
    assert set(distances.argmin(1)) == {0, 1, 2}


@every_sampler
@both_kinds
def test_large_images_come_back_from_the_schedule_that_is_shifted_for_them(name, sampler):
    """Images of the same 16 pixels, each repeated 8 x 8 times."""
    images = np.sign(np.random.default_rng(1).standard_normal((3, 16))).repeat(8 * 8, axis=1)
    x = np.random.default_rng(2).standard_normal((24, 16 * 8 * 8))
    schedule = make_schedule(name, logsnr_shift=2 * math.log(1 / 8))
    drawn = run(sampler, FewImages(images), x, make_levels(schedule, SAMPLERS[sampler].grid, 30))[-1].x
    distances = np.abs(drawn[:, None] - images).max(-1)  # (B, K)
    assert distances.min(1).max() < 1e-6
    assert set(distances.argmin(1)) == {0, 1, 2}


@pytest.mark.parametrize("sampler, grid", [("ddim", "trailing"), ("dpmpp_2m", "rho")])
@both_kinds
def test_large_images_of_repeated_pixels_are_drawn_as_the_small_ones(name, grid, sampler):
    """Hoogeboom et al. (2023), section 3.1: the meaning of a shift of 2 ln(1/k), at every step.

    A mean over k * k pixels has k times less noise, and both samplers depend on ratios of image to noise only.
    """
    k, rng = 4, np.random.default_rng(2)
    images = np.sign(np.random.default_rng(1).standard_normal((3, 16)))
    plain, shifted = (
        make_levels(make_schedule(name, logsnr_shift=shift), grid, 12) for shift in (0.0, 2 * math.log(1 / k))
    )
    noise = rng.standard_normal((5, 16, k * k))
    x = shifted[0].alpha * images[0][:, None] + shifted[0].sigma * noise
    small = plain[0].alpha * images[0] + plain[0].sigma * k * noise.mean(-1)
    large_steps = run(sampler, FewImages(images.repeat(k * k, axis=1)), x.reshape(5, -1), shifted)
    small_steps = run(sampler, FewImages(images), small, plain)
    for large, small in zip(large_steps, small_steps, strict=True):
        assert_allclose(large.clean.reshape(5, 16, k * k), small.clean[..., None].repeat(k * k, -1), atol=1e-6)


@every_sampler
@both_kinds
@pytest.mark.parametrize("timesteps", [10, 50])
def test_the_images_come_back_from_short_processes_too(timesteps, name, sampler):
    images = np.sign(np.random.default_rng(1).standard_normal((3, 64)))
    x = np.random.default_rng(2).standard_normal((24, 64))
    drawn = run(sampler, FewImages(images), x, make_levels(make_schedule(name, timesteps), "trailing", timesteps))[-1].x
    assert np.abs(drawn[:, None] - images).max(-1).min(1).max() < 1e-6


@own_grid
@both_kinds
def test_a_single_image_comes_back_exactly_from_any_number_of_steps(name, sampler, grid):
    schedule = make_schedule(name, 10)
    for n in range(1, 11):
        assert run(sampler, Gaussian(0.4, 0.0), -1.3, make_levels(schedule, grid, n))[-1].x == 0.4


# Convergence on Gaussian data


@pytest.mark.parametrize(
    "sampler, name", [*itertools.product(DETERMINISTIC, BOTH_KINDS), *(("abm", name) for name in OTHERS)]
)
def test_error_shrinks_with_the_declared_order(name, sampler):
    """Halving the step divides the error by 2**order.

    Measured from log-SNR -2 to 4, in equal steps of t, as the largest error over several means and deviations of the
    data: the error of a single one could change sign.
    """
    gaussian = Gaussian(np.array([0.3, -0.5, 0.0, 0.2, 0.7]), np.array([0.1, 0.3, 0.5, 0.7, 2.0]))
    x = np.array([1.7, -1.0, 0.3, 0.9, 2.0])
    schedule = make_schedule(name)

    def error(n):
        levels = [schedule.level(t) for t in np.linspace(*schedule.t_at([-2, 4]), n + 1)]
        end = last(SAMPLERS[sampler].run(gaussian, x, levels)).x
        return np.abs(end - gaussian.flow(x, levels[0], levels[-1])).max()

    # Over two halvings.  It is above the order where terms of the error cancel (abm on the linear schedule).
    assert -0.1 < math.log2(error(80) / error(320)) / 2 - SAMPLERS[sampler].order < 0.9


@pytest.mark.parametrize("name, shift", [("cosine", -2.8), ("flow", 3.0)])  # -2.8: for images of 128 pixels
@deterministic
def test_the_order_is_the_declared_one_on_shifted_schedules_too(name, sampler, shift):
    """Measured from log-SNR -2 to 4 before the shift, in equal steps of log-SNR."""
    gaussian = Gaussian(np.array([0.3, -0.5, 0.0, 0.2, 0.7]), np.array([0.1, 0.3, 0.5, 0.7, 2.0]))
    x = np.array([1.7, -1.0, 0.3, 0.9, 2.0])
    schedule = make_schedule(name, logsnr_shift=shift)

    def error(n):
        levels = [schedule.level(t) for t in schedule.t_at(np.linspace(-2, 4, n + 1) + shift)]
        end = last(SAMPLERS[sampler].run(gaussian, x, levels)).x
        return np.abs(end - gaussian.flow(x, levels[0], levels[-1])).max()

    assert math.log2(error(80) / error(320)) / 2 == pytest.approx(SAMPLERS[sampler].order, abs=0.2)


@pytest.mark.parametrize("shift, to", [(0.0, 199), (-4.2, 399)])  # -4.2: for images of 256 pixels
@pytest.mark.parametrize("name", [name for name, row in SCHEDULES.items() if not row.betas])
@pytest.mark.parametrize("sampler", ["heun", "abm"])
def test_the_order_holds_from_pure_noise_where_no_image_is_left(sampler, name, shift, to):
    """The first level has alpha = 0, where log(sigma/alpha) is infinite and the angle is not."""
    gaussian = Gaussian(np.array([0.3, -0.5, 0.7]), np.array([0.3, 0.5, 2.0]))
    x = np.array([1.7, -1.0, 2.0])
    schedule = make_schedule(name, logsnr_shift=shift)

    def error(n):
        levels = [schedule.level(t) for t in np.linspace(999, to, n + 1)]
        assert levels[0].alpha == 0
        end = last(SAMPLERS[sampler].run(gaussian, x, levels)).x
        return np.abs(end - gaussian.flow(x, levels[0], levels[-1])).max()

    assert math.log2(error(320) / error(640)) > SAMPLERS[sampler].order - 0.25


@pytest.mark.parametrize("eta", [0.0, 1.5])
@both_kinds
def test_sa_solver_converges_in_law_with_order_two_for_every_eta(name, eta):
    """From log-SNR -2 to 4 the mean is exact, and halving the step divides the error of the variance by four."""
    schedule = make_schedule(name)

    def error(n):
        levels = [schedule.level(t) for t in np.linspace(*schedule.t_at([-2, 4]), n + 1)]
        errors = []
        for mean, std in ((0.3, 0.1), (-0.5, 0.3), (0.0, 0.5), (0.2, 0.7), (0.7, 2.0)):
            unit, start, *fresh = np.eye(n + 2)
            gaussian = Gaussian(mean, std, unit)
            x = levels[0].alpha * mean * unit + math.sqrt(gaussian.variance(levels[0])) * start
            law = last(sa_solver(gaussian, x, levels, fresh.pop, eta)).x
            assert law[0] == pytest.approx(levels[-1].alpha * mean, abs=1e-9)
            errors.append((law[1:] ** 2).sum() - gaussian.variance(levels[-1]))
        return np.abs(errors).max()

    assert -0.15 < math.log2(error(80) / error(320)) / 2 - 2 < 0.9


# Right mean and variance at the end of whole chains


def moments(steps, mean, std, levels, sampler="ddim", **options):
    """Exact (mean, standard deviation) after `steps`, the start and every draw being independent standard normals."""
    unit, start, *fresh = np.eye(steps + 2)
    draws = {"draw": lambda: fresh.pop()} if SAMPLERS[sampler].draws or options.get("eta") else {}
    law = last(SAMPLERS[sampler].run(Gaussian(mean, std, unit), start, levels, **draws, **options)).x
    return law[0], np.sqrt((law[1:] ** 2).sum())


@pytest.mark.parametrize(
    "sampler, name",
    [*itertools.product(SAMPLERS, BOTH_KINDS), *(("ddpm", name) for name in OTHERS)],
)
def test_a_full_chain_ends_with_the_mean_and_spread_of_the_data(name, sampler):
    """Up to the error of discretisation, of order 1/200, and the alpha of 0.006 that the noisiest level still has.

    For orders above 1 the error is what the last step drops: the variance of the data given the cleanest level.
    """
    levels = make_levels(make_schedule(name, 200), "trailing", 200)
    mean, std = moments(200, 0.4, 0.5, levels, sampler)
    assert mean == pytest.approx(0.4, abs=0.002)
    assert std == pytest.approx(0.5, rel=(1 if (SAMPLERS[sampler].order or 0) > 1 else 10) / 200)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@both_kinds
def test_ddim_ends_with_the_mean_and_spread_of_the_data_for_every_eta(name, eta):
    levels = make_levels(make_schedule(name), "trailing", 1000)
    mean, std = moments(1000, 0.4, 0.5, levels, eta=eta)
    assert mean == pytest.approx(0.4, abs=0.002)
    assert std == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(
    "name, grid",
    [
        *((name, "angle") for name in SCHEDULES),
        *(("cosine", grid) for grid in GRIDS if grid not in ("angle", "leading")),
    ],
)
def test_the_largest_eta_of_sa_solver_spreads_samples_at_most_seven_percent_too_far(name, grid):
    """A quarter more does not on its own grid.  With few steps every eta falls short: the last step drops variance."""

    def spreads(eta, grid):
        all_levels = (make_levels(make_schedule(name), grid, steps) for steps in (5, 10, 20, 50, 100))
        chains = (moments(len(levels) - 1, 0.3, 0.5, levels, "sa_solver", eta=eta) for levels in all_levels)
        return np.array([std / 0.5 for _, std in chains])

    largest = SAMPLERS["sa_solver"].max_eta
    assert spreads(largest, grid).max() < 1.07 and spreads(largest, grid)[-2:].min() > 0.93
    assert spreads(1.25 * largest, SAMPLERS["sa_solver"].grid).max() > 1.07


@every_grid
@every_schedule
def test_one_step_and_steps_that_hardly_divide_the_timesteps_keep_the_mean_of_the_data(name, grid):
    """Up to the alpha of 0.1 that a leading grid may start from."""
    for steps in (1, 2, 13, 26, 37, 50):
        mean, _ = moments(steps, 0.3, 0.5, make_levels(make_schedule(name, 50), grid, steps))
        assert mean == pytest.approx(0.3, rel=0.1)


@both_kinds
def test_ddpm_draws_samples_with_the_mean_and_spread_of_the_data(name):
    """20000 samples: each moment is within five standard errors and the 4 % error of 200 steps."""
    count = 20_000
    x = np.random.default_rng(1).standard_normal(count)
    levels = make_levels(make_schedule(name, 200), "trailing", 200)
    drawn = run("ddpm", Gaussian(0.4, 0.5), x, levels)[-1].x
    assert drawn.mean() == pytest.approx(0.4, abs=0.002 + 5 * 0.5 / math.sqrt(count))
    assert drawn.std() == pytest.approx(0.5, rel=0.04 + 5 / math.sqrt(2 * count))
    assert (((drawn - drawn.mean()) / drawn.std()) ** 4).mean() == pytest.approx(3, abs=5 * math.sqrt(96 / count))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@two_grids
@both_kinds
def test_ddim_of_a_single_image_has_exactly_the_marginal_of_every_level_for_every_eta(name, grid, eta):
    """Song et al. (2021), lemma 1: alpha * image + sigma * noise, the fresh noise of every step included."""
    levels = make_levels(make_schedule(name), grid, 20)
    unit, start, *fresh = np.eye(22)
    image = 0.4
    x = levels[0].alpha * image * unit + levels[0].sigma * start
    draws = {"draw": lambda: fresh.pop()} if eta else {}
    for step in ddim(Gaussian(image, 0.0, unit), x, levels, eta=eta, **draws):
        assert step.x[0] == pytest.approx(step.level.alpha * image, abs=1e-12)
        assert math.sqrt((step.x[1:] ** 2).sum()) == pytest.approx(step.level.sigma, abs=1e-12)


@pytest.mark.parametrize("eta", [0.0, 1.0, 4.0])
@two_grids
@both_kinds
def test_sa_solver_of_a_single_image_is_the_process_of_every_eta_at_every_level(name, grid, eta):
    """It has the marginal of the level, and the share of the first noise in the level's noise is (sigma/alpha)^(eta^2),
    divided by its value at the first level, for any number of steps."""
    levels = make_levels(make_schedule(name), grid, 20)
    unit, start, *fresh = np.eye(22)
    image = 0.4
    x = levels[0].alpha * image * unit + levels[0].sigma * start
    ratios = [level.sigma / max(level.alpha, 1e-300) for level in levels[:-1]]
    for i, step in enumerate(sa_solver(Gaussian(image, 0.0, unit), x, levels, fresh.pop, eta)):
        assert step.x[0] == pytest.approx(step.level.alpha * image, abs=1e-12)
        assert math.sqrt((step.x[1:] ** 2).sum()) == pytest.approx(step.level.sigma, abs=1e-12)
        if i + 1 < len(ratios):
            left = step.level.sigma * (ratios[i + 1] / ratios[0]) ** (eta**2)
            assert step.x[1] == pytest.approx(left, rel=1e-9, abs=1e-12)


@two_grids
@both_kinds
def test_dpmpp_2m_of_a_single_image_follows_it_exactly(name, grid):
    """An exponential integrator is exact where the estimate of the image does not change."""
    levels = make_levels(make_schedule(name), grid, 20)
    noise = -1.3
    for step in dpmpp_2m(Gaussian(0.4, 0.0), levels[0].alpha * 0.4 + levels[0].sigma * noise, levels):
        assert step.x == pytest.approx(step.level.alpha * 0.4 + step.level.sigma * noise, abs=1e-9)


@two_grids
@variance_preserving
def test_heun_does_not_move_x_for_unit_gaussian_data(name, grid):
    """Noise and image have the same distribution, so the flow stands still.  Euler's method would shrink x."""
    for step in run("heun", Gaussian(0.0, 1.0), 1.7, make_levels(make_schedule(name), grid, 20))[:-1]:
        assert step.x == pytest.approx(1.7, rel=1e-9)


# DDIM and DDPM


@pytest.mark.parametrize("name", [name for name, row in SCHEDULES.items() if not row.betas])
@two_grids
def test_ddim_is_eulers_method_on_a_straight_schedule(grid, name):
    x, levels = np.array([0.4, -1.3, 2.0]), make_levels(make_schedule(name), grid, 12)
    for (level, following), step in zip(pairwise(levels), ddim(wobbly, x, levels), strict=True):
        clean, noise = wobbly(x, level)
        x = x + (following.sigma - level.sigma) * (noise - clean)
        assert_allclose(step.x, x, rtol=1e-11)


def one_step(level, following, clean, noise, draw, **options):
    return next(ddim(lambda x, at: (clean, noise), None, [level, following], lambda: draw, **options)).x


@pytest.mark.parametrize("timesteps", [2, 10, 1000])
@variance_preserving
def test_eta_one_is_the_posterior_of_ho_et_al_between_neighbouring_entries(name, timesteps):
    """Eq. 7: mean as a combination of the image and x_t, variance beta_tilde, from alpha_bar alone."""
    schedule = make_schedule(name, timesteps)
    clean, noise = 0.3, -1.1
    for t in {1, timesteps // 2, timesteps - 1}:
        level, following = schedule.level(t), schedule.level(t - 1)
        bar, bar_before = level.alpha**2, following.alpha**2
        beta = 1 - bar / bar_before
        x = math.sqrt(bar) * clean + math.sqrt(1 - bar) * noise
        mean = math.sqrt(bar_before) * beta / (1 - bar) * clean
        mean += math.sqrt(1 - beta) * (1 - bar_before) / (1 - bar) * x
        std = math.sqrt((1 - bar_before) / (1 - bar) * beta)
        assert one_step(level, following, clean, noise, 0.0, eta=1.0) == pytest.approx(mean, abs=1e-9)
        assert one_step(level, following, clean, noise, 2.5, eta=1.0) == pytest.approx(mean + 2.5 * std, abs=1e-9)


def test_ddpm_is_ddim_with_eta_one():
    levels = make_levels(make_schedule("cosine"), "trailing", 20)
    assert run("ddpm", wobbly, 0.4, levels)[-1].x == run("ddim", wobbly, 0.4, levels, eta=1.0)[-1].x


@pytest.mark.parametrize("eta", [0.0, 0.25, 0.5, 1.0])
@both_kinds
def test_the_fresh_noise_of_a_step_is_proportional_to_eta(name, eta):
    level, following = (make_schedule(name).level(t) for t in (700, 600))
    fresh = partial(one_step, level, following, 0.3, -1.1)
    whole = fresh(1.0, eta=1.0) - fresh(0.0, eta=1.0)
    assert whole > 0.05
    assert fresh(1.0, eta=eta) - fresh(0.0, eta=eta) == pytest.approx(eta * whole, abs=1e-12)


@every_sampler
def test_fresh_noise_is_drawn_once_a_step_and_not_on_the_last(sampler):
    count = 0

    def draw():
        nonlocal count
        count += 1
        return 0.0

    levels = make_levels(make_schedule("linear"), "trailing", 12)
    options = {"draw": draw} if SAMPLERS[sampler].draws else {}
    last(SAMPLERS[sampler].run(wobbly, 0.4, levels, **options))
    assert count == (11 if SAMPLERS[sampler].draws else 0)


# Higher orders


@every_schedule
def test_dpmpp_2m_is_ddim_on_its_first_step(name):
    levels = make_levels(make_schedule(name), "trailing", 12)
    assert next(dpmpp_2m(wobbly, 0.4, levels)).x == pytest.approx(next(ddim(wobbly, 0.4, levels)).x, rel=1e-12)


@every_schedule
def test_dpmpp_2m_extrapolates_the_image_as_published(name):
    """Lu et al. (2022b), algorithm 2, on unequal steps, written in their lambda = log(alpha/sigma) and r."""
    schedule = make_schedule(name)
    first, second, third = levels = [schedule.level(t) for t in (800.0, 700.0, 430.0)]
    before, after = dpmpp_2m(wobbly, 0.4, levels)
    lambdas = [math.log(level.alpha / level.sigma) for level in levels]
    h, r = lambdas[2] - lambdas[1], (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])
    ahead = (1 + 1 / (2 * r)) * wobbly(before.x, second)[0] - 1 / (2 * r) * wobbly(0.4, first)[0]
    expected = third.sigma / second.sigma * before.x - third.alpha * math.expm1(-h) * ahead
    assert after.x == pytest.approx(expected, rel=1e-12)


def velocity_over_angle(x, level):
    """(angle, radius, derivative of x/radius by the angle) of the wobbly denoiser."""
    angle, length = math.atan2(level.sigma, level.alpha), math.hypot(level.sigma, level.alpha)
    clean, noise = wobbly(x, level)
    return angle, length, math.cos(angle) * noise - math.sin(angle) * clean


@pytest.mark.parametrize("steps", [2, 12])
@both_kinds
def test_the_first_step_of_abm_is_ddims(name, steps):
    levels = make_levels(make_schedule(name), "angle", steps)
    assert next(abm(wobbly, 0.4, levels)).x == pytest.approx(next(ddim(wobbly, 0.4, levels)).x, rel=1e-11)


@every_schedule
def test_abm_corrects_each_step_with_the_slope_at_its_end(name):
    """The second step starts where Adams-Moulton's two-point rule ends, whose nodes are the ends of the first step."""
    levels = make_levels(make_schedule(name), "angle", 12)
    guess, after = list(abm(wobbly, 0.4, levels))[:2]
    angles = [math.atan2(level.sigma, level.alpha) for level in levels[:3]]
    pairs = [wobbly(0.4, levels[0]), wobbly(guess.x, levels[1])]

    def slope(angle):
        share = (angle - angles[0]) / (angles[1] - angles[0])
        clean, noise = ((1 - share) * first + share * second for first, second in zip(*pairs, strict=True))
        return math.cos(angle) * noise - math.sin(angle) * clean

    start = 0.4 / math.hypot(levels[0].sigma, levels[0].alpha)
    y = start + integrate.quad(slope, angles[0], angles[1])[0] + integrate.quad(slope, angles[1], angles[2])[0]
    assert after.x == pytest.approx(y * math.hypot(levels[2].sigma, levels[2].alpha), rel=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@two_grids
@both_kinds
def test_sa_solver_of_order_one_is_ddim_without_fresh_noise_and_with_ddpms(name, grid, eta):
    levels = make_levels(make_schedule(name), grid, 12)
    noise = np.random.default_rng(3).standard_normal((11, 5))
    x = np.linspace(-2, 2, 5)
    ours = sa_solver(wobbly, x, levels, iter(noise).__next__, eta, order=1)
    theirs = ddim(wobbly, x, levels, iter(noise).__next__, eta)
    for our, their in zip(ours, theirs, strict=True):
        assert_allclose(our.x, their.x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("ratio", [0.2, 0.6, 0.95])
def test_the_data_term_is_exact_for_an_image_that_is_a_polynomial_of_the_angle(ratio, count, eta):
    """The integral of Xue et al. (2023), over lambda = log(alpha/sigma), by scipy."""
    end = Level(0, 0.8, 0.6)
    image = np.polynomial.Polynomial([0.3, -1.0][:count])
    start = math.atan2(end.sigma, end.alpha * ratio)
    history = [Estimate(angle, image(angle), 0.0) for angle in (start, start + 0.5)[:count]]
    lambdas = math.log(end.alpha * ratio / end.sigma), math.log(end.alpha / end.sigma)

    def integrand(here):
        return math.exp((1 + eta**2) * (here - lambdas[1])) * image(math.atan(math.exp(-here)))

    exact = end.alpha * (1 + eta**2) * integrate.quad(integrand, *lambdas, epsabs=1e-13)[0]
    assert data_term(history, ratio, end, eta) == pytest.approx(exact, rel=1e-7)


def test_more_fresh_noise_than_ddpms_removes_more_of_an_early_error():
    """Why eta is above 1: less of an error of 1 in one early estimate is left in the image."""
    levels = make_levels(make_schedule("cosine"), "angle", 20)

    def left(eta):
        gaussian, errs = Gaussian(0.4, 0.5), [0.0]

        def denoise(x, level):
            clean = gaussian(x, level)[0] + errs.pop() if errs and level == levels[5] else gaussian(x, level)[0]
            return clean, (x - level.alpha * clean) / level.sigma

        right = last(sa_solver(denoise, 1.3, levels, lambda: 0.0, eta)).x
        errs[:] = [1.0]
        return abs(last(sa_solver(denoise, 1.3, levels, lambda: 0.0, eta)).x - right)

    assert 0 < left(1.5) < left(1.0) / 1.5 < left(0.0) / 3


@pytest.mark.parametrize("beta_end", [0.1, 0.999])
@pytest.mark.parametrize("steps", [10, 200])
@every_sampler
def test_betas_that_reach_noise_early_leave_every_sampler_stable(sampler, steps, beta_end):
    """At an alpha of 1e-200 float64 cannot tell angles apart.  The results keep their order and stay near the data."""
    levels = make_levels(make_schedule("linear", beta_end=beta_end), "trailing", steps)
    drawn = run(sampler, Gaussian(0.4, 0.5), np.array([-1.3, 0.0, 1.3]), levels)[-1].x
    assert np.all(np.abs(drawn - 0.4) < (1.5 if SAMPLERS[sampler].draws else 0.7))
    assert SAMPLERS[sampler].draws or (drawn[0] <= drawn[1] <= drawn[2] and drawn[1] == pytest.approx(0.4, abs=0.02))


@pytest.mark.parametrize("steps", [5, 20])
@every_grid
@both_kinds
@deterministic
def test_no_sampler_amplifies_the_networks_errors(sampler, name, grid, steps):
    """Independent errors of 0.02 in v, sigma * 0.02 in the image, leave an error of about that size at the end.

    Extrapolation could make it thirty times as large where steps grow, as the first ones of log_snr and rho do.
    """
    assert spread_after_errors(sampler, make_levels(make_schedule(name), grid, steps)) < 0.05


@pytest.mark.parametrize("steps", [5, 20])
@both_kinds
@deterministic
def test_no_sampler_amplifies_the_networks_errors_on_its_own_grid_of_a_shifted_schedule(sampler, name, steps):
    schedule = make_schedule(name, logsnr_shift=-4.2)
    assert spread_after_errors(sampler, make_levels(schedule, SAMPLERS[sampler].grid, steps)) < 0.05


def spread_after_errors(sampler, levels):
    """The deviation of the results from one start, for a denoiser with independent errors of 0.02 in v."""
    gaussian, rng = Gaussian(0.4, 0.5), np.random.default_rng(0)

    def imperfect(x, level):
        clean = gaussian(x, level)[0] + 0.02 * level.sigma * rng.standard_normal(np.shape(x))
        return clean, (x - level.alpha * clean) / level.sigma

    return run(sampler, imperfect, np.full(300, 1.3), levels)[-1].x.std()


@every_schedule
def test_heun_is_the_mean_of_the_slopes_at_both_ends_even_where_no_image_is_left(name):
    schedule = make_schedule(name)
    level, following = schedule.level(999), schedule.level(700)
    angle, length, slope = velocity_over_angle(0.4, level)
    end, end_length = math.atan2(following.sigma, following.alpha), math.hypot(following.sigma, following.alpha)
    guess = end_length * (0.4 / length + (end - angle) * slope)
    mean = (slope + velocity_over_angle(guess, following)[2]) / 2
    expected = end_length * (0.4 / length + (end - angle) * mean)
    assert next(heun(wobbly, 0.4, [level, following])).x == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_velocity_integral_is_exact_for_images_and_noise_that_are_polynomials_of_the_angle(count):
    """For degrees below the number of estimates, at unequal angles; the integral is scipy's."""
    angles, end = [1.1, 1.25, 1.45][:count], 0.95
    clean, noise = (np.polynomial.Polynomial(c[:count]) for c in ([0.3, -1.0, 0.7], [-0.2, 0.4, 1.1]))
    exact = integrate.quad(
        lambda angle: math.cos(angle) * noise(angle) - math.sin(angle) * clean(angle), angles[0], end
    )[0]
    history = [Estimate(angle, clean(angle), noise(angle)) for angle in angles]
    assert velocity_integral(history, angles[0], end) == pytest.approx(exact, rel=1e-12)


def test_estimates_from_the_first_gap_of_half_a_step_on_are_left_out():
    history = [Estimate(angle, angle**2, -angle) for angle in (1.0, 1.25, 1.375, 2.0)]
    assert well_spaced(history, 0.2) == history
    assert well_spaced(history, 0.25) == history[:2]
    assert well_spaced(history, 0.5) == history[:1]
    assert velocity_integral(history, 1.0, 0.5) == velocity_integral(history[:1], 1.0, 0.5)


@pytest.mark.parametrize("nodes", [[0.3], [0.3, 1.1], [1.5, 0.2, 0.9, -0.4]])
def test_lagrange_weights_interpolate_every_polynomial_of_a_degree_below_their_number(nodes):
    at = np.linspace(-1, 2, 7)
    polynomial = np.polynomial.Polynomial(np.arange(1.0, len(nodes) + 1))
    assert_allclose(polynomial(np.array(nodes)) @ lagrange_weights(nodes, at), polynomial(at), rtol=1e-12, atol=1e-12)
    assert_allclose(lagrange_weights(nodes, np.array(nodes)), np.eye(len(nodes)), atol=1e-12)
