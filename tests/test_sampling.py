"""Drawing: image i of a seed is one picture, whatever is drawn beside it, and costs what is said."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from network_helpers import random_network
from torch import nn

import tiny_diffusion
from tiny_diffusion.config.training import resolve
from tiny_diffusion.data.pixels import to_pictures, to_uint8
from tiny_diffusion.diffusion.grids import make_levels
from tiny_diffusion.diffusion.request import Request, default_sampling, labels_in_shares, order_in_shares, request_from
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.diffusion.sampling import denoising, sample
from tiny_diffusion.models.build import make_diffusion
from tiny_diffusion.randomness import stream
from tiny_diffusion.runs.folder import RunFolder
from tiny_diffusion.runs.writer import Callbacks, RunWriter

SHAPE = (1, 8, 8)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
CONFIG = resolve({"dataset": "digits", "base_channels": 8, "class_cond": True})
DIFFUSION = make_diffusion(CONFIG)


@pytest.fixture(scope="module")
def model(make_trainer):
    """A class-conditional network that has begun to learn the digits."""
    trainer = make_trainer(steps=40, class_cond=True, lr=5e-3)
    for _ in trainer.run():
        pass
    return trainer.ema.model


@pytest.fixture(scope="module")
def wild():
    """A network of random weights, whose estimates leave [-1, 1] far behind."""
    return random_network(CONFIG, 0.5)


def request_for(indices, **options):
    return Request(indices, **{"sampler": "ddim", "grid": "trailing", "steps": 8, **options})


def draw(model, indices, **options):
    return sample(model, DIFFUSION, request_for(indices, **options), SHAPE)


class Recorder(nn.Module):
    """A model that answers zero and notes what it was asked."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.calls = []

    def forward(self, x, time, label=None):
        self.calls.append((x, time, None if label is None else label.tolist()))
        return 0 * x


def assert_same_pictures(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)
    first, second = (to_uint8(images).int().numpy() for images in (first, second))
    assert np.abs(first - second).max() <= 1


# One picture an index


@pytest.mark.parametrize("sampler, guidance", [*((name, 1.0) for name in SAMPLERS), ("sa_solver", 3.0)])
def test_image_seven_does_not_depend_on_its_batch(sampler, guidance, model):
    options = {"sampler": sampler, "grid": SAMPLERS[sampler].grid, "classes": tuple(range(10)), "guidance": guidance}
    batch = draw(model, range(3, 10), **options)
    alone = draw(model, [7], **options)
    assert_same_pictures(alone, batch[4:5])
    assert (batch[5] - batch[4]).abs().max() > 0.1


@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_nor_after_few_steps_or_many(sampler, steps, model):
    options = {"sampler": sampler, "grid": SAMPLERS[sampler].grid, "steps": steps}
    assert_same_pictures(draw(model, [7], **options), draw(model, range(5, 9), **options)[2:3])


def test_the_batch_size_does_not_matter(model):
    options = {"sampler": "ddpm", "classes": (3, 5)}
    at_once = draw(model, range(8), batch_size=8, **options)
    for batch_size in (1, 3, 100):
        assert_same_pictures(draw(model, range(8), batch_size=batch_size, **options), at_once)


def test_images_come_in_the_order_of_their_indices(model):
    some, all_of_them = draw(model, [9, 2, 2, 11], sampler="ddpm"), draw(model, range(12), sampler="ddpm")
    assert_same_pictures(some, all_of_them[[9, 2, 2, 11]])


@every_sampler
def test_every_seed_and_every_index_has_a_picture_of_its_own(sampler, model):
    options = {"sampler": sampler, "steps": 3, "grid": SAMPLERS[sampler].grid}
    images = torch.cat([draw(model, range(5), seed=seed, **options) for seed in range(4)]).flatten(1)
    apart = (images[:, None] - images[None]).abs().amax(-1) + 2 * torch.eye(20)
    assert apart.min() > 0.05


@every_sampler
def test_drawing_again_draws_the_same_bit_for_bit(sampler, model):
    options = {"sampler": sampler, "grid": SAMPLERS[sampler].grid, "seed": 3}
    first = draw(model, range(4), **options)
    torch.rand(10)
    assert torch.equal(draw(model, range(4), **options), first)


def test_drawing_leaves_torchs_generator_the_model_and_gradients_alone(model):
    state, weights = torch.get_rng_state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = draw(model, range(4), sampler="ddpm")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not images.requires_grad and torch.is_grad_enabled()


# The steps


@every_sampler
@pytest.mark.parametrize("grid, steps", [("trailing", 1), ("trailing", 7), ("leading", 2)])
def test_denoising_goes_from_noise_over_the_levels_of_the_grid_to_the_images(grid, steps, sampler, model):
    """The leading grid begins half-way to noise, where sigma is far from 1."""
    request = Request([4, 9], sampler=sampler, steps=steps, grid=grid, seed=2)
    states = list(denoising(model, DIFFUSION, request, SHAPE))
    assert [state.level for state in states] == make_levels(DIFFUSION.schedule, grid, steps)
    assert all(state.x.shape == state.clean.shape == (2, *SHAPE) for state in states)
    noise = np.stack([stream(2, "image", index).standard_normal(SHAPE, dtype=np.float32) for index in (4, 9)])
    torch.testing.assert_close(states[0].x, states[0].level.sigma * torch.from_numpy(noise))
    assert torch.equal(states[-1].x, sample(model, DIFFUSION, request, SHAPE))


@pytest.mark.parametrize("guidance", [1.0, 2.0, 0.0])
@every_sampler
def test_the_network_is_called_as_often_as_is_said(sampler, guidance):
    """On any grid: each has as many levels."""
    recorder, grid = Recorder(), SAMPLERS[sampler].grid
    request = Request(range(5), sampler=sampler, steps=6, grid=grid, classes=(1,), guidance=guidance, batch_size=2)
    images = sample(recorder, DIFFUSION, request, SHAPE)
    assert images.shape == (5, *SHAPE)
    assert len(recorder.calls) == 3 * request.evaluations()  # batches of 2, 2 and 1
    assert request.evaluations() == SAMPLERS[sampler].evaluations(6) * (2 if guidance == 2 else 1)


@every_sampler
def test_clipping_holds_every_estimate_and_the_images_in_range(sampler, wild):
    for clip, largest in ((True, 1.0), (False, math.inf)):
        request = Request(range(3), sampler=sampler, steps=10, grid="trailing", clip=clip)
        states = list(denoising(wild, DIFFUSION, request, SHAPE))[1:]
        assert all(state.clean.abs().max() <= largest for state in states)
        assert states[-1].x.abs().max() <= largest
    assert states[-1].x.abs().max() > 1.5  # without


@pytest.mark.parametrize("shape", [(3, 8, 12), (1, 16, 4), (4, 5, 7)])
def test_images_have_any_shape_and_are_single_precision_on_the_cpu(shape):
    images = sample(Recorder(), DIFFUSION, request_for(range(3), batch_size=2), shape)
    assert images.shape == (3, *shape) and images.dtype == torch.float32 and images.device.type == "cpu"


# Fresh noise


def test_ddim_with_eta_one_is_ddpm_and_with_eta_zero_is_ddim(model):
    ddpm, ddim = (draw(model, range(4), sampler=name) for name in ("ddpm", "ddim"))
    assert torch.equal(draw(model, range(4), eta=1.0), ddpm)
    assert torch.equal(draw(model, range(4), eta=0.0), ddim)
    half = draw(model, range(4), eta=0.5)
    assert (half - ddim).abs().max() > 0.05 and (half - ddpm).abs().max() > 0.05


def test_samplers_with_fresh_noise_go_elsewhere_from_the_same_start(model):
    """Two states of ddpm, from equal noise, differ by more than its deterministic part explains."""
    request = Request([0], sampler="ddpm", steps=8, grid="trailing")
    random = list(denoising(model, DIFFUSION, request, SHAPE))
    steady = list(denoising(model, DIFFUSION, dataclasses.replace(request, sampler="ddim"), SHAPE))
    assert torch.equal(random[0].x, steady[0].x)
    assert (random[1].x - steady[1].x).abs().max() > 0.1


# Labels


def test_labels_take_turns_by_index_and_not_by_place_in_the_batch():
    classes = (4, 7, 1)
    assert request_for(range(6), classes=classes).labels() == [4, 7, 1, 4, 7, 1]
    assert request_for([5, 1, 300], classes=classes).labels() == [1, 7, 4]
    assert request_for(range(6)).labels() is None


@pytest.mark.parametrize("indices", [range(10), [9, 0, 5, 5], range(100, 107)])
def test_labels_are_the_same_however_a_request_is_cut(indices):
    whole = request_for(indices, classes=(2, 3, 9, 0), batch_size=3)
    assert list(itertools.chain.from_iterable(part.labels() for part in whole.batches())) == whole.labels()


def test_the_network_is_told_the_labels_and_for_guidance_none_as_well():
    for guidance, told in ((1.0, [[8, 6, 8]]), (2.0, [[8, 6, 8], None])):
        recorder = Recorder()
        sample(recorder, DIFFUSION, request_for([2, 1, 0], steps=1, classes=(8, 6), guidance=guidance), SHAPE)
        assert [label for _, _, label in recorder.calls] == told


def test_labels_change_the_picture_and_guidance_changes_it_more(model):
    plain, three, five = draw(model, range(8)), draw(model, range(8), classes=(3,)), draw(model, range(8), classes=(5,))
    assert (three - five).abs().max() > 0.05 and (three - plain).abs().max() > 0.05
    guided = [draw(model, range(8), classes=(label,), guidance=4.0) for label in (3, 5)]
    assert (guided[0] - guided[1]).abs().mean() > (three - five).abs().mean()


def test_guidance_zero_is_no_label_and_guidance_one_is_the_label(model):
    """none + w (label - none)."""
    torch.testing.assert_close(draw(model, range(4), classes=(3,), guidance=0.0), draw(model, range(4)))
    nearly = draw(model, range(4), classes=(3,), guidance=1.0 + 1e-6)
    torch.testing.assert_close(nearly, draw(model, range(4), classes=(3,)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_images", [1, 7, 100, 1003])
@pytest.mark.parametrize("counts", [[900, 100], [5, 0, 1, 0], [10] * 102, [0, 3], [1]], ids=len)
def test_classes_get_their_shares_of_the_images_rounded_down_or_up(counts, num_images):
    found = np.bincount(labels_in_shares(counts, num_images, seed=3), minlength=len(counts))
    wanted = num_images * np.array(counts) / sum(counts)
    assert found.sum() == num_images and ((np.floor(wanted) <= found) & (found <= np.ceil(wanted))).all()


def test_no_class_is_left_out_where_there_are_more_classes_than_images():
    """Over 600 seeds each of 30 equal classes gets 6 of 30 images: 120 expected, within five deviations, 9.8."""
    found = np.bincount(np.concatenate([labels_in_shares([2] * 30, 6, seed) for seed in range(600)]), minlength=30)
    assert abs(found - 120).max() < 49


def test_the_first_images_have_about_the_shares_of_all():
    """A hundred of a thousand labels: 90 of the larger class expected, hypergeometric with a deviation of 2.8."""
    first = np.bincount(labels_in_shares([900, 100], 1000, seed=0)[:100], minlength=2)
    assert abs(first[0] - 90) < 12


# Requests


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 10, 64])
@pytest.mark.parametrize("indices", [range(10), range(5, 6), [3, 1, 4, 1, 5, 9, 2], (), range(0)])
def test_the_parts_of_a_request_are_its_indices_in_order(indices, batch_size):
    request = request_for(indices, steps=3, seed=4, classes=(1, 2), guidance=1.5, clip=False, batch_size=batch_size)
    parts = list(request.batches())
    assert [index for part in parts for index in part.indices] == list(indices)
    assert all(1 <= len(part.indices) <= batch_size for part in parts)
    assert len(parts) == math.ceil(len(indices) / batch_size)
    assert all(dataclasses.replace(part, indices=indices) == request for part in parts)


def test_a_request_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        request_for(range(3)).steps = 4


@pytest.mark.parametrize(
    "told, asked, eta",
    [
        ({"sampler": "sa_solver", "eta": 0.7}, {}, 0.7),
        ({"sampler": "sa_solver", "eta": 0.7}, {"sampler": "sa_solver"}, 0.7),
        ({"sampler": "sa_solver", "eta": 0.7}, {"eta": 1.2}, 1.2),
        ({"sampler": "sa_solver", "eta": 0.7}, {"sampler": "ddim"}, 0.0),
        ({"sampler": "ddim"}, {}, 0.0),
        ({"sampler": "abm"}, {}, None),
        ({"sampler": "abm"}, {"sampler": "sa_solver"}, 1.5),
    ],
)
def test_fresh_noise_is_as_asked_then_as_the_checkpoint_tells_then_the_samplers(told, asked, eta):
    usual = {"steps": 20, "grid": "angle", "guidance": 1.0, "clip": True, **told}
    assert request_from(usual, 1000, range(2), **asked).eta == eta


@every_sampler
def test_only_ddpm_takes_every_step_unless_told_otherwise(sampler):
    usual = {"sampler": "abm", "steps": 10, "grid": "angle", "guidance": 1.0, "clip": True}
    few = SAMPLERS[sampler].steps
    assert (few is None) == (sampler == "ddpm")
    assert request_from(usual, 1000, range(2), sampler=sampler).steps == (few or 1000)


@every_sampler
def test_a_models_default_sampling_can_be_sampled_on_any_schedule(sampler):
    for timesteps in (2, 1000):
        defaults = default_sampling(sampler, timesteps)
        assert 1 <= defaults["steps"] <= timesteps and defaults["grid"] == SAMPLERS[sampler].grid
        request = request_from(defaults, timesteps, range(2))
        assert all(getattr(request, name) == value for name, value in defaults.items())
    assert sample(Recorder(), DIFFUSION, request, SHAPE).shape == (2, *SHAPE)


OUT_OF_MEMORY = torch.OutOfMemoryError("out of memory")


class Small(nn.Module):
    """A model on a device that holds so many images at once."""

    def __init__(self, model, holds, error=OUT_OF_MEMORY):
        super().__init__()
        self.model, self.holds, self.error, self.sizes = model, holds, error, []

    def forward(self, x, time, label=None):
        self.sizes.append(len(x))
        if len(x) > self.holds:
            raise self.error
        return self.model(x, time, label)


@pytest.mark.parametrize("holds, guidance", [(1, 1.0), (2, 2.0), (3, 1.0), (6, 2.0)])  # guidance doubles the rows
def test_a_batch_that_does_not_fit_is_drawn_in_parts(model, holds, guidance):
    options = {"classes": (3, 1, 4), "guidance": guidance, "steps": 3}
    small = Small(model, holds)
    drawn = draw(small, range(7), **options)
    torch.testing.assert_close(drawn, draw(model, range(7), **options), rtol=0, atol=1e-5)
    assert sum(size > holds for size in small.sizes) <= 4  # of 14 rows at most; it is remembered what fits


def test_one_image_that_does_not_fit_is_an_error_and_so_is_any_other_error(model):
    with pytest.raises(torch.OutOfMemoryError):
        draw(Small(model, 0), range(5))
    broken = Small(model, 0, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        draw(broken, range(5))
    assert broken.sizes == [5]


def test_a_request_made_from_a_checkpoint_is_the_commands(cli, make_trainer, digits, tmp_path):
    """The README's lines: the pixels of `sample.py` with the same words."""
    trainer = make_trainer(steps=2, class_cond=True)
    list(trainer.run())
    RunWriter(trainer.config, RunFolder(tmp_path), trainer, digits, Callbacks()).save(tmp_path / "model.pt", 1.0)
    cli.works("sample", "--checkpoint", "model.pt", "--seed", 7, "--indices", "0-3", "--output", "drawn.npz")
    checkpoint = tiny_diffusion.load_checkpoint(tmp_path / "model.pt")
    model, diffusion = tiny_diffusion.load_model(checkpoint), tiny_diffusion.make_diffusion(checkpoint.config)
    images = tiny_diffusion.sample(model, diffusion, checkpoint.request(range(4), seed=7), checkpoint.shape)
    assert np.array_equal(to_pictures(images), np.load(tmp_path / "drawn.npz")["arr_0"])


@pytest.mark.parametrize("counts", [[900, 100], [5, 0, 1, 0], [6] * 10, [5923, 6742, 5958, 17], [1]], ids=len)
def test_images_take_classes_in_the_shares_of_training_from_the_first_image_on(counts):
    """One turn holds the classes exactly in their shares, and every beginning of it within one image and a half."""
    order = np.array(order_in_shares(counts))
    assert len(order) * math.gcd(*counts) == sum(counts)
    so_far = np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)
    wanted = np.arange(1, len(order) + 1)[:, None] * np.array(counts) / sum(counts)
    np.testing.assert_array_equal(so_far[-1] * math.gcd(*counts), counts)
    assert abs(so_far - wanted).max() <= max(1.5, len(counts) / 2)


def test_equal_classes_take_turns():
    assert order_in_shares([6000] * 10) == tuple(range(10))
    assert order_in_shares([2, 0, 1]) == (0, 2, 0)  # at 1/4, 1/2 and 3/4
