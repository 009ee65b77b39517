"""Bits per dimension and the error by noise level: exact for Gaussian pixels, whose ideal network is known."""

import math

import pytest
import torch

from tiny_diffusion.diffusion.predictions import PREDICTIONS
from tiny_diffusion.diffusion.process import Diffusion
from tiny_diffusion.diffusion.schedules import SCHEDULES, make_schedule
from tiny_diffusion.evaluation.error_by_noise import error_by_level, log_snrs_of
from tiny_diffusion.evaluation.likelihood import MAX_CHANGE, STEPS, bits_per_dimension, heldout_bits, log_likelihood

MEAN, STD = 0.2, 0.4  # of every pixel, independently


def ideal(schedule, prediction, mean=MEAN, std=STD):
    """The ideal network for independent Gaussian pixels: E[x_0 | x_t] is linear in x_t."""

    def model(x, time, label):
        t = float(time[0]) - (1 if schedule.straight else 0)
        level = schedule.level(min(max(t, 0), schedule.timesteps - 1))
        alpha, sigma = level.alpha, level.sigma
        clean = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
        noise = (x - alpha * clean) / sigma
        a, b = PREDICTIONS[prediction](alpha, sigma)
        return a * clean + b * noise

    return model


def singular(schedule, prediction):
    return prediction == "epsilon" and schedule.alpha[-1] == 0


def closed_form(schedule, images, std):
    """(B,) log-density at the cleanest level, where a pixel is N(alpha mean, alpha^2 std^2 + sigma^2) / radius."""
    first = schedule.level(0)
    noisy = math.hypot(first.alpha * std, first.sigma) / first.radius
    return torch.distributions.Normal(MEAN * first.alpha / first.radius, noisy).log_prob(images).flatten(1).sum(1)


def pixels_of(std, count=5):
    """Gaussian images (count, 1, 4, 4) and as many Rademacher vectors."""
    generator = torch.Generator().manual_seed(0)
    images = MEAN + std * torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 2, images.shape, generator=generator).double() * 2 - 1


@pytest.mark.parametrize("std", [0.5, 0.02, *(pytest.param(std, marks=pytest.mark.slow) for std in (0.1, 0.005))])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_likelihood_of_pixels_of_any_deviation_is_within_a_hundredth_of_a_bit(name, std):
    schedule, (images, probe) = make_schedule(name), pixels_of(std)
    found = log_likelihood(ideal(schedule, "v", std=std), Diffusion(schedule, "v"), images, probe, STEPS)
    torch.testing.assert_close(found, closed_form(schedule, images, std), rtol=0, atol=0.01 * 16 * math.log(2))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_likelihood_is_that_of_every_prediction(name, prediction):
    schedule, (images, probe) = make_schedule(name), pixels_of(STD)
    if singular(schedule, prediction):
        pytest.skip("the one pair that cannot be inverted")
    found = log_likelihood(ideal(schedule, prediction), Diffusion(schedule, prediction), images, probe, STEPS)
    torch.testing.assert_close(found, closed_form(schedule, images, STD), rtol=0, atol=0.01 * 16 * math.log(2))


def test_the_steps_are_doubled_until_that_changes_nothing(monkeypatch):
    """From two steps, which are far off, the bits of sharp pixels come to those of hundreds."""
    schedule, std = make_schedule("cosine"), 0.01
    images = ((pixels_of(std, 16)[0] + 1) * 127.5).round().to(torch.uint8)
    model, diffusion = ideal(schedule, "v", std=std), Diffusion(schedule, "v")
    coarse, wanted = (bits_per_dimension(model, diffusion, images, steps=steps).mean() for steps in (2, 400))
    assert abs(coarse - wanted) > 0.5
    monkeypatch.setattr("tiny_diffusion.evaluation.likelihood.STEPS", 2)
    plain = {"seed": 0, "progress": lambda items, count, doing: items}
    bits, _ = heldout_bits(model, diffusion, images, torch.device("cpu"), **plain)
    assert bits == pytest.approx(float(wanted), abs=MAX_CHANGE)


def test_images_of_noise_take_eight_bits_at_least():
    """Uniform grey levels have 8 bits each; no density can code them in fewer on average."""
    schedule = make_schedule("cosine")
    images = torch.randint(0, 256, (20, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    bits = bits_per_dimension(ideal(schedule, "v"), Diffusion(schedule, "v"), images, steps=100)
    pixels = images.double() / 127.5 - 1
    assert bits.mean() > 8
    # The Gaussian's own code length: its cross entropy with the uniform, in bits of a grey level.
    wanted = -torch.distributions.Normal(MEAN, STD).log_prob(pixels).mean() / math.log(2) + math.log2(127.5)
    assert bits.mean() == pytest.approx(float(wanted), rel=0.02)


def test_an_images_bits_do_not_depend_on_its_batch():
    schedule = make_schedule("cosine")
    images = torch.randint(0, 256, (4, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    whole = bits_per_dimension(ideal(schedule, "v"), Diffusion(schedule, "v"), images, steps=20)
    alone = bits_per_dimension(ideal(schedule, "v"), Diffusion(schedule, "v"), images[2:3], steps=20, first=2)
    torch.testing.assert_close(whole[2:3], alone)


def test_images_equally_far_from_the_mean_have_equal_bits():
    """Dequantisation is centred: a Gaussian around grey level 127 codes 121 and 133 alike."""
    schedule = make_schedule("cosine")
    diffusion = Diffusion(schedule, "v")
    model = ideal(schedule, "v", mean=127 / 127.5 - 1, std=0.05)
    below, above = (torch.full((64, 1, 4, 4), level, dtype=torch.uint8) for level in (121, 133))
    difference = bits_per_dimension(model, diffusion, above, steps=20) - bits_per_dimension(
        model, diffusion, below, steps=20
    )
    # The same random offset u of 1,024 pixels, in levels of deviation s, adds 4 * 6 u / (2 s^2 ln 2): 0 on average.
    tolerance = 4 * 4 * 6 * 12**-0.5 / (2 * (0.05 * 127.5) ** 2 * math.log(2)) / 1024**0.5
    assert abs(difference.mean()) < tolerance


@pytest.mark.parametrize("timesteps", [10, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_error_by_noise_level_is_the_posterior_variance(name, timesteps):
    """Of Gaussian pixels around a mean image: sigma^2 / (alpha^2 std^2 + sigma^2), over their own variance.

    alpha^2 / sigma^2 is the exponential of every log-SNR that is shown: none is clipped to the ends of the schedule.
    """
    schedule, std = make_schedule(name, timesteps), 0.1
    mean = torch.linspace(-0.6, 0.6, 16).reshape(1, 4, 4)
    generator = torch.Generator().manual_seed(0)
    pixels = mean + std * torch.randn(2000, 1, 4, 4, generator=generator)
    images = ((pixels + 1) * 127.5).round().to(torch.uint8)
    found = error_by_level(ideal(schedule, "v", mean, std), Diffusion(schedule, "v"), images)
    for log_snr, error in zip(log_snrs_of(schedule), found, strict=True):
        wanted = 1 / (math.exp(log_snr) * std**2 + 1)
        assert error == pytest.approx(wanted, rel=0.05)
