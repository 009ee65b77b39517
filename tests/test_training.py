"""The trainer: what a step does, what a bad step does not do, how long a run is, and the averaged weights."""

import copy
import dataclasses
import itertools
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tiny_diffusion.data.pixels import to_float
from tiny_diffusion.data.sources import open_dataset
from tiny_diffusion.training import step_time
from tiny_diffusion.training import trainer as trainer_module
from tiny_diffusion.training.ema import WARM_UP, Ema
from tiny_diffusion.training.loss_scaling import FIRST_SCALE, STEPS_UNTIL_DOUBLED, LossScaler
from tiny_diffusion.training.optimizers import OPTIMIZERS
from tiny_diffusion.training.run_length import WARM_UP_STEPS, RunLength
from tiny_diffusion.training.step_time import estimate_step_seconds, images_per_second

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
SIMPLE = {"loss_weight": "uniform", "timestep_distribution": "uniform"}


def run(trainer):
    """All reports of a run."""
    return list(trainer.run())


def steps_of(trainer, count):
    """The next reports of a run, which stops there."""
    return list(itertools.islice(trainer.run(), count))


def snapshot(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def weights_of(trainer):
    return snapshot(trainer.model.state_dict())


def gradients_of(trainer):
    return {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}


def norm_of(tensors):
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors.values()))


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def heldout():
    data = open_dataset("digits", heldout=True)
    return to_float(data.images[:128]), data.labels[:128]


# Learning


LEARNING = {  # options, and the share of a zero answer's loss that is left after 100 steps
    "as by default": ({}, 0.6),
    "epsilon": ({"prediction": "epsilon", **SIMPLE}, 0.5),
    "epsilon by AdamW": ({"prediction": "epsilon", "optimizer": "adamw", **SIMPLE}, 0.5),
    "flow": ({"prediction": "flow", "schedule": "flow", **SIMPLE}, 0.5),
}


@pytest.mark.parametrize(
    "options, share",
    [pytest.param(*row, id=name, marks=[pytest.mark.slow] * (row[0] != {})) for name, row in LEARNING.items()],
)
def test_the_loss_falls_and_so_does_the_averaged_networks_on_images_it_has_never_seen(
    options, share, make_trainer, heldout
):
    """A new network answers zero, so its loss is what there is to learn."""
    trainer = make_trainer(steps=100, **options)
    unseen = trainer.heldout_loss(*heldout)
    losses = [report.loss.item() for report in run(trainer)]
    assert np.mean(losses[-20:]) < share * np.mean(losses[:5])
    assert trainer.heldout_loss(*heldout) < share * unseen


ZERO_ANSWERS = {"mse": torch.square, "l1": torch.abs, "huber": lambda x: x.abs() - 0.5 + (1 - x.abs()).square() / 2}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("loss", ZERO_ANSWERS)
def test_the_first_loss_is_that_of_answering_zero(loss, accumulate, make_trainer):
    trainer = make_trainer(prediction="x0", loss=loss, accumulate=accumulate, **SIMPLE)
    clean, _ = trainer.batches.at(0)
    (report,) = steps_of(trainer, 1)
    torch.testing.assert_close(report.loss, ZERO_ANSWERS[loss](clean).mean())


def test_reports_count_steps_epochs_and_the_rate(make_trainer):
    trainer = make_trainer(steps=20, lr=1e-3)
    reports = run(trainer)
    assert [report.step for report in reports] == list(range(1, 21))
    assert [report.epoch for report in reports] == pytest.approx([k * 16 / 1498 for k in range(1, 21)])
    wanted = [1e-3 * min(1, (k + 1) / 2) * math.sqrt(1 - k / 20) for k in range(20)]
    assert [report.lr for report in reports] == pytest.approx(wanted)
    for report in reports:
        assert report.loss.shape == report.grad_norm.shape == report.skipped.shape == ()
        assert report.loss > 0 and report.grad_norm > 0 and report.skipped == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        reports[0].step = 3


@pytest.mark.parametrize("count", [1, 20])
def test_the_speed_is_that_of_the_work_and_not_of_its_launches(count, make_trainer, monkeypatch):
    """A step takes this device half a second and is queued in a millisecond; reading a loss waits for it."""

    class Queued:
        """A number that is known at `done`."""

        def __float__(self):
            device.now = max(device.now, self.done)
            return 1.0

    def launch(lr):
        trainer.step, device.now = trainer.step + 1, device.now + 0.001
        device.free = max(device.free, device.now) + 0.5
        loss = Queued()
        loss.done = device.free
        return loss, loss

    device, trainer = SimpleNamespace(now=100.0, free=0.0), make_trainer(steps=100)
    for module in (trainer_module, step_time):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: device.now))
    monkeypatch.setattr(trainer, "train_step", launch)
    for _ in range(2):
        reports = steps_of(trainer, count)
        assert images_per_second(reports, 16) == pytest.approx(16 / 0.5, rel=0.01)
        device.now += 60  # of something else


def test_a_run_that_is_stopped_and_run_again_goes_on_bit_for_bit(make_trainer):
    whole, parts = make_trainer(steps=6), make_trainer(steps=6)
    wanted = [report.loss.item() for report in run(whole)]
    got = [report.loss.item() for report in [*steps_of(parts, 2), *run(parts)]]
    assert got == wanted and parts.finished() and run(parts) == []
    assert equal(parts.tensors(), whole.tensors())


@pytest.mark.parametrize(
    "batch_size, step, epoch, current",
    [
        (16, 0, 0, 1),
        (16, 1, 16 / 1498, 1),
        (16, 94, 1504 / 1498, 1),
        (16, 95, 1520 / 1498, 2),
        (1498, 1, 1, 1),
        (1498, 2, 2, 2),
        (3000, 2, 6000 / 1498, 4),  # it began in the third and ended the fourth
        (749, 2, 1, 1),
        (749, 3, 1.5, 2),
    ],
)
def test_epochs_are_passes_over_the_data(batch_size, step, epoch, current, make_trainer):
    trainer = make_trainer(batch_size=batch_size)
    trainer.step = step
    assert trainer.epoch == pytest.approx(epoch)
    assert trainer.current_epoch == current


def times_given_to(trainer, steps):
    """(steps, B): the times that the network is told."""
    times = []
    trainer.model.register_forward_pre_hook(lambda module, arguments: times.append(arguments[1]))
    steps_of(trainer, steps)
    return torch.cat(times).view(steps, -1)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_batch_has_one_timestep_of_each_sixteenth_of_the_schedule(accumulate, make_trainer):
    for times in times_given_to(make_trainer(accumulate=accumulate, **SIMPLE), 5):
        assert sorted((times // 62.5).tolist()) == list(range(16))


def test_every_step_and_every_seed_has_timesteps_and_noise_of_its_own(make_trainer):
    seen = set()
    for seed in range(3):
        trainer = make_trainer(seed=seed)
        trainer.batches.at = lambda step: (torch.zeros(16, 1, 8, 8), torch.zeros(16, dtype=torch.int64))
        trainer.model.register_forward_pre_hook(
            lambda module, arguments: seen.update(
                [tuple(arguments[0][:, 0, 0, 0].tolist()), tuple(arguments[1].tolist())]
            )
        )
        steps_of(trainer, 4)
    assert len(seen) == 3 * 4 * 2


# Parts of a batch


@pytest.mark.parametrize(
    "accumulate, options",
    [(2, {"prediction": "epsilon", "loss": "l1"}), (4, {"class_cond": True, "hflip": True}), (16, {})],
)
def test_a_batch_in_parts_has_the_gradient_of_the_whole(accumulate, options, make_trainer):
    whole, parts = (make_trainer(accumulate=count, grad_clip=1e9, **options) for count in (1, accumulate))
    for _ in range(3):  # at the first step all gradients but the last layer's are zero
        (wanted,), (got,) = steps_of(whole, 1), steps_of(parts, 1)
        torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(got.grad_norm, wanted.grad_norm, rtol=1e-4, atol=0)
        parts.load(snapshot(whole.tensors()), whole.step)
    reference = gradients_of(whole)
    difference = {name: gradient - reference[name] for name, gradient in gradients_of(parts).items()}
    assert norm_of(difference) < 1e-5 * norm_of(reference)


@pytest.mark.parametrize("parts", [3, 5, 11])
def test_parts_of_uneven_size_have_the_gradient_of_the_whole(parts, make_trainer):
    """16 images in 3 parts are 6, 5 and 5, and each image counts as much as any other."""
    trainer = make_trainer()
    steps_of(trainer, 3)
    loss, wanted = trainer.compute_gradients(1), gradients_of(trainer)
    torch.testing.assert_close(trainer.compute_gradients(parts), loss, rtol=1e-5, atol=0)
    difference = {name: gradient - wanted[name] for name, gradient in gradients_of(trainer).items()}
    assert norm_of(difference) < 1e-5 * norm_of(wanted)


def test_weights_after_steps_in_parts_are_those_after_steps_at_once(make_trainer):
    whole, parts = (make_trainer(accumulate=count, lr=1e-4) for count in (1, 4))
    run(whole), run(parts)
    start = weights_of(make_trainer(lr=1e-4))
    moved = {name: tensor - start[name] for name, tensor in weights_of(whole).items()}
    apart = {name: tensor - whole.model.state_dict()[name] for name, tensor in weights_of(parts).items()}
    assert norm_of(apart) < 1e-3 * norm_of(moved)


# Memory that runs out


FAULTS = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CUDA's runtime": RuntimeError("CUDA error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "Linux": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    ),
    "Windows": RuntimeError("[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you"),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB)"),
    "MPS, one tensor": RuntimeError("Invalid buffer size: 12.00 GB"),
    "Python": MemoryError(),
    "C++": RuntimeError("std::bad_alloc"),
}
every_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


def fresh(fault):
    """Another of the same: one that had been raised would hold on to where it was."""
    return type(fault)(*fault.args)


def limit(trainer, images, fault=FAULTS["CUDA"], model=None):
    """From now on memory holds so many images at once.  Returns how many are given to the network, call by call."""
    given = []

    def check(module, arguments):
        given.append(len(arguments[0]))
        if given[-1] > images:
            raise fresh(fault)

    (model or trainer.model).register_forward_pre_hook(check)
    return given


@pytest.fixture(scope="module")
def stepped_in_two_parts(make_trainer):
    """(trainer, the report of its only step)"""
    trainer = make_trainer(accumulate=2)
    return trainer, *steps_of(trainer, 1)


@every_fault
def test_a_step_that_runs_out_of_memory_is_done_again_in_twice_as_many_parts(fault, make_trainer, stepped_in_two_parts):
    trainer, (wanted, report) = make_trainer(auto_batch=True), stepped_in_two_parts
    assert trainer.parts == 1
    given = limit(trainer, 8, fault)
    (got,) = steps_of(trainer, 1)
    assert trainer.parts == 2 and given == [16, 8, 8]
    assert (got.loss, got.grad_norm, got.step) == (report.loss, report.grad_norm, 1)
    assert equal(trainer.tensors(), wanted.tensors())


@pytest.mark.parametrize(
    "options",
    [
        {"class_cond": True, "dropout": 0.2, "hflip": True},
        {"precision": "bf16", "optimizer": "adamw"},
        pytest.param({"dropout": 0.2, "checkpoint_activations": True}, marks=pytest.mark.slow),
        pytest.param({"precision": "fp16"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_goes_on_bitwise_as_if_it_had_been_asked_for_as_many_parts(options, make_trainer):
    trainer, first, then = (make_trainer(**options, **more) for more in ({"auto_batch": True}, {}, {"accumulate": 2}))
    steps_of(trainer, 2)
    limit(trainer, 8)
    losses = [report.loss.item() for report in steps_of(trainer, 2)]
    steps_of(first, 2)
    then.load(snapshot(first.tensors()), 2)
    assert losses == [report.loss.item() for report in steps_of(then, 2)]
    assert trainer.parts == 2 and equal(trainer.tensors(), then.tensors())


@pytest.mark.parametrize("call, fault", [(1, FAULTS["CUDA"]), (2, FAULTS["Python"])], ids=repr)
def test_memory_that_runs_out_on_the_way_back_leaves_nothing_of_the_attempt(call, fault, make_trainer):
    """At the second call the first part's gradients are in place already."""
    trainer, wanted = make_trainer(auto_batch=True, dropout=0.2, accumulate=2), make_trainer(dropout=0.2, accumulate=4)
    calls = itertools.count(1)

    def fail(gradient):
        raise fresh(fault)

    def watch(module, arguments, output):
        if next(calls) == call:
            output.register_hook(fail)

    trainer.model.register_forward_hook(watch)
    steps_of(trainer, 2), steps_of(wanted, 2)
    assert next(calls) == call + 2 * 4 + 1
    assert trainer.parts == 4 and equal(trainer.tensors(), wanted.tensors())


@pytest.mark.parametrize("batch_size, images, parts", [(16, 16, 1), (16, 15, 2), (10, 5, 2), (10, 3, 4), (5, 1, 5)])
def test_parts_double_until_they_fit_or_are_single_images(batch_size, images, parts, make_trainer):
    trainer = make_trainer(batch_size=batch_size, auto_batch=True)
    given = limit(trainer, images)
    steps_of(trainer, 2)
    assert trainer.parts == parts and trainer.micro_batch == max(given[-parts:]) <= images
    assert sum(given[-parts:]) == batch_size and max(given[-parts:]) - min(given[-parts:]) <= 1


def test_where_one_image_is_too_many_memorys_error_is_raised(make_trainer):
    trainer = make_trainer(auto_batch=True, batch_size=3)
    given = limit(trainer, 0)
    for ask in (trainer.run().__next__, lambda: estimate_step_seconds(trainer)):
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            ask()
    assert given == [3, 2, 1, 1] and trainer.parts == 3


@every_fault
def test_without_auto_batch_memorys_error_is_raised_at_once(fault, make_trainer):
    trainer = make_trainer()
    given, before = limit(trainer, 5, fault), snapshot(trainer.tensors())
    for ask in (trainer.run().__next__, lambda: estimate_step_seconds(trainer)):
        with pytest.raises(type(fault)) as raised:
            ask()
        assert raised.value.args == fault.args
    assert given == [16, 16] and trainer.parts == 1 and trainer.step == 0 and equal(trainer.tensors(), before)


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (16x8 and 4x8)"),
        ValueError("out of memory"),
    ],
    ids=str,
)
def test_other_errors_are_raised_at_once(fault, make_trainer):
    trainer = make_trainer(auto_batch=True)
    given = limit(trainer, 5, fault)
    for ask in (trainer.run().__next__, lambda: estimate_step_seconds(trainer)):
        with pytest.raises(type(fault), match=str(fault)[:10]):
            ask()
    assert given == [16, 16] and trainer.parts == 1


def test_what_an_attempt_had_computed_is_let_go_before_the_next_one(make_trainer):
    """The error knows the frames that it came through, and they all that was kept for the backward pass."""

    class Activations:
        pass

    trainer, earlier = make_trainer(auto_batch=True), []

    def check(module, arguments):
        assert not any(reference() for reference in earlier)
        assert all(parameter.grad is None for parameter in module.parameters()) or trainer.parts == 4
        activations = Activations()
        if len(arguments[0]) > 4:
            earlier.append(weakref.ref(activations))
            raise fresh(FAULTS["CUDA"])

    trainer.model.register_forward_pre_hook(check)
    steps_of(trainer, 1)
    assert trainer.parts == 4 and len(earlier) == 2


def test_the_first_estimate_finds_out_how_many_parts_it_takes_and_changes_nothing(make_trainer):
    trainer = make_trainer(auto_batch=True, dropout=0.1)
    given, before = limit(trainer, 7), snapshot(trainer.tensors())
    assert estimate_step_seconds(trainer) > 0
    assert trainer.parts == 4 and given == [16, 8, 4, 4]
    assert equal(trainer.tensors(), before) and all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("options", [{}, {"accumulate": 4}, {"auto_batch": True}], ids=str)
def test_the_first_estimate_is_of_a_whole_batch_whatever_its_parts(options, make_trainer, monkeypatch):
    """A clock that goes on by a second an image, and by a minute at the first call, which is slow to start."""
    trainer, now = make_trainer(**options), [60.0]
    limit(trainer, 8 if options.get("auto_batch") else 16)
    trainer.model.register_forward_hook(
        lambda module, arguments, output: now.append(now[-1] + len(arguments[0]) + 60 * (len(now) == 1))
    )
    monkeypatch.setattr(step_time, "time", SimpleNamespace(perf_counter=lambda: now[-1]))
    assert estimate_step_seconds(trainer) == pytest.approx(16)


@pytest.mark.parametrize("batch_size, accumulate, count", [(16, 4, 32), (16, 1, 100)])
def test_the_heldout_loss_is_computed_in_micro_batches_and_is_that_of_all_at_once(
    batch_size, accumulate, count, make_trainer, heldout
):
    whole, parts = make_trainer(batch_size=count), make_trainer(batch_size=batch_size, accumulate=accumulate)
    steps_of(whole, 5)
    parts.ema.model.load_state_dict(whole.ema.model.state_dict())
    given = limit(parts, batch_size // accumulate, model=parts.ema.model)
    images, labels = heldout[0][:count], heldout[1][:count]
    assert parts.heldout_loss(images, labels) == pytest.approx(whole.heldout_loss(images, labels), rel=1e-6)
    assert sum(given) == count and len(given) == math.ceil(count * accumulate / batch_size)


@pytest.mark.parametrize(
    "options", [{"dropout": 0.2, "class_cond": True}, {"precision": "bf16", "accumulate": 2}], ids=str
)
def test_activations_that_are_computed_again_train_bitwise_the_same_network(options, make_trainer):
    plain, again = (make_trainer(checkpoint_activations=choice, **options) for choice in (False, True))
    steps_of(plain, 3), steps_of(again, 3)
    assert again.model.checkpoint_activations and equal(again.tensors(), plain.tensors())


# Clipping


def test_gradients_longer_than_the_limit_are_scaled_to_it_and_shorter_ones_left(make_trainer):
    free, held, loose = (make_trainer(grad_clip=limit) for limit in (1e9, 0.01, 10.0))
    (wanted,), (got,), _ = (steps_of(trainer, 1) for trainer in (free, held, loose))
    norm = norm_of(gradients_of(free))
    assert 0.01 < norm < 10
    assert got.grad_norm.item() == wanted.grad_norm.item() == pytest.approx(norm, rel=1e-5)
    assert norm_of(gradients_of(held)) == pytest.approx(0.01, rel=1e-4)
    for name, gradient in gradients_of(held).items():
        torch.testing.assert_close(gradient * (norm / 0.01), gradients_of(free)[name], rtol=1e-3, atol=1e-7)
    assert equal(gradients_of(loose), gradients_of(free))


# Bad steps


BAD_VALUES = [float("nan"), float("inf")]


def poison(trainer, value, steps):
    """One pixel of the batches of these steps is not finite."""
    right = trainer.batches.at

    def at(step):
        clean, label = right(step)
        if step in steps:
            clean[0, 0, 0, 0] = value
        return clean, label

    trainer.batches.at = at


@every_optimizer
@pytest.mark.parametrize("value", BAD_VALUES)
def test_a_step_that_is_not_finite_changes_no_weight_and_no_state_of_the_optimizer(value, optimizer, make_trainer):
    trainer = make_trainer(optimizer=optimizer, dropout=0.1)
    poison(trainer, value, {3, 4})
    steps_of(trainer, 3)
    weights, state = weights_of(trainer), snapshot(trainer.optimizer.tensors())
    for skipped in (1, 2):
        (report,) = steps_of(trainer, 1)
        assert not math.isfinite(report.loss + report.grad_norm) and report.skipped == skipped
        assert equal(weights_of(trainer), weights)
        assert equal(trainer.optimizer.tensors(), state)
    (report,) = steps_of(trainer, 1)
    assert math.isfinite(report.loss) and report.skipped == 0 and report.step == 6
    assert not equal(weights_of(trainer), weights)


@every_optimizer
def test_a_run_whose_first_step_is_bad_continues_as_if_it_had_begun_with_the_second(optimizer, make_trainer):
    bad, clean = make_trainer(optimizer=optimizer), make_trainer(optimizer=optimizer)
    poison(bad, float("nan"), {0})
    clean.step = 1
    run(bad), run(clean)
    assert equal(weights_of(bad), weights_of(clean))
    assert equal(bad.optimizer.tensors(), clean.optimizer.tensors())


@every_optimizer
@pytest.mark.parametrize(
    "layer, value",
    [
        ("conv_in.weight", float("nan")),
        ("mid_block.resnets.0.conv1.weight", float("inf")),
        ("time_embedding.linear_1.bias", float("nan")),
    ],
)
def test_a_gradient_that_is_not_finite_is_a_bad_step_although_the_loss_is_right(layer, value, optimizer, make_trainer):
    trainer = make_trainer(optimizer=optimizer)
    steps_of(trainer, 2)
    weights, state = weights_of(trainer), snapshot(trainer.optimizer.tensors())
    handle = trainer.model.get_parameter(layer).register_hook(lambda gradient: torch.full_like(gradient, value))
    (report,) = steps_of(trainer, 1)
    assert math.isfinite(report.loss) and report.skipped == 1
    assert equal(weights_of(trainer), weights) and equal(trainer.optimizer.tensors(), state)
    handle.remove()
    assert steps_of(trainer, 1)[0].skipped == 0


def test_averaged_weights_stay_finite_through_bad_steps(make_trainer):
    trainer = make_trainer()
    poison(trainer, float("nan"), {2, 5, 6})
    run(trainer)
    assert all(torch.isfinite(tensor).all() for tensor in trainer.tensors().values())


# Length


@pytest.mark.parametrize("steps, start", [(1, 0), (10, 0), (500, 0), (5000, 0), (5000, 4000), (10, 3)])
def test_progress_goes_from_0_to_1_over_the_steps(steps, start):
    length = RunLength(steps=steps, from_step=start)
    progress = [length.progress(step, seconds=1e9) for step in range(start, steps + 1)]
    assert progress == pytest.approx(np.linspace(0, 1, steps - start + 1).tolist())


@pytest.mark.parametrize("seconds, start", [(60.0, 0.0), (60.0, 45.0), (1e-3, 0.0)])
def test_progress_goes_from_0_to_1_over_the_seconds(seconds, start):
    length = RunLength(seconds=seconds, from_seconds=start)
    for share in (0, 0.25, 0.5, 1, 2):
        assert length.progress(10**6, start + share * (seconds - start)) == pytest.approx(share)


@pytest.mark.parametrize("beyond", [0, 1, 100])
def test_a_stretch_of_no_length_is_over_before_it_begins(beyond):
    """As when --extend asks for an end that lies behind the run: not one step may be taken."""
    assert RunLength(steps=1000, from_step=1000 + beyond).progress(1000 + beyond, 0.0) >= 1
    assert RunLength(seconds=60.0, from_seconds=60.0 + beyond).progress(5, 60.0 + beyond) >= 1


@pytest.mark.parametrize("start", [0, 700])
@pytest.mark.parametrize("steps", [1, 5, 20, 300, 1000, 20_000])
def test_the_rate_warms_up_and_decays_to_zero(steps, start):
    """A tenth of the steps, at most 100; then sqrt(1 - progress)."""
    length = RunLength(steps=start + steps, from_step=start)
    rates = np.array([length.lr_scale(step, length.progress(step, 0)) for step in range(start, start + steps + 1)])
    warm_up = max(1, min(steps // 10, WARM_UP_STEPS))
    progress = np.arange(steps + 1) / steps
    np.testing.assert_allclose(rates[warm_up - 1 :], np.sqrt(1 - progress[warm_up - 1 :]), atol=1e-9)
    np.testing.assert_allclose(
        rates[:warm_up], (np.arange(warm_up) + 1) / warm_up * np.sqrt(1 - progress[:warm_up]), atol=1e-9
    )
    assert np.all(np.diff(rates[:warm_up]) > 0) and np.all(np.diff(rates[warm_up:]) < 0)
    assert rates[-1] == 0 and rates.max() <= 1 and rates[0] > 0


@pytest.mark.parametrize("start", [0, 700])
def test_by_the_clock_the_rate_warms_up_over_a_hundred_steps_or_a_tenth_of_the_time(start):
    """Whichever is shorter: a run of few steps would otherwise never come near its learning rate."""
    length = RunLength(seconds=60.0, from_step=start)
    for step, share in ((0, 0.01), (1, 0.02), (49, 0.5), (99, 1.0), (5000, 1.0)):
        assert length.lr_scale(start + step, 0.0) == pytest.approx(share)
    for progress, share in ((0.001, 0.01), (0.05, 0.5), (0.1, 1.0), (0.75, 1.0)):
        assert length.lr_scale(start, progress) == pytest.approx(share * math.sqrt(1 - progress))
    assert length.lr_scale(start, 1.2) == 0


def test_a_run_by_the_clock_ends_when_its_seconds_are_spent(make_trainer):
    now = [3.0]  # three of them were spent before the first step
    trainer = make_trainer(length=RunLength(seconds=10.0), clock=lambda: now[0], lr=1e-3)
    rates = []
    for report in trainer.run():
        rates.append(report.lr)
        now[0] += 1.0
    assert rates == pytest.approx([1e-3 * math.sqrt(1 - (3 + k) / 10) for k in range(7)])
    assert trainer.finished() and trainer.step == 7


# Averaged weights


class WithBuffers(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 3), float(value), dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(2))


@pytest.mark.parametrize("steps, jump", [(1, 0), (6, 0), (6, 1), (6, 5), (50, 0), (50, 5), (50, 40)])
def test_the_average_of_a_weight_that_jumps_follows_a_closed_form(steps, jump):
    """The old value keeps a share of prod n / (n + 8) over the steps n since, a ratio of factorials."""
    model = WithBuffers(0)
    ema = Ema(model, decay=0.999999)
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.fill_(float(step > jump))
        ema.update(step)
    kept = math.exp(math.lgamma(steps + 1) - math.lgamma(jump + 1) - math.lgamma(steps + 9) + math.lgamma(jump + 9))
    torch.testing.assert_close(ema.model.weight, torch.full((2, 3), 1 - kept, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("step", [1, 2, 8, 72, 10**6])
def test_one_update_keeps_the_smaller_of_the_decay_and_the_warm_up(step, decay):
    model = WithBuffers(1)
    ema = Ema(model, decay)
    with torch.no_grad():
        model.weight.fill_(3.0)
    ema.update(step)
    kept = min(decay, step / (step + 8))
    assert WARM_UP == 8
    torch.testing.assert_close(
        ema.model.weight, torch.full((2, 3), 3 - 2 * kept, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_buffers_are_copied_and_not_averaged():
    model = WithBuffers(1)
    ema = Ema(model, 0.999)
    for step in (1, 2, 3):
        model.count += 1
        model.mean += 0.1
        ema.update(step)
        assert ema.model.count == step and torch.equal(ema.model.mean, model.mean)
    assert ema.model.mean is not model.mean


def test_the_average_is_a_network_of_its_own_that_does_not_learn(make_trainer):
    trainer = make_trainer()
    own = {parameter.data_ptr() for parameter in trainer.model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in trainer.ema.model.parameters()}
    assert not any(parameter.requires_grad for parameter in trainer.ema.model.parameters())
    run(trainer)
    assert trainer.model.training and not trainer.ema.model.training


def test_without_memory_the_average_is_the_weights(make_trainer):
    trainer = make_trainer(ema_decay=0.0)
    steps_of(trainer, 3)
    assert equal(trainer.ema.model.state_dict(), trainer.model.state_dict())


def test_each_step_is_averaged_once(make_trainer):
    trainer = make_trainer(ema_decay=0.95)
    average = weights_of(trainer)
    for step in range(1, 5):
        steps_of(trainer, 1)
        kept = min(0.95, step / (step + 8))
        average = {name: kept * average[name] + (1 - kept) * tensor for name, tensor in weights_of(trainer).items()}
    for name, tensor in trainer.ema.model.state_dict().items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-7)


# Measuring changes nothing


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), {"class_cond": True, "dropout": 0.2}])
def test_the_heldout_loss_is_the_same_every_time_and_disturbs_no_training(options, make_trainer, heldout):
    quiet, measured = make_trainer(**options), make_trainer(**options)
    for _ in range(3):
        steps_of(quiet, 1), steps_of(measured, 1)
        first = measured.heldout_loss(*heldout)
        torch.rand(3)
        assert measured.heldout_loss(*heldout) == first
        assert estimate_step_seconds(measured) > 0
        assert all(parameter.grad is None for parameter in measured.model.parameters())
    assert equal(measured.tensors(), quiet.tensors())
    assert measured.model.training


def test_the_heldout_loss_is_the_averaged_networks(make_trainer, heldout):
    trainer = make_trainer()
    run(trainer)
    before = trainer.heldout_loss(*heldout)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    assert trainer.heldout_loss(*heldout) == before
    trainer.ema.model.load_state_dict(trainer.model.state_dict())
    assert trainer.heldout_loss(*heldout) > before


# Labels


def labels_given_to(trainer, steps):
    labels = []
    trainer.model.register_forward_pre_hook(lambda module, arguments: labels.append(arguments[2]))
    steps_of(trainer, steps)
    return labels


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_given_share_of_labels_is_hidden_and_the_others_are_the_images(share, make_trainer):
    trainer = make_trainer(class_cond=True, label_dropout=share, batch_size=128, base_channels=4)
    labels = torch.cat(labels_given_to(trainer, 8))
    own = torch.cat([trainer.batches.at(step)[1] for step in range(8)])
    hidden = labels == 10  # the null class, one past the last
    assert torch.equal(labels[~hidden], own[~hidden])
    assert abs(hidden.float().mean() - share) <= 5 * math.sqrt(share * (1 - share) / len(labels))
    assert len({tuple(places) for places in hidden.view(8, 128).tolist()}) == (8 if share else 1)


def test_a_network_without_classes_is_given_no_labels(make_trainer):
    assert labels_given_to(make_trainer(class_cond=False), 2) == [None, None]


# Precision


@pytest.fixture
def scaler():
    return LossScaler(True, torch.device("cpu"))


def test_the_loss_scale_is_halved_by_an_overflow_and_doubled_after_enough_finite_steps(scaler):
    bad, good = torch.tensor(1.0), torch.tensor(0.0)
    assert scaler.state.tolist() == [FIRST_SCALE, 0]
    scaler.update(bad)
    assert scaler.state.tolist() == [FIRST_SCALE / 2, 0]
    for count in range(1, STEPS_UNTIL_DOUBLED):
        scaler.update(good)
        assert scaler.state.tolist() == [FIRST_SCALE / 2, count]
    scaler.update(good)
    assert scaler.state.tolist() == [FIRST_SCALE, 0]


def test_an_overflow_starts_the_count_of_finite_steps_anew(scaler):
    for bad in [0.0] * (STEPS_UNTIL_DOUBLED - 1) + [1.0] + [0.0] * (STEPS_UNTIL_DOUBLED - 1):
        scaler.update(torch.tensor(bad))
    assert scaler.state.tolist() == [FIRST_SCALE / 2, STEPS_UNTIL_DOUBLED - 1]


def test_gradients_are_unscaled_by_what_the_loss_was_scaled_by(scaler):
    gradients = [torch.tensor([3.0, -5.0])]
    scaled = [scaler.scale(gradient) for gradient in gradients]
    scaler.unscale_(scaled)
    torch.testing.assert_close(scaled, gradients, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_scale_nothing(precision, make_trainer):
    scaler, loss = make_trainer(precision=precision).scaler, torch.tensor(7.0)
    for bad in (0.0, 1.0):
        scaler.update(torch.tensor(bad))
    assert scaler.scale(loss) is loss and scaler.state[0] == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_has_nearly_the_gradients_of_single_precision(precision, make_trainer):
    """They are compared as the optimizer gets them: unscaled and in single precision."""
    half, single = make_trainer(precision=precision, grad_clip=1e9), make_trainer(grad_clip=1e9)
    steps_of(single, 3)
    half.load({**snapshot(single.tensors()), "scaler/loss_scale": half.scaler.state.clone()}, single.step)
    (got,), (wanted,) = steps_of(half, 1), steps_of(single, 1)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=0.01, atol=0)
    reference = gradients_of(single)
    difference = {name: gradient - reference[name] for name, gradient in gradients_of(half).items()}
    assert 0 < norm_of(difference) < 0.05 * norm_of(reference)
    assert all(tensor.dtype == torch.float32 for tensor in half.tensors().values())


@pytest.mark.slow
def test_a_loss_scale_that_is_too_large_comes_down_until_steps_succeed(make_trainer):
    trainer = make_trainer(steps=30, precision="fp16")
    trainer.scaler.state[0] = 2.0**30
    weights = weights_of(trainer)
    reports = run(trainer)
    skipped = [report.skipped.item() for report in reports]
    overflows = skipped.index(0)
    assert overflows > 0 and skipped == [*range(1, overflows + 1), *[0] * (30 - overflows)]
    assert trainer.scaler.state.tolist() == [2.0 ** (30 - overflows), 30 - overflows]
    assert not equal(weights_of(trainer), weights)


# Going on


def test_loading_needs_a_trainer_of_the_same_network(make_trainer):
    tensors = make_trainer().tensors()
    for options in ({"base_channels": 4}, {"class_cond": False}, {"channel_mult": (1, 2, 2)}):
        with pytest.raises((KeyError, RuntimeError)):
            make_trainer(**options).load(tensors, 0)


@pytest.mark.parametrize("part", ["model", "ema", "scaler"])
def test_loading_needs_every_part(part, make_trainer):
    tensors = {name: tensor for name, tensor in make_trainer().tensors().items() if not name.startswith(f"{part}/")}
    with pytest.raises((KeyError, RuntimeError)):
        make_trainer().load(tensors, 0)


def test_what_is_loaded_stays_the_callers(make_trainer):
    """Training on must not write into the tensors that were read."""
    source = make_trainer()
    steps_of(source, 2)
    tensors = snapshot(source.tensors())
    before = copy.deepcopy(tensors)
    other = make_trainer()
    other.load(tensors, 2)
    steps_of(other, 2)
    assert equal(tensors, before)


def test_a_compiled_network_is_only_another_way_to_call_it(make_trainer, monkeypatch):
    calls = []

    def compiled(model):
        return lambda *inputs: (calls.append(1), model(*inputs))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    fast, plain = make_trainer(compile=True), make_trainer()
    run(fast), run(plain)
    assert len(calls) == 10 and equal(fast.tensors(), plain.tensors())
