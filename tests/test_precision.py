"""`--precision auto` is bf16 where that exists, is faster and right; it is decided once; bf16 trains as fp32 does."""

import json
import statistics
from types import SimpleNamespace

import pytest
import torch
from run_helpers import SMALL
from torch import nn

from tiny_diffusion.config.training import resolve
from tiny_diffusion.models.build import make_model
from tiny_diffusion.runs.checkpoint import load_checkpoint
from tiny_diffusion.runtime.world import SINGLE_PROCESS, World
from tiny_diffusion.training import precision
from tiny_diffusion.training.precision import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    check_bf16,
    decide_precision,
    reason_for_fp32,
)

CPU = torch.device("cpu")
RUN = ["train", *SMALL, "--attention_levels", "none", "--timesteps", 5, "--batch_size", 8, "--device", "cpu"]
OPTIONS = {"dataset": "digits", "base_channels": 8, "channel_mult": (1,), "batch_size": 16}


class Machine:
    """A clock, and what the network costs on it and adds to its output in bf16."""

    def __init__(self, monkeypatch, instructions=True, fp32=0.01, bf16=0.01, error=0.0):
        self.now, self.checks, self.cost, self.error = 0.0, 0, {False: fp32, True: bf16}, error
        monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(precision, "has_bf16", lambda device: instructions)

    def network(self, **options):
        torch.manual_seed(0)
        model = make_model(resolve({**OPTIONS, **options}), 1, 10)

        def passes(module, arguments, output):
            self.checks += 1
            half = torch.is_autocast_enabled("cpu")
            self.now += self.cost[half] * len(output)
            return output + (self.error * output.detach().norm() / output.numel() ** 0.5 if half else 0)

        model.register_forward_hook(passes)
        return model

    def decide(self, world=SINGLE_PROCESS, **options):
        """(precision, the line of the log)"""
        config, lines = decide_precision(resolve({**OPTIONS, **options}), self.network(), 1, world)
        return config.precision, *lines


@pytest.mark.parametrize(
    ("machine", "wanted", "words"),
    [
        ({"fp32": 0.012}, "bf16", ["1.20 times as fast"]),
        ({"fp32": 0.0109}, "fp32", ["1.09 times as fast", "1.1 times"]),
        ({"bf16": 0.05}, "fp32", ["0.20 times as fast"]),
        ({"fp32": 0.02, "error": 3 * OUTPUT_TOLERANCE}, "fp32", ["wrong", "the output differs"]),
        ({"fp32": 0.02, "error": float("nan")}, "fp32", ["wrong", "the output differs", "nan"]),
        ({"fp32": 0.02, "instructions": False}, "fp32", ["cpu has no bf16 instructions"]),
    ],
    ids=["faster", "hardly faster", "slower", "wrong", "not finite", "without instructions"],
)
def test_bf16_is_taken_where_it_is_there_and_faster_and_right(machine, wanted, words, monkeypatch):
    machine = Machine(monkeypatch, **machine)
    found, line = machine.decide()
    assert found == wanted and line.startswith(f"precision {wanted}: ") and all(word in line for word in words)


def test_without_instructions_nothing_is_checked(monkeypatch):
    machine = Machine(monkeypatch, instructions=False)
    machine.decide()
    assert machine.checks == 0


@pytest.mark.parametrize("options", [{"precision": "fp32"}, {"precision": "bf16"}, {"precision": "fp16"}], ids=str)
def test_a_precision_that_was_asked_for_is_kept_without_a_word(options, monkeypatch):
    machine = Machine(monkeypatch, fp32=0.02)
    assert machine.decide(**options) == (options["precision"],)
    assert machine.checks == 0


def test_a_deterministic_run_leaves_nothing_to_the_clock(monkeypatch):
    machine = Machine(monkeypatch, fp32=0.02)
    found, line = machine.decide(deterministic=True)
    assert found == "fp32" and "--deterministic" in line and machine.checks == 0


def test_apples_gpus_are_fp32_without_a_check():
    assert "mps" in reason_for_fp32(resolve(OPTIONS), torch.device("mps"))


@pytest.mark.slow
def test_a_slow_network_is_checked_with_fewer_images(monkeypatch):
    """The first passes have four images each, whatever they take; the rest fits into the seconds of the check."""
    for cost, seconds in ((0.005, 3.0), (0.02, 3.0), (0.01, 1.5)):
        machine = Machine(monkeypatch, fp32=1.5 * cost, bf16=cost)
        assert check_bf16(machine.network(), (1000, 1, 8, 8), seconds)[0]
        assert 0.5 * seconds < machine.now <= seconds
    machine = Machine(monkeypatch, fp32=15.0, bf16=10.0)
    assert check_bf16(machine.network(), (1000, 1, 8, 8), 3.0)[0]
    assert machine.checks == 2 * 2 + 2 + 2 * precision.ROUNDS


def test_a_short_budget_has_a_short_check(monkeypatch):
    machine = Machine(monkeypatch, fp32=0.006, bf16=0.004)
    machine.decide(minutes=0.5, batch_size=4096)
    assert machine.now <= 0.02 * 30


def test_a_wrong_gradient_is_found_in_any_layer(monkeypatch):
    """Where the backward pass of one convolution is wrong in bf16 only, as in pytorch#169688."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.clone()

        @staticmethod
        def backward(ctx, gradient):
            return -gradient

    class Convolution(nn.Conv2d):
        def forward(self, x):
            weight = Wrong.apply(self.weight) if torch.is_autocast_enabled("cpu") else self.weight
            return self._conv_forward(x, weight, self.bias)

    machine, names = Machine(monkeypatch, fp32=0.02), []
    for name, layer in machine.network().named_modules():
        names += [name] if type(layer) is nn.Conv2d else []
    assert len(names) > 8
    for name in names[::3]:
        model = machine.network()
        model.get_submodule(name).__class__ = Convolution
        takes, why = check_bf16(model, (4, 1, 8, 8), 3.0)
        assert not takes and "a gradient of shape" in why, name


@pytest.mark.parametrize(
    "options",
    [
        {"channel_mult": (1, 2)},
        {"class_cond": False, "dropout": 0.5},
        pytest.param({"base_channels": 32, "channel_mult": (1, 2), "layers_per_block": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rounding_alone_is_half_of_the_tolerances_at_most(options, monkeypatch):
    monkeypatch.setattr(precision, "OUTPUT_TOLERANCE", OUTPUT_TOLERANCE / 2)
    monkeypatch.setattr(precision, "GRADIENT_TOLERANCE", GRADIENT_TOLERANCE / 2)
    machine = Machine(monkeypatch, fp32=0.02)
    assert check_bf16(machine.network(**options), (4, 1, 8, 8), 1.0)[0]


def test_the_check_changes_neither_the_network_nor_the_random_numbers(monkeypatch):
    machine = Machine(monkeypatch, fp32=0.02)
    model = machine.network(dropout=0.5).eval()
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    assert check_bf16(model, (4, 1, 8, 8), 1.0)[0]
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_check_that_fails_leaves_fp32_and_says_why(monkeypatch):
    machine = Machine(monkeypatch, fp32=0.02)
    model = machine.network()

    def fail(module, arguments):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no such kernel\nand more")

    model.register_forward_pre_hook(fail)
    takes, why = check_bf16(model, (4, 1, 8, 8), 1.0)
    assert not takes and "(no such kernel)" in why


@pytest.mark.parametrize(("decided", "wanted"), [(1.0, "bf16"), (0.0, "fp32")])
def test_other_ranks_take_what_rank_0_decided(decided, wanted, monkeypatch):
    class Second(World):
        """Rank 1, whose maxima with rank 0 are: nothing keeps either from a check, and what rank 0 found."""

        def maximum(self, *values):
            assert values == (0.0,)
            return [next(answers)]

    answers, machine = iter([0.0, decided]), Machine(monkeypatch)
    assert machine.decide(Second(CPU, 1, 2))[0] == wanted and machine.checks == 0


def test_ranks_check_nothing_where_one_of_them_has_no_instructions(monkeypatch):
    class First(World):
        def maximum(self, *values):
            return [next(answers)]

    answers, machine = iter([1.0, 0.0]), Machine(monkeypatch, fp32=0.02)
    found, line = machine.decide(First(CPU, 0, 2))
    assert found == "fp32" and "another rank" in line and machine.checks == 0


# The command


def decided_by(cli, monkeypatch, wanted, *words):
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    monkeypatch.setattr(precision, "check_bf16", lambda *asked: (wanted == "bf16", "as the test says"))
    return cli.works(*RUN, "--output_dir", "run", *words)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["bf16", "fp32"])
def test_checkpoints_hold_the_decision_and_a_resumed_run_keeps_it(wanted, cli, monkeypatch, tmp_path):
    other = {"bf16": "fp32", "fp32": "bf16"}[wanted]
    whole = decided_by(cli, monkeypatch, wanted, "--max_steps", 4, "--output_dir", "whole", "--precision", "auto")
    assert whole.err.count(f"precision {wanted}: as the test says") == 1
    decided_by(cli, monkeypatch, wanted, "--max_steps", 2)
    assert load_checkpoint("run/model_final.pt").config.precision == wanted
    cli.refuses(
        2,
        ["train", "--resume", "--output_dir", "run", "--precision", other],
        f"--precision {other} differs from this run's {wanted}",
    )
    resumed = decided_by(cli, monkeypatch, other, "--max_steps", 4, "--resume", "--precision", "auto")
    assert "as the test says" not in resumed.err
    one, two = (load_checkpoint(f"{folder}/model_final.pt") for folder in ("whole", "run"))
    assert two.config.precision == wanted
    assert all(torch.equal(tensor, two.tensors[name]) for name, tensor in one.tensors.items())


def test_a_file_of_options_leaves_the_decision_to_the_machine_that_reads_it(cli, monkeypatch):
    decided_by(cli, monkeypatch, "bf16", "--max_steps", 1, "--save_config", "options.json")
    with open("options.json", encoding="utf-8") as file:
        assert json.load(file)["precision"] == "auto"


def test_samples_and_scores_are_float32_whatever_the_run_computed_in(cli, monkeypatch):
    """An image of a seed is then the same on every processor."""
    decided_by(cli, monkeypatch, "bf16", "--max_steps", 2)
    used = []
    forward = torch.nn.Conv2d.forward
    monkeypatch.setattr(
        torch.nn.Conv2d, "forward", lambda self, x: used.append(forward(self, x).dtype) or forward(self, x)
    )
    cli.works("sample", "--checkpoint", "run", "--num_images", 2, "--steps", 2, "--output", "drawn.png")
    assert set(used) == {torch.float32}


# The same training


@pytest.mark.slow
def test_losses_of_bf16_and_fp32_differ_by_less_than_those_of_two_seeds(make_trainer):
    """Means of five steps of a run of 60: the noise of two seeds is the distance between their curves."""

    def curve(**options):
        losses = [report.loss.item() for report in make_trainer(steps=60, base_channels=16, **options).run()]
        return [statistics.mean(losses[first : first + 5]) for first in range(0, 60, 5)]

    def distance(one, other):
        return statistics.mean(abs(a - b) for a, b in zip(one, other, strict=True))

    single, half, other_seed = curve(precision="fp32"), curve(precision="bf16"), curve(precision="fp32", seed=1)
    assert 0 < distance(single, half) < 0.5 * distance(single, other_seed)
    assert statistics.mean(half[-3:]) < 0.6 * half[0]
