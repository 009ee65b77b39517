"""A small run, and whether another ended as it did: for tests that end one before its end."""

import json

import torch
from cli_helpers import call

from tiny_diffusion.runs.checkpoint import load_checkpoint

SMALL = ["--dataset", "digits", "--image_size", 4, "--base_channels", 4, "--channel_mult", 1, "--num_samples", 1]
RUN = ["train", *SMALL, "--attention_levels", "none", "--timesteps", 5, "--dropout", 0.1, "--device", "cpu"]
RUN += ["--splits", "test", "--batch_size", 100, "--epochs", 3]  # 9 steps
RUN += ["--sample_interval", 1, "--save_interval", 1, "--keep_last", 1]
RUN += ["--precision", "fp32"]  # in a process of its own, too: what a clock decided would not be the same twice
OFTEN = (("no_plots",), ("save_every_step",))


def made_once(folders, options_of):
    """run(*words) -> the folder of an uninterrupted run of train with options_of(words); made once, to look at only.

    folders: the fixture tmp_path_factory.
    """
    made = {}

    def run(*words):
        if words not in made:
            made[words] = folders.mktemp("runs") / "run"
            assert call("train", *options_of(words), "--output_dir", made[words]) == 0
        return made[words]

    return run


def log_of(folder):
    """The whole lines of the log, without what depends on the clock."""
    lines = []
    for text in (folder / "log.jsonl").read_text().splitlines(keepends=True) if (folder / "log.jsonl").exists() else ():
        if text.endswith("\n"):
            lines.append({key: value for key, value in json.loads(text).items() if key != "images_per_second"})
    return lines


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_ended_as(folder, whole):
    """The same tensors bit for bit, the same log, the same files: nothing half-written is left."""
    got, wanted = (load_checkpoint(each / "model_final.pt") for each in (folder, whole))
    assert got.tensors.keys() == wanted.tensors.keys()
    assert not [name for name in wanted.tensors if not torch.equal(got.tensors[name], wanted.tensors[name])]
    assert all(got.about[key] == wanted.about[key] for key in ("step", "finished", "loss_history"))
    assert log_of(folder) == log_of(whole)
    assert files_in(folder) == files_in(whole)
