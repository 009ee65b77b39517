"""The commands as Python functions that take the same words: `num_images=16` is `--num_images 16`.

They raise OptionError and FileError with the message that the command would print.
"""

import contextlib
import importlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tiny_diffusion.cli import COMMANDS
from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.cli.sample import SampleOptions, make_request
from tiny_diffusion.config import synonyms
from tiny_diffusion.config.option import Flag, specs
from tiny_diffusion.config.training import Config
from tiny_diffusion.diffusion.levels import Step
from tiny_diffusion.errors import OptionError

# Options of the command alone.
OF_FILES = ("checkpoint", "guide_checkpoint", "output", "show_intermediate", "device", "weights")


def train(**options) -> Path:
    """Trains a model as `train.py` does, and returns the path of its checkpoint, model_final.pt.

    options: those of `train.py`.

    >>> from tiny_diffusion import open_model, train
    >>> path = train(dataset="digits", max_steps=2, base_channels=8, output_dir="outputs/python")
    >>> open_model(path).sample(num_images=4, steps=2).shape
    (4, 8, 8, 1)
    """
    run_command("train", **options)
    return Path(options.get("output_dir", Config.output_dir)) / "model_final.pt"


def run_command(name: str, **options) -> None:
    """Runs a command by its name, such as "evaluate" or "distill", with its options.  Raises as the command fails.

    A flag is True; a list stands for values between commas.
    """
    with _errors_raised(name):
        importlib.import_module(COMMANDS[name][0]).run(words_of(options), name, time.monotonic())


@contextlib.contextmanager
def _errors_raised(name: str) -> Iterator[None]:
    """Turns the exit of a parser, which has printed why, into an OptionError."""
    try:
        yield
    except SystemExit as error:
        if error.code:
            raise OptionError(f"{name} refuses these options, for the reason above") from None


def words_of(options: dict[str, object]) -> list[str]:
    """The command line of these options.

    >>> words_of({"steps": 5, "show_intermediate": True, "sampler": ["ddim", "abm"], "class_cond": False})
    ['--steps=5', '--show_intermediate', '--sampler=ddim,abm', '--no_class_cond']
    """
    words = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            words.append(f"--{name}=" + (",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return words


def open_model(path: str | Path, weights: str = "ema", device: str = "auto") -> "TrainedModel":
    """The model of a checkpoint, or the newest one in the folder of a run.

    weights: ema, the averaged ones, or raw.   device: auto, cpu, cuda or mps.
    """
    return TrainedModel(path, weights, device)


class TrainedModel:
    """A model on a device, with everything that its checkpoint says of it."""

    def __init__(self, path: str | Path, weights: str, device: str):
        from tiny_diffusion.models.build import make_diffusion, to_device
        from tiny_diffusion.runs.checkpoint import load_checkpoint, load_model
        from tiny_diffusion.runs.folder import newest_in
        from tiny_diffusion.runtime.world import make_world

        self.checkpoint = load_checkpoint(newest_in(path))
        self.diffusion = make_diffusion(self.checkpoint.config)
        self.network = to_device(load_model(self.checkpoint, weights), make_world(device, {}).device)

    def sample(self, **options) -> np.ndarray:
        """The images that `sample.py` writes with the same options: uint8 (N, H, W, C).

        options: num_images, indices, seed, classes, guidance, guidance_interval, sampler, steps, grid, eta, batch_size,
        as on the command line.  `PIL.Image.fromarray(images[0].squeeze())` makes a picture of one.
        """
        from tiny_diffusion.data.pixels import to_pictures
        from tiny_diffusion.diffusion.sampling import sample

        return to_pictures(sample(self.network, self.diffusion, self.request(**options), self.checkpoint.shape))

    def steps(self, **options) -> Iterator[Step]:
        """The steps of sampling, all images in one batch: each has `level`, `x` (the noisy images) and `clean`.

        options: as in `sample`.

        >>> for step in model.steps(num_images=4, steps=2):
        ...     print(round(step.level.sigma, 1), tuple(step.x.shape))
        1.0 (4, 1, 8, 8)
        0.7 (4, 1, 8, 8)
        0.0 (4, 1, 8, 8)
        """
        from tiny_diffusion.diffusion.sampling import denoising

        return denoising(self.network, self.diffusion, self.request(**options), self.checkpoint.shape)

    def request(self, **options):
        """The Request of these options.  Raises OptionError for those that this model cannot follow."""
        for name in options:
            if name not in specs(SampleOptions) or name in OF_FILES:
                known = synonyms.answer(name, sampling_options()) or f"Use some of {', '.join(sampling_options())}."
                raise OptionError(f"{name} is no option of sampling here. {known}")
        with _errors_raised("sample"):
            return make_request(parse(words_of(options), "sample", "", SampleOptions), self.checkpoint)


def sampling_options() -> list[str]:
    """The options of `TrainedModel.sample`."""
    return [
        name for name, spec in specs(SampleOptions).items() if name not in OF_FILES and not isinstance(spec.type, Flag)
    ]
