"""Schedules: the laws that make a table of two numbers per step a noising process, and the geometry of a level."""

import dataclasses
import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tiny_diffusion.diffusion.levels import CLEAN, Level
from tiny_diffusion.diffusion.schedules import MAX_BETA, SCHEDULES, make_schedule

WITH_BETAS = [name for name, row in SCHEDULES.items() if row.betas]
WITH_ENDS = [name for name, row in SCHEDULES.items() if row.ends]
STRAIGHT = [name for name, row in SCHEDULES.items() if not row.betas]

every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_length = pytest.mark.parametrize("timesteps", [2, 1000])
# The shortest process, and the usual one with the shift of images of 256 pixels.
every_kind = pytest.mark.parametrize("timesteps, shift", [(2, 0.0), (1000, -4.2)])


def betas_of(schedule):
    """The betas, read back from the table: alpha_t^2 = alpha_(t-1)^2 (1 - beta_t)."""
    return 1 - (schedule.alpha / np.append(1.0, schedule.alpha[:-1])) ** 2


def log_snr_of(alpha, sigma):
    with np.errstate(divide="ignore"):
        return 2 * (np.log(alpha) - np.log(sigma))


def fractional_times(timesteps):
    """Real-valued times over the whole table, on and between the entries."""
    return np.linspace(0, timesteps - 1, 7 * timesteps)


# The process


@every_kind
@pytest.mark.parametrize("name", WITH_BETAS)
def test_image_and_noise_keep_unit_variance_where_the_schedule_has_betas(name, timesteps, shift):
    _, alpha, sigma = make_schedule(name, timesteps, logsnr_shift=shift).at(fractional_times(timesteps))
    assert_allclose(alpha**2 + sigma**2, 1, rtol=0, atol=1e-15)


@every_kind
@pytest.mark.parametrize("name", STRAIGHT)
def test_image_and_noise_add_up_to_one_where_the_schedule_is_straight(name, timesteps, shift):
    schedule = make_schedule(name, timesteps, logsnr_shift=shift)
    _, alpha, sigma = schedule.at(fractional_times(timesteps))
    assert schedule.straight
    assert_allclose(alpha + sigma, 1, rtol=0, atol=1e-15)


@every_kind
@every_schedule
def test_every_step_is_noisier_than_the_one_before(name, timesteps, shift):
    schedule = make_schedule(name, timesteps, logsnr_shift=shift)
    assert np.all(np.diff(schedule.log_snr) < 0)
    assert np.all(np.diff(schedule.alpha) < 0)
    assert np.all(np.diff(schedule.sigma) >= 0)  # float64 cannot tell 1 - 1e-17 from 1: strictly, log-SNR does


@every_schedule
def test_every_step_is_noisier_in_the_longest_process_there_can_be(name):
    assert np.all(np.diff(make_schedule(name, 100_000).log_snr) < 0)


@every_kind
@every_schedule
def test_the_table_holds_the_log_snr_of_its_alpha_and_sigma(name, timesteps, shift):
    schedule = make_schedule(name, timesteps, logsnr_shift=shift)
    assert_allclose(schedule.log_snr, log_snr_of(schedule.alpha, schedule.sigma), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("timesteps", [2, 10, 1000])
@every_schedule
def test_the_end_is_noise(name, timesteps):
    """At most a thousandth of the image's variance is left: a correlation of 0.03, which T = 2 reaches by its cap."""
    assert make_schedule(name, timesteps).alpha[-1] ** 2 <= 1.001e-3


@pytest.mark.parametrize("timesteps", [200, 1000])
@every_schedule
def test_the_start_is_the_image(name, timesteps):
    assert make_schedule(name, timesteps).sigma[0] < 0.05


@pytest.mark.parametrize("name", WITH_ENDS)
@pytest.mark.parametrize("timesteps", [200, 5000])
def test_any_number_of_steps_ends_where_a_thousand_do(name, timesteps):
    """log(alpha^2) is about -sum(beta), which scaling by 1000/T keeps; sum(beta^2)/2 is what differs."""
    ratio = make_schedule(name, timesteps).log_snr[-1] / make_schedule(name, 1000).log_snr[-1]
    assert ratio == pytest.approx(1, abs=0.1)


def test_the_clean_image_is_the_level_without_noise():
    assert (CLEAN.alpha, CLEAN.sigma) == (1, 0)


# Levels


@every_schedule
def test_angle_and_radius_are_the_polar_coordinates_of_alpha_and_sigma(name):
    """The angle rises from nearly 0 to nearly pi/2, and is pi/2 where no image is left."""
    levels = [make_schedule(name).level(t) for t in (0, 300, 999)]
    for level in [*levels, CLEAN]:
        assert level.radius * math.cos(level.angle) == pytest.approx(level.alpha, abs=1e-15)
        assert level.radius * math.sin(level.angle) == pytest.approx(level.sigma, abs=1e-15)
    assert 0 == CLEAN.angle < levels[0].angle < levels[1].angle < levels[2].angle <= math.pi / 2


def test_velocity_is_the_derivative_by_the_angle_of_x_over_the_radius():
    level, clean, noise, h = Level(0.0, 0.3, 0.9), 0.7, -1.2, 1e-5
    ahead, behind = (math.cos(angle) * clean + math.sin(angle) * noise for angle in (level.angle + h, level.angle - h))
    assert level.velocity(clean, noise) == pytest.approx((ahead - behind) / (2 * h), rel=1e-8)


# Closed forms


@pytest.mark.parametrize("timesteps", [200, 1000])
def test_linear_is_the_product_of_one_minus_betas_in_equal_steps(timesteps):
    """Ho et al. (2020), section 4, written as the loop it is."""
    product, expected = 1.0, []
    for t in range(timesteps):
        product *= 1 - (1e-4 + t * (0.02 - 1e-4) / (timesteps - 1)) * 1000 / timesteps
        expected.append(product)
    assert_allclose(make_schedule("linear", timesteps).alpha ** 2, expected, rtol=1e-10)


@pytest.mark.parametrize("timesteps", [200, 1000])
def test_exponential_has_betas_in_equal_ratios(timesteps):
    betas = betas_of(make_schedule("exponential", timesteps))
    assert_allclose(betas[1:] / betas[:-1], (0.065 / 1e-4) ** (1 / (timesteps - 1)), rtol=1e-9)


@pytest.mark.parametrize("timesteps", [10, 200, 1000])
def test_cosine_is_the_papers_curve_up_to_the_capped_last_step(timesteps):
    """Nichol & Dhariwal (2021), eq. 17."""
    s = np.arange(timesteps + 1) / timesteps
    curve = np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2
    squared = make_schedule("cosine", timesteps).alpha ** 2
    assert_allclose(squared[:-1], curve[1:-1] / curve[0], rtol=1e-9)
    assert squared[-1] / squared[-2] == pytest.approx(1 - MAX_BETA)


@pytest.mark.parametrize("timesteps", [10, 200, 1000])
def test_sigmoid_is_the_papers_curve_up_to_the_capped_last_step(timesteps):
    """Jabri et al. (2022), algorithm 1, with start -3, end 3, tau 1: their gamma(t) is alpha^2."""

    def logistic(x):
        return 1 / (1 + math.exp(-x))

    times = [(t + 1) / timesteps for t in range(timesteps)]
    gamma = [(logistic(3) - logistic(t * 6 - 3)) / (logistic(3) - logistic(-3)) for t in times]
    squared = make_schedule("sigmoid", timesteps).alpha ** 2
    assert_allclose(squared[:-1], gamma[:-1], rtol=1e-9)
    assert squared[-1] / squared[-2] == pytest.approx(1 - MAX_BETA)


@every_length
def test_flow_is_the_straight_line_that_ends_in_pure_noise(timesteps):
    schedule = make_schedule("flow", timesteps)
    assert_allclose(schedule.sigma, np.arange(1, timesteps + 1) / timesteps, rtol=1e-15)
    assert schedule.alpha[-1] == 0
    assert schedule.sigma[-1] == 1


@pytest.mark.parametrize("timesteps", [2, 10, 1000])
@pytest.mark.parametrize("name", WITH_BETAS)
def test_no_step_erases_the_image(name, timesteps):
    schedule = make_schedule(name, timesteps)
    assert np.all(schedule.alpha > 0)
    assert np.all(betas_of(schedule) <= MAX_BETA + 1e-12)


# The ends of the betas


@pytest.mark.parametrize("timesteps", [200, 1000])
@pytest.mark.parametrize("name", WITH_ENDS)
def test_the_ends_of_the_betas_are_the_given_ones_scaled_to_the_number_of_steps(name, timesteps):
    betas = betas_of(make_schedule(name, timesteps, beta_start=3e-4, beta_end=0.03))
    assert_allclose(betas[[0, -1]], [3e-4 * 1000 / timesteps, 0.03 * 1000 / timesteps], rtol=1e-9)


@pytest.mark.parametrize("name", WITH_ENDS)
def test_an_end_that_is_not_given_is_the_rows_own(name):
    start, end = SCHEDULES[name].ends
    given = make_schedule(name, 200, beta_start=start, beta_end=end).log_snr
    assert_array_equal(make_schedule(name, 200).log_snr, given)
    assert_array_equal(make_schedule(name, 200, beta_end=end).log_snr, given)
    assert_array_equal(make_schedule(name, 200, beta_start=start).log_snr, given)


@pytest.mark.parametrize("name", WITH_ENDS)
def test_a_tiny_first_beta_keeps_its_digits(name):
    """1 - (1 - 1e-14) keeps only two of them."""
    assert make_schedule(name, beta_start=1e-14).sigma[0] == pytest.approx(1e-7, rel=1e-9)


def test_levels_far_into_the_noise_keep_their_digits():
    """Ten steps cap most betas at 0.999, and 1 - alpha^2 rounds to 1 long before the end."""
    betas = np.minimum(np.linspace(0.01, 2, 10), MAX_BETA)
    assert make_schedule("linear", 10).log_snr[-1] == pytest.approx(math.fsum(np.log1p(-betas)), rel=1e-13)


# The shift


@pytest.mark.parametrize("timesteps, shift", [(2, -20.0), (1000, 3.0)])
@every_schedule
def test_a_shift_is_added_to_log_snr_on_and_between_the_entries(name, timesteps, shift):
    plain, shifted = make_schedule(name, timesteps), make_schedule(name, timesteps, logsnr_shift=shift)
    t = fractional_times(timesteps)
    before, after = (log_snr_of(*schedule.at(t)[1:]) for schedule in (plain, shifted))
    assert_allclose(after, before + shift, rtol=1e-9, atol=1e-9)
    assert_allclose(shifted.log_snr, plain.log_snr + shift, rtol=1e-12)
    assert (plain.shift, shifted.shift) == (0, shift)


@every_schedule
def test_no_shift_is_a_shift_of_zero(name):
    plain, shifted = make_schedule(name), make_schedule(name, logsnr_shift=0.0)
    assert_array_equal(plain.log_snr, shifted.log_snr)
    assert_array_equal(plain.at(fractional_times(1000)), shifted.at(fractional_times(1000)))


@every_kind
@every_schedule
def test_a_shift_moves_the_log_snr_at_every_time_and_so_the_inverse_too(name, timesteps, shift):
    values = np.linspace(-15, 15, 301)
    shifted = make_schedule(name, timesteps, logsnr_shift=shift).t_at(values + shift)
    assert_allclose(shifted, make_schedule(name, timesteps).t_at(values), rtol=0, atol=1e-9 * timesteps)


@pytest.mark.parametrize("k", [2, 8])
@every_schedule
def test_the_shift_of_k_times_the_side_is_undone_by_averaging_k_by_k_pixels(name, k):
    """Hoogeboom et al. (2023), eq. 4: the mean of k * k equal pixels has the log-SNR of the small image."""
    plain, large = make_schedule(name), make_schedule(name, logsnr_shift=2 * math.log(1 / k))
    pixels = np.eye(k * k)  # each row a pixel's noise, as coefficients of independent standard normals
    noise_of_the_mean = np.linalg.norm(pixels.mean(axis=0))
    _, alpha, sigma = large.at(fractional_times(1000))
    _, small_alpha, small_sigma = plain.at(fractional_times(1000))
    assert_allclose(alpha * small_sigma, small_alpha * sigma * noise_of_the_mean, rtol=1e-9)


@pytest.mark.parametrize("timesteps, shift", [(2, -4.2), (1000, 3.0)])
@pytest.mark.parametrize("name", STRAIGHT)
def test_the_shift_of_a_straight_schedule_is_that_of_stable_diffusion_3(name, timesteps, shift):
    """Esser et al. (2024), eq. 23, with sqrt(m/n) = exp(-shift/2)."""
    t, ratio = fractional_times(timesteps), math.exp(-shift / 2)
    _, _, before = make_schedule(name, timesteps).at(t)
    _, _, after = make_schedule(name, timesteps, logsnr_shift=shift).at(t)
    assert_allclose(after, ratio * before / (1 + (ratio - 1) * before), rtol=1e-12)


@pytest.mark.parametrize("shift", [-20.0, 3.0, 20.0])
@every_length
@pytest.mark.parametrize("name", STRAIGHT)
def test_pure_noise_is_pure_noise_under_every_shift(name, timesteps, shift):
    schedule = make_schedule(name, timesteps, logsnr_shift=shift)
    assert (schedule.alpha[-1], schedule.sigma[-1], schedule.level(timesteps - 1).time) == (0, 1, timesteps)


# Between the entries


@every_kind
@every_schedule
def test_at_a_whole_t_the_level_is_the_entry_of_the_table(name, timesteps, shift):
    schedule = make_schedule(name, timesteps, logsnr_shift=shift)
    for t in {0, 1, timesteps // 2, timesteps - 2, timesteps - 1}:
        level = schedule.level(t)
        assert (level.alpha, level.sigma) == (schedule.alpha[t], schedule.sigma[t])


@every_kind
@every_schedule
def test_a_t_between_two_entries_lies_strictly_between_them(name, timesteps, shift):
    schedule = make_schedule(name, timesteps, logsnr_shift=shift)
    for fraction in (0.01, 0.5, 0.99):
        _, alpha, sigma = schedule.at(np.arange(timesteps - 1) + fraction)
        assert np.all((alpha < schedule.alpha[:-1]) & (alpha > schedule.alpha[1:]))
        assert np.all((sigma >= schedule.sigma[:-1]) & (sigma <= schedule.sigma[1:]))
        assert np.all(alpha / sigma < schedule.alpha[:-1] / schedule.sigma[:-1])
        assert np.all(alpha / sigma > schedule.alpha[1:] / schedule.sigma[1:])


@pytest.mark.parametrize("name", WITH_BETAS)
def test_half_way_between_two_entries_the_ratio_of_noise_to_image_is_their_geometric_mean(name):
    schedule = make_schedule(name, 200)
    _, alpha, sigma = schedule.at(np.arange(199) + 0.5)
    ratio = schedule.sigma / schedule.alpha
    assert_allclose(sigma / alpha, np.sqrt(ratio[1:] * ratio[:-1]), rtol=1e-10)


@pytest.mark.parametrize("name", STRAIGHT)
def test_half_way_between_two_entries_of_a_straight_schedule_is_their_mean(name):
    schedule = make_schedule(name, 200)
    _, alpha, sigma = schedule.at(np.arange(199) + 0.5)
    assert_allclose(sigma, (schedule.sigma[1:] + schedule.sigma[:-1]) / 2, rtol=1e-14)
    assert_allclose(alpha, (schedule.alpha[1:] + schedule.alpha[:-1]) / 2, rtol=1e-12)


@every_kind
@every_schedule
def test_t_at_is_the_inverse_of_at(name, timesteps, shift):
    schedule = make_schedule(name, timesteps, logsnr_shift=shift)
    t = fractional_times(timesteps)
    _, alpha, sigma = schedule.at(t)
    assert_allclose(schedule.t_at(log_snr_of(alpha, sigma)), t, rtol=0, atol=1e-9 * timesteps)


@every_schedule
def test_a_log_snr_beyond_the_table_has_the_time_of_its_end(name):
    assert_array_equal(make_schedule(name, 10, logsnr_shift=-4.2).t_at([1e3, np.inf, -1e3, -np.inf]), [0, 0, 9, 9])


@pytest.mark.parametrize("t", [-0.001, 9.001, math.nan, math.inf, [0.0, 9.5], [[3.0], [math.nan]]])
@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_a_t_outside_the_table_is_an_index_error(name, t):
    with pytest.raises(IndexError, match=r"\[0, 9\]"):
        make_schedule(name, 10).at(t)


@pytest.mark.parametrize("shape", [(), (2, 3), (0,)])
@every_schedule
def test_time_alpha_and_sigma_have_the_shape_of_t(name, shape):
    assert all(values.shape == shape for values in make_schedule(name, 10).at(np.full(shape, 2.5)))


@every_schedule
def test_a_level_is_three_plain_floats(name):
    assert all(type(value) is float for value in dataclasses.astuple(make_schedule(name, 10).level(2)))


@every_kind
@every_schedule
def test_the_networks_time_is_t_or_on_a_straight_schedule_sigma_times_the_number_of_steps(name, timesteps, shift):
    """diffusers' two conventions; with the second an exported network works for any number of steps."""
    schedule = make_schedule(name, timesteps, logsnr_shift=shift)
    t = fractional_times(timesteps)
    time, _, sigma = schedule.at(t)
    assert_allclose(time, timesteps * sigma if schedule.straight else t, rtol=1e-14)


# Values and errors


def test_schedules_and_levels_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_schedule("linear").name = "cosine"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Level(0.0, 1.0, 0.0).alpha = 0.5


def test_an_unknown_schedule_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="'cosin'.*" + ", ".join(SCHEDULES)):
        make_schedule("cosin")


@pytest.mark.parametrize("timesteps", [1, 0, -5])
@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_fewer_than_two_timesteps_are_refused(name, timesteps):
    with pytest.raises(ValueError, match=f"at least 2 timesteps, not {timesteps}"):
        make_schedule(name, timesteps)


@pytest.mark.parametrize("ends", [{"beta_start": 1e-4}, {"beta_end": 0.02}, {"beta_start": 1e-4, "beta_end": 0.02}])
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in WITH_ENDS])
def test_betas_are_refused_where_the_schedule_has_none_to_set(name, ends):
    with pytest.raises(ValueError, match=f"{name} schedule has no beta_start"):
        make_schedule(name, 200, **ends)
