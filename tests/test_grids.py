"""Grids: n steps are n distinct levels, from noise to the clean image, for every n that a schedule allows."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tiny_diffusion.diffusion.grids import GRIDS, NOISIEST_RATIO, make_levels
from tiny_diffusion.diffusion.levels import CLEAN
from tiny_diffusion.diffusion.schedules import SCHEDULES, make_schedule

every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_grid = pytest.mark.parametrize("grid", GRIDS)
every_length = pytest.mark.parametrize("timesteps", [2, 200])
every_shift = pytest.mark.parametrize("shift", [0.0, -4.2])  # -4.2: for images of 256 pixels
# The shortest process, and a longer one with the shift of images of 256 pixels.
every_kind = pytest.mark.parametrize("timesteps, shift", [(2, 0.0), (200, -4.2)])


def ratios(levels):
    """sigma/alpha of the levels, without CLEAN and without a level that has no image left."""
    return np.array([level.sigma / level.alpha for level in levels[:-1] if level.alpha > 0])


# Laws of every grid


@every_kind
@every_schedule
@every_grid
def test_n_steps_are_n_falling_times_within_the_table_for_every_n(grid, name, timesteps, shift):
    schedule = make_schedule(name, timesteps, logsnr_shift=shift)
    for n in range(1, timesteps + 1):
        t = GRIDS[grid](schedule, n)
        assert t.shape == (n,)
        assert np.all(np.diff(t) < 0)
        assert t[0] <= timesteps - 1 and t[-1] >= 0


@every_schedule
@every_grid
def test_n_steps_are_n_levels_each_less_noisy_than_the_one_before_and_then_the_clean_image(grid, name):
    """At T = 1000, because at 10 the sigmas of the linear schedule's last levels round to 1 in float64."""
    schedule = make_schedule(name, 1000, logsnr_shift=-4.2)
    for n in (1, 2, 3, 7, 20, 64, 999, 1000):
        levels = make_levels(schedule, grid, n)
        assert len(levels) == len({level.time for level in levels[:-1]}) + 1 == n + 1
        assert all(after.sigma < before.sigma for before, after in pairwise(levels))
        assert all(after.alpha > before.alpha for before, after in pairwise(levels))
        assert levels[-1] == CLEAN


@every_length
@every_schedule
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid != "leading"])
def test_sampling_starts_where_the_process_ends_for_every_n(grid, name, timesteps):
    schedule = make_schedule(name, timesteps, logsnr_shift=-4.2)
    assert all(GRIDS[grid](schedule, n)[0] == timesteps - 1 for n in range(1, timesteps + 1))


@pytest.mark.parametrize("timesteps", [50, 1000])
@every_schedule
def test_leading_starts_from_nearly_no_image_for_every_n(name, timesteps):
    """alpha before the shift is at most 0.1, where DDIM's own multiples of T // n may start at t = 0."""
    plain, shifted = (make_schedule(name, timesteps, logsnr_shift=shift) for shift in (0.0, 3.0))
    for n in range(1, timesteps + 1):
        t = GRIDS["leading"](shifted, n)
        level = plain.level(t[0])
        assert level.alpha <= 0.1 * math.hypot(level.alpha, level.sigma)
        multiples = np.arange(n)[::-1] * (timesteps // n)
        start = plain.level(multiples[0])
        kept = start.alpha <= 0.1 * math.hypot(start.alpha, start.sigma)
        assert_array_equal(t, multiples if kept else GRIDS["trailing"](plain, n))


@every_schedule
@every_grid
def test_the_levels_are_the_schedules_own_at_these_times(grid, name):
    schedule = make_schedule(name, logsnr_shift=-4.2)
    assert make_levels(schedule, grid, 20)[:-1] == [schedule.level(t) for t in GRIDS[grid](schedule, 20)]


@pytest.mark.parametrize("timesteps, shift", [(10, 3.0), (1000, -20.0)])
@every_schedule
@every_grid
def test_a_shift_changes_every_level_and_no_time(grid, name, timesteps, shift):
    plain, shifted = make_schedule(name, timesteps), make_schedule(name, timesteps, logsnr_shift=shift)
    for n in {1, 2, min(timesteps, 7), min(timesteps, 50), timesteps}:
        assert_allclose(GRIDS[grid](shifted, n), GRIDS[grid](plain, n), rtol=0, atol=1e-9 * timesteps)
        before, after = (ratios(make_levels(schedule, grid, n)) for schedule in (plain, shifted))
        assert_allclose(after, before * np.exp(-shift / 2), rtol=1e-6)


# Each grid


@pytest.mark.parametrize("timesteps", [2, 10, 200, 1000])
def test_trailing_is_exact_even_division_back_from_the_end_for_every_n(timesteps):
    """Lin et al. (2023): round(T, T - T/n, ...) - 1, in exact fractions; Python and numpy both round half to even."""
    schedule = make_schedule("cosine", timesteps)
    for n in {*range(1, min(timesteps, 60) + 1), timesteps - 1, timesteps}:
        expected = [round(Fraction(timesteps * (n - i), n)) - 1 for i in range(n)]
        assert_array_equal(GRIDS["trailing"](schedule, n), expected)


@pytest.mark.parametrize("grid", ["trailing", "leading"])
@every_length
def test_as_many_steps_as_there_are_entries_visit_every_entry(timesteps, grid):
    assert_array_equal(GRIDS[grid](make_schedule("cosine", timesteps), timesteps), np.arange(timesteps)[::-1])


def test_leading_is_the_grid_of_the_ddim_paper():
    """50 of 1000 steps begin at 980; 7 of 10, whose quotient is 1, at 6, where the linear schedule is noise."""
    assert_array_equal(GRIDS["leading"](make_schedule("linear", 1000), 50), np.arange(980, -1, -20))
    assert_array_equal(GRIDS["leading"](make_schedule("linear", 10), 7), np.arange(7)[::-1])


@pytest.mark.parametrize("steps, shift", [(3, 0.0), (50, -4.2)])
@every_schedule
def test_log_snr_takes_equal_steps_of_log_snr_down_to_the_first_entry(name, steps, shift):
    """From the second level on: the first is the last entry, which may be noisier than the range."""
    schedule = make_schedule(name, logsnr_shift=shift)
    values = -2 * np.log(ratios(make_levels(schedule, "log_snr", steps)[1:]))
    noisiest = max(schedule.log_snr[-1], -2 * np.log(NOISIEST_RATIO) + shift)
    assert_allclose(values, np.linspace(noisiest, schedule.log_snr[0], steps)[1:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps, shift", [(3, 0.0), (50, -4.2)])
@every_schedule
def test_rho_takes_equal_steps_of_the_seventh_root_of_the_ratio_down_to_the_first_entry(name, steps, shift):
    """Karras et al. (2022), eq. 5, from sigma_max = 80 before the shift or where the schedule ends."""
    schedule = make_schedule(name, logsnr_shift=shift)
    roots = ratios(make_levels(schedule, "rho", steps)[1:]) ** (1 / 7)
    noisiest = min(np.exp(-schedule.log_snr[-1] / 2), 80.0 * np.exp(-shift / 2)) ** (1 / 7)
    cleanest = (schedule.sigma[0] / schedule.alpha[0]) ** (1 / 7)
    i = np.arange(1, steps)
    assert_allclose(roots, noisiest + i / (steps - 1) * (cleanest - noisiest), rtol=1e-9)


def angles_before(shift, levels):
    return [np.arctan2(level.sigma, level.alpha * np.exp(-shift / 2)) for level in levels]


@pytest.mark.parametrize("steps, shift", [(1, 0.0), (50, -4.2)])
@every_schedule
def test_angle_takes_equal_steps_of_the_angle_before_the_shift_all_the_way_to_the_clean_image(name, steps, shift):
    levels = make_levels(make_schedule(name, logsnr_shift=shift), "angle", steps)
    angles = angles_before(shift, levels)
    assert_allclose(angles, np.linspace(angles[0], 0, steps + 1), rtol=0, atol=1e-9)


@every_shift
@pytest.mark.parametrize("name", [name for name, row in SCHEDULES.items() if row.betas])
def test_angle_takes_equal_steps_to_the_first_entry_where_that_is_more_than_one_step_from_clean(name, shift):
    """500 steps are 0.003 each, and sigma is 0.006 to 0.02 at t = 0 of these schedules."""
    angles = angles_before(shift, make_levels(make_schedule(name, logsnr_shift=shift), "angle", 500)[:-1])
    cleanest = np.arcsin(make_schedule(name).sigma[0])
    assert_allclose(angles, np.linspace(angles[0], cleanest, 500), rtol=0, atol=1e-9)


@pytest.mark.parametrize("grid", ["log_snr", "rho"])
@every_schedule
def test_grids_over_a_range_end_on_the_cleanest_entry(grid, name):
    assert GRIDS[grid](make_schedule(name), 10)[-1] == pytest.approx(0, abs=1e-9)


# Errors


def test_an_unknown_grid_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="'karras'.*" + ", ".join(GRIDS)):
        make_levels(make_schedule("linear"), "karras", 10)


@pytest.mark.parametrize("steps", [0, -1, 11])
@every_grid
def test_a_number_of_steps_outside_1_to_the_number_of_timesteps_is_refused(grid, steps):
    with pytest.raises(ValueError, match=f"from 1 to 10, .* not {steps}"):
        make_levels(make_schedule("linear", 10), grid, steps)
