"""What `benchmark` counts and times: closed forms, shares that add up, a training that it does not change."""

import json
import os
import platform
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from tiny_diffusion.benchmarking.measure import data_speed, make_trainer, network_gflop, sampling_speed, training_speed
from tiny_diffusion.benchmarking.profile import ROWS, _convolutions_of, profile_step
from tiny_diffusion.benchmarking.rates import forward_gflop, matrix_rate, seconds_of
from tiny_diffusion.config.training import resolve
from tiny_diffusion.diffusion.sampling import Request
from tiny_diffusion.runtime import cpu

CPU = torch.device("cpu")
SMALL = {"dataset": "digits", "base_channels": 8, "batch_size": 6, "epochs": 1}


def small_trainer(**options):
    return make_trainer(resolve({**SMALL, **options}), CPU)


def test_operations_of_layers_have_their_closed_form():
    image = torch.zeros(2, 3, 10, 12)
    assert forward_gflop(nn.Conv2d(3, 8, 3, padding=1), image) == pytest.approx(2 * 2 * 8 * 120 * 27 / 1e9)
    assert forward_gflop(nn.Conv2d(3, 8, 3, padding=1, stride=2), image) == pytest.approx(2 * 2 * 8 * 30 * 27 / 1e9)
    assert forward_gflop(nn.Linear(12, 5), image) == pytest.approx(2 * 2 * 3 * 10 * 12 * 5 / 1e9)


def test_operations_of_the_network_are_those_of_its_convolutions_and_linear_layers():
    trainer = small_trainer(attention_levels=())
    convolutions = sum(found.gflop for found in _convolutions_of(trainer, trainer.run()).values()) / 6
    linear = sum(2 * layer.weight.numel() for layer in trainer.model.modules() if isinstance(layer, nn.Linear)) / 1e9
    assert network_gflop(trainer) == pytest.approx(convolutions + linear)


def test_every_convolution_is_noted_once():
    trainer = small_trainer()
    found = _convolutions_of(trainer, trainer.run())
    layers = [layer for layer in trainer.model.modules() if isinstance(layer, nn.Conv2d)]
    assert sum(row.count for row in found.values()) == len(layers)
    assert {weight for _, weight in found} == {tuple(layer.weight.shape) for layer in layers}


def test_shares_of_a_step_add_up():
    found = profile_step(small_trainer(), steps=2)
    assert list(found.shares) == list(ROWS)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert all(share >= 0 for share in found.shares.values())
    of_network = sum(found.shares[kind] for kind in ("convolution", "attention", "matrix products"))
    assert found.shares["convolution"] > 0 and of_network <= found.products <= 1
    assert sum(layer.share for layer in found.layers) <= found.shares["convolution"] + 1e-9
    assert all(layer.forward_gflops > 0 and layer.backward_gflops > 0 for layer in found.layers)


def test_what_takes_long_is_found_where_it_happens():
    trainer = small_trainer()
    usual, busy = trainer.batches.at, torch.randn(700, 700)

    def slow(step):
        for _ in range(20):
            busy.sort()
        return usual(step)

    trainer.batches.at = slow
    shares = profile_step(trainer, steps=2).shares
    assert shares["data"] == max(shares.values())


def test_watching_a_step_does_not_change_it():
    watched, plain = small_trainer(), small_trainer()
    profile_step(watched, steps=2)
    run = plain.run()
    while plain.step < watched.step:
        next(run)
    for name, tensor in plain.tensors().items():
        assert torch.equal(tensor, watched.tensors()[name]), name
    assert "_clip" not in vars(watched) and "step" not in vars(watched.optimizer)


def test_calls_are_timed_without_the_first():
    calls = []

    def work():
        calls.append(time.sleep(0.3 if not calls else 0.01))

    taken = seconds_of(work, CPU, seconds=0, least=4)
    assert len(calls) == 5 and len(taken) == 4 and max(taken) < 0.3


def test_rates_follow_from_what_was_timed():
    trainer = small_trainer()
    found = training_speed(trainer, seconds=0.1)
    assert found["images_per_second"] == pytest.approx(6 / found["step_seconds"])
    assert found["gflops"] == pytest.approx(3 * network_gflop(trainer) * found["images_per_second"])
    drawn = sampling_speed(trainer, Request(range(3), "abm", 4, "angle"), seconds=0.1)
    assert drawn["images_per_second"] == pytest.approx(3 / drawn["seconds"]) and drawn["evaluations"] == 4
    assert data_speed(trainer, seconds=0.05)["images_per_second"] > found["images_per_second"]
    assert matrix_rate(CPU, seconds=0.05) > 0


@pytest.mark.slow
def test_the_command_prints_and_writes_what_it_measured(cli, tmp_path):
    path = tmp_path / "speed.json"
    words = ["--dataset", "digits", "--base_channels", 8, "--batch_size", 6, "--num_images", 2, "--seconds", 0.1]
    ended = cli.works("benchmark", *words, "--json", path)
    found = json.loads(path.read_text())
    assert set(found) == {
        "machine", "config", "training", "matrix_product_gflops", "sampling", "data", "step", "start_up",
    }  # fmt: skip
    assert found["config"]["base_channels"] == 8 and found["sampling"]["images"] == 2
    for part in ("training", "memory", "drawing", "data", "start-up", "a step of", *ROWS):
        assert part in ended.out
    assert found["start_up"]["help_seconds"] < found["start_up"]["first_step_seconds"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dataset", "folder"], ["--dataset folder", "made up"]),
        (["--patch_size", 3], ["patch_size 3"]),
        (["--precision", "fp16"], ["--precision fp16", "CUDA"]),
    ],
)
def test_what_it_cannot_measure_is_refused(cli, words, said):
    cli.refuses(2, ["benchmark", *words], *said)


def _settings(**environment) -> list[str]:
    """What `settle` leaves in the environment and asks of malloc, in a process of its own."""
    code = (
        "import os; from tiny_diffusion.runtime import cpu; asked = []\n"
        "cpu.keep_freed_memory = lambda: asked.append('kept'); cpu.tune_cpu()\n"
        "print(os.environ['GOMP_SPINCOUNT'], *asked)"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_what_the_environment_says_of_waiting_and_memory_stays():
    spins, kept = _settings()
    assert spins in (cpu.SPINS_ALONE, cpu.SPINS_SHARED) and kept == "kept"
    assert _settings(GOMP_SPINCOUNT="7", MALLOC_ARENA_MAX="2") == ["7"]


@pytest.mark.parametrize(
    ("readings", "company"),
    [
        (["0.00 0.01 0.05 1/80 7"], False),  # this process only, whatever ran until now
        (["2.00 2.01 2.05 3/80 7"], True),
        (["2.00 2.01 2.05 3/80 7", "2.00 2.01 2.05 2/80 7", "2.00 2.01 2.05 1/80 7"], False),  # something brief
        (["nothing of that kind"], True),
        ([], True),  # another system
    ],
)
def test_waiting_threads_spin_less_in_company(readings, company, monkeypatch, tmp_path):
    told = iter([*readings, *readings[-1:] * 9])

    class Load:
        def read_text(self):
            return next(told) if readings else (tmp_path / "none").read_text()

    monkeypatch.setattr(cpu, "LOAD", Load())
    assert cpu.others_running() is company
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: None)
    cpu.tune_cpu()
    assert os.environ["GOMP_SPINCOUNT"] == (cpu.SPINS_SHARED if company else cpu.SPINS_ALONE)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")
def test_freed_memory_is_used_again_without_new_pages():
    code = (
        "import resource, sys, numpy as np; from tiny_diffusion.runtime import cpu\n"
        "if sys.argv[1] == 'settled': cpu.tune_cpu()\n"
        "def touch():\n    for _ in range(5): several = [np.ones(2**21) for _ in range(8)]; del several\n"
        "touch(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt; touch()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    faults = {
        how: int(subprocess.run([sys.executable, "-c", code, how], env=clean, capture_output=True, text=True).stdout)
        for how in ("settled", "not")
    }
    assert faults["settled"] < 100 <= faults["not"], faults
