"""Schedules, levels and samplers give what diffusers' schedulers give, where those are right.

diffusers is a development dependency.  Its tables are float32, with an error of 1e-5 at the end of cosine's, where x_0
is x/5e-5.  So the tables are compared at that precision, and the samplers are compared after the tables of diffusers'
scheduler were recomputed from the same betas in float64.  DPM-Solver++ and flow matching still step in float32.
"""

import math

import numpy as np
import pytest
import torch
from import_helpers import diffusers, needs
from numpy.testing import assert_allclose, assert_array_equal

from tiny_diffusion.diffusion.grids import make_levels
from tiny_diffusion.diffusion.predictions import PREDICTIONS
from tiny_diffusion.diffusion.process import Diffusion
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.diffusion.schedules import SCHEDULES, make_schedule

pytestmark = [
    needs("diffusers"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # of torch's tensors, in diffusers
]

THEIR_NAME = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}

every_shared_prediction = pytest.mark.parametrize("prediction", [name for name in PREDICTIONS if name in THEIR_NAME])
two_schedules_with_betas = pytest.mark.parametrize("name", ["linear", "cosine"])  # a sampler sees levels only
schedules_with_betas = pytest.mark.parametrize("name", [name for name, row in SCHEDULES.items() if row.betas])
every_shift = pytest.mark.parametrize("shift", [0.0, -4.2])  # -4.2: for images of 256 pixels
lengths_and_steps = pytest.mark.parametrize("timesteps, steps", [(10, 7), (1000, 37)])


def network(x, time, label=None):
    """A fixed function of image and time that stands for a network."""
    time = torch.as_tensor(time, dtype=torch.float64).reshape(-1, 1, 1, 1)
    return 0.5 * torch.sin(2 * x + 0.3) + 0.3 * torch.cos(time / 90) * x


@pytest.fixture
def noise():
    """noise(n) -> n different pictures of standard normal numbers in float64."""
    rng = np.random.default_rng(0)
    return lambda n=1: torch.from_numpy(rng.standard_normal((n, 2, 1, 2, 3)))


def betas_of(name, timesteps, shift=0.0):
    """The betas of this table, read back from its alpha."""
    alpha_squared = make_schedule(name, timesteps, logsnr_shift=shift).alpha ** 2
    return 1 - alpha_squared / np.append(1.0, alpha_squared[:-1])


def theirs(kind, name, timesteps, prediction, **options):
    """The diffusers scheduler of these betas with its tables in float64."""
    betas = betas_of(name, timesteps)
    scheduler = kind(timesteps, trained_betas=betas, prediction_type=THEIR_NAME[prediction], **options)
    scheduler.betas = torch.from_numpy(betas)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, dim=0)
    return scheduler


def draw_theirs(scheduler, x, steps, **options):
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **options).prev_sample
    return x


def draw_ours(sampler, name, timesteps, prediction, grid, x, steps, clip=False, shift=0.0, **options):
    schedule = make_schedule(name, timesteps, logsnr_shift=shift)
    denoise = Diffusion(schedule, prediction).denoiser(network, clip=clip)
    *_, last = SAMPLERS[sampler].run(denoise, x, make_levels(schedule, grid, steps), **options)
    return last.x


def assert_same_pictures(ours, expected, rtol=1e-9):
    """Relative to the largest pixel, because without clipping some of these pictures reach thousands or millions."""
    largest = float(expected.abs().max())
    assert 0.01 < largest < np.inf
    torch.testing.assert_close(ours, expected, rtol=0, atol=rtol * max(1.0, largest))


# Tables


@pytest.mark.parametrize("timesteps", [200, 1000])
def test_linear_is_diffusers_linear_with_its_betas_scaled_to_the_number_of_steps(timesteps):
    scale = 1000 / timesteps
    expected = diffusers.DDPMScheduler(
        timesteps, beta_start=1e-4 * scale, beta_end=0.02 * scale, beta_schedule="linear"
    )
    assert_allclose(make_schedule("linear", timesteps).alpha ** 2, expected.alphas_cumprod, rtol=1e-5)


@pytest.mark.parametrize("timesteps", [2, 1000])
def test_cosine_is_diffusers_squaredcos_cap_v2(timesteps):
    expected = diffusers.DDPMScheduler(timesteps, beta_schedule="squaredcos_cap_v2")
    assert_allclose(make_schedule("cosine", timesteps).alpha ** 2, expected.alphas_cumprod, rtol=1e-4)


@every_shift
@pytest.mark.parametrize("timesteps", [10, 1000])
@schedules_with_betas
def test_every_table_travels_to_diffusers_as_trained_betas(name, timesteps, shift):
    expected = diffusers.DDPMScheduler(timesteps, trained_betas=betas_of(name, timesteps, shift))
    alpha_squared = make_schedule(name, timesteps, logsnr_shift=shift).alpha ** 2
    assert_allclose(alpha_squared, expected.alphas_cumprod, rtol=2e-4)


@every_shift
@pytest.mark.parametrize("timesteps", [2, 1000])
def test_flow_is_diffusers_flow_matching_table_and_time(timesteps, shift):
    schedule = make_schedule("flow", timesteps, logsnr_shift=shift)
    expected = diffusers.FlowMatchEulerDiscreteScheduler(timesteps, shift=math.exp(-shift / 2))
    time, _, sigma = schedule.at(np.arange(timesteps)[::-1])
    assert_allclose(sigma, expected.sigmas, rtol=1e-6)
    assert_allclose(time, expected.timesteps, rtol=1e-6)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("timesteps, steps", [(10, 7), (1000, 4), (1000, 37), (1000, 1000)])
def test_the_grids_are_diffusers_spacings(spacing, timesteps, steps):
    """Of the leading ones those that start from nearly no image; test_grids has the others."""
    scheduler = diffusers.DDPMScheduler(timesteps, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    times = [level.time for level in make_levels(make_schedule("linear", timesteps), spacing, steps)[:-1]]
    assert_array_equal(times, scheduler.timesteps)


@schedules_with_betas
def test_add_noise_is_diffusers_add_noise(name, noise):
    clean, fresh = noise(2)
    expected = theirs(diffusers.DDPMScheduler, name, 1000, "v").add_noise(clean, fresh, torch.tensor([999, 37]))
    torch.testing.assert_close(
        Diffusion(make_schedule(name)).add_noise(clean, fresh, np.array([999, 37])), expected, rtol=1e-9, atol=1e-12
    )


# Samplers


def with_the_same_noise(monkeypatch, pictures):
    """Makes diffusers' ancestral sampling use these pictures as noise; returns a `draw` that gives the same ones."""
    fresh = iter(pictures)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(fresh))
    ours = iter(pictures)
    return lambda: next(ours)


@lengths_and_steps
@two_schedules_with_betas
@every_shared_prediction
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_is_diffusers_ancestral_sampling(clip, prediction, name, timesteps, steps, noise, monkeypatch):
    x, *fresh = noise(steps + 1)
    draw = with_the_same_noise(monkeypatch, fresh)
    options = {"variance_type": "fixed_small", "timestep_spacing": "trailing", "clip_sample": clip}
    expected = draw_theirs(theirs(diffusers.DDPMScheduler, name, timesteps, prediction, **options), x, steps)
    ours = draw_ours("ddpm", name, timesteps, prediction, "trailing", x, steps, clip, draw=draw)
    assert_same_pictures(ours, expected)


@pytest.mark.parametrize("timesteps, steps", [(10, 10), (1000, 37)])
@two_schedules_with_betas
@every_shared_prediction
@pytest.mark.parametrize("eta, clip", [(0.0, False), (0.0, True), (0.6, False), (1.0, True)])
def test_ddim_is_diffusers_ddim(eta, clip, prediction, name, timesteps, steps, noise, monkeypatch):
    """On leading spacing, which its t - T // n assumes.  With clipping it re-derives the noise only on request."""
    x, *fresh = noise(steps + 1)
    theirs_draw, ours_draw = iter(fresh), iter(fresh)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddim.randn_tensor", lambda *_, **__: next(theirs_draw))
    scheduler = theirs(
        diffusers.DDIMScheduler, name, timesteps, prediction, timestep_spacing="leading", clip_sample=clip
    )
    expected = draw_theirs(scheduler, x, steps, eta=eta, use_clipped_model_output=clip)
    ours = draw_ours(
        "ddim", name, timesteps, prediction, "leading", x, steps, clip, eta=eta, draw=lambda: next(ours_draw)
    )
    assert_same_pictures(ours, expected)


@pytest.mark.parametrize("timesteps, steps", [(10, 5), (1000, 20)])
@two_schedules_with_betas
@every_shared_prediction
def test_ddim_is_diffusers_ddim_on_trailing_spacing_where_the_steps_divide(prediction, name, timesteps, steps, noise):
    x = noise()[0]
    scheduler = theirs(
        diffusers.DDIMScheduler, name, timesteps, prediction, timestep_spacing="trailing", clip_sample=False
    )
    expected = draw_theirs(scheduler, x, steps)
    assert_same_pictures(draw_ours("ddim", name, timesteps, prediction, "trailing", x, steps), expected)


@lengths_and_steps
@two_schedules_with_betas
@every_shared_prediction
def test_dpmpp_2m_is_diffusers_second_order_multistep_solver(prediction, name, timesteps, steps, noise):
    x = noise()[0]
    scheduler = theirs(
        diffusers.DPMSolverMultistepScheduler, name, timesteps, prediction, algorithm_type="dpmsolver++",
        solver_order=2, solver_type="midpoint", lower_order_final=True, final_sigmas_type="zero",
        timestep_spacing="trailing",
    )  # fmt: skip
    expected = draw_theirs(scheduler, x, steps)
    ours = draw_ours("dpmpp_2m", name, timesteps, prediction, "trailing", x, steps)
    assert_same_pictures(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0, 1.5])
@lengths_and_steps
@two_schedules_with_betas
@every_shared_prediction
def test_sa_solver_of_order_one_takes_the_steps_of_diffusers(
    prediction, name, timesteps, steps, eta, noise, monkeypatch
):
    """Their predictor without corrector, for all steps but the last, which in diffusers ends above the clean level.

    At order two the results differ: their polynomials are over lambda, which is infinite at alpha = 0.
    """
    x, *fresh = noise(steps + 1)
    theirs_draw, ours_draw = iter(fresh), iter(fresh)
    monkeypatch.setattr("diffusers.schedulers.scheduling_sasolver.randn_tensor", lambda *_, **__: next(theirs_draw))
    scheduler = theirs(
        diffusers.SASolverScheduler, name, timesteps, prediction, predictor_order=1, tau_func=lambda t: eta,
        timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    schedule = make_schedule(name, timesteps)
    levels = make_levels(schedule, "trailing", steps)
    denoise = Diffusion(schedule, prediction).denoiser(network, clip=False)
    ours = SAMPLERS["sa_solver"].run(denoise, x, levels, draw=lambda: next(ours_draw), eta=eta, order=1)
    for t, step in zip(scheduler.timesteps[:-1], ours, strict=False):
        scheduler.last_sample = None  # without which it does not correct
        x = scheduler.step(network(x, t), t, x).prev_sample
        assert_same_pictures(step.x, x, rtol=1e-5)


@pytest.mark.parametrize("name, beta_schedule", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
@every_shared_prediction
def test_a_stock_scheduler_with_its_own_table_draws_the_same_picture(prediction, name, beta_schedule, noise):
    """diffusers' own tables are used; clipping keeps the error of float32 from growing."""
    x = noise()[0]
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=beta_schedule, prediction_type=THEIR_NAME[prediction], clip_sample=True
    )
    expected = draw_theirs(scheduler, x, 50, use_clipped_model_output=True)
    assert_same_pictures(draw_ours("ddim", name, 1000, prediction, "leading", x, 50, clip=True), expected, rtol=1e-5)


@every_shift
@pytest.mark.parametrize("grid", ["trailing", "leading", "rho"])
@pytest.mark.parametrize("timesteps, steps", [(2, 1), (10, 7), (1000, 37)])
def test_ddim_on_flow_is_diffusers_flow_matching_euler(timesteps, steps, grid, shift, noise):
    """diffusers is given the levels before the shift and shifts them itself."""
    x = noise()[0]
    plain, levels = (
        make_levels(make_schedule("flow", timesteps, logsnr_shift=each), grid, steps) for each in (0.0, shift)
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(timesteps, shift=math.exp(-shift / 2))
    scheduler.set_timesteps(sigmas=[level.sigma for level in plain[:-1]])
    assert_allclose(scheduler.timesteps, [level.time for level in levels[:-1]], rtol=1e-6)
    expected = x
    for t in scheduler.timesteps:
        expected = scheduler.step(network(expected, t), t, expected).prev_sample
    ours = draw_ours("ddim", "flow", timesteps, "flow", grid, x, steps, shift=shift)
    assert_same_pictures(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("steps", [5, 40])
def test_dpmpp_2m_on_flow_is_diffusers_second_order_multistep_solver_on_flow(steps, noise):
    """On diffusers' levels, whose t are fractional; the times that it rounds to whole numbers are not used."""
    x = noise()[0]
    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000, prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double().tolist()
    expected = x
    for t, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        expected = scheduler.step(network(expected, 1000 * sigma), t, expected).prev_sample
    schedule = make_schedule("flow")
    levels = [*(schedule.level(1000 * sigma - 1) for sigma in sigmas[:-1]), make_levels(schedule, "trailing", 1)[-1]]
    *_, last = SAMPLERS["dpmpp_2m"].run(Diffusion(schedule, "flow").denoiser(network, clip=False), x, levels)
    assert_same_pictures(last.x, expected, rtol=1e-5)
