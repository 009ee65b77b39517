"""The training configuration: every option that makes a run what it is, and which combinations make sense.

Options that were not given stay unset until `resolve` has filled them from the preset and the data set's own defaults,
so that one which would be ignored can be refused.  The frozen Config is the JSON in every checkpoint.  No torch here.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from tiny_diffusion.config.image_size import (
    default_channel_mult,
    default_patch_size,
    default_shift,
    height_and_width,
    square,
)
from tiny_diffusion.config.option import (
    BACKGROUND_HELP,
    COLOUR,
    DATA_DIR_HELP,
    IMAGE_SIZE_HELP,
    LOGSNR_SHIFT_HELP,
    MAX_SIDE,
    MIN_SIDE,
    SIZE,
    option,
)
from tiny_diffusion.config.presets import PRESETS
from tiny_diffusion.config.rules import DATASET_OPTIONS, check, check_values, refuse_ignored
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.diffusion.loss_weights import LOSS_WEIGHTS
from tiny_diffusion.diffusion.predictions import PREDICTIONS
from tiny_diffusion.diffusion.schedules import SCHEDULES, Schedule, make_schedule
from tiny_diffusion.diffusion.timesteps import TIMESTEP_DISTRIBUTIONS
from tiny_diffusion.errors import OptionError

CACHE_MB = 2048
NEWER = {"deterministic": False}  # what checkpoints that are older than these options do not say
# What the first checkpoints, which had no presets, do not say either.
OLDER = {
    "preset": None, "splits": ("train",), "random_crop": False, "background": None, "cache_mb": None, "workers": None,
    "logsnr_shift": 0.0, "checkpoint_activations": False, "auto_batch": False, "eval_interval": None,
    "eval_images": None, "keep_best": False,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A resolved training run: what the checkpoint holds and what every other command reads back."""

    preset: str | None = option(
        None, "a whole recipe, of which what you say is changed; see above", choices=PRESETS, group="data"
    )
    dataset: str = option("mnist", "what to learn", choices=DATASETS, group="data")
    data_dir: str | None = option(None, DATA_DIR_HELP, free=True, group="data")
    splits: tuple[str, ...] | None = option(
        None, "parts of the data set that train, such as train,val [the usual ones]", (str,), group="data"
    )
    image_size: int | tuple[int, int] | None = option(
        None, IMAGE_SIZE_HELP, SIZE, low=MIN_SIDE, high=MAX_SIDE, group="data"
    )
    random_crop: bool = option(
        False, "crop another part of an image each time, instead of its centre", bool, group="data"
    )
    background: str | None = option(None, BACKGROUND_HELP, COLOUR, group="data")
    cache_mb: int | None = option(
        None, "decoded images kept in memory and in the cache folder; a larger set is decoded as it is read [2048]",
        int, low=0, high=100_000_000, free=True, group="data",
    )  # fmt: skip
    workers: int | None = option(
        None, "threads that decode images [as many as cores; none where all are in memory]", int, low=0, high=256,
        free=True, group="data",
    )  # fmt: skip
    hflip: bool = option(False, "mirror half of the images, left to right", bool, group="data")

    schedule: str = option("cosine", "how noise grows with the timestep", choices=SCHEDULES, group="diffusion")
    timesteps: int = option(1000, "T, the length of the noising process", int, low=2, high=100_000, group="diffusion")
    beta_start: float | None = option(
        None, "first beta, stated for T = 1000 [1e-4]", float, low=0, open_low=True, high=0.999, group="diffusion"
    )
    beta_end: float | None = option(
        None, "last beta, stated for T = 1000 [0.02; exponential 0.065]", float, low=0, open_low=True, high=0.999,
        group="diffusion",
    )  # fmt: skip
    logsnr_shift: float | None = option(None, LOGSNR_SHIFT_HELP, float, low=-20, high=20, group="diffusion")
    prediction: str = option("v", "what the network outputs", choices=PREDICTIONS, group="diffusion")
    loss: str = option("mse", "error measure", choices=("mse", "l1", "huber"), group="diffusion")
    loss_weight: str = option("uniform", "how much each noise level counts", choices=LOSS_WEIGHTS, group="diffusion")
    timestep_distribution: str = option(
        "edm", "how often each noise level is trained", choices=TIMESTEP_DISTRIBUTIONS, group="diffusion"
    )

    base_channels: int = option(32, "width of the first level", int, low=4, high=2048, group="network")
    channel_mult: tuple[int, ...] | None = option(
        None, "width of each level, in base_channels [1,2; 1,2,2 above 32 pixels; 1,2,2,2 above 128]", (int,),
        low=1, high=64, group="network",
    )  # fmt: skip
    layers_per_block: int = option(1, "residual blocks a level", int, low=1, high=16, group="network")
    time_emb_dim: int | None = option(
        None, "width of the time embedding [4 x base_channels]", int, low=4, high=8192, group="network"
    )
    attention_levels: tuple[int, ...] | None = option(
        None, "levels with attention, 0 the finest: 1,2 or none [the coarsest]", (int,), low=0, high=7, group="network"
    )
    attention_heads: int = option(2, "heads of each attention", int, low=1, high=64, group="network")
    patch_size: int | None = option(
        None, "pixel-unshuffle images by this outside the network; 1 for none [2; 4 from 128 pixels; 1 where odd]", int,
        low=1, high=16, group="network",
    )  # fmt: skip
    dropout: float = option(0.0, "share of activations dropped in training", float, low=0, high=0.9, group="network")
    class_cond: bool = option(False, "learn the classes, so that sample.py can draw chosen ones", bool, group="network")
    checkpoint_activations: bool = option(
        False, "compute activations again instead of keeping them: less memory, a third slower", bool, free=True,
        group="network",
    )  # fmt: skip
    label_dropout: float = option(
        0.1, "share of labels hidden in training, for guidance", float, low=0, high=0.9, group="network"
    )

    epochs: int | None = option(
        20, "length of the run, in passes over the data", int, low=1, high=1_000_000, group="run"
    )
    minutes: float | None = option(
        None, "length of the run by the clock, instead of --epochs: start-up, samples and saves included", float,
        low=0, open_low=True, high=100_000, group="run",
    )  # fmt: skip
    max_steps: int | None = option(
        None, "stop (and save) at this optimiser step; --resume goes on", int, low=1, high=10**9, free=True, group="run"
    )
    batch_size: int = option(64, "images a step", int, low=1, high=65_536, group="run")
    accumulate: int = option(
        1, "split each batch in this many parts, to save memory", int, low=1, high=4096, group="run"
    )
    auto_batch: bool = option(
        False, "when memory runs out, split batches further and go on", bool, free=True, group="run"
    )
    lr: float = option(
        2e-3,
        "peak learning rate of AdamW; Muon's matrices take 10 times it",
        float,
        low=0,
        open_low=True,
        high=10,
        group="run",
    )
    optimizer: str = option(
        "muon", "muon (for convolutions; AdamW for the rest), adamw, or adam as its paper has it",
        choices=("muon", "adamw", "adam"), group="run",
    )  # fmt: skip
    ema_decay: float = option(
        0.999, "longest memory of the averaged weights, a step", float, low=0, high=0.999999, group="run"
    )
    grad_clip: float = option(1.0, "largest gradient norm", float, low=0, open_low=True, high=1e9, group="run")
    precision: str = option("fp32", "arithmetic of the network", choices=("fp32", "bf16", "fp16"), group="run")
    compile: bool = option(
        False, "torch.compile the network: minutes of warm-up, then faster on a GPU", bool, free=True, group="run"
    )
    deterministic: bool = option(
        False, "the same bits each time on CUDA too, somewhat slower; on a CPU they are", bool, free=True, group="run"
    )
    seed: int = option(0, "what every random number derives from", int, low=0, high=2**63 - 1, group="run")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"), free=True, group="run")

    output_dir: str = option("outputs", "folder that the run writes", free=True, group="output")
    sample_interval: int | None = option(
        1, "epochs between sample pictures", int, low=1, high=10**9, free=True, group="output"
    )
    num_samples: int = option(64, "images in a sample picture", int, low=1, high=4096, free=True, group="output")
    save_interval: int | None = option(
        5, "epochs between numbered checkpoints", int, low=1, high=10**9, free=True, group="output"
    )
    eval_interval: int | None = option(
        None, "epochs between measurements, as `evaluate` makes them, into log.jsonl and the loss plot [none]", int,
        low=1, high=10**9, free=True, group="output",
    )  # fmt: skip
    eval_images: int | None = option(
        None, "images drawn for a measurement [1000]", int, low=100, high=1_000_000, free=True, group="output"
    )
    keep_best: bool = option(
        False, "keep the checkpoint that measures best as checkpoints/best.pt", bool, free=True, group="output"
    )
    keep_last: int | None = option(
        None, "numbered checkpoints to keep [all]", int, low=1, high=10**9, free=True, group="output"
    )

    def to_dict(self) -> dict:
        """Plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping) -> "Config":
        """The inverse of `to_dict`.  Raises OptionError for an unknown, missing or impossible value.

        Options that are newer than the file get the value that the program had then.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        values = {**NEWER, **({} if "preset" in values else OLDER), **values}
        if set(values) != names:
            raise OptionError(f"configuration keys do not match: {', '.join(sorted(set(values) ^ names))}")
        return check(cls(**{name: from_json(value) for name, value in values.items()}))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return height_and_width(self.image_size)

    def make_schedule(self) -> Schedule:
        return make_schedule(self.schedule, self.timesteps, self.beta_start, self.beta_end, self.logsnr_shift)


def resolve(given: Mapping[str, object]) -> Config:
    """The whole configuration from the options that were given: those, then the preset's, the data set's, the defaults.

    Raises OptionError for a value out of range, for options that contradict each other, and for one that would be
    ignored.
    """
    defaults = {name: field.default for name, field in Config.__dataclass_fields__.items()}
    check_values(given, Config)
    preset = beneath(given, PRESETS[given["preset"]].options) if "preset" in given else {}
    dataset = DATASETS[{**defaults, **preset, **given}["dataset"]]
    values = {**defaults, **dataset.defaults, **preset, **given}
    if values["minutes"] is not None:
        values["epochs"] = None
    refuse_ignored(given, values)

    def fill(name: str, value: object) -> None:
        values[name] = value if values[name] is None else values[name]

    fill("image_size", dataset.size)
    values["image_size"] = square(values["image_size"])
    size = height_and_width(values["image_size"])
    fill("splits", dataset.train)
    fill("cache_mb", CACHE_MB if "cache_mb" in dataset.takes else None)
    fill("background", "white" if "background" in dataset.takes else None)
    fill("logsnr_shift", default_shift(size))
    fill("patch_size", default_patch_size(size))
    fill("channel_mult", default_channel_mult([side / values["patch_size"] for side in size]))
    fill("eval_images", 1000 if values["eval_interval"] else None)
    fill("time_emb_dim", 4 * values["base_channels"])
    fill("attention_levels", (max(0, len(values["channel_mult"]) - 1),))
    if ends := SCHEDULES[values["schedule"]].ends:
        fill("beta_start", ends[0])
        fill("beta_end", ends[1])
    return check(Config(**values))


def beneath(given: Mapping[str, object], lower: Mapping[str, object]) -> dict[str, object]:
    """What of a preset's or a file's options still stands under those that were given: none that they make moot."""
    gone = set(given)
    if {"epochs", "minutes"} & gone:
        gone |= {"epochs", "minutes"}
    if "schedule" in given and given["schedule"] != lower.get("schedule", given["schedule"]):
        gone |= {"beta_start", "beta_end"}
    if "dataset" in given and given["dataset"] != lower.get("dataset", given["dataset"]):
        gone |= {"splits", "data_dir", *DATASET_OPTIONS}
    if given.get("attention_levels") == ():
        gone |= {"attention_heads"}
    if "channel_mult" in given:
        gone |= {"attention_levels"}
    return {name: value for name, value in lower.items() if name not in gone}


def as_given(config: Config) -> dict[str, object]:
    """The options that resolve to this configuration, without those that have no use in it."""
    values = {name: value for name, value in vars(config).items() if value is not None}
    if not config.class_cond:
        del values["label_dropout"]
    if not config.attention_levels:
        del values["attention_heads"]
    if not config.splits:
        del values["splits"]
    if "random_crop" not in DATASETS[config.dataset].takes:
        del values["random_crop"]
    if config.eval_interval is None:
        del values["keep_best"]
        values.pop("eval_images", None)
    return values


def from_json(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
