"""Going on: a run that was stopped ends where one that was not would have ended, bit for bit on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import call, contents
from PIL import Image
from run_helpers import made_once

from tiny_diffusion.config.option import specs
from tiny_diffusion.config.training import Config
from tiny_diffusion.data.batches import Batches
from tiny_diffusion.diffusion.predictions import PREDICTIONS
from tiny_diffusion.diffusion.schedules import SCHEDULES
from tiny_diffusion.runs import session
from tiny_diffusion.runs.checkpoint import load_checkpoint, load_model, save_checkpoint
from tiny_diffusion.runs.folder import RunFolder
from tiny_diffusion.runs.restore import with_classes_of
from tiny_diffusion.runs.writer import Callbacks, RunWriter

ROOT = Path(__file__).parent.parent
SMALL = ["--dataset", "digits", "--image_size", 4, "--num_samples", 1, "--device", "cpu"]
OPTIONS = [*SMALL, "--splits", "test", "--base_channels", 4, "--channel_mult", 1, "--timesteps", 5]
OPTIONS += ["--batch_size", 50, "--epochs", 2]
STEPS_AN_EPOCH = 6  # 299 / 50


def assert_bitwise_equal(got, wanted):
    assert got.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(got[name], wanted[name])]


def snapshot(folder):
    """Every file with its bytes and its time of change."""
    return {name: (data, (folder / name).stat().st_mtime_ns) for name, data in contents(folder).items()}


def lines_of(folder):
    """The log, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def assert_same_run(folder, wanted):
    """The final checkpoints hold the same tensors, and the logs the same steps and losses."""
    got, want = (load_checkpoint(each / "model_final.pt") for each in (folder, wanted))
    assert_bitwise_equal(got.tensors, want.tensors)
    for key in ("step", "finished", "loss_history", "stretch"):
        assert got.about[key] == want.about[key]
    heldout = got.about["heldout_history"]  # a stop adds a point
    assert want.about["heldout_history"] and all(point in heldout for point in want.about["heldout_history"])
    assert lines_of(folder) == lines_of(wanted)
    assert [line["step"] for line in lines_of(folder)] == list(range(1, got.about["step"] + 1))


# The trainer


RUNS = {
    "muon": {},
    "adamw, dropout, a short memory": {"optimizer": "adamw", "dropout": 0.3, "ema_decay": 0.3},
    "adam, mirrored, no memory": {"optimizer": "adam", "hflip": True, "ema_decay": 0.0},
    "classes, logit-normal": {"class_cond": True, "timestep_distribution": "logit_normal", "timesteps": 50},
    "hidden classes and dropout": {"class_cond": True, "label_dropout": 0.5, "dropout": 0.1},
    "in parts, x0, sigmoid": {"accumulate": 4, "dropout": 0.2, "prediction": "x0", "schedule": "sigmoid"},
    "epsilon, linear": {"prediction": "epsilon", "schedule": "linear", "timestep_distribution": "uniform"},
    "flow": {"prediction": "flow", "schedule": "flow", "loss_weight": "uniform", "loss": "l1"},
    "across epochs": {"batch_size": 400, "patch_size": 4},
    "a batch of an epoch and a bit": {"batch_size": 1600, "patch_size": 4, "loss_weight": "min_snr"},
    "bf16": {"precision": "bf16"},
    "fp16, exponential": {"precision": "fp16", "schedule": "exponential"},
    "another seed, more noise": {"seed": 2**40, "grad_clip": 0.1, "logsnr_shift": -2.0},
    "activations made again": {"checkpoint_activations": True, "dropout": 0.2, "loss": "huber"},
    "deeper": {"channel_mult": (1, 2, 2), "layers_per_block": 2, "attention_levels": ()},
}


# The rows that the quick tests have.
QUICK = ("muon", "hidden classes and dropout", "across epochs")


@pytest.mark.parametrize(
    "options",
    [pytest.param(row, id=name, marks=[pytest.mark.slow] * (name not in QUICK)) for name, row in RUNS.items()],
)
def test_six_steps_are_two_and_a_checkpoint_and_four(options, make_trainer, tmp_path):
    """Those across epochs end the first one in their fourth step."""
    options = {"steps": 6, "base_channels": 4, **options}
    whole = make_trainer(**options)
    wanted = [(report.loss.item(), report.grad_norm.item(), report.lr) for report in whole.run()]
    first, got = make_trainer(**options), []
    for report in first.run():
        got.append((report.loss.item(), report.grad_norm.item(), report.lr))
        if report.step == 2:
            break
    RunWriter(first.config, RunFolder(tmp_path), first, first.batches.data, Callbacks()).save(tmp_path / "x.pt", 1.0)
    checkpoint = load_checkpoint(tmp_path / "x.pt")
    second = make_trainer(**options)
    torch.rand(3)  # whatever torch's own generator did in between
    second.load(checkpoint.tensors, checkpoint.about["step"])
    got += [(report.loss.item(), report.grad_norm.item(), report.lr) for report in second.run()]
    assert got == wanted
    assert_bitwise_equal(second.tensors(), whole.tensors())


# The command


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return made_once(tmp_path_factory, lambda words: [*OPTIONS, *words])


@pytest.fixture
def train(cli, tmp_path):
    """train(*words) -> how a run in tmp_path/run ended."""
    return lambda *words: cli("train", *OPTIONS, "--output_dir", tmp_path / "run", *words)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def copy_run(run, folder):
    """The run, as if it had been made in that folder; also its files' times."""
    shutil.copytree(run, folder)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, STEPS_AN_EPOCH, 9])
def test_a_run_of_ten_steps_is_one_of_fewer_that_is_resumed(stop, train, folder, runs):
    assert train("--max_steps", stop).code == 0
    resumed = train("--resume", "--max_steps", 10)
    assert resumed.code == 0 and f"step {stop}" in resumed.err
    assert_same_run(folder, runs("--max_steps", 10))


@pytest.mark.slow
def test_a_run_that_is_stopped_again_and_again_ends_the_same(train, folder, runs):
    assert train("--max_steps", 2).code == 0
    for stop in (3, 7):
        assert train("--resume", "--max_steps", stop).code == 0
    assert train("--resume").code == 0
    assert_same_run(folder, runs())
    assert load_checkpoint(folder / "model_final.pt").about["finished"]


def test_what_the_run_is_made_of_does_not_matter(train, folder, runs):
    words = ["--class_cond", "--dropout", 0.2, "--optimizer", "adamw", "--hflip"]
    assert train(*words, "--max_steps", 4).code == 0
    assert train("--resume", "--max_steps", 10).code == 0
    assert_same_run(folder, runs(*words, "--max_steps", 10))


PAIRS = [
    (schedule, prediction)
    for schedule in SCHEDULES
    for prediction in PREDICTIONS
    if (schedule, prediction) != ("flow", "epsilon")  # which is refused
]
COMBINATIONS = [  # neighbouring options take their turns at different paces, so that all come together with all
    ["--schedule", schedule, "--prediction", prediction, "--optimizer", ("muon", "adamw", "adam")[i % 3],
     "--ema_decay", (0.999, 0.5, 0)[i // 2 % 3], "--accumulate", (1, 2, 5)[i // 3 % 3],
     "--dropout", (0.2, 0)[i // 4 % 2], *(["--class_cond"] if i // 5 % 2 else []), "--max_steps", 10]
    for i, (schedule, prediction) in enumerate(PAIRS[::3])  # which have every schedule and every prediction
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("words", COMBINATIONS, ids=lambda words: " ".join(map(str, words[1::2])))
def test_nor_do_its_options_together_nor_when_it_was_stopped_and_saved(words, train, folder, runs):
    """Stopped within an epoch; the second part saves at other times than the first."""
    stop = (1, 4, 5, 7, 8, 9)[COMBINATIONS.index(words) % 6]
    assert stop % STEPS_AN_EPOCH
    assert train(*words[:-1], stop, "--save_interval", 2).code == 0
    assert train("--resume", "--max_steps", 10, "--save_interval", 1).code == 0
    assert_same_run(folder, runs(*words))


FREE = ["--save_interval", 1, "--sample_interval", 2, "--num_samples", 2, "--keep_last", 1]


@pytest.mark.slow
def test_how_often_is_saved_and_drawn_may_change_and_changes_nothing_else(train, folder, runs):
    assert train("--max_steps", 4).code == 0
    assert train("--resume", *FREE).code == 0
    assert_same_run(folder, runs())
    files = set(contents(folder))
    assert "checkpoints/model_epoch_002.pt" in files and "checkpoints/model_epoch_001.pt" not in files
    config = load_checkpoint(folder / "model_final.pt").config
    assert (config.save_interval, config.sample_interval, config.num_samples, config.keep_last) == (1, 2, 2, 1)


def test_lines_of_the_log_beyond_the_checkpoint_are_cut(train, folder, runs):
    """A kill loses what came after the last save, and may leave half a line."""
    assert train("--max_steps", 4).code == 0
    with open(folder / "log.jsonl", "a") as log:
        for step in range(5, 9):
            log.write(json.dumps({"step": step, "epoch": 0.5, "loss": 1e9, "grad_norm": 1.0, "lr": 1.0}) + "\n")
        log.write('{"step": 9, "lo')
    assert train("--resume", "--max_steps", 10).code == 0
    assert_same_run(folder, runs("--max_steps", 10))


def test_a_damaged_checkpoint_is_passed_over(train, folder, runs):
    assert train("--max_steps", 8, "--save_interval", 1).code == 0
    (folder / "model_final.pt").write_bytes((folder / "model_final.pt").read_bytes()[:-1000])
    resumed = train("--resume", "--max_steps", 10)
    assert resumed.code == 0 and "model_epoch_001.pt, step 6" in resumed.err
    assert_same_run(folder, runs("--max_steps", 10))


def test_the_rolling_checkpoint_goes_when_the_run_ends_and_can_be_gone_on_from(train, folder, runs, monkeypatch):
    monkeypatch.setattr(session, "SAVE_EVERY_S", 0.0)
    assert train("--max_steps", 4).code == 0
    assert not (folder / "checkpoints" / "latest.pt").exists()
    (folder / "model_final.pt").rename(folder / "checkpoints" / "latest.pt")
    resumed = train("--resume", "--max_steps", 10)
    assert resumed.code == 0 and "latest.pt, step 4" in resumed.err
    assert not (folder / "checkpoints" / "latest.pt").exists()
    assert_same_run(folder, runs("--max_steps", 10))


def test_the_rolling_checkpoint_is_written_as_time_goes_by(train, folder, monkeypatch):
    steps = []
    monkeypatch.setattr(session, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(
        RunWriter, "save", lambda self, path, *rest: steps.append((path.name, self.trainer.step)) or True
    )
    assert train("--max_steps", 4).code == 0
    rolling = [("latest.pt", step) for step in (1, 2, 3, 4)]  # the last of them before the last pictures
    assert steps == [*rolling, ("model_final.pt", 4)]


# By the clock


BY_THE_CLOCK = [*OPTIONS[: OPTIONS.index("--epochs")], "--minutes", 5]


@pytest.mark.slow
@pytest.mark.parametrize("spent", [100.0, 1e4])
def test_a_resumed_run_by_the_clock_spends_the_rest_of_its_time(spent, cli, folder):
    """Its learning rate falls as sqrt(1 - time / all of it), from which the time can be read."""
    assert cli("train", *BY_THE_CLOCK, "--output_dir", folder, "--max_steps", 2).code == 0
    checkpoint = load_checkpoint(folder / "model_final.pt")
    assert 0 < checkpoint.about["elapsed_seconds"] < 100
    about = {key: value for key, value in checkpoint.about.items() if key not in ("format", "sha256")}
    save_checkpoint(folder / "model_final.pt", {**about, "elapsed_seconds": spent}, checkpoint.tensors)
    assert cli("train", "--resume", "--output_dir", folder, "--max_steps", 3).code == 0
    about, lines = load_checkpoint(folder / "model_final.pt").about, lines_of(folder)
    assert spent < about["elapsed_seconds"] < spent + 60
    if spent < 300:
        left = (lines[2]["lr"] / 2e-3) ** 2  # the warm-up is over: more than a tenth of the time is spent
        assert (300 - spent - 40) / 300 < left < 1 - spent / 300
    assert about["finished"] == (len(lines) == 2) == (spent > 300)


# A named checkpoint


@pytest.mark.slow
def test_a_named_checkpoint_goes_on_in_another_folder(train, folder, runs, tmp_path):
    source = runs("--max_steps", 4)
    before = snapshot(source)
    assert train("--resume", source / "model_final.pt", "--max_steps", 10).code == 0
    got, wanted = (load_checkpoint(each / "model_final.pt") for each in (folder, runs("--max_steps", 10)))
    assert_bitwise_equal(got.tensors, wanted.tensors)
    assert lines_of(folder) == lines_of(runs("--max_steps", 10))
    assert snapshot(source) == before


@pytest.mark.slow
def test_a_named_checkpoint_goes_on_in_its_own_folder_and_the_log_goes_back_to_it(cli, train, folder, runs):
    assert train("--save_interval", 1, "--max_steps", 9).code == 0
    assert cli("train", "--resume", folder / "checkpoints" / "model_epoch_001.pt", "--max_steps", 10).code == 0
    assert_same_run(folder, runs("--max_steps", 10))


def test_a_checkpoint_does_not_choose_the_folder_that_is_written(cli, runs, tmp_path):
    """A run that was moved goes on where it lies, and a file from elsewhere needs --output_dir."""
    source, moved, alone = runs("--max_steps", 4), tmp_path / "moved", tmp_path / "downloads" / "model.pt"
    before = snapshot(source)
    copy_run(source, moved)
    alone.parent.mkdir()
    shutil.copy(source / "model_final.pt", alone)
    assert cli("train", "--resume", moved / "model_final.pt", "--max_steps", 10).code == 0
    assert load_checkpoint(moved / "model_final.pt").about["step"] == 10
    cli.refuses(2, ["train", "--resume", alone, "--max_steps", 10], alone, "no run's folder", "--output_dir")
    assert snapshot(source) == before and list(alone.parent.iterdir()) == [alone]


def test_a_missing_checkpoint_is_named(cli, tmp_path):
    cli.refuses(1, ["train", "--resume", tmp_path / "none.pt"], tmp_path / "none.pt", "does not exist")


# Nothing to do


def test_resuming_a_finished_run_touches_nothing(train, folder, runs):
    copy_run(runs(), folder)
    before = snapshot(folder)
    for words in (["--resume"], ["--resume", folder / "model_final.pt"], ["--resume", "--max_steps", 50]):
        ended = train(*words)
        assert ended.code == 0 and "finished" in ended.err and "--extend" in ended.err
        assert snapshot(folder) == before


@pytest.mark.parametrize("stop", [4, 3, 1])
def test_resuming_up_to_a_step_that_is_behind_touches_nothing(stop, train, folder, runs):
    copy_run(runs("--max_steps", 4), folder)
    before = snapshot(folder)
    ended = train("--resume", "--max_steps", stop)
    assert ended.code == 0 and f"--max_steps {stop}" in ended.err
    assert snapshot(folder) == before


@pytest.mark.parametrize("words", [[], ["--epochs", 3], ["--lr", 1e-3], ["--max_steps", 3]], ids=str)
def test_a_folder_that_holds_a_run_is_not_written_to_unasked(words, cli, folder, runs):
    copy_run(runs("--max_steps", 4), folder)
    before = snapshot(folder)
    argv = ["train", *OPTIONS, "--output_dir", folder, *words]
    cli.refuses(2, argv, f"--output_dir {folder}", "--resume", "--extend", "--overwrite")
    assert snapshot(folder) == before


def test_there_must_be_a_checkpoint_to_resume(cli, folder):
    cli.refuses(2, ["train", "--resume", "--output_dir", folder], f"--output_dir {folder}", "no checkpoint", "--resume")
    assert not folder.exists()


def test_a_folder_of_damaged_checkpoints_is_refused_by_name(cli, folder, runs):
    copy_run(runs("--max_steps", 4), folder)
    (folder / "model_final.pt").write_bytes(b"PK")
    cli.refuses(1, ["train", "--resume", "--output_dir", folder], folder / "model_final.pt")


def test_a_folder_that_cannot_be_written_is_refused_by_name(cli, tmp_path):
    (tmp_path / "file").write_text("")
    ended = cli("train", *OPTIONS, "--output_dir", tmp_path / "file" / "run")
    assert ended.code == 1 and f"--output_dir {tmp_path / 'file' / 'run'}" in ended.err.splitlines()[-1]


REFUSED = {  # another value as typed, and the run's own as it is printed; nothing is typed for a switch
    "preset": ("tiny", "(not set)"),
    "dataset": ("mnist", "digits"),
    "splits": ("train", "test"),
    "image_size": ("8x6", "4"),
    "random_crop": (None, "False"),
    "background": ("black", "(not set)"),
    "hflip": (None, "False"),
    "schedule": ("linear", "cosine"),
    "timesteps": ("4", "5"),
    "beta_start": ("0.001", "(not set)"),
    "beta_end": ("0.03", "(not set)"),
    "logsnr_shift": ("1", "0"),
    "prediction": ("x0", "v"),
    "loss": ("l1", "mse"),
    "loss_weight": ("min_snr", "uniform"),
    "timestep_distribution": ("uniform", "edm"),
    "base_channels": ("8", "4"),
    "channel_mult": ("1,2", "1"),
    "layers_per_block": ("2", "1"),
    "time_emb_dim": ("8", "16"),
    "attention_levels": ("none", "0"),
    "attention_heads": ("1", "2"),
    "patch_size": ("2", "1"),
    "activation": ("gelu", "silu"),
    "betas": ("0.1,0.9", "(not set)"),
    "unet_details": ("norm_eps=0.001", "none"),
    "dropout": ("0.5", "0"),
    "class_cond": ("False", "True"),  # by --no_class_cond
    "label_dropout": ("0.2", "0.1"),
    "epochs": ("3", "2"),
    "minutes": ("1", "(not set)"),
    "batch_size": ("16", "50"),
    "accumulate": ("2", "1"),
    "lr": ("0.001", "0.002"),
    "optimizer": ("adamw", "muon"),
    "ema_decay": ("0.9", "0.999"),
    "grad_clip": ("2", "1"),
    "precision": ("bf16", "fp32"),
    "seed": ("1", "0"),
}
TAKEN = {
    "data_dir": ["--data_dir", "elsewhere"],
    "checkpoint_activations": ["--checkpoint_activations"],
    "deterministic": ["--deterministic"],
    "max_steps": ["--max_steps", 100],
    "auto_batch": ["--auto_batch"],
    "device": ["--device", "cpu"],
    "output_dir": [],  # in every test here
    "sample_interval": ["--sample_interval", 2],
    "num_samples": ["--num_samples", 3],
    "save_interval": ["--save_interval", 1],
    "keep_last": ["--save_interval", 1, "--keep_last", 1],
}
TAKEN_BY_OTHERS = {  # test_evaluate.py, test_cli_folder.py, test_trackers.py; compiling takes minutes
    "eval_interval", "eval_images", "keep_best", "cache_mb", "workers", "log", "compile",
}  # fmt: skip


def test_of_every_option_it_is_known_whether_a_resumed_run_takes_it():
    free = {name for name, spec in specs(Config).items() if spec.free}
    assert set(REFUSED) == set(specs(Config)) - free
    assert set(TAKEN) | TAKEN_BY_OTHERS == free


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_would_change_the_result_is_refused_with_both_values(name, cli, folder, runs):
    copy_run(runs("--max_steps", 4), folder)
    before, (value, own) = snapshot(folder), REFUSED[name]
    words = [f"--{name}"] if value is None else [f"--{name}", value]
    words = ["--no_class_cond"] if name == "class_cond" else words
    argv = ["train", "--resume", "--output_dir", folder, *words]
    cli.refuses(2, argv, f"--{name} {value or 'True'} differs from this run's {own} ")
    assert snapshot(folder) == before


@pytest.mark.parametrize("names", [["output_dir"], list(TAKEN)], ids=["none", "all of them"])
def test_options_that_do_not_change_the_result_are_taken(names, cli, folder, runs):
    copy_run(runs("--max_steps", 4), folder)
    cli.works("train", "--resume", "--output_dir", folder, *(word for name in names for word in TAKEN[name]))
    assert_same_run(folder, runs())


@pytest.mark.parametrize("name", [name for name in REFUSED if REFUSED[name][1] != "(not set)"])
def test_an_option_with_the_runs_own_value_is_no_change(name, cli, folder, runs):
    if REFUSED[name][0] is None or name in ("class_cond", "label_dropout", "random_crop"):
        pytest.skip("it would be ignored, or has no way to say no")
    copy_run(runs(), folder)
    ended = cli.works("train", "--resume", "--output_dir", folder, f"--{name}", REFUSED[name][1])
    assert "Nothing to do" in ended.err


@pytest.mark.parametrize("name, value", [("epochs", 3), ("minutes", 1)])
def test_another_length_is_refused_with_the_way_to_it(name, value, cli, folder, runs):
    copy_run(runs("--max_steps", 4), folder)
    cli.refuses(2, ["train", "--resume", "--output_dir", folder, f"--{name}", value], f"--{name} {value}", "--extend")


@pytest.mark.parametrize(
    "words",
    [
        ["--resume", "--overwrite"],
        ["--resume", "--extend"],
        ["--extend", "--overwrite"],
        ["--init_from", "x.pt", "--resume"],
        ["--init_from", "x.pt", "--extend"],
    ],
    ids=" ".join,
)
def test_ways_to_start_that_contradict_each_other_are_refused(words, cli, folder):
    named = [word for word in words if word.startswith("--")]
    cli.refuses(2, ["train", "--output_dir", folder, "--epochs", 1, *words], *named)
    assert not folder.exists()


# Extending


def test_an_extended_run_goes_on_past_its_end_with_a_rate_that_warms_up_anew(train, folder, runs):
    copy_run(runs(), folder)
    before = lines_of(folder)
    assert train("--extend", "--epochs", 4).code == 0
    after = lines_of(folder)
    assert after[:12] == before
    assert [line["step"] for line in after] == list(range(1, 25))  # ceil(4 x 299 / 50)
    assert [line["lr"] for line in after[12:]] == pytest.approx([2e-3 * (1 - k / 12) ** 0.5 for k in range(12)])
    final = load_checkpoint(folder / "model_final.pt")
    assert final.about["finished"] and final.about["step"] == 24 and final.config.epochs == 4


@pytest.mark.slow
def test_an_extended_run_can_be_stopped_and_resumed_like_any_other(train, folder, runs, tmp_path, cli):
    for place in (folder, tmp_path / "whole"):
        copy_run(runs(), place)
    assert cli("train", "--extend", "--epochs", 3, "--output_dir", tmp_path / "whole").code == 0
    assert cli("train", "--extend", "--epochs", 3, "--max_steps", 14, "--output_dir", folder).code == 0
    assert cli("train", "--resume", "--output_dir", folder).code == 0
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize("name, value", [("epochs", 1), ("epochs", 2), ("minutes", 1e-4)])
def test_an_end_that_lies_behind_the_run_is_refused_and_nothing_is_trained(name, value, cli, folder, runs):
    copy_run(runs(), folder)
    before = snapshot(folder)
    ended = cli("train", "--extend", f"--{name}", value, "--output_dir", folder)
    assert ended.code == 2 and "--extend" in ended.err and "larger" in ended.err
    assert snapshot(folder) == before


def test_extending_needs_a_length(cli, folder, runs):
    copy_run(runs(), folder)
    cli.refuses(2, ["train", "--extend", "--output_dir", folder], "--extend", "--epochs", "--minutes")


# Starting anew


def test_overwriting_is_a_new_run_that_leaves_other_files_alone(train, folder, runs):
    copy_run(runs(), folder)
    (folder / "notes.txt").write_text("mine")
    assert train("--overwrite", "--max_steps", 4).code == 0
    assert_same_run(folder, runs("--max_steps", 4))
    assert set(contents(folder)) == {*contents(runs("--max_steps", 4)), "notes.txt"}


@pytest.mark.parametrize(
    "words", [["--data_dir", "/nowhere", "--dataset", "mnist"], ["--init_from", "none.pt"], ["--precision", "fp16"]],
    ids=str,
)  # fmt: skip
def test_a_new_run_that_cannot_start_deletes_nothing_of_the_old_one(words, cli, folder, runs, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    copy_run(runs("--max_steps", 4), folder)
    before = snapshot(folder)
    options = OPTIONS[2:] if "--dataset" in words else OPTIONS
    assert cli("train", *options, "--output_dir", folder, "--overwrite", *words).code in (1, 2)
    assert snapshot(folder) == before


def test_a_run_from_another_models_weights_starts_with_its_average_and_counts_from_one(cli, folder, runs):
    """With a learning rate of nothing, the weights stay what they were."""
    source = runs("--max_steps", 4) / "model_final.pt"
    words = ["--max_steps", 2, "--batch_size", 50, "--num_samples", 1, "--lr", 1e-30, "--device", "cpu"]
    assert cli("train", "--init_from", source, "--output_dir", folder, *words).code == 0
    final, wanted = load_checkpoint(folder / "model_final.pt"), load_model(load_checkpoint(source)).state_dict()
    assert_bitwise_equal(final.part("model"), wanted)
    assert_bitwise_equal(final.part("ema"), wanted)
    assert [line["step"] for line in lines_of(folder)] == [1, 2]
    assert (final.config.base_channels, final.config.image_size, final.config.dataset) == (4, 4, "digits")


@pytest.mark.parametrize("before, after", [(True, False), (False, True), (True, True)])
def test_weights_start_with_the_output_for_the_null_class_where_other_classes_are_learnt(before, after, make_trainer):
    """Whatever the first run learnt of classes, for each class of the second it is what was learnt without a class."""
    source, trainer = make_trainer(steps=3, class_cond=before), make_trainer(class_cond=after)
    for parameter in source.ema.model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)  # the embeddings begin at 0, and so does the last layer
    state = source.ema.model.state_dict()
    trainer.model.load_state_dict(with_classes_of(state, trainer, same=False))
    x, time = torch.randn(3, 1, 8, 8), torch.tensor([1.0, 500.0, 900.0])
    with torch.no_grad():
        wanted = source.ema.model(x, time)
        for label in (None, torch.tensor([0, 5, 9])) if after else (None,):
            torch.testing.assert_close(trainer.model(x, time, label), wanted, rtol=1e-4, atol=1e-5)


def test_a_network_of_other_sizes_cannot_start_from_those_weights(cli, folder, runs):
    source = runs("--max_steps", 4) / "model_final.pt"
    words = ["--init_from", source, "--output_dir", folder, "--base_channels", 8, "--device", "cpu"]
    cli.refuses(2, ["train", *words], f"--init_from {source}", "sizes")
    assert not folder.exists()


# Divergence


def test_a_run_that_diverges_stops_and_leaves_what_was_saved(train, folder, runs, monkeypatch):
    copy_run(runs("--max_steps", 4), folder)
    before = (folder / "model_final.pt").read_bytes()
    right = Batches.at

    def at(self, step):
        clean, label = right(self, step)
        return (clean * float("nan") if step >= 6 else clean), label

    monkeypatch.setattr(Batches, "at", at)
    monkeypatch.setattr(session, "MAX_SKIPPED", 3)
    ended = train("--resume")
    assert ended.code == 1 and "3 steps in a row" in ended.err and "--lr" in ended.err
    assert (folder / "model_final.pt").read_bytes() == before
    monkeypatch.setattr(Batches, "at", right)
    assert train("--resume", "--max_steps", 10).code == 0
    assert_same_run(folder, runs("--max_steps", 10))


# Signals


LONG = [*SMALL, "--precision", "fp32", "--base_channels", 8, "--batch_size", 64, "--epochs", 3, "--sample_interval", 1]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long") / "run"
    assert call("train", *LONG, "--output_dir", folder) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_a_resumed_run_ends_the_same(number, code, folder, long_run, cli):
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, LONG), "--output_dir", folder],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        started = time.monotonic()
        while not (folder / "samples" / "epoch_001.png").exists() and time.monotonic() - started < 120:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert number.name in err and "latest.pt" in err and "--resume" in err and "Traceback" not in err
    stopped = load_checkpoint(folder / "checkpoints" / "latest.pt").about
    assert 24 <= stopped["step"] < 70 and not stopped["finished"] and not (folder / "model_final.pt").exists()
    assert len(lines_of(folder)) == stopped["step"]
    assert cli("train", "--resume", "--output_dir", folder).code == 0
    assert_same_run(folder, long_run)
    assert not (folder / "checkpoints" / "latest.pt").exists()


# Images that change


PHOTOS = ["train", "--dataset", "folder", "--data_dir", "photos", "--image_size", 8, "--batch_size", 4, "--epochs", 4,
          "--base_channels", 8, "--channel_mult", "1", "--attention_levels", "none", "--num_samples", 1,
          "--timesteps", 5, "--device", "cpu", "--output_dir", "run"]  # fmt: skip


def save_photos(folder, seeds):
    for seed in seeds:
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
        path = folder / ("a" if seed % 2 else "b") / f"{seed}.bmp"  # whose size does not depend on its pixels
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def stopped_photo_run(tmp_path_factory):
    """The working folder of a run that was stopped after 3 of 8 steps, on 8 images in two folders."""
    place = tmp_path_factory.mktemp("photo_run")
    save_photos(place / "photos", range(8))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert call(*PHOTOS, "--max_steps", 3) == 0
    return place


@pytest.fixture
def photo_run(stopped_photo_run, cli, tmp_path):
    """The images of such a run in the working folder."""
    shutil.copytree(stopped_photo_run, tmp_path, dirs_exist_ok=True)
    return tmp_path / "photos"


CHANGES = {
    "added": lambda photos: save_photos(photos, [8]),
    "removed": lambda photos: (photos / "a" / "1.bmp").unlink(),
    "renamed": lambda photos: (photos / "a" / "1.bmp").rename(photos / "a" / "9.bmp"),
    "moved to the other class": lambda photos: (photos / "a" / "1.bmp").rename(photos / "b" / "1.bmp"),
    "replaced by one of the same size": lambda photos: shutil.copy(photos / "a" / "3.bmp", photos / "a" / "1.bmp"),
    "classes swapped": lambda photos: [
        (photos / old).rename(photos / new) for old, new in (("a", "c"), ("b", "a"), ("c", "b"))
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_images_that_have_changed_are_refused_with_the_way_out(change, photo_run, cli):
    CHANGES[change](photo_run)
    ended, path = cli(*PHOTOS, "--resume"), "run/model_final.pt"
    last = ended.err.splitlines()[-1]
    assert ended.code == 2 and f"--data_dir photos: the images have changed since {path} was saved" in last
    assert f"--init_from {path}" in last


def test_images_that_have_only_moved_are_resumed(photo_run, cli):
    photo_run.rename(photo_run.parent / "elsewhere")
    cli.works(*PHOTOS, "--resume", "--data_dir", "elsewhere")


@pytest.mark.slow
def test_a_run_resumed_in_another_folder_keeps_its_loss_curve(train, folder, cli, tmp_path):
    train("--max_steps", 4)
    before = (folder / "log.jsonl").read_text().splitlines()
    cli.works("train", "--resume", folder / "model_final.pt", "--output_dir", tmp_path / "other")
    after = (tmp_path / "other" / "log.jsonl").read_text().splitlines()
    assert after[: len(before)] == before and len(after) > len(before)


def test_a_run_does_not_train_on_pictures_of_its_own(photo_run, cli):
    words = [*PHOTOS[:-2], "--output_dir", "."]
    cli.refuses(2, words, "--data_dir photos lies in --output_dir .", "Name another")
