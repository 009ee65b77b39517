"""Predictions: the network's output determines the image and the noise, and they determine the output."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from tiny_diffusion.diffusion.predictions import PREDICTIONS, determinant, recover, target
from tiny_diffusion.diffusion.schedules import SCHEDULES, make_schedule

every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_length = pytest.mark.parametrize("timesteps", [2, 1000])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def levels_of(name, timesteps, prediction):
    """(alpha, sigma) on and between the entries of the table, without the one singular level: epsilon at alpha = 0."""
    _, alpha, sigma = make_schedule(name, timesteps).at(np.linspace(0, timesteps - 1, 3 * timesteps + 1))
    solvable = (alpha > 0) | (prediction != "epsilon")
    return alpha[solvable], sigma[solvable]


def close(actual, expected, det):
    """Solving a 2x2 system in float64 loses as many digits as its determinant is small."""
    return np.all(np.abs(actual - expected) <= 1e-14 / np.minimum(np.abs(det), 1))


@every_length
@every_schedule
@every_prediction
def test_image_and_noise_come_back_from_the_target(prediction, name, timesteps, rng):
    alpha, sigma = levels_of(name, timesteps, prediction)
    clean, noise = rng.uniform(-1, 1, alpha.shape), rng.standard_normal(alpha.shape)
    output = target(prediction, alpha, sigma, clean, noise)
    got_clean, got_noise = recover(prediction, alpha, sigma, alpha * clean + sigma * noise, output)
    det = determinant(prediction, alpha, sigma)
    assert close(got_clean, clean, det)
    assert close(got_noise, noise, det)


@every_length
@every_schedule
@every_prediction
def test_the_image_and_noise_recovered_from_any_output_make_up_x(prediction, name, timesteps, rng):
    alpha, sigma = levels_of(name, timesteps, prediction)
    x, output = rng.standard_normal((2, *alpha.shape))
    clean, noise = recover(prediction, alpha, sigma, x, output)
    det = determinant(prediction, alpha, sigma)
    assert close(alpha * clean + sigma * noise, x, det)
    assert close(target(prediction, alpha, sigma, clean, noise), output, det)


@every_length
@every_schedule
@every_prediction
def test_the_determinant_is_zero_only_for_epsilon_at_alpha_zero(prediction, name, timesteps):
    schedule = make_schedule(name, timesteps)
    det = determinant(prediction, schedule.alpha, schedule.sigma)
    assert det.shape == (timesteps,)
    singular = (schedule.alpha == 0) & (prediction == "epsilon")
    assert np.array_equal(det == 0, singular)
    assert singular.any() == (prediction == "epsilon" and name == "flow")


@pytest.mark.parametrize("alpha, sigma", [(1.0, 0.0), (0.6, 0.8), (0.25, 0.75), (0.0, 1.0)])
def test_the_targets_are_the_papers(alpha, sigma):
    """Ho et al. (2020); the image itself; Salimans & Ho (2022), eq. 11; Liu et al. (2022), from image to noise."""
    clean, noise = 0.3, -1.7
    assert target("epsilon", alpha, sigma, clean, noise) == noise
    assert target("x0", alpha, sigma, clean, noise) == clean
    assert target("v", alpha, sigma, clean, noise) == pytest.approx(alpha * noise - sigma * clean)
    assert target("flow", alpha, sigma, clean, noise) == pytest.approx(noise - clean)


@every_prediction
def test_floats_arrays_and_tensors_give_the_same_numbers(prediction, rng):
    alpha, sigma, clean, noise = 0.6, 0.8, *rng.standard_normal((2, 3))
    arrays = target(prediction, np.full(3, alpha), np.full(3, sigma), clean, noise)
    mixed = target(prediction, alpha, sigma, torch.from_numpy(clean), torch.from_numpy(noise))
    columns = (torch.full((3,), value, dtype=torch.float64) for value in (alpha, sigma))
    tensors = target(prediction, *columns, torch.from_numpy(clean), torch.from_numpy(noise))
    floats = [target(prediction, alpha, sigma, c, n) for c, n in zip(clean.tolist(), noise.tolist(), strict=True)]
    assert isinstance(mixed, torch.Tensor) and isinstance(tensors, torch.Tensor)
    assert all(type(value) is float for value in floats)
    for values in (mixed.numpy(), tensors.numpy(), floats):
        assert_allclose(values, arrays, rtol=1e-12)

    x = alpha * clean + sigma * noise
    arrays = recover(prediction, alpha, sigma, x, arrays)
    tensors = recover(prediction, alpha, sigma, torch.from_numpy(x), mixed)
    floats = [recover(prediction, alpha, sigma, *pair) for pair in zip(x.tolist(), floats, strict=True)]
    assert all(isinstance(value, torch.Tensor) for value in tensors)
    for values in (np.stack(tensors), np.transpose(floats)):
        assert_allclose(values, np.stack(arrays), rtol=1e-12)


@every_prediction
def test_single_precision_stays_single_precision(prediction):
    """A level's plain floats must not promote a batch of float32 or bfloat16 images."""
    for kind in (torch.float32, torch.bfloat16):
        x = torch.ones(2, dtype=kind)
        assert all(value.dtype == kind for value in recover(prediction, 0.6, 0.8, x, x))
        assert target(prediction, 0.6, 0.8, x, x).dtype == kind
