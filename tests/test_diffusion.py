"""The process on batches of images: noising, the loss, and the denoiser that samplers call."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from tiny_diffusion.config.training import resolve
from tiny_diffusion.diffusion.grids import make_levels
from tiny_diffusion.diffusion.loss_weights import LOSS_WEIGHTS
from tiny_diffusion.diffusion.predictions import PREDICTIONS
from tiny_diffusion.diffusion.process import LOSSES, Diffusion
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.diffusion.schedules import SCHEDULES, make_schedule
from tiny_diffusion.diffusion.timesteps import TIMESTEP_DISTRIBUTIONS
from tiny_diffusion.models.build import make_diffusion

PAIRS = [pair for pair in itertools.product(PREDICTIONS, SCHEDULES) if pair != ("epsilon", "flow")]
pairs = pytest.mark.parametrize("prediction, name", PAIRS)
# A loss, a weight of guidance and a sampler are given errors, outputs and estimates, and know nothing of the pair that
# made them.  So each of them meets two pairs, one of each kind of schedule, and every pair meets one of them.
TWO_PAIRS = [("epsilon", "cosine"), ("v", "flow")]


def with_pairs(others, one):
    """Rows (*other, prediction, schedule): each of the others with two pairs, and one of them with every pair."""
    rows = [(*other, *pair) for other in others for pair in TWO_PAIRS] + [(*one, *pair) for pair in PAIRS]
    return list(dict.fromkeys(rows))


every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)

T = 200
TIMES = np.array([0.0, 17.0, 101.5, 198.9, 199.0])  # one for each image of a batch


@pytest.fixture
def batch():
    """(clean, noise): five images of 2 x 3 x 4, clean in [-1, 1]."""
    rng = np.random.default_rng(0)
    clean, noise = rng.uniform(-1, 1, (5, 2, 3, 4)), rng.standard_normal((5, 2, 3, 4))
    return torch.from_numpy(clean).float(), torch.from_numpy(noise).float()


def what_is_right(prediction, level, clean, noise):
    """The output of the network that knows image and noise."""
    return {
        "epsilon": noise,
        "x0": clean,
        "v": level.alpha * noise - level.sigma * clean,
        "flow": noise - clean,
    }[prediction]


def perfect(diffusion, clean, noise):
    """That network, as a model of a whole batch at TIMES."""
    levels = [diffusion.schedule.level(t) for t in TIMES]
    outputs = [what_is_right(diffusion.prediction, *row) for row in zip(levels, clean, noise, strict=True)]
    return lambda x, time, label: torch.stack(outputs)


def few_images_network(images, prediction, schedule):
    """The perfect network for a data set of these images, of any prediction type, told nothing but x and the time."""

    def network(x, time, label):
        t = time[0].item() - 1 if schedule.straight else time[0].item()
        level = schedule.level(min(max(t, 0), schedule.timesteps - 1))
        squares = ((x[:, None] - level.alpha * images) ** 2).flatten(2).sum(-1)  # (B, K)
        clean = torch.einsum("bk,kchw->bchw", torch.softmax(-squares / (2 * level.sigma**2), 1), images)
        return what_is_right(prediction, level, clean, (x - level.alpha * clean) / level.sigma)

    return network


# Noising


@every_schedule
def test_each_image_of_a_batch_is_noised_to_its_own_t(name, batch):
    clean, noise = batch
    schedule = make_schedule(name, T)
    noisy = Diffusion(schedule).add_noise(clean, noise, TIMES)
    assert noisy.shape == clean.shape and noisy.dtype == clean.dtype
    for i, t in enumerate(TIMES):
        level = schedule.level(t)
        torch.testing.assert_close(noisy[i], level.alpha * clean[i] + level.sigma * noise[i])


def test_double_precision_images_are_noised_in_double_precision(batch):
    clean, noise = (values.double() for values in batch)
    noisy = Diffusion(make_schedule("flow", T)).add_noise(clean, noise, TIMES)
    alpha = torch.from_numpy(1 - (TIMES + 1) / T).view(5, 1, 1, 1)
    torch.testing.assert_close(noisy, alpha * clean + (1 - alpha) * noise, rtol=0, atol=1e-14)


@pytest.mark.parametrize("outside", [-1.0, -0.01, 199.01, 200.0])
def test_a_t_outside_the_schedule_is_an_index_error(outside, batch):
    diffusion, times = Diffusion(make_schedule("linear", T)), np.array([0, 1, 2, 3, outside])
    with pytest.raises(IndexError):
        diffusion.add_noise(*batch, times)
    with pytest.raises(IndexError):
        diffusion.loss(lambda x, time, label: x, *batch, times)


@every_schedule
@pytest.mark.parametrize("distribution", TIMESTEP_DISTRIBUTIONS)
@pytest.mark.parametrize("timesteps", [2, T])
def test_drawn_timesteps_follow_the_distribution_and_stay_on_the_schedule(timesteps, distribution, name):
    schedule = make_schedule(name, timesteps)
    u = np.concatenate([[1e-15], np.linspace(0.01, 0.99, 50), [1 - 1e-16]])
    t = Diffusion(schedule, timestep_distribution=distribution).timesteps(u)
    assert np.all((t >= 0) & (t <= timesteps - 1))
    np.testing.assert_array_equal(t[1:-1], TIMESTEP_DISTRIBUTIONS[distribution](schedule, u[1:-1]))


# The loss


@pytest.mark.parametrize(
    "loss_weight, loss_kind, prediction, name", with_pairs(itertools.product(LOSS_WEIGHTS, LOSSES), ("edm", "huber"))
)
def test_the_perfect_network_has_no_loss(loss_weight, loss_kind, prediction, name, batch):
    diffusion = Diffusion(make_schedule(name, T), prediction, loss_weight, loss_kind=loss_kind)
    assert diffusion.loss(perfect(diffusion, *batch), *batch, TIMES).item() < 1e-6  # float32 rounds v


@pytest.mark.parametrize("loss_kind, prediction, name", with_pairs([(kind,) for kind in LOSSES], ("huber",)))
def test_a_network_that_is_wrong_by_a_known_amount_has_the_loss_of_that_amount(loss_kind, prediction, name, batch):
    """Half of the pixels are off by 0.4, where the Huber loss is a square, and half by 3, where it is a line."""
    off = torch.full((5, 2, 3, 4), 0.4)
    off[:, 1] = -3.0
    mean = {"mse": (0.16 + 9) / 2, "l1": (0.4 + 3) / 2, "huber": (0.08 + 2.5) / 2}[loss_kind]
    diffusion = Diffusion(make_schedule(name, T), prediction, "uniform", loss_kind=loss_kind)
    right = perfect(diffusion, *batch)
    loss = diffusion.loss(lambda x, time, label: right(x, time, label) + off, *batch, TIMES)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize(
    "loss_weight, loss_kind, prediction, name",
    with_pairs(itertools.product([name for name, row in LOSS_WEIGHTS.items() if row], LOSSES), ("min_snr", "huber")),
)
def test_a_weight_on_the_image_makes_one_objective_of_every_prediction(loss_weight, loss_kind, prediction, name, batch):
    """It is the weight times the loss of the recovered image's error: here 0.4 in half of the pixels, -3 in the rest.

    The network knows the image wrongly and finds the noise that fits it; in float64, because alpha is nearly 0 at T-1.
    """
    clean, noise = (values.double() for values in batch)
    off = torch.full_like(clean, 0.4)
    off[:, 1] = -3.0
    mean = {"mse": (0.16 + 9) / 2, "l1": (0.4 + 3) / 2, "huber": (0.08 + 2.5) / 2}[loss_kind]
    diffusion = Diffusion(make_schedule(name, T), prediction, loss_weight, loss_kind=loss_kind)
    _, alpha, sigma = diffusion.schedule.at(TIMES)
    noise_off = -torch.from_numpy(alpha / sigma).view(-1, 1, 1, 1) * off
    loss = diffusion.loss(perfect(diffusion, clean + off, noise + noise_off), clean, noise, TIMES)
    assert loss.item() == pytest.approx(mean * LOSS_WEIGHTS[loss_weight](alpha, sigma).mean(), rel=1e-6)


@every_schedule
def test_the_network_is_given_the_noisy_images_their_times_and_their_labels(name, batch):
    clean, noise = batch
    given, labels = [], torch.arange(5)

    def network(*inputs):
        given.extend(inputs)
        return inputs[0]

    diffusion = Diffusion(make_schedule(name, T))
    diffusion.loss(network, clean, noise, TIMES, labels)
    x, time, label = given
    torch.testing.assert_close(x, diffusion.add_noise(clean, noise, TIMES))
    torch.testing.assert_close(time, torch.from_numpy(diffusion.schedule.at(TIMES)[0]).float())
    assert label is labels
    given.clear()
    diffusion.loss(network, clean, noise, TIMES)
    assert given[2] is None


def test_the_gradient_of_the_loss_is_that_of_the_mean_square(batch):
    """For the network w x with v's target, d/dw mean((w x - v)^2) = 2 mean(x (w x - v))."""
    clean, noise = batch
    diffusion = Diffusion(make_schedule("cosine", T))
    w = torch.tensor(0.3, requires_grad=True)
    diffusion.loss(lambda x, time, label: w * x, clean, noise, TIMES).backward()
    x, v = diffusion.add_noise(clean, noise, TIMES), perfect(diffusion, clean, noise)(None, None, None)
    torch.testing.assert_close(w.grad, 2 * (x * (0.3 * x - v)).mean())


def test_a_half_precision_output_is_compared_in_single_precision(batch):
    """Under autocast the network answers in bfloat16, whose three digits are too few to average."""
    diffusion = Diffusion(make_schedule("cosine", T))
    half = perfect(diffusion, *batch)(None, None, None).bfloat16()
    loss = diffusion.loss(lambda x, time, label: half, *batch, TIMES)
    assert loss.dtype == torch.float32
    expected = (half.double() - perfect(diffusion, *batch)(None, None, None).double()).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_diffusion_is_what_its_configuration_says():
    options = {"schedule": "flow", "timesteps": 50, "prediction": "flow", "loss": "huber", "loss_weight": "min_snr"}
    diffusion = make_diffusion(resolve({**options, "timestep_distribution": "logit_normal"}))
    assert (diffusion.schedule.name, diffusion.schedule.timesteps) == ("flow", 50)
    assert diffusion.prediction == "flow"
    assert diffusion.loss_kind == "huber"
    assert diffusion.loss_weight == "min_snr"
    assert diffusion.timestep_distribution == "logit_normal"


def test_a_diffusion_has_the_betas_its_configuration_says():
    diffusion = make_diffusion(resolve({"schedule": "linear", "timesteps": 500, "beta_start": 3e-4, "beta_end": 0.03}))
    expected = make_schedule("linear", 500, 3e-4, 0.03)
    np.testing.assert_array_equal(diffusion.schedule.log_snr, expected.log_snr)


def test_a_diffusion_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Diffusion(make_schedule("linear")).prediction = "x0"


# The denoiser


@pairs
@pytest.mark.parametrize("clip", [False, True])
def test_the_perfect_networks_denoiser_knows_image_and_noise(clip, prediction, name, batch):
    clean, noise = (values.double() for values in batch)
    diffusion = Diffusion(make_schedule(name, T), prediction)
    for t in TIMES:
        level = diffusion.schedule.level(t)
        output = what_is_right(prediction, level, clean, noise)
        denoise = diffusion.denoiser(lambda x, time, label, output=output: output, clip=clip)
        got_clean, got_noise = denoise(level.alpha * clean + level.sigma * noise, level)
        torch.testing.assert_close(got_clean, clean, rtol=0, atol=1e-9)
        torch.testing.assert_close(got_noise, noise, rtol=0, atol=1e-9)


def any_network(x, time, label):
    """A fixed function that leaves [-1, 1] often; a label moves it."""
    shift = 0 if label is None else label.view(-1, 1, 1, 1) + 1
    return 2 * torch.sin(3 * x + shift) + 0.5 + time.view(-1, 1, 1, 1) / 1000


@pairs
def test_clipping_holds_the_image_in_range_and_makes_the_noise_fit(prediction, name, batch):
    x = 3 * batch[1].double()
    diffusion = Diffusion(make_schedule(name, T), prediction)
    for t in TIMES:
        level = diffusion.schedule.level(t)
        free, _ = diffusion.denoiser(any_network, clip=False)(x, level)
        clean, noise = diffusion.denoiser(any_network, clip=True)(x, level)
        assert free.abs().max() > 1
        torch.testing.assert_close(clean, free.clamp(-1, 1), rtol=0, atol=0)
        torch.testing.assert_close(level.alpha * clean + level.sigma * noise, x, rtol=0, atol=1e-12)


def test_clipping_is_on_unless_it_is_turned_off(batch):
    diffusion = Diffusion(make_schedule("cosine", T))
    assert diffusion.denoiser(any_network)(3 * batch[1], diffusion.schedule.level(199))[0].abs().max() == 1


@pytest.fixture
def recorder():
    """(model, calls): a network that notes the time and label of every call."""
    calls = []

    def model(x, time, label):
        calls.append((time, label))
        return any_network(x, time, label)

    return model, calls


@pytest.mark.parametrize("labelled", [False, True])
@every_schedule
def test_without_guidance_the_network_is_called_once_with_the_levels_time_and_label(labelled, name, batch, recorder):
    model, calls = recorder
    labels = torch.arange(5) if labelled else None
    diffusion = Diffusion(make_schedule(name, T))
    level = diffusion.schedule.level(101.5)
    diffusion.denoiser(model, labels)(batch[1], level)
    ((time, label),) = calls
    assert time.tolist() == [level.time] * 5
    assert label is labels


@pytest.mark.parametrize("guidance, prediction, name", with_pairs([(0.5,), (2.5,), (7.0,)], (2.5,)))
def test_guidance_asks_twice_and_goes_that_much_further_towards_the_label(guidance, prediction, name, batch, recorder):
    """Ho & Salimans (2022), eq. 6, on the output; the image that is recovered is linear in it."""
    model, calls = recorder
    x, labels = batch[1].double(), torch.arange(5)
    diffusion = Diffusion(make_schedule(name, T), prediction)
    level = diffusion.schedule.level(101.5)
    towards, away = (diffusion.denoiser(any_network, label, clip=False)(x, level) for label in (labels, None))
    guided = diffusion.denoiser(model, labels, guidance, clip=False)(x, level)
    assert sorted(label is None for _, label in calls) == [False, True]
    for got, label, none in zip(guided, towards, away, strict=True):
        assert not torch.allclose(label, none, atol=0.1)
        torch.testing.assert_close(got, none + guidance * (label - none), rtol=1e-9, atol=1e-9)


def test_guidance_without_labels_is_refused():
    with pytest.raises(ValueError, match="labels"):
        Diffusion(make_schedule("linear", T)).denoiser(any_network, guidance=2.0)


def test_the_denoiser_records_no_gradient(batch):
    weight = torch.ones((), requires_grad=True)
    x = batch[1].clone().requires_grad_()
    diffusion = Diffusion(make_schedule("cosine", T))
    clean, noise = diffusion.denoiser(lambda x, time, label: weight * x)(x, diffusion.schedule.level(100))
    assert not clean.requires_grad and not noise.requires_grad


@every_sampler
@pytest.mark.parametrize("enabled", [False, True])
def test_a_sampler_that_pauses_leaves_gradients_and_autocast_as_the_caller_had_them(enabled, sampler, batch):
    """A context manager that is open at a yield stays open in the caller's code."""
    modes = []

    def model(x, time, label):
        modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return any_network(x, time, label)

    diffusion = Diffusion(make_schedule("cosine", T))
    denoise = diffusion.denoiser(model, autocast=torch.bfloat16)
    draws = {"draw": lambda: torch.zeros_like(batch[1])} if SAMPLERS[sampler].draws else {}
    with torch.set_grad_enabled(enabled):
        for _ in SAMPLERS[sampler].run(denoise, batch[1], make_levels(diffusion.schedule, "trailing", 4), **draws):
            assert torch.is_grad_enabled() == enabled
            assert not torch.is_autocast_enabled("cpu")
    assert set(modes) == {(False, True)}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_denoiser_answers_in_the_type_of_x_whatever_the_network_computes_in(kind, autocast, batch):
    weight, seen = torch.eye(4), []

    def model(x, time, label):
        output = x.float() @ weight
        seen.append(output.dtype)
        return output

    diffusion = Diffusion(make_schedule("cosine", T))
    clean, noise = diffusion.denoiser(model, autocast=autocast)(batch[1].to(kind), diffusion.schedule.level(100))
    assert seen == [autocast or torch.float32]
    assert clean.dtype == noise.dtype == kind


@pairs
def test_image_and_noise_are_recovered_in_the_precision_of_x_from_an_output_of_less(prediction, name, batch):
    """The products with bfloat16's output would otherwise be rounded to its three digits."""
    x, half = batch[1].double(), batch[0].bfloat16()
    diffusion = Diffusion(make_schedule(name, T), prediction)
    level = diffusion.schedule.level(101.5)
    expected = diffusion.denoiser(lambda x, time, label: half.double(), clip=False)(x, level)
    got = diffusion.denoiser(lambda x, time, label: half, clip=False)(x, level)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("sampler, prediction, name", with_pairs([(name,) for name in SAMPLERS], ("sa_solver",)))
def test_every_sampler_draws_the_images_the_perfect_network_knows_whatever_it_predicts(sampler, prediction, name):
    """In float32 with clipping on, as users draw: epsilon on cosine divides by an alpha of 2e-4 at its first step."""
    rng = np.random.default_rng(1)
    images = torch.from_numpy(np.sign(rng.standard_normal((3, 1, 4, 4)))).float()
    fresh = torch.from_numpy(rng.standard_normal((21, 24, 1, 4, 4))).float()
    schedule = make_schedule(name, T)
    denoise = Diffusion(schedule, prediction).denoiser(few_images_network(images, prediction, schedule))
    draws = {"draw": iter(fresh[1:]).__next__} if SAMPLERS[sampler].draws else {}
    *_, last = SAMPLERS[sampler].run(denoise, fresh[0], make_levels(schedule, "trailing", 20), **draws)
    distances = (last.x[:, None] - images).abs().flatten(2).amax(-1)  # (B, K)
    assert distances.amin(1).max() < 1e-3
    assert set(distances.argmin(1).tolist()) == {0, 1, 2}
