"""Both halves of a batch at once have the gradient of one after the other, bit for bit, and fail as it fails."""

import itertools
import threading

import pytest
import torch

from tiny_diffusion.config.training import resolve
from tiny_diffusion.training import halves
from tiny_diffusion.training.halves import CORES, Halves
from tiny_diffusion.training.step_time import estimate_step_seconds

PHOTOGRAPHS = torch.Size((64, 3, 64, 64))


@pytest.fixture
def two_cores(monkeypatch):
    """Two cores, and no batch that is too small to be halved."""
    monkeypatch.setattr(halves, "MIN_ACTIVATIONS", 0)
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(1)


def halves_of(device="cpu", **options):
    config = resolve({"dataset": "flowers102", "precision": "fp32", **options})
    return Halves(config, torch.device(device))


def gradients(trainer, parts):
    loss = trainer.compute_gradients(parts)
    return {"loss": loss, **{name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}}


@pytest.mark.parametrize("batch_size", [16, 13])
def test_halves_have_the_loss_and_the_gradient_of_one_after_the_other(batch_size, make_trainer, two_cores):
    """Bit for bit and each time, for a sum of two does not depend on their order."""
    trainer, threads = make_trainer(batch_size=batch_size, precision="fp32"), set()
    list(itertools.islice(trainer.run(), 2))  # at the first step all gradients but the last layer's are zero
    trainer.model.register_forward_hook(lambda *_: threads.add(threading.get_ident()))
    at_once = [gradients(trainer, parts=1) for _ in range(5)]
    assert len(threads) == 2
    torch.set_num_threads(1)
    wanted = gradients(trainer, parts=2)
    assert any(gradient.any() for gradient in wanted.values())
    for got in at_once:
        assert [name for name, tensor in wanted.items() if not torch.equal(got[name], tensor)] == []


def test_the_first_estimate_of_a_steps_time_takes_halves_where_the_steps_do(make_trainer, two_cores):
    def images_at_a_time(**options):
        trainer, given = make_trainer(precision="fp32", **options), []
        trainer.model.register_forward_pre_hook(lambda _, inputs: given.append(len(inputs[0])))
        estimate_step_seconds(trainer)
        return given

    assert images_at_a_time() == [8] * 4
    assert images_at_a_time(accumulate=2) == [8] * 2
    torch.set_num_threads(1)
    assert images_at_a_time() == [16] * 2


def test_a_loss_that_is_not_the_same_in_any_order_is_not_halved(two_cores):
    halved = halves_of()
    halved.allowed = False
    assert halved.run(lambda rows: rows, PHOTOGRAPHS) == [slice(0, 64)]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_a_half_is_raised_when_both_have_ended(failing, two_cores):
    ended = threading.Event()

    def work(rows):
        if rows.start == 32 * failing:
            raise MemoryError("half")
        ended.wait(0.2)
        ended.set()

    with pytest.raises(MemoryError, match="half"):
        halves_of().run(work, PHOTOGRAPHS)
    assert ended.is_set()
    assert torch.get_num_threads() == CORES


def test_memory_that_runs_out_in_a_half_splits_the_batch(make_trainer, two_cores):
    trainer = make_trainer(auto_batch=True, precision="fp32")

    def limited(_, inputs):
        if len(inputs[0]) > 4:
            raise MemoryError

    trainer.model.register_forward_pre_hook(limited)
    assert torch.isfinite(next(trainer.run()).loss)
    assert trainer.parts == 4


def test_each_half_computes_on_one_core(two_cores):
    assert halves_of().run(lambda _: torch.get_num_threads(), PHOTOGRAPHS) == [1, 1]
    assert torch.get_num_threads() == CORES


@pytest.mark.parametrize(
    "options, device, shape, cores, gain",
    [
        ({}, "cpu", PHOTOGRAPHS, CORES, True),
        ({}, "cpu", PHOTOGRAPHS, 1, False),
        ({}, "cpu", PHOTOGRAPHS, 2 * CORES, False),
        ({}, "cuda", PHOTOGRAPHS, CORES, False),
        ({}, "cpu", torch.Size((64, 1, 8, 8)), CORES, False),
        ({}, "cpu", torch.Size((2, 3, 512, 512)), CORES, True),
        ({}, "cpu", torch.Size((1, 3, 512, 512)), CORES, False),  # however large, it has no halves
        ({"precision": "bf16"}, "cpu", PHOTOGRAPHS, CORES, False),
        ({"dropout": 0.1}, "cpu", PHOTOGRAPHS, CORES, False),
        ({"compile": True}, "cpu", PHOTOGRAPHS, CORES, False),
        ({"checkpoint_activations": True}, "cpu", PHOTOGRAPHS, CORES, False),
    ],
)
def test_halves_are_taken_where_they_gain_and_repeat_bit_for_bit(options, device, shape, cores, gain):
    torch.set_num_threads(cores)
    try:
        assert halves_of(device, **options).gain(shape) == gain
    finally:
        torch.set_num_threads(1)
