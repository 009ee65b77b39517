"""benchmark: operations have closed forms, shares add up, and profiling does not change the training."""

import json
import os
import platform
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from tiny_diffusion.benchmarking.profile import ROWS, count_convolutions, profile_step
from tiny_diffusion.benchmarking.rates import forward_gflop, matrix_rate, seconds_of
from tiny_diffusion.benchmarking.speed import data_speed, make_trainer, network_gflop, sampling_speed, training_speed
from tiny_diffusion.config.training import resolve
from tiny_diffusion.diffusion.request import Request
from tiny_diffusion.runtime import cpu

CPU = torch.device("cpu")
SMALL = {"dataset": "digits", "base_channels": 8, "batch_size": 6, "epochs": 1}


def small_trainer(**options):
    return make_trainer(resolve({**SMALL, **options}), CPU)


def test_the_operations_of_layers_equal_their_closed_form():
    image = torch.zeros(2, 3, 10, 12)
    assert forward_gflop(nn.Conv2d(3, 8, 3, padding=1), image) == pytest.approx(2 * 2 * 8 * 120 * 27 / 1e9)
    assert forward_gflop(nn.Conv2d(3, 8, 3, padding=1, stride=2), image) == pytest.approx(2 * 2 * 8 * 30 * 27 / 1e9)
    assert forward_gflop(nn.Linear(12, 5), image) == pytest.approx(2 * 2 * 3 * 10 * 12 * 5 / 1e9)


def test_operations_of_the_network_are_those_of_its_convolutions_and_linear_layers():
    trainer = small_trainer(attention_levels=())
    convolutions = sum(found.gflop for found in count_convolutions(trainer, trainer.run()).values()) / 6
    linear = sum(2 * layer.weight.numel() for layer in trainer.model.modules() if isinstance(layer, nn.Linear)) / 1e9
    assert network_gflop(trainer) == pytest.approx(convolutions + linear)


def test_every_convolution_is_counted_once():
    trainer = small_trainer()
    found = count_convolutions(trainer, trainer.run())
    layers = [layer for layer in trainer.model.modules() if isinstance(layer, nn.Conv2d)]
    assert sum(row.count for row in found.values()) == len(layers)
    assert {weight for _, weight in found} == {tuple(layer.weight.shape) for layer in layers}


@pytest.fixture(scope="module")
def profiled():
    """(trainer, profile of some of its steps)."""
    trainer = small_trainer()
    return trainer, profile_step(trainer, steps=1)


def test_shares_of_a_step_add_up(profiled):
    found = profiled[1]
    assert list(found.shares) == list(ROWS)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert all(share >= 0 for share in found.shares.values())
    of_network = sum(found.shares[kind] for kind in ("convolution", "attention", "matrix products"))
    assert found.shares["convolution"] > 0 and of_network <= found.products <= 1
    assert sum(layer.share for layer in found.layers) <= found.shares["convolution"] + 1e-9
    assert all(layer.forward_gflops > 0 and layer.backward_gflops > 0 for layer in found.layers)


@pytest.mark.slow
def test_the_slow_part_of_a_step_has_the_largest_share():
    trainer = small_trainer()
    usual, busy = trainer.batches.at, torch.randn(700, 700)

    def slow(step):
        for _ in range(4):
            busy.sort()
        return usual(step)

    trainer.batches.at = slow
    shares = profile_step(trainer, steps=1).shares
    assert shares["data"] == max(shares.values())


@pytest.mark.slow
def test_profiling_does_not_change_the_training(profiled):
    trainer, plain = profiled[0], small_trainer()
    run = plain.run()
    while plain.step < trainer.step:
        next(run)
    for name, tensor in plain.tensors().items():
        assert torch.equal(tensor, trainer.tensors()[name]), name
    for part in ("optimizer", "ema", "batches"):
        assert vars(getattr(plain, part)).keys() == vars(getattr(trainer, part)).keys()


def test_calls_are_timed_without_the_first():
    calls = []

    def work():
        calls.append(time.sleep(0.3 if not calls else 0.01))

    taken = seconds_of(work, CPU, seconds=0, min_calls=4)
    assert len(calls) == 5 and len(taken) == 4 and max(taken) < 0.3


def test_rates_follow_from_the_seconds_measured():
    trainer = small_trainer()
    found = training_speed(trainer, seconds=0.1)
    assert found["images_per_second"] == pytest.approx(6 / found["step_seconds"])
    assert found["gflops"] == pytest.approx(3 * network_gflop(trainer) * found["images_per_second"])
    drawn = sampling_speed(trainer, Request(range(3), "abm", 4, "angle"), seconds=0.1)
    assert drawn["images_per_second"] == pytest.approx(3 / drawn["seconds"]) and drawn["evaluations"] == 4
    assert data_speed(trainer, seconds=0.05)["images_per_second"] > found["images_per_second"]
    assert matrix_rate(CPU, seconds=0.05) > 0


@pytest.mark.slow
def test_the_command_prints_and_writes_its_numbers(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("tiny_diffusion.benchmarking.speed.STARTS", 1)
    path = tmp_path / "speed.json"
    words = ["--dataset", "digits", "--base_channels", 8, "--batch_size", 6, "--num_images", 2, "--seconds", 0.1]
    ended = cli.works("benchmark", *words, "--json", path)
    found = json.loads(path.read_text())
    assert set(found) == {
        "machine", "config", "training", "matrix_product_gflops", "sampling", "data", "step", "start_up",
    }  # fmt: skip
    assert found["config"]["base_channels"] == 8 and found["sampling"]["images"] == 2
    for part in ("training", "memory", "sampling", "data", "start-up", "a step of", *ROWS):
        assert part in ended.out
    assert found["start_up"]["help_seconds"] < found["start_up"]["first_step_seconds"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dataset", "folder"], ["--dataset folder", "random images"]),
        (["--patch_size", 3], ["patch_size 3"]),
        (["--precision", "fp16"], ["--precision fp16", "CUDA"]),
    ],
)
def test_a_configuration_that_cannot_be_measured_is_refused(cli, words, said):
    cli.refuses(2, ["benchmark", *words], *said)


# The CPU's tuning: see runtime/cpu.py


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """What the code prints in a fresh process, whose environment sets malloc and OpenMP by these variables only."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GOMP_"))}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True).stdout


def test_a_spin_count_in_the_environment_stays():
    code = "import os; from tiny_diffusion.runtime import cpu; cpu.tune_cpu(); print(os.environ['GOMP_SPINCOUNT'])"
    assert run_python(code).strip() in (cpu.SPINS_ALONE, cpu.SPINS_SHARED)
    assert run_python(code, GOMP_SPINCOUNT="7").strip() == "7"


@pytest.mark.parametrize(
    ("readings", "company"),
    [
        (["0.00 0.01 0.05 1/80 7"], False),  # only this process is running
        (["2.00 2.01 2.05 3/80 7"], True),
        (["2.00 2.01 2.05 3/80 7", "2.00 2.01 2.05 2/80 7", "2.00 2.01 2.05 1/80 7"], False),  # a short burst
        (["another format"], True),
        ([], True),  # a system without the file
    ],
)
def test_waiting_threads_spin_less_beside_other_programs(readings, company, monkeypatch, tmp_path):
    coming = iter([*readings, *readings[-1:] * 9])

    class Load:
        def read_text(self):
            return next(coming) if readings else (tmp_path / "none").read_text()

    monkeypatch.setattr(cpu, "LOAD", Load())
    assert cpu.others_running() is company
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")  # so that this process keeps its malloc as it is
    cpu.tune_cpu()
    assert os.environ["GOMP_SPINCOUNT"] == (cpu.SPINS_SHARED if company else cpu.SPINS_ALONE)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")
def test_freed_memory_is_reused_without_page_faults_unless_the_environment_sets_malloc():
    code = (
        "import resource, sys, numpy as np; from tiny_diffusion.runtime import cpu\n"
        "if sys.argv[1] == 'tuned': cpu.tune_cpu()\n"
        "def touch():\n    for _ in range(5): several = [np.ones(2**21) for _ in range(8)]; del several\n"
        "touch(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt; touch()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    assert int(run_python(code, "tuned")) < 100 <= int(run_python(code, "plain"))
    assert int(run_python(code, "tuned", MALLOC_ARENA_MAX="2")) >= 100
