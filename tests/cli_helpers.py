"""What the tests of the command line share; the fixtures `cli`, `trained` and `loud` are in conftest.py."""

from pathlib import Path
from typing import NamedTuple

from tiny_diffusion.checkpoint import load_checkpoint, save_checkpoint
from tiny_diffusion.cli import main
from tiny_diffusion.config import Config
from tiny_diffusion.options import FigureOptions, InfoOptions, SampleOptions, TrainActions

OPTIONS = {
    "train": (Config, TrainActions),
    "sample": (SampleOptions,),
    "visualize": (FigureOptions,),
    "info": (InfoOptions,),
}
TINY = ["--dataset", "digits", "--base_channels", "8", "--num_samples", "4"]


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


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_tensors(source: Path, target: Path, change) -> None:
    """A copy of a checkpoint, valid in every way, in which change(name, tensor) takes the place of each tensor."""
    checkpoint = load_checkpoint(source)
    about = {key: value for key, value in checkpoint.about.items() if key not in ("format", "sha256")}
    save_checkpoint(target, about, {name: change(name, tensor) for name, tensor in checkpoint.tensors.items()})
