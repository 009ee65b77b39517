"""Edits of the images of a seed: where they agree with plain sampling and with the images given, bit for bit."""

import math

import pytest
import torch
from network_helpers import random_network

from tiny_diffusion.config.training import resolve
from tiny_diffusion.diffusion.editing import corrections, level_at, likeliest_labels
from tiny_diffusion.diffusion.edits import FromNoise, Inpaint, Interpolate, Invert, SDEdit
from tiny_diffusion.diffusion.grids import make_levels
from tiny_diffusion.diffusion.request import Request
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.diffusion.sampling import sample
from tiny_diffusion.diffusion.schedules import make_schedule
from tiny_diffusion.models.build import make_diffusion

SHAPE = (1, 8, 8)
CONFIG = resolve({"dataset": "digits", "base_channels": 8, "channel_mult": (1,), "class_cond": True})
DIFFUSION = make_diffusion(CONFIG)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
IMAGES = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1
MASK = torch.zeros(1, 1, 8, 8)
MASK[..., 4:, :] = 1


@pytest.fixture(scope="module")
def model():
    """A class-conditional network of random weights."""
    return random_network(CONFIG, 0.2)


def request_for(indices, sampler="sa_solver", **options):
    row = SAMPLERS[sampler]
    return Request(indices, **{"sampler": sampler, "grid": row.grid, "steps": 4, "eta": row.eta, **options})


def run(model, request, edit=None):
    return sample(model, DIFFUSION, request, SHAPE, **({} if edit is None else {"edit": edit}))


@every_sampler
def test_strength_1_is_plain_sampling_bit_for_bit(sampler, model):
    request = request_for(range(5), sampler, classes=(3, 4))
    assert torch.equal(run(model, request, SDEdit(IMAGES, 1)), run(model, request))


@every_sampler
def test_strength_0_returns_the_images_exactly(sampler, model):
    assert torch.equal(run(model, request_for(range(3), sampler), SDEdit(IMAGES, 0)), IMAGES)


def test_a_stronger_edit_goes_further_from_its_image(model):
    away = [
        (run(model, request_for(range(3), "ddim"), SDEdit(IMAGES, strength)) - IMAGES).square().mean().item()
        for strength in (0.05, 0.3, 0.9)
    ]
    assert 0 < away[0] < away[1] < away[2]


@every_sampler
def test_known_pixels_come_back_exactly_and_the_others_are_sampled(sampler, model):
    images = run(model, request_for(range(6), sampler), Inpaint(IMAGES, MASK))
    assert torch.equal(images[..., :4, :], IMAGES[..., :4, :].repeat(2, 1, 1, 1))
    assert (images[:3, :, 4:] - images[3:, :, 4:]).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("edit", [SDEdit(IMAGES, 0.6), Inpaint(IMAGES, MASK), Inpaint(IMAGES, MASK, classes=(1, 2, 5))])
def test_an_edited_image_does_not_depend_on_its_batch(edit, model):
    together = run(model, request_for(range(5)), edit)
    torch.testing.assert_close(run(model, request_for([4]), edit), together[4:], rtol=0, atol=1e-4)
    torch.testing.assert_close(run(model, request_for(range(5), batch_size=2), edit), together, rtol=0, atol=1e-4)


def test_a_step_of_inpainting_costs_three_evaluations_whether_the_class_is_searched_or_not(model):
    for classes in ((), (0, 1, 2, 3)):
        counted = Counted(model)
        run(counted, request_for(range(2), steps=20), Inpaint(IMAGES, MASK, classes))
        assert counted.calls == 60


@pytest.mark.parametrize(
    "sampler, classes", [*((name, ()) for name in SAMPLERS), ("ddim", (7,)), ("sa_solver", (7, 2))]
)
def test_an_interpolation_begins_and_ends_with_the_plain_samples_bit_for_bit(sampler, classes, model):
    request = request_for([2, 5], sampler, classes=classes)
    frames = run(model, request, Interpolate(5))
    assert torch.equal(frames[[0, -1]], run(model, request))
    assert frames.shape == (5, *SHAPE)


def test_two_frames_are_the_two_images(model):
    assert torch.equal(run(model, request_for([2, 5]), Interpolate(2)), run(model, request_for([2, 5])))


def test_frames_near_an_end_are_near_its_image(model):
    frames = run(model, request_for([2, 5]), Interpolate(200))
    steps = (frames[1:] - frames[:-1]).square().mean((1, 2, 3)).sqrt()
    assert steps.max() < 0.2 < (frames[0] - frames[-1]).square().mean().sqrt()


@pytest.mark.slow
def test_an_inverted_image_is_sampled_again_from_its_noise(make_trainer):
    trainer = make_trainer(steps=60, class_cond=True, lr=5e-3)
    for _ in trainer.run():
        pass
    model, images = trainer.ema.model, (trainer.batches.data.images[:2].float() / 127.5 - 1)
    request = request_for(range(2), "ddim", grid="angle", steps=50, clip=False)
    top = run(model, request, Invert(images))
    back = run(model, request, FromNoise(top / make_levels(DIFFUSION.schedule, "angle", 50)[0].sigma))
    assert (back - images).abs().mean() < 0.005


# The class that the known pixels suit


class TwoClasses:
    """The perfect denoisers of two classes of images, all pixels near +0.5 or all near -0.5."""

    def __call__(self, labels):
        mean = torch.tensor([0.5 if label else -0.5 for label in labels]).view(-1, 1, 1, 1)
        variance = 0.1**2

        def denoise(x, level):
            total = level.alpha**2 * variance + level.sigma**2
            clean = mean + level.alpha * variance / total * (x - level.alpha * mean)
            return clean, (x - level.alpha * clean) / level.sigma

        return denoise


def test_the_label_is_found_by_the_known_pixels():
    known = torch.full((4, *SHAPE), 9.0)
    known[..., :4, :] = torch.tensor([0.4, -0.6, -0.4, 0.6]).view(4, 1, 1, 1)
    labels, evaluations = likeliest_labels(TwoClasses(), known, MASK, (0, 1), make_schedule("cosine"))
    assert labels == [1, 0, 0, 1] and evaluations == 2 * 3 + 2 * 2


def test_corrections_are_as_many_as_asked_and_most_in_the_middle_band():
    levels = make_levels(make_schedule("cosine"), "angle", 20)
    corrections_at = corrections(levels, 40)
    assert sum(map(corrections_at, levels[:-1])) == 40
    assert corrections_at(levels[0]) == corrections_at(levels[-2]) == 1
    assert {corrections_at(level) for level in levels if 30 < math.degrees(level.angle) < 75} == {3}
    assert corrections_at(level_at(make_schedule("cosine"), 0.1)) == 0


class Counted(torch.nn.Module):
    """A model that counts its evaluations."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, *arguments):
        self.calls += 1
        return self.model(*arguments)
