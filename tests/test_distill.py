"""Distillation: the laws of a jump and of its loss in closed form, and the command from teacher to student."""

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from run_helpers import SMALL, assert_ended_as, made_once

from tiny_diffusion.config.student import STEPS, Student, is_student
from tiny_diffusion.diffusion.grids import make_levels
from tiny_diffusion.diffusion.predictions import PREDICTIONS, target
from tiny_diffusion.diffusion.process import Diffusion
from tiny_diffusion.diffusion.request import default_sampling
from tiny_diffusion.diffusion.samplers import ddim
from tiny_diffusion.diffusion.schedules import SCHEDULES, make_schedule
from tiny_diffusion.diffusion.timesteps import stratified
from tiny_diffusion.evaluation import distances
from tiny_diffusion.models.unet import UNet
from tiny_diffusion.randomness import stream
from tiny_diffusion.runs.checkpoint import load_checkpoint, load_model
from tiny_diffusion.runtime.world import SINGLE_PROCESS
from tiny_diffusion.training import moments
from tiny_diffusion.training.distill import Consistency, Levels, per_image

DEVIATION = 0.5  # of the pixels of Gaussian data
INVERTIBLE = [(s, p) for s in SCHEDULES for p in PREDICTIONS if p != "epsilon"]
every_process = pytest.mark.parametrize("schedule, prediction", INVERTIBLE)


def process(schedule="cosine", prediction="v"):
    return Diffusion(make_schedule(schedule, 1000, *(SCHEDULES[schedule].ends or (None, None))), prediction)


def images(count, seed=0):
    """Random (clean, noise) of deviation DEVIATION and 1."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return DEVIATION * clean, torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)


def times(diffusion, count):
    """Noise levels as a run draws them."""
    return Consistency(diffusion, 1)(1.0).timesteps(stratified(stream(0, "timesteps"), count))


def says(diffusion, clean_of):
    """A network whose estimate of the clean image is clean_of(x, alpha, sigma)."""
    steps = np.arange(diffusion.schedule.timesteps)
    given = diffusion.schedule.at(steps)[0]

    def network(x, time, label=None):
        _, alpha, sigma = (per_image(each, x) for each in diffusion.schedule.at(np.interp(time.numpy(), given, steps)))
        clean = clean_of(x, alpha, sigma)
        return target(diffusion.prediction, alpha, sigma, clean, (x - alpha * clean) / sigma)

    return network


# The laws


@every_process
@pytest.mark.parametrize("segments", STEPS)
def test_a_jump_is_the_step_of_ddim_between_its_levels(schedule, prediction, segments):
    """So the student begins as its teacher: whatever the network says, from any level of the grid."""
    diffusion = process(schedule, prediction)
    clean, noise = images(3)
    network = lambda x, time, label: torch.tanh(x) * 0.7 + time.view(-1, 1, 1, 1) / 1000  # noqa: E731
    for level, following in pairwise(make_levels(diffusion.schedule, "angle", segments)):
        x = level.alpha * clean + level.sigma * noise
        *_, step = ddim(diffusion.denoiser(network, clip=False), x, [level, following])
        batch = Levels(*(np.full(3, value) for value in (level.time, level.alpha, level.sigma)))
        loss = Consistency(diffusion, segments)(1.0)
        got = loss._jump(network, x, batch, loss._ends(batch), None)
        torch.testing.assert_close(got, step.x)


def test_in_the_angle_a_jump_is_a_rotation_of_the_image_into_its_velocity():
    """X = cos(phi - psi) x - sin(phi - psi) v."""
    diffusion, (x, v) = process(), images(5)
    t = times(diffusion, 5)
    level, loss = Levels(*diffusion.schedule.at(t)), Consistency(diffusion, 4)(0.5)
    end = loss._ends(level)
    turn = per_image(level.angle - end.angle, x)
    torch.testing.assert_close(loss._jump(lambda *_: v, x, level, end, None), turn.cos() * x - turn.sin() * v)


@pytest.mark.parametrize("segments, ends", [(1, (0,)), (2, (45, 0)), (4, (67.5, 45, 22.5, 0))])
def test_a_jump_ends_at_the_next_level_of_the_grid_below(segments, ends):
    loss = Consistency(process(), segments)(1.0)
    for end, above in zip(ends, (90, *ends), strict=False):
        for degrees in (end + 0.01, (end + above) / 2, above - 0.01):
            angle = np.array([math.radians(degrees)])
            got = loss._ends(Levels(angle, np.cos(angle), np.sin(angle)))
            assert np.degrees(got.angle) == pytest.approx(end, abs=0.01)


@every_process
def test_the_gradient_vanishes_at_the_exact_jump_of_gaussian_data(schedule, prediction):
    """On the probability flow of N(0, d^2) x = sqrt((alpha d)^2 + sigma^2) z keeps its z, so that its path ends at d z.

    The network jumps there, but for a factor that is 1 at the clean end and c at pure noise, and the loss pulls c to 1.
    """
    diffusion = process(schedule, prediction)
    (clean, noise), t = images(8000), times(diffusion, 8000)

    def gradient(value):
        factor = torch.tensor(value, dtype=torch.float64, requires_grad=True)

        def jumps_to(x, alpha, sigma):
            return (1 + (factor - 1) * sigma) * DEVIATION * x / torch.sqrt((alpha * DEVIATION) ** 2 + sigma**2)

        network = says(diffusion, jumps_to)
        Consistency(diffusion, 1)(1.0).loss(network, clean, noise, t).backward()
        return factor.grad.item()

    below, exact, above = map(gradient, (0.5, 1.0, 1.5))
    assert below < 0 < above and abs(exact) < 0.1 * min(-below, above)


@every_process
@pytest.mark.parametrize("segments", STEPS)
def test_for_a_single_image_the_loss_of_the_exact_denoiser_is_zero(schedule, prediction, segments):
    """All paths end at the one image, so any pair jumps to the same point."""
    diffusion = process(schedule, prediction)
    _, noise = images(64)
    clean = torch.full_like(noise, 0.3)

    network = says(diffusion, lambda x, alpha, sigma: torch.full_like(x, 0.3))
    for progress in (0.0, 1.0):
        loss = Consistency(diffusion, segments)(progress).loss(network, clean, noise, times(diffusion, 64))
        assert loss.item() < 1e-3


@every_process
@pytest.mark.parametrize("segments", STEPS)
def test_the_loss_and_its_gradient_are_finite_at_both_ends(schedule, prediction, segments):
    diffusion = process(schedule, prediction)
    clean, noise = (each.float() for each in images(4))
    t = np.array([0.0, 1e-6, 998.999999, 999.0])
    weight = torch.tensor(0.9, requires_grad=True)
    for progress in (0.0, 0.999, 1.0):
        loss = Consistency(diffusion, segments)(progress).loss(lambda x, *_: weight * x, clean, noise, t)
        loss.backward()
        assert math.isfinite(loss.item()) and math.isfinite(weight.grad.item())


def test_pairs_grow_closer_until_three_eighths_of_the_run():
    gaps = [Consistency(process(), 1)(progress).gap for progress in (0.0, 0.13, 0.26, 0.38, 0.9, 1.0)]
    assert gaps == pytest.approx(np.array([8, 4, 2, 1, 1, 1]) / 256)


def test_both_jumps_of_a_pair_drop_the_same_activations(make_trainer):
    """The network is all dropout: with other masks the jumps of one pair would differ by far more than the gap."""
    diffusion, dropout = process(), torch.nn.Dropout(0.5)
    clean, noise = images(8)
    masks = []

    def network(x, time, label=None):
        masks.append(dropout(torch.ones_like(x)))
        return masks[-1] * x

    Consistency(diffusion, 1)(1.0).loss(network, clean, noise, times(diffusion, 8))
    assert torch.equal(*masks)


def test_guidance_one_makes_the_pairs_that_a_perfect_teacher_makes():
    """For a single image the teacher's direction is the image's own, so its pairs are those of the data."""
    diffusion, (_, noise) = process(), images(16)
    clean, t = torch.full_like(noise, 0.3), times(diffusion, 16)
    teacher = says(diffusion, lambda x, alpha, sigma: torch.full_like(x, 0.3))
    student, label = (lambda x, *_: 0.5 * x), torch.zeros(16, dtype=torch.int64)
    for guidance in (1.0, 3.0):  # the two halves agree, so their weight does not matter
        guided = Consistency(diffusion, 1, teacher, guidance)(1.0).loss(student, clean, noise, t, label)
        torch.testing.assert_close(guided, Consistency(diffusion, 1)(1.0).loss(student, clean, noise, t, label))


@pytest.mark.parametrize("steps", STEPS)
def test_the_levels_of_a_student_are_even_in_the_angle(steps):
    sampling = Student(steps, 1, 1.0, "").sampling()
    angles = [math.degrees(level.angle) for level in make_levels(make_schedule("cosine"), sampling["grid"], steps)]
    assert angles == pytest.approx(np.linspace(90, 0, steps + 1), abs=0.01)
    assert sampling.keys() <= default_sampling("ddim", 1000).keys()


# The moments


def gaussian(seed, k=5):
    """The mean and the covariance of a Gaussian of k dimensions."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(k, k, generator=generator, dtype=torch.float64)
    return torch.randn(k, generator=generator, dtype=torch.float64), root @ root.T + 0.1 * torch.eye(k)


def test_the_gradient_of_the_frechet_distance_is_that_of_its_closed_form():
    """By differences along random directions; and the distance of a Gaussian to itself is 0, with no gradient."""
    (mean, covariance), (target, wanted), (step, turn) = map(gaussian, range(3))
    slope, curvature, distance = moments.frechet_gradient(mean, covariance, target, wanted)
    two = (distances.Moments(2, m, c) for m, c in ((mean, covariance), (target, wanted)))  # of 2 images: scatter = C
    assert float(distance) == pytest.approx(distances.frechet_distance(*two), rel=1e-9)
    h = 1e-5
    above, below = (
        moments.frechet_gradient(mean + e * step, covariance + e * turn, target, wanted)[2] for e in (h, -h)
    )
    torch.testing.assert_close((above - below) / (2 * h), slope @ step + (curvature * turn).sum(), rtol=1e-6, atol=0)
    for each in moments.frechet_gradient(target, wanted, target, wanted):
        torch.testing.assert_close(each, torch.zeros_like(each), rtol=0, atol=1e-9)


def test_samples_that_follow_the_witness_take_on_the_mean_and_covariance_of_real_images():
    """A generator of two numbers each, m + s z, trained on the witness alone, ends at those of the target."""
    state = moments.Moments(2, 0, 1)
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(4000, 2, generator=generator) * torch.tensor([2.0, 0.5]) + torch.tensor([1.0, -1.0])
    state.set_target(real, torch.zeros(4000, dtype=torch.int64))
    centre, scale = (torch.tensor(values, requires_grad=True) for values in ([0.5, -0.5], [1.5, 0.8]))
    for step in range(400):
        z = state.project(centre + scale * torch.randn(256, 2, generator=generator))
        if state.is_warm(0):
            slopes = torch.autograd.grad(state.witness(z, None, 0), (centre, scale))
            with torch.no_grad():
                for value, slope in zip((centre, scale), slopes, strict=True):
                    value -= 0.006 * (1 - step / 400) * slope.sign()
        state.add(0, moments.sums_of(z.detach(), None, 1))
    torch.testing.assert_close(centre.detach(), real.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(scale.detach().abs(), real.std(0), rtol=0.1, atol=0)
    assert state.distance[0] < 0.01


def test_one_image_is_a_target_and_a_batch_that_is_not_finite_changes_no_average():
    """A step with such a batch is undone, so the averages must not keep it."""
    diffusion, network = process(), UNet(1, base_channels=8, attention_levels=())
    task = moments.MomentMatching(
        Consistency(diffusion, 1), diffusion, make_levels(diffusion.schedule, "angle", 1), network, 0
    )
    one = SimpleNamespace(world=SINGLE_PROCESS)
    task.moments.set_target(task.features(torch.zeros(1, 1, 8, 8)), torch.zeros(1, dtype=torch.int64))
    assert all(buffer.isfinite().all() for buffer in task.moments.buffers())
    task.moments.steps += 1  # the next one matches moments
    for value, batches in ((math.nan, 0), (0.5, 1)):
        objective = task(0.0)
        objective.loss(network, *torch.full((2, 2, 1, 8, 8), value), np.array([500.0, 500.0]))
        task.after_step(objective, one)
        task.moments.steps += 1
        assert task.moments.batches.tolist() == [batches]
        assert task.moments.mean.isfinite().all()


@pytest.mark.parametrize("steps", STEPS)
def test_what_is_matched_is_what_the_student_samples(steps):
    """From the same noise, evaluation by evaluation; only the last keeps gradients."""
    diffusion, network = process(), UNet(1, base_channels=8, attention_levels=(), num_classes=3)
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    levels = make_levels(diffusion.schedule, "angle", steps)
    task = moments.MomentMatching(Consistency(diffusion, 1), diffusion, levels, network, 3)
    noise, label = torch.randn(steps, 1, 8, 8), torch.arange(steps) % 3
    got = task.sampled(network, noise, label, steps - 1)
    x, draws = noise * levels[0].sigma, iter(noise.roll(k, 0) for k in range(1, steps))
    *_, last = ddim(diffusion.denoiser(network, label), x, levels, lambda: next(draws), eta=1.0)
    torch.testing.assert_close(got.detach().clamp(-1, 1), last.x)
    assert got.requires_grad and task.features(got).shape == (steps, task.features.width)


# The command


TEACHER = [*SMALL, "--attention_levels", "none", "--dropout", 0.1, "--device", "cpu"]
TEACHER += ["--splits", "test", "--batch_size", 100, "--epochs", 1]  # 3 steps
RUN = ["--epochs", 3, "--sample_interval", 1, "--save_interval", 1, "--num_samples", 1, "--device", "cpu"]  # 9 steps


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """teachers(*words) -> the checkpoint of a teacher of three steps with these options."""

    def options_of(words):
        return [*TEACHER, *([] if "--class_cond" in words else ["--no_class_cond"]), *words]

    run = made_once(tmp_path_factory, options_of)
    return lambda *words: run(*words) / "model_final.pt"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, more, asked",
    [
        ([], ["--steps", 1], {"steps": 1, "segments": 1, "guidance": 1.0, "moments": True}),
        (["--class_cond"], ["--accumulate", 2], {"steps": 2, "moments": True}),
        ([], ["--method", "consistency"], {"steps": 2, "segments": 1, "guidance": 1.0, "moments": False}),
        (["--class_cond"], ["--guidance", 2, "--steps", 4], {"steps": 4, "segments": 1, "guidance": 2.0}),
        (["--schedule", "flow", "--prediction", "flow"], ["--method", "phased"], {"steps": 2, "segments": 2}),
        (["--prediction", "x0", "--schedule", "linear"], ["--steps", 1, "--accumulate", 2], {"steps": 1}),
    ],
    ids=str,
)
def test_a_student_samples_by_itself_with_exactly_its_evaluations(
    words, more, asked, teachers, cli, tmp_path, monkeypatch
):
    """And it is an ordinary checkpoint, whose run resumes bit for bit from any step."""
    monkeypatch.setattr(moments, "WARM_UP", 2)  # so that these few steps match moments
    path, whole, parts = teachers(*words), tmp_path / "whole", tmp_path / "parts"
    argv = ["distill", "--checkpoint", path, *RUN, *more]
    cli.works(*argv, "--output_dir", whole)
    cli.works(*argv, "--output_dir", parts, "--max_steps", 4)
    cli.works(*argv, "--output_dir", parts, "--resume")
    assert_ended_as(parts, whole)
    student = load_checkpoint(whole / "model_final.pt")
    assert asked.items() <= student.about["student"].items()
    assert student.student.teacher == load_checkpoint(path).about["sha256"]
    assert student.config.lr == pytest.approx(6e-4 if student.student.moments else 2e-4)
    assert student.request(range(3)).evaluations() == student.student.steps
    calls = []
    model = load_model(student)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    from tiny_diffusion import make_diffusion, sample

    assert sample(model, make_diffusion(student.config), student.request(range(3)), student.shape).isfinite().all()
    assert len(calls) == student.student.steps
    said = cli.works("info", "--checkpoint", whole / "model_final.pt").out
    assert f"distilled   to {student.student.steps} evaluations" in said
    cli.works("sample", "--checkpoint", whole / "model_final.pt", "--num_images", 2)
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_an_older_or_ordinary_checkpoint_is_no_student(teachers):
    checkpoint = load_checkpoint(teachers())
    assert checkpoint.student is None and "student" not in checkpoint.about


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 3},
        {"steps": True},
        {"segments": 4},
        {"guidance": -1},
        {"teacher": None},
        {"more": 1},
        {"moments": 1},
        {"moments": True, "segments": 2},
        {"moments": True, "guidance": 2.0},
    ],
    ids=str,
)
def test_what_no_run_can_have_written_is_no_student(change):
    values = {"steps": 2, "segments": 1, "guidance": 1.0, "teacher": "abc"}
    assert is_student(values) and is_student({**values, "moments": True})
    assert not is_student({**values, **change})
    assert not is_student(None) and not is_student({})


# Bad input


def test_what_cannot_be_distilled_is_refused_in_one_line_and_nothing_is_written(teachers, cli, tmp_path):
    path, new = teachers(), ["--output_dir", tmp_path / "new"]
    for words, reasons in (
        (["--steps", 3], ["--steps", "'3'", "1, 2, 4"]),
        (["--guidance", 2], ["--guidance 2", "class_cond"]),
        (["--guidance", 2, "--method", "moments"], ["--guidance 2", "--method moments", "Leave one out"]),
        (["--keep_best"], ["--keep_best", "--eval_interval"]),
        (["--epochs", 2, "--minutes", 2], ["--epochs", "--minutes"]),
        (["--overwrite", "--resume"], ["--overwrite", "--resume"]),
        (["--extend"], ["--extend", "--epochs"]),
        (["--sampler", "ddim"], ["--sampler", "not an option"]),
    ):
        cli.refuses(2, ["distill", "--checkpoint", path, *new, *words], *reasons)
    cli.refuses(2, ["distill", "--steps", 2, *new], "--checkpoint is required")
    cli.refuses(1, ["distill", "--checkpoint", "gone.pt", *new], "gone.pt")
    epsilon = teachers("--prediction", "epsilon")
    cli.refuses(2, ["distill", "--checkpoint", epsilon, *new], str(epsilon), "epsilon", "--prediction v")
    short = teachers("--timesteps", 2)
    cli.refuses(2, ["distill", "--checkpoint", short, "--steps", 4, *new], "--steps 4", "2 timesteps")
    never = teachers("--class_cond", "--label_dropout", 0)
    cli.refuses(2, ["distill", "--checkpoint", never, "--guidance", 2, *new], "--guidance 2", "label_dropout 0")
    assert not (tmp_path / "new").exists()
    cli.refuses(2, ["distill", "--checkpoint", path, "--output_dir", path.parent], "holds a run already", "--resume")


def test_a_run_goes_on_as_what_it_was(teachers, cli, tmp_path):
    path, folder = teachers(), tmp_path / "run"
    argv = ["distill", *RUN, "--output_dir", folder]
    cli.works(*argv, "--checkpoint", path, "--max_steps", 2)
    for words, reasons in (
        (["--steps", 4], ["--steps 4", "2", "another folder"]),
        (["--method", "phased"], ["--method phased", "moments"]),
        (["--checkpoint", teachers("--class_cond")], ["not the teacher"]),
        (["--lr", 0.5], ["--lr 0.5"]),
    ):
        cli.refuses(2, [*argv, "--resume", *words], *reasons)
    student = folder / "model_final.pt"
    new = ["--output_dir", tmp_path / "new"]
    cli.refuses(2, ["distill", "--checkpoint", student, *new], str(student), "distilled model already", "2 evaluations")
    cli.refuses(2, ["distill", "--output_dir", path.parent, "--resume"], "train --resume")
    cli.works("distill", "--output_dir", folder, "--resume", "--device", "cpu")  # nothing else has to be repeated
    assert load_checkpoint(student).about["finished"]
