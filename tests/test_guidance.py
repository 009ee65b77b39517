"""Guidance: ``none + w (label - none)``, its closed form for Gaussian data, and what it costs."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from tiny_diffusion.cli.guidance import Interval
from tiny_diffusion.config.rules import refuse_sampling
from tiny_diffusion.config.training import resolve
from tiny_diffusion.diffusion.grids import GRIDS, make_levels
from tiny_diffusion.diffusion.guidance import Autoguided, time_of
from tiny_diffusion.diffusion.levels import CLEAN, Level
from tiny_diffusion.diffusion.predictions import target
from tiny_diffusion.diffusion.process import Diffusion
from tiny_diffusion.diffusion.request import Request, default_sampling, request_from
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.diffusion.sampling import denoising, sample
from tiny_diffusion.diffusion.schedules import SCHEDULES, make_schedule
from tiny_diffusion.errors import OptionError

SHAPE, T = (1, 3, 2), 100
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


class Gaussians(nn.Module):
    """The exact v of N(mean, deviation^2) for each label, and for the null class, which is the last.

    rows: how many rows each call had.
    """

    def __init__(self, means, deviation=0.5, schedule="cosine"):
        super().__init__()
        self.means, self.deviation = nn.Parameter(torch.tensor(means), requires_grad=False), deviation
        self.num_classes, self.schedule, self.rows = len(means) - 1, make_schedule(schedule, T), []

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        self.rows.append(len(x))
        label = torch.full((len(x),), self.num_classes) if label is None else label
        mean = self.means[label].view(-1, 1, 1, 1)
        scale = T if self.schedule.straight else 1.0  # a flow's network is given T * sigma
        t = time[0].item() - 1 if self.schedule.straight else time[0].item() / scale
        level = self.schedule.level(t)
        spread = level.alpha**2 * self.deviation**2 + level.sigma**2
        clean = mean + level.alpha * self.deviation**2 / spread * (x - level.alpha * mean)
        noise = level.sigma / spread * (x - level.alpha * mean)
        return target("v", level.alpha, level.sigma, clean, noise)


def request_for(indices=range(4), **options):
    usual = {"sampler": "ddim", "grid": "trailing", "steps": 8, "classes": (0, 1), "clip": False}
    return Request(indices, **{**usual, **options})


def diffusion_of(model: Gaussians) -> Diffusion:
    return Diffusion(model.schedule, "v")


@pytest.mark.parametrize(
    "schedule, weight",
    sorted({*itertools.product(("cosine", "flow"), (0.0, 0.5, 2.0, 3.5)), *((name, 2.0) for name in SCHEDULES)}),
)
def test_guided_gaussians_are_sampled_from_the_tilted_gaussian(schedule, weight):
    """Classes N(m_c, s^2) and null class N(m_0, s^2): p_0 (p_c / p_0)^w is N(m_0 + w (m_c - m_0), s^2) at every level.

    Along its probability flow (x - alpha mean) / sqrt(alpha^2 s^2 + sigma^2) is constant.  The last step, to the clean
    image, is left out, because it is not small on every schedule.
    """
    means, deviation = (-0.6, 0.3, 0.1), 0.5
    model = Gaussians(means, deviation, schedule).double()
    request = request_for(sampler="heun", grid="angle", steps=T, guidance=weight)
    first, *_, last, _ = denoising(model, diffusion_of(model), request, SHAPE)
    mean = torch.tensor([means[2] + weight * (means[label] - means[2]) for label in (0, 1, 0, 1)]).view(-1, 1, 1, 1)
    start, end = (
        (each.x - each.level.alpha * mean) / math.hypot(each.level.alpha * deviation, each.level.sigma)
        for each in (first, last)
    )
    torch.testing.assert_close(end, start, rtol=0, atol=2e-3)


@every_sampler
def test_guidance_one_is_conditional_sampling_bit_for_bit_and_call_for_call(sampler):
    plain, guided = Gaussians((-0.6, 0.3, 0.1)), Gaussians((-0.6, 0.3, 0.1))
    request = request_for(sampler=sampler)
    wanted = sample(plain, diffusion_of(plain), request, SHAPE)
    got = sample(guided, diffusion_of(guided), dataclasses.replace(request, guidance=1), SHAPE)
    assert torch.equal(got, wanted) and guided.rows == plain.rows == [4] * request.evaluations()


@every_sampler
def test_guidance_zero_is_the_null_class_bit_for_bit_at_the_cost_of_one_evaluation(sampler):
    model = Gaussians((-0.6, 0.3, 0.1))
    unlabelled = sample(model, diffusion_of(model), request_for(sampler=sampler, classes=()), SHAPE)
    calls, request = len(model.rows), request_for(sampler=sampler, guidance=0)
    assert torch.equal(sample(model, diffusion_of(model), request, SHAPE), unlabelled)
    assert model.rows[calls:] == model.rows[:calls] == [4] * request.evaluations()


# Which levels are guided depends on their times alone.  So every interval meets every sampler on one schedule and grid,
# and every schedule and grid, which choose the levels, meet one interval and sampler.
INTERVALS = [None, (0.2, 0.7), (0.0, 0.1), (0.5, 1.0), (0.001, 0.0015)]
GUIDED = [("cosine", interval, "trailing", name) for interval in INTERVALS for name in SAMPLERS]
GUIDED += [(name, (0.2, 0.7), grid, "heun") for name in SCHEDULES for grid in GRIDS]


@pytest.mark.parametrize("schedule, interval, grid, sampler", GUIDED, ids=str)
def test_both_halves_are_one_call_inside_the_interval_and_there_is_a_single_evaluation_outside(
    schedule, interval, grid, sampler
):
    model = Gaussians((-0.6, 0.3, 0.1), schedule=schedule)
    request = request_for(sampler=sampler, grid=grid, guidance=2, guidance_interval=interval)
    sample(model, diffusion_of(model), request, SHAPE)
    assert len(model.rows) == SAMPLERS[sampler].evaluations(8)
    assert sum(model.rows) == 4 * request.evaluations(model.schedule)
    assert dataclasses.replace(request, guidance=0).evaluations(model.schedule) == len(model.rows)
    first, *others = make_levels(model.schedule, grid, 8)[:-1]
    inside = [interval is None or interval[0] <= time_of(level) <= interval[1] for level in (first, *others)]
    repeated = [inside[0], *(each for each in inside[1:] for _ in range(SAMPLERS[sampler].evaluations_per_step))]
    assert sorted(model.rows) == sorted(8 if each else 4 for each in repeated)


def test_outside_the_interval_the_model_is_the_conditional_one():
    model = Gaussians((-0.6, 0.3, 0.1))
    x, label = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0])
    plain, none = (diffusion_of(model).denoiser(model, each, clip=False) for each in (label, None))
    guided = diffusion_of(model).denoiser(model, label, 3.0, clip=False, interval=(0.3, 0.6))
    for t in range(0, T, 9):
        level = model.schedule.level(t)
        if 0.3 <= time_of(level) <= 0.6:
            for got, towards, away in zip(guided(x, level), plain(x, level), none(x, level), strict=True):
                torch.testing.assert_close(got, away + 3 * (towards - away))
        else:
            assert all(map(torch.equal, guided(x, level), plain(x, level)))


@every_schedule
def test_time_is_zero_for_the_clean_image_and_one_for_pure_noise_and_grows_between(schedule):
    times = [time_of(make_schedule(schedule, T).level(t)) for t in range(T)]
    assert time_of(CLEAN) == 0 and time_of(Level(1.0, 0.0, 1.0)) == 1
    assert times == sorted(times) and 0 < times[0] < 0.15 and 0.95 < times[-1] <= 1


def test_on_the_cosine_schedule_time_is_the_share_of_the_timesteps():
    schedule = make_schedule("cosine", 1000)
    assert all(abs(time_of(schedule.level(t)) - (t + 1) / 1000) < 0.01 for t in range(1000))


@pytest.mark.parametrize("labelled", [False, True])
def test_a_guide_takes_the_place_of_the_null_class(labelled):
    """Autoguidance between two Gaussians: means are extrapolated from the guide's, with a call each."""
    model, guide = Gaussians((-0.6, 0.3, 0.1)), Gaussians((-0.2, 0.1, 0.0))
    classes, wanted = ((0,), -0.2 + 2 * (-0.6 + 0.2)) if labelled else ((), 0.0 + 2 * (0.1 - 0.0))
    exact, options = Gaussians((wanted, wanted)), {"sampler": "abm", "grid": "angle"}
    got = sample(
        Autoguided(model, guide), diffusion_of(model), request_for(classes=classes, guidance=2, **options), SHAPE
    )
    torch.testing.assert_close(
        got, sample(exact, diffusion_of(exact), request_for(classes=(), **options), SHAPE), rtol=0, atol=1e-5
    )
    assert model.rows == guide.rows == [4] * 8


def test_a_guide_has_no_part_in_guidance_one():
    model, guide = Gaussians((-0.6, 0.3, 0.1)), Gaussians((-0.2, 0.1, 0.0))
    got = sample(Autoguided(model, guide), diffusion_of(model), request_for(), SHAPE)
    assert torch.equal(got, sample(model, diffusion_of(model), request_for(), SHAPE)) and not guide.rows


def test_an_interval_is_kept_in_the_defaults_where_there_is_one_and_goes_with_guidance_one():
    usual = default_sampling("ddim", 100)
    assert "guidance_interval" not in usual and request_from(usual, 100, [0]).guidance_interval is None
    stored = default_sampling("ddim", 100, 1.5, (0.2, 0.8))
    assert request_from(stored, 100, [0]).guidance_interval == (0.2, 0.8)
    assert request_from(stored, 100, [0], guidance=2).guidance_interval == (0.2, 0.8)
    assert request_from(stored, 100, [0], guidance=1).guidance_interval is None
    assert request_from(stored, 100, [0], guidance_interval=(0, 1)).guidance_interval is None
    assert request_from(stored, 100, [0], guidance_interval=(0.1, 1)).guidance_interval == (0.1, 1)


@pytest.mark.parametrize(
    "text, why",
    [("0.6,0.2", "reversed"), ("0.5,0.5", "empty"), ("0.2,1.5", "range"), ("-0.1,0.5", "range"), ("0.5", "two times"),
     ("nan,1", "range"), ("a,b", "two times")],
)  # fmt: skip
def test_an_interval_that_is_none_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        Interval().read(text)


@pytest.mark.parametrize(
    "class_cond, asked, why",
    [
        (True, {"guidance": [], "interval": (0.2, 0.8)}, "--guidance_interval 0.2,0.8 would be ignored: guidance is 1"),
        (False, {"guidance": [], "interval": (0.2, 0.8)}, "--guidance_interval 0.2,0.8 .*no classes"),
        (True, {"guidance": [1], "guide": "x.pt"}, "--guide_checkpoint x.pt .*leaves the guide out"),
        (True, {"guidance": [], "guide": "x.pt"}, "--guide_checkpoint x.pt .*leaves the guide out"),
        (True, {"guidance": [2, 0], "guide": "x.pt"}, "--guide_checkpoint x.pt .*leaves this model out"),
        (False, {"guidance": [2]}, "--guidance 2 needs a model trained with --class_cond"),
    ],
)
def test_guidance_that_would_be_ignored_is_refused(class_cond, asked, why):
    config = resolve({"dataset": "digits", "class_cond": class_cond})
    with pytest.raises(OptionError, match=why):
        refuse_sampling(config, default_sampling("ddim", 100), samplers=["ddim"], steps=[], eta=None, **asked)


def test_a_guide_needs_no_classes_and_a_sweep_may_hold_one():
    config, usual = resolve({"dataset": "digits", "class_cond": False}), default_sampling("ddim", 100)
    refuse_sampling(config, usual, samplers=["ddim"], steps=[], eta=None, guidance=[2], interval=(0, 0.5), guide="x.pt")
    config = resolve({"dataset": "digits", "class_cond": True})
    refuse_sampling(config, usual, samplers=["ddim"], steps=[], eta=None, guidance=[1, 2], interval=(0, 0.5))
