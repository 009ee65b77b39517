"""Options: what an option is, and those of every command besides the training configuration in config.py.

An option is a field of a dataclass; the command line, `--help` and the checks all read the field.  What was not given
is None.  No torch here: `--help` must answer at once.  To add an option: a field.
"""

import dataclasses
import math
from dataclasses import dataclass
from difflib import get_close_matches

from tiny_diffusion.data.catalog import DATASETS, background_colour
from tiny_diffusion.diffusion.grids import GRIDS
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.diffusion.schedules import SCHEDULES

MIN_SIDE, MAX_SIDE = 4, 1024  # of an image, in pixels
MAX_NAMED = 60  # choices in a message

SIZE = "size"  # an image's side in pixels, or a pair (height, width)
COLOUR = "colour"  # a name of data.catalog.COLOURS, or #rrggbb


@dataclass(frozen=True)
class Spec:
    """What an option takes.  kind: the type, (int,) or (str,) for a list, SIZE or COLOUR.  free: a resumed run may
    change it.

    bare: the flag may stand without a value, which is then an empty text; elsewhere the command line refuses those.
    """

    help: str
    kind: object = str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    free: bool = False
    bare: bool = False
    group: str = "run"
    metavar: str = ""


def option(default, help, kind=str, choices=(), **rest):
    """A dataclass field that is also a command-line option."""
    return dataclasses.field(default=default, metadata={"spec": Spec(help, kind, tuple(choices), **rest)})


def specs(options: type) -> dict[str, Spec]:
    """The options of a dataclass by name."""
    return {field.name: field.metadata["spec"] for field in dataclasses.fields(options)}


def problem(spec: Spec, value: object) -> str | None:
    """What is wrong with this value for this option, or None."""
    if isinstance(spec.kind, tuple):
        if not isinstance(value, tuple) or len(value) > 8:
            return f"{value!r} is not a list of at most 8 {'numbers' if spec.kind[0] is int else 'names'}"
        return next(filter(None, (problem(dataclasses.replace(spec, kind=spec.kind[0]), item) for item in value)), None)
    if spec.kind == SIZE and not isinstance(value, int):
        if not isinstance(value, tuple) or len(value) != 2 or not all(isinstance(side, int) for side in value):
            return f"{value!r} is not a side in pixels such as 64, nor a height and width such as 96, 64"
        return next(filter(None, (problem(spec, side) for side in value)), None)
    if spec.kind == COLOUR:
        return background_colour(value)[1]
    if spec.choices and value not in spec.choices:
        return not_one_of(str(value), spec.choices)
    if spec.kind in (bool, str):
        if not isinstance(value, spec.kind):
            return f"{value!r} is not {'true or false' if spec.kind is bool else 'a text'}"
        return "'' is empty. Give it a value, or leave it out" if value == "" and not spec.bare else None
    wanted = (int, float) if spec.kind is float else int
    if isinstance(value, bool) or not isinstance(value, wanted) or value != value or abs(value) == math.inf:
        return f"{value!r} is not a {'whole ' if spec.kind is int else 'finite '}number"
    if spec.low is not None and (value <= spec.low if spec.open_low else value < spec.low):
        return f"{value} is too small; it must be {'more than' if spec.open_low else 'at least'} {spec.low}"
    if spec.high is not None and value > spec.high:
        return f"{value} is too large; it must be at most {spec.high}"
    return None


def not_one_of(value: str, choices) -> str:
    near = get_close_matches(value.lower(), lowered := {choice.lower(): choice for choice in choices}, n=1, cutoff=0.5)
    hint = f" Did you mean {lowered[near[0]]!r}?" if near else ""
    return f"{value!r} is not one of {listed(choices)}.{hint}"


def listed(choices) -> str:
    """The choices, or the first of very many."""
    rest = f" and {len(choices) - MAX_NAMED:,} more" if len(choices) > MAX_NAMED else ""
    return ", ".join(list(choices)[:MAX_NAMED]) + rest


# Of options that several commands have.
DATA_DIR_HELP = "where data sets lie [$TINY_DIFFUSION_DATA, then data]; for folder, the folder of images"
IMAGE_SIZE_HELP = "side in pixels, or HEIGHTxWIDTH; images are scaled to cover it and cropped [the data set's own]"
BACKGROUND_HELP = "what transparent images lie on: white, black, grey or #rrggbb [white]"
FRESH = {name: row for name, row in SAMPLERS.items() if row.eta is not None}
ETA_HELP = "how much noise is fresh, 1 being the process's own: " + ", ".join(
    f"{name} 0 to {row.max_eta:g} [{row.eta:g}]" for name, row in FRESH.items()
)
MAX_ETA = max(row.max_eta for row in FRESH.values())
LOGSNR_SHIFT_HELP = "added to the log-SNR of each level; large images need more noise [ln(32 / side) above 32 pixels]"


@dataclass(frozen=True)
class TrainActions:
    """What `train` does with the run's folder; no part of the configuration."""

    resume: str | None = option(
        None, "go on with the run in --output_dir, or with this checkpoint", bare=True, group="start"
    )
    extend: bool = option(
        False, "go on past the end of the run, to new --epochs or --minutes in all", bool, group="start"
    )
    overwrite: bool = option(False, "delete the run in --output_dir and start anew", bool, group="start")
    init_from: str | None = option(None, "start a new run from this checkpoint's weights", group="start")
    config: str | None = option(None, "read options from this file; those on the command line win", group="start")
    save_config: str | None = option(None, "write the resolved options to this file, for --config", group="start")
    dry_run: bool = option(False, "print the resolved options and stop", bool, group="start")


@dataclass(frozen=True)
class SampleOptions:
    """What `sample` is asked for; what is None comes from the checkpoint."""

    checkpoint: str | None = option(None, "the model: model_final.pt, or any checkpoint of a run")
    num_images: int = option(64, "images in all, shared evenly over --classes", int, low=1, high=10_000_000)
    output: str | None = option(
        None, "picture.png, animation.gif, samples.npz, or a folder/ [generated_samples.png of the run]"
    )
    show_intermediate: bool = option(False, "write intermediate/step_XXXX.png too: the picture as it appears", bool)
    sampler: str | None = option(None, "how to step from noise to image [the checkpoint's]", choices=SAMPLERS)
    steps: int | None = option(
        None, "sampling steps, at most the model's T (--timesteps means the same)", int, low=1, high=100_000
    )
    grid: str | None = option(None, "which noise levels to visit [the checkpoint's]", choices=GRIDS)
    eta: float | None = option(None, ETA_HELP, float, low=0, high=MAX_ETA)
    classes: str | None = option(None, "classes to draw, by name or number: 3,5 or 0-9 [all]", metavar="LIST")
    guidance: float | None = option(None, "how strongly to follow the class; 1 is plain", float, low=0, high=100)
    indices: str | None = option(
        None, "images of this seed to draw, instead of the first: 0-63 or 1,2,5-10", metavar="LIST"
    )
    weights: str = option("ema", "averaged weights or the last ones", choices=("ema", "raw"))
    batch_size: int | None = option(None, "images drawn together [what fits]", int, low=1, high=65_536)
    seed: int = option(0, "image i of a seed is always the same picture", int, low=0, high=2**63 - 1)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))


@dataclass(frozen=True)
class FigureOptions:
    """What `visualize` draws."""

    what: str = option(
        "forward",
        "forward: images as noise covers them; schedules: all schedules side by side",
        choices=("forward", "schedules"),
    )
    dataset: str = option("mnist", "where the images are from", choices=DATASETS)
    data_dir: str | None = option(None, DATA_DIR_HELP)
    image_size: int | tuple[int, int] | None = option(None, IMAGE_SIZE_HELP, SIZE, low=MIN_SIDE, high=MAX_SIDE)
    background: str | None = option(None, BACKGROUND_HELP, COLOUR)
    num_images: int = option(6, "images, a row each", int, low=1, high=100)
    schedule: str = option("cosine", "how noise grows with the timestep", choices=SCHEDULES)
    timesteps: int = option(1000, "T, the length of the noising process", int, low=2, high=100_000)
    beta_start: float | None = option(
        None, "first beta, stated for T = 1000 [1e-4]", float, low=0, open_low=True, high=0.999
    )
    beta_end: float | None = option(
        None, "last beta, stated for T = 1000 [0.02; exponential 0.065]", float, low=0, open_low=True, high=0.999
    )
    logsnr_shift: float | None = option(None, LOGSNR_SHIFT_HELP, float, low=-20, high=20)
    save_path: str | None = option(
        None, "the picture to write [outputs/forward_diffusion.png or outputs/schedules.png]"
    )
    seed: int = option(0, "which images and which noise", int, low=0, high=2**63 - 1)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))


@dataclass(frozen=True)
class InfoOptions:
    """What `info` looks into."""

    checkpoint: str | None = option(None, "the checkpoint to describe")


@dataclass(frozen=True)
class ClassifierOptions:
    """What `classifier` trains."""

    dataset: str = option("mnist", "whose images it tells apart", choices=DATASETS)
    data_dir: str | None = option(None, DATA_DIR_HELP)
    epochs: int = option(8, "passes over the training images", int, low=1, high=1000)
    seed: int = option(0, "what every random number derives from", int, low=0, high=2**63 - 1)
    output: str | None = option(None, "the .safetensors file to write [DATASET-classifier.safetensors]")


@dataclass(frozen=True)
class EvaluateOptions:
    """What `evaluate` measures, and against what."""

    checkpoint: str | None = option(None, "the model whose images are drawn and scored")
    images: str | None = option(None, "instead of a model: samples.npz (arr_0) or a folder of images")
    dataset: str | None = option(None, "real images to compare with [those of the checkpoint]", choices=DATASETS)
    reference: str | None = option(
        None, "instead of a data set: reference.npz (arr_0), a folder of images, or another model's .pt"
    )
    data_dir: str | None = option(None, DATA_DIR_HELP)
    features: str | None = option(
        None, "pixels, classifier, inception, or a file .pt (TorchScript), .onnx, .safetensors [classifier, or pixels]"
    )
    num_images: int = option(10_000, "images drawn; with --images at most so many", int, low=2, high=1_000_000)
    sampler: tuple[str, ...] | None = option(
        None, "one or several, for a sweep: sa_solver,ddim [the checkpoint's]", (str,), choices=SAMPLERS
    )
    steps: tuple[int, ...] | None = option(
        None, "one number or several, for a sweep: 5,10,20,50 [the checkpoint's]", (int,), low=1, high=100_000
    )
    grid: str | None = option(None, "which noise levels to visit [the checkpoint's]", choices=GRIDS)
    guidance: float | None = option(None, "how strongly to follow the class; 1 is plain", float, low=0, high=100)
    eta: float | None = option(None, ETA_HELP, float, low=0, high=MAX_ETA)
    weights: str = option("ema", "averaged weights or the last ones", choices=("ema", "raw"))
    train_on_synthetic: bool = option(
        False, "also train a classifier on drawn images and try it on real ones; needs --class_cond models", bool
    )
    bits_per_dim: bool = option(False, "also the likelihood of held-out images, by the probability flow", bool)
    batch_size: int | None = option(None, "images drawn together [what fits]", int, low=1, high=65_536)
    seed: int = option(0, "which images are drawn", int, low=0, high=2**63 - 1)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    output: str | None = option(None, "folder for evaluation.json and the figures [evaluation/ of the run]")


@dataclass(frozen=True)
class BenchmarkOptions:
    """How `benchmark` measures; what it measures are options of train."""

    seconds: float = option(8.0, "how long each part is measured", float, low=0.1, high=3600)
    num_images: int = option(64, "images drawn together", int, low=1, high=65_536)
    json: str | None = option(None, "also write every number to this file")
