"""Loss weights and timestep distributions: how much each noise level counts, and how often training sees it."""

import itertools
import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tiny_diffusion.diffusion import loss_weights as weights_module
from tiny_diffusion.diffusion import timesteps as timesteps_module
from tiny_diffusion.diffusion.loss_weights import LOSS_WEIGHTS, output_weight
from tiny_diffusion.diffusion.predictions import PREDICTIONS, recover, target
from tiny_diffusion.diffusion.schedules import SCHEDULES, make_schedule
from tiny_diffusion.diffusion.timesteps import MEAN, STD, TIMESTEP_DISTRIBUTIONS, stratified

every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_length = pytest.mark.parametrize("timesteps", [2, 1000])
every_distribution = pytest.mark.parametrize("distribution", TIMESTEP_DISTRIBUTIONS)
variance_preserving = pytest.mark.parametrize("name", [name for name, row in SCHEDULES.items() if row.betas])
stated_on_the_image = pytest.mark.parametrize("weight", [name for name, row in LOSS_WEIGHTS.items() if row])
pairs = pytest.mark.parametrize(
    "prediction, name", [pair for pair in itertools.product(PREDICTIONS, SCHEDULES) if pair != ("epsilon", "flow")]
)


def squared_weight(name, prediction, alpha, sigma):
    """The weight on the squared error of the network's output."""
    weight, scale = output_weight(name, prediction, alpha, sigma)
    return weight * scale**2


def table(name, timesteps=200, shift=0.0):
    schedule = make_schedule(name, timesteps, logsnr_shift=shift)
    return schedule.alpha, schedule.sigma


# Weights


@pairs
@stated_on_the_image
def test_a_weight_on_the_image_is_the_same_loss_whatever_is_predicted(weight, prediction, name):
    """The weighted error of the output is the weight times the error of the image that is recovered from it."""
    alpha, sigma = table(name)
    rng = np.random.default_rng(0)
    clean, noise, error = rng.standard_normal((3, *alpha.shape))
    x = alpha * clean + sigma * noise
    recovered, _ = recover(prediction, alpha, sigma, x, target(prediction, alpha, sigma, clean, noise) + error)
    on_the_image = LOSS_WEIGHTS[weight](alpha, sigma) * (recovered - clean) ** 2
    assert_allclose(squared_weight(weight, prediction, alpha, sigma) * error**2, on_the_image, rtol=1e-6)


@variance_preserving
def test_min_snr_is_the_published_weight_of_epsilon_and_of_v(name):
    """Hang et al. (2023): min(SNR, 5)/SNR for epsilon, min(SNR, 5)/(SNR + 1) for v, min(SNR, 5) for the image."""
    alpha, sigma = table(name)
    snr = (alpha / sigma) ** 2
    assert snr.max() > 5 > snr.min()
    assert_allclose(squared_weight("min_snr", "epsilon", alpha, sigma), np.minimum(snr, 5) / snr, rtol=1e-9)
    assert_allclose(squared_weight("min_snr", "v", alpha, sigma), np.minimum(snr, 5) / (snr + 1), rtol=1e-9)
    assert_allclose(squared_weight("min_snr", "x0", alpha, sigma), np.minimum(snr, 5), rtol=1e-9)


@every_schedule
def test_edm_is_the_published_weight_in_terms_of_the_ratio_of_noise_to_image(name):
    """Karras et al. (2022), table 1: lambda(s) = (s^2 + 0.5^2) / (0.5 s)^2, on the image."""
    alpha, sigma = (values[:-1] for values in table(name))
    s = sigma / alpha
    assert_allclose(squared_weight("edm", "x0", alpha, sigma), (s**2 + 0.25) / (0.25 * s**2), rtol=1e-9)


@every_length
@variance_preserving
def test_edm_with_unit_data_is_no_weight_at_all_on_v(name, timesteps, monkeypatch):
    """With sigma_data = 1 EDM's network outputs -v, and its weight makes the loss of that output unweighted."""
    monkeypatch.setattr(weights_module, "SIGMA_DATA", 1.0)
    assert_allclose(squared_weight("edm", "v", *table(name, timesteps)), 1, rtol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@every_schedule
def test_uniform_weights_every_output_alike(name, prediction):
    alpha, sigma = table(name)
    assert_array_equal(output_weight("uniform", prediction, alpha, sigma), np.ones((2, 200)))


@pairs
@pytest.mark.parametrize("weight", LOSS_WEIGHTS)
def test_every_weight_is_finite_and_not_negative_even_where_no_image_is_left(weight, prediction, name):
    alpha, sigma = table(name, 1000, shift=-4.2)
    values = squared_weight(weight, prediction, alpha, sigma)
    assert values.shape == (1000,)
    assert np.all(np.isfinite(values)) and np.all(values >= 0) and np.any(values > 0)


# Stratified numbers


@pytest.mark.parametrize("count", [1, 7, 128])
def test_stratified_numbers_fall_one_in_each_interval(count):
    u = stratified(np.random.default_rng(0), count)
    assert u.shape == (count,)
    assert_array_equal(np.sort(np.floor(u * count)), np.arange(count))


def test_stratified_numbers_are_a_function_of_the_stream():
    first, again, other = (stratified(np.random.default_rng(seed), 64) for seed in (0, 0, 1))
    assert_array_equal(first, again)
    assert np.all(first != other)


def test_every_position_of_the_batch_gets_every_interval_equally_often():
    """4000 batches of 4: each of the 16 counts is binomial, 1000 with a standard deviation of 27."""
    rng = np.random.default_rng(0)
    intervals = np.array([np.floor(stratified(rng, 4) * 4) for _ in range(4000)]).astype(int)
    counts = [np.bincount(position, minlength=4) for position in intervals.T]
    assert np.abs(np.array(counts) - 1000).max() < 5 * 27.4


def test_stratified_numbers_are_uniform_within_their_interval():
    """A single number is uniform in (0, 1): mean 1/2, variance 1/12, each within five standard errors of 10000."""
    rng = np.random.default_rng(0)
    u = np.array([stratified(rng, 1)[0] for _ in range(10_000)])
    assert 0 < u.min() < u.max() < 1
    assert u.mean() == pytest.approx(1 / 2, abs=5 * math.sqrt(1 / 12 / 10_000))
    assert u.var() == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / 10_000))


# Timestep distributions

MANY = (np.arange(100_000) + 0.5) / 100_000  # evenly spaced u, whose t have the distribution itself


def normal_cdf(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


@every_length
@every_schedule
@every_distribution
def test_every_t_lies_on_the_schedule_up_to_the_outermost_numbers(distribution, name, timesteps):
    """1e-12 is the smallest number that `stratified` can give in a batch of a million."""
    schedule = make_schedule(name, timesteps, logsnr_shift=-4.2)
    t = TIMESTEP_DISTRIBUTIONS[distribution](schedule, np.array([1e-12, 0.5, 1 - 1e-12]))
    assert np.all((t >= 0) & (t <= timesteps - 1))


@every_schedule
@every_distribution
def test_t_rises_with_u_so_that_stratified_numbers_give_stratified_times(distribution, name):
    t = TIMESTEP_DISTRIBUTIONS[distribution](make_schedule(name), MANY[::10])
    assert np.all(np.diff(t) >= 0)
    assert len(np.unique(t)) > 500


@every_schedule
@every_distribution
def test_t_has_the_shape_of_u(distribution, name):
    u = np.array([[0.1, 0.6], [0.3, 0.9], [0.2, 0.5]])
    t = TIMESTEP_DISTRIBUTIONS[distribution](make_schedule(name), u)
    assert_array_equal(t, [TIMESTEP_DISTRIBUTIONS[distribution](make_schedule(name), row) for row in u])


@every_length
@every_schedule
def test_uniform_hits_every_entry_of_the_table_equally_often(name, timesteps):
    u = (np.arange(5 * timesteps) + 0.5) / (5 * timesteps)
    t = TIMESTEP_DISTRIBUTIONS["uniform"](make_schedule(name, timesteps), u)
    assert_array_equal(t, np.repeat(np.arange(timesteps), 5))


@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
@every_schedule
def test_logit_normal_puts_the_normal_share_below_each_time(name, share):
    """P(t < T s) = Phi(ln(s / (1 - s))).  Esser et al. (2024), eq. 19, with location 0 and scale 1."""
    t = TIMESTEP_DISTRIBUTIONS["logit_normal"](make_schedule(name), MANY)
    assert_array_equal(t, np.floor(t))
    assert np.mean(t < 1000 * share) == pytest.approx(normal_cdf(math.log(share / (1 - share))), abs=2e-5)


@pytest.mark.parametrize("log_ratio, shift", [(-0.8, 0.0), (2.0, -4.2)])  # -4.2: for images of 256 pixels
@every_schedule
def test_edm_puts_the_normal_share_below_each_noise_level(name, log_ratio, shift):
    """P(ln(sigma/alpha) < x - shift/2) = Phi((x - mean) / std), inside the range of the schedule."""
    schedule = make_schedule(name, logsnr_shift=shift)
    _, alpha, sigma = schedule.at(TIMESTEP_DISTRIBUTIONS["edm"](schedule, MANY))
    log_ratios = np.log(sigma / np.maximum(alpha, 1e-300))
    assert np.mean(log_ratios < log_ratio - shift / 2) == pytest.approx(normal_cdf((log_ratio - MEAN) / STD), abs=2e-5)


@pytest.mark.parametrize("shift, timesteps", [(-20.0, 1000), (3.0, 10)])
@every_schedule
@every_distribution
def test_a_shift_moves_the_noise_of_every_quantile_and_not_its_time(distribution, name, timesteps, shift):
    """ln(sigma/alpha) moves by -shift/2."""
    plain, shifted = make_schedule(name, timesteps), make_schedule(name, timesteps, logsnr_shift=shift)
    before, after = (TIMESTEP_DISTRIBUTIONS[distribution](schedule, MANY[::100]) for schedule in (plain, shifted))
    assert_allclose(after, before, rtol=0, atol=1e-9 * timesteps)
    inside = before < timesteps - 1  # alpha may be 0 at the end
    (_, alpha, sigma), (_, shifted_alpha, shifted_sigma) = (
        schedule.at(t[inside]) for schedule, t in ((plain, before), (shifted, after))
    )
    moved = np.log(shifted_sigma / shifted_alpha) - np.log(sigma / alpha)
    assert_allclose(moved, -shift / 2, rtol=0, atol=1e-7)


def test_edm_takes_another_mean_and_spread():
    schedule = make_schedule("cosine")
    t = timesteps_module.edm(schedule, MANY, mean=-1.2, std=1.2)
    _, alpha, sigma = schedule.at(t)
    assert np.mean(np.log(sigma / alpha)) == pytest.approx(-1.2, abs=1e-2)
    assert np.std(np.log(sigma / alpha)) == pytest.approx(1.2, abs=1e-2)


@every_schedule
def test_what_edm_has_outside_the_schedule_goes_to_its_ends(name):
    """At T = 10 the first level is far from clean, and the probability of cleaner ones goes to t = 0."""
    schedule = make_schedule(name, 10)
    t = TIMESTEP_DISTRIBUTIONS["edm"](schedule, MANY)
    beyond = normal_cdf((-0.5 * schedule.log_snr[0] - MEAN) / STD)
    assert np.mean(t == 0) == pytest.approx(beyond, abs=2e-5)
