"""The commands as Python functions that take the same words: `num_images=16` is `--num_images 16`.

A flag is True or False, a list stands for values between commas, and None for an option that is not given.  They raise
OptionError and FileError with the message that the command would print.
"""

import contextlib
import importlib
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tiny_diffusion.cli import COMMANDS
from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.cli.evaluate import EvaluateOptions, output_folder
from tiny_diffusion.cli.sample import SampleOptions, make_request
from tiny_diffusion.config import synonyms
from tiny_diffusion.config.option import Flag, ListOf, Size, Type, specs
from tiny_diffusion.config.option_file import read_options
from tiny_diffusion.config.training import Config
from tiny_diffusion.diffusion.levels import Step
from tiny_diffusion.errors import OptionError

if TYPE_CHECKING:
    from tiny_diffusion.diffusion.request import Request
    from tiny_diffusion.diffusion.sampling import Edit

# Options of the command alone.
OF_FILES = ("checkpoint", "guide_checkpoint", "output", "show_intermediate", "device", "weights")


def train(**options: object) -> Path:
    """Trains a model as `train.py` does, and returns the path of its checkpoint, model_final.pt.

    options: those of `train.py`.

    >>> from tiny_diffusion import open_model, train
    >>> path = train(dataset="digits", max_steps=2, base_channels=8, output_dir="outputs/python")
    >>> open_model(path).sample(num_images=4, steps=2).shape
    (4, 8, 8, 1)
    """
    run_command("train", **options)
    return _final_checkpoint(options)


def distill(**options: object) -> Path:
    """Makes a model of few evaluations as `distill` does, and returns the path of its checkpoint, model_final.pt.

    options: those of `python -m tiny_diffusion distill`.   checkpoint: the teacher.   steps: 1, 2 or 4.

    >>> from tiny_diffusion import distill, open_model
    >>> path = distill(checkpoint=path, steps=2, max_steps=2, output_dir="outputs/two")
    >>> len(list(open_model(path).steps(num_images=4)))  # the noise, and a step for each evaluation
    3
    """
    run_command("distill", **options)
    return _final_checkpoint(options)


def evaluate(**options: object) -> dict:
    """Measures images as `evaluate` does, and returns what evaluation.json holds.

    options: those of `python -m tiny_diffusion evaluate`, such as checkpoint="model_final.pt", or images="samples.npz"
    and dataset="mnist".   The dictionary has "features", "reference" and "results".  A result, of one sampler, number
    of steps and guidance, has the numbers by their full names: "metrics", and "floor", which real images score.

    >>> from tiny_diffusion import evaluate
    >>> (result,) = evaluate(checkpoint=path, steps=2, num_images=20)["results"]
    >>> [name for name in result["metrics"] if name.startswith("relative")]
    ['relative_frechet_distance[digits-classifier-v1, n=20, train]']
    """
    with contextlib.redirect_stdout(io.StringIO()):
        run_command("evaluate", **options)
    given = parse(words_of(options, "evaluate"), "evaluate", "", EvaluateOptions)
    return json.loads((output_folder(EvaluateOptions(**given)) / "evaluation.json").read_text("utf-8"))


def run_command(name: str, **options: object) -> None:
    """Runs a command by its name, such as "visualize", with its options.  Raises as the command fails."""
    with _errors_raised(name):
        importlib.import_module(COMMANDS[name][0]).run(words_of(options, name), name, time.monotonic())


@contextlib.contextmanager
def _errors_raised(name: str) -> Iterator[None]:
    """Turns the exit of a parser, which has printed why, into an OptionError."""
    try:
        yield
    except SystemExit as error:
        if error.code:
            raise OptionError(f"{name} refuses these options, for the reason above") from None


def words_of(options: dict[str, object], command: str) -> list[str]:
    """The command line of these options of a command.

    False turns off what a preset or the data set may turn on, and leaves out a flag that is off anyway.

    >>> words_of({"steps": 5, "show_intermediate": True, "eta": None, "classes": [3, 7]}, "sample")
    ['--steps=5', '--show_intermediate', '--classes=3,7']
    >>> words_of({"class_cond": False, "hflip": False, "compile": False, "image_size": (96, 64)}, "train")
    ['--no_class_cond', '--no_hflip', '--image_size=96x64']
    """
    sets = importlib.import_module(COMMANDS[command][0]).OPTIONS
    types = {name: spec.type for options in sets for name, spec in specs(options).items()}
    words = []
    for name, value in options.items():
        type_ = types.get(name)
        if value is True:
            words.append(f"--{name}")
        elif value is False and isinstance(type_, Flag):
            words += [f"--no_{name}"] if type_.can_be_off else []
        elif value is not None and not (value is False and type_ and type_.bare):
            words.append(f"--{name}={_text(value, type_)}")
    return words


def _text(value: object, type_: Type | None) -> str:
    """A value of an option of this type as it stands on the command line.   type_: None for an unknown option."""
    if not isinstance(value, list | tuple | range):
        return str(value)
    if isinstance(type_, ListOf) and not value:
        return "none"
    return ("x" if isinstance(type_, Size) else ",").join(map(str, value))


def _final_checkpoint(options: dict[str, object]) -> Path:
    """model_final.pt of the run that train or distill make with these options."""
    folder, resumed, file = options.get("output_dir"), options.get("resume"), options.get("config")
    if folder is None and isinstance(resumed, str | Path) and str(resumed):
        from tiny_diffusion.runs.folder import run_of

        folder = run_of(Path(resumed))
    if folder is None and file is not None:
        folder = read_options(Path(file)).get("output_dir")
    return Path(folder or Config.output_dir).expanduser() / "model_final.pt"


def open_model(path: str | Path, weights: str = "ema", device: str = "auto") -> "TrainedModel":
    """The model of a checkpoint, or the newest one in the folder of a run.

    weights: ema, the averaged ones, or raw.   device: auto, cpu, cuda or mps.

    >>> from tiny_diffusion import open_model
    >>> open_model(path).checkpoint.config.dataset
    'digits'
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

    def sample(self, edit: "Edit | None" = None, **options: object) -> np.ndarray:
        """The images that `sample.py` writes with the same options: uint8 (N, H, W, C).

        options: num_images, indices, seed, classes, guidance, guidance_interval, sampler, steps, grid, eta, batch_size,
        as on the command line.   edit: SDEdit, Inpaint, Interpolate, Invert or FromNoise, instead of pure noise.

        >>> from PIL import Image
        >>> from tiny_diffusion import SDEdit
        >>> images = model.sample(num_images=4, classes=[3, 7])
        >>> Image.fromarray(images[0].squeeze()).size
        (8, 8)
        >>> import torch
        >>> clean = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1  # (N, C, H, W) in [-1, 1]
        >>> model.sample(SDEdit(clean, strength=0.5), num_images=4, classes=[8]).shape
        (4, 8, 8, 1)
        """
        from tiny_diffusion.data.pixels import to_pictures
        from tiny_diffusion.diffusion.sampling import sample

        more = {} if edit is None else {"edit": edit}
        return to_pictures(sample(self.network, self.diffusion, self.request(**options), self.checkpoint.shape, **more))

    def steps(self, edit: "Edit | None" = None, **options: object) -> Iterator[Step]:
        """The steps of sampling, all images in one batch: each has `level`, `x` (the noisy images) and `clean`.

        options, edit: as in `sample`.

        >>> for step in model.steps(num_images=4, steps=2):
        ...     print(round(step.level.sigma, 1), tuple(step.x.shape))
        1.0 (4, 1, 8, 8)
        0.7 (4, 1, 8, 8)
        0.0 (4, 1, 8, 8)
        """
        from tiny_diffusion.diffusion.sampling import denoising

        more = {} if edit is None else {"edit": edit}
        return denoising(self.network, self.diffusion, self.request(**options), self.checkpoint.shape, **more)

    def request(self, **options: object) -> "Request":
        """The Request of these options.  Raises OptionError for those that this model cannot follow.

        >>> model.request(num_images=4, steps=10).steps
        10
        """
        for name in options:
            if name not in specs(SampleOptions) or name in OF_FILES:
                known = synonyms.answer(name, sampling_options()) or f"Use some of {', '.join(sampling_options())}."
                raise OptionError(f"{name} is no option of sampling here. {known}")
        with _errors_raised("sample"):
            return make_request(parse(words_of(options, "sample"), "sample", "", SampleOptions), self.checkpoint)


def sampling_options() -> list[str]:
    """The options of `TrainedModel.sample`."""
    return [
        name for name, spec in specs(SampleOptions).items() if name not in OF_FILES and not isinstance(spec.type, Flag)
    ]
