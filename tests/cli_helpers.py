"""What the tests of the command line share; the fixtures `cli`, `trained` and `loud` are in conftest.py."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tiny_diffusion.cli import COMMANDS, main
from tiny_diffusion.config.option import specs
from tiny_diffusion.config.training import Config
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.runs.checkpoint import load_checkpoint, save_checkpoint

OPTIONS = {command: importlib.import_module(module).OPTIONS for command, (module, _) in COMMANDS.items()}
SOME_VALUES = {  # of the options of train; those with choices, and switches, have these
    "dataset": [*DATASETS, "folder", "folder"], "data_dir": ["some/where", "ü"],
    "splits": [("train",), ("test", "train"), ("val",)],
    "image_size": [8, 28, 64, (32, 48), (130, 64)], "background": ["black", "#12aB00"], "cache_mb": [0, 7],
    "workers": [0, 5], "logsnr_shift": [0.0, -1.25], "timesteps": [2, 1000], "beta_start": [1e-5], "beta_end": [0.03],
    "base_channels": [8, 12, 32], "channel_mult": [(1,), (1, 2), (1, 2, 2)], "attention_levels": [(), (0,), (1, 0)],
    "attention_heads": [1, 2, 4], "layers_per_block": [1, 2], "time_emb_dim": [4, 100], "patch_size": [1, 2, 4],
    "dropout": [0.0, 0.3], "label_dropout": [0.0, 0.4], "epochs": [1, 7], "minutes": [0.5, 3], "max_steps": [5],
    "batch_size": [12, 64], "accumulate": [1, 4], "lr": [1e-4, 1], "ema_decay": [0.0, 0.99], "grad_clip": [0.5],
    "seed": [3], "output_dir": ["a b"], "sample_interval": [2], "num_samples": [4, 9], "save_interval": [3],
    "log": [("tensorboard",), ("wandb", "tensorboard")],
    "keep_last": [1], "eval_interval": [1, 3], "eval_images": [100, 500], "betas": [(0.1, 0.9), (0.2, 0.5)],
    "unet_details": [("norm_eps=1e-06",), ("downsample_padding=0", "add_attention=false")],
}  # fmt: skip
TINY = ["--dataset", "digits", "--base_channels", "8", "--channel_mult", "1", "--num_samples", "4"]


class Ended(NamedTuple):
    """How a command ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


def call(*argv: object) -> int:
    """The exit code of a command, whether it returns or exits."""
    try:
        return main([str(word) for word in argv])
    except SystemExit as ended:
        return ended.code


class Cli:
    """Runs commands in this process: cli("sample", "--steps", 5) -> Ended."""

    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, *argv: object) -> Ended:
        self.capsys.readouterr()
        code = call(*argv)
        return Ended(code, *self.capsys.readouterr())

    def works(self, *argv: object) -> Ended:
        ended = self(*argv)
        assert ended.code == 0, ended.err
        return ended

    def refuses(self, code: int, argv, *words: object) -> str:
        """The command ends with this code and one line on standard error, which holds the words; the line."""
        ended = self(*argv)
        assert (ended.code, ended.out) == (code, ""), ended
        lines = ended.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"tiny_diffusion {argv[0]}: error: "), ended.err
        for word in words:
            assert str(word) in lines[0]
        return lines[0]


def typed(given: Mapping[str, object]) -> list[str]:
    """These options of train as words of a command line."""
    show = {name: spec.type.show for name, spec in specs(Config).items()}
    return [f"--{name}" if value is True else f"--{name}={show[name](value)}" for name, value in given.items()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_tensors(source: Path, target: Path, change) -> None:
    """A copy of a checkpoint, valid in every way, in which change(name, tensor) takes the place of each tensor."""
    checkpoint = load_checkpoint(source)
    about = {key: value for key, value in checkpoint.about.items() if key not in ("format", "sha256")}
    save_checkpoint(target, about, {name: change(name, tensor) for name, tensor in checkpoint.tensors.items()})
