"""The training configuration: every option that makes a run what it is, and how they are resolved.

Options that were not given stay unset until `resolve` fills them from the preset and the data set's own defaults, so
that an option which would be ignored can be refused.  The frozen Config is the JSON in every checkpoint.  It needs no
torch.  To add an option: a row in Config, with `since=` for the checkpoints that lack it, and its use.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from tiny_diffusion.config import rules
from tiny_diffusion.config.image_size import (
    default_channel_mult,
    default_patch_size,
    default_shift,
    height_and_width,
    square,
)
from tiny_diffusion.config.option import REQUIRED, Choice, Colour, Flag, Int, ListOf, Number, Size, Text, option, specs
from tiny_diffusion.config.presets import PRESETS
from tiny_diffusion.config.unet_details import DetailList
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.diffusion.loss_weights import LOSS_WEIGHTS
from tiny_diffusion.diffusion.predictions import PREDICTIONS
from tiny_diffusion.diffusion.schedules import GIVEN, SCHEDULES, Schedule, from_betas, make_schedule
from tiny_diffusion.diffusion.timesteps import TIMESTEP_DISTRIBUTIONS
from tiny_diffusion.errors import OptionError

MAX_TIMESTEPS = 100_000

# The options of each group of --help.
data, diffusion, network, run, output = (
    partial(option, group=group) for group in ("data", "diffusion", "network", "run", "output")
)


@dataclass(frozen=True)
class Config:
    """A resolved training run: what the checkpoint holds and what every other command reads back."""

    # fmt: off
    preset: str | None = data(
        Choice(PRESETS), None, "a whole recipe, see above; options that you give replace its own", since=None)
    dataset: str = data(Choice(DATASETS), "mnist", "the images to train on")
    data_dir: str | None = data(
        Text(), None, "folder of the data sets [$TINY_DIFFUSION_DATA, then data]; for folder, the folder of images",
        follows="dataset", free=True)
    splits: tuple[str, ...] | None = data(
        ListOf(Text("NAME")), None, "parts of the data set to train on, such as train,val [the usual ones]",
        follows="dataset", fill=lambda values: DATASETS[values["dataset"]].train, since=("train",))
    image_size: int | tuple[int, int] | None = data(
        Size(), None, "side in pixels, or HEIGHTxWIDTH; images are scaled to cover it and cropped [the data set's own]",
        fill=lambda values: DATASETS[values["dataset"]].size)
    random_crop: bool = data(
        Flag(), False, "crop a random part of an image each time, instead of its centre",
        needs=rules.IMAGE_FILES, follows="dataset", since=False)
    background: str | None = data(
        Colour(), None, "background of transparent images: white, black, grey or #rrggbb",
        needs=rules.TRANSPARENCY, follows="dataset", fill="white", since=None)
    cache_mb: int | None = data(
        Int(0, 100_000_000), None,
        "megabytes of decoded images kept in memory and cached; larger sets are decoded as they are read",
        needs=rules.IMAGE_FILES, follows="dataset", fill=2048, since=None, free=True)
    workers: int | None = data(
        Int(0, 256), None, "threads that decode images [as many as cores; none where all are in memory]",
        needs=rules.IMAGE_FILES, follows="dataset", since=None, free=True)
    hflip: bool = data(Flag(can_be_off=True), False, "mirror half of the images, left to right")

    schedule: str = diffusion(
        Choice((*SCHEDULES, GIVEN)), "cosine", "how noise grows with the timestep; betas: as --betas says")
    timesteps: int = diffusion(Int(2, MAX_TIMESTEPS), 1000, "T, the length of the noising process")
    betas: tuple[float, ...] | None = diffusion(
        ListOf(Number(0, 1), MAX_TIMESTEPS), None, "the T betas of --schedule betas, as loaded models may have",
        needs=rules.GIVEN_BETAS, follows="schedule", since=None)
    beta_start: float | None = diffusion(
        Number(0, 0.999, open_low=True), None, "first beta, stated for T = 1000 [1e-4]",
        needs=rules.BETAS, follows="schedule", fill=lambda values: rules.ends_of(values["schedule"])[0])
    beta_end: float | None = diffusion(
        Number(0, 0.999, open_low=True), None, "last beta, stated for T = 1000 [0.02; exponential 0.065]",
        needs=rules.BETAS, follows="schedule", fill=lambda values: rules.ends_of(values["schedule"])[1])
    logsnr_shift: float | None = diffusion(
        Number(-20, 20), None,
        "added to the log-SNR of each level; large images need more noise [ln(32 / side) above 32 pixels]",
        fill=lambda values: default_shift(height_and_width(values["image_size"])), since=0.0)
    prediction: str = diffusion(Choice(PREDICTIONS), "v", "what the network outputs")
    loss: str = diffusion(Choice(("mse", "l1", "huber")), "mse", "how the error of the output is measured")
    loss_weight: str = diffusion(Choice(LOSS_WEIGHTS), "uniform", "how much each noise level counts")
    timestep_distribution: str = diffusion(
        Choice(TIMESTEP_DISTRIBUTIONS), "edm", "how often each noise level is trained")

    patch_size: int | None = network(
        Int(1, 16), None,
        "pixel-unshuffle images by this outside the network; 1 for none [2; 4 from 128 pixels; 1 where odd]",
        fill=lambda values: default_patch_size(height_and_width(values["image_size"])))
    base_channels: int = network(Int(4, 2048), 32, "width of the first level")
    channel_mult: tuple[int, ...] | None = network(
        ListOf(Int(1, 64)), None,
        "width of each level, in base_channels [1,2; 1,2,2 above 32 pixels; 1,2,2,2 above 128]",
        fill=lambda values: default_channel_mult(
            [side / values["patch_size"] for side in height_and_width(values["image_size"])]))
    layers_per_block: int = network(Int(1, 16), 1, "residual blocks per level")
    time_emb_dim: int | None = network(
        Int(4, 8192), None, "width of the time embedding [4 x base_channels]",
        fill=lambda values: 4 * values["base_channels"])
    attention_levels: tuple[int, ...] | None = network(
        ListOf(Int(0, 7)), None, "levels with attention, 0 the finest: 1,2 or none [the coarsest]",
        follows="channel_mult", fill=lambda values: (max(0, len(values["channel_mult"]) - 1),))
    attention_heads: int = network(Int(1, 64), 2, "attention heads of the coarsest level", needs=rules.ATTENTION)
    activation: str = network(
        Choice(("silu", "relu", "gelu", "mish")), "silu", "nonlinearity of the residual blocks", since="silu")
    unet_details: tuple[str, ...] = network(
        DetailList(), (), "what else is not as usual, as loaded models may have it: norm_eps=1e-6,norm_num_groups=32",
        since=())
    dropout: float = network(Number(0, 0.9), 0.0, "share of activations dropped in training")
    class_cond: bool | None = network(
        Flag(can_be_off=True), None,
        "learn the classes: better images, and chosen classes can be sampled [if there are classes]",
        fill=lambda values: rules.has_classes(values["dataset"]))
    checkpoint_activations: bool = network(
        Flag(), False, "recompute activations instead of keeping them: less memory, a third slower",
        since=False, free=True)
    label_dropout: float = network(
        Number(0, 0.9), 0.1, "share of labels dropped in training, for guidance", needs=rules.CLASSES)

    epochs: int | None = run(Int(1, 1_000_000), 20, "length of the run, in passes over the data")
    minutes: float | None = run(
        Number(0, 100_000, open_low=True), None,
        "length of the run by the clock, instead of --epochs: start-up, samples and saves included")
    max_steps: int | None = run(
        Int(1, 10**9), None, "stop (and save) at this optimiser step; --resume continues", free=True)
    batch_size: int = run(Int(1, 65_536), 64, "images per step")
    accumulate: int = run(Int(1, 4096), 1, "split each batch into this many parts, to save memory")
    auto_batch: bool = run(
        Flag(), False, "when memory runs out, split batches further and continue", since=False, free=True)
    lr: float = run(
        Number(0, 10, open_low=True), 2e-3, "peak learning rate of AdamW; Muon uses 10 times it")
    optimizer: str = run(
        Choice(("muon", "adamw", "adam")), "muon",
        "muon (for convolutions; AdamW for the rest), adamw, or adam as in its paper")
    ema_decay: float = run(Number(0, 0.999999), 0.999, "largest decay per step of the averaged weights (EMA)")
    grad_clip: float = run(Number(0, 1e9, open_low=True), 1.0, "norm to which larger gradients are clipped")
    precision: str = run(
        Choice(("auto", "fp32", "bf16", "fp16")), "auto",
        "arithmetic of the network; auto: bf16 if a check at the start finds it faster and right")
    compile: bool = run(
        Flag(), False, "torch.compile the network: minutes of warm-up, then faster on a GPU", free=True)
    deterministic: bool = run(
        Flag(), False, "bitwise the same results each time on CUDA too, somewhat slower; on a CPU they always are",
        since=False, free=True)
    seed: int = run(Int(0, 2**63 - 1), 0, "seed of all random numbers")
    device: str = run(Choice(("auto", "cpu", "cuda", "mps")), "auto", "where to compute", free=True)

    output_dir: str = output(Text(), "outputs", "folder that the run writes to", free=True)
    sample_interval: int | None = output(Int(1, 10**9), 1, "epochs between sample pictures", free=True)
    num_samples: int = output(Int(1, 4096), 64, "images in a sample picture", free=True)
    save_interval: int | None = output(Int(1, 10**9), 5, "epochs between numbered checkpoints", free=True)
    eval_interval: int | None = output(
        Int(1, 10**9), None,
        "epochs between measurements, as `evaluate` makes them, into log.jsonl and the loss plot [none]",
        since=None, free=True)
    eval_images: int | None = output(
        Int(100, 1_000_000), None, "images sampled for each measurement",
        needs=rules.MEASURED, fill=1000, since=None, free=True)
    keep_best: bool = output(
        Flag(), False, "keep the checkpoint with the best score as checkpoints/best.pt",
        needs=rules.MEASURED, since=False, free=True)
    keep_last: int | None = output(Int(1, 10**9), None, "numbered checkpoints to keep [all]", free=True)
    log: tuple[str, ...] = output(
        ListOf(Choice(("tensorboard", "wandb"))), (), "also record the run there: one or both", since=(), free=True)
    # fmt: on

    def to_dict(self) -> dict:
        """Plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping) -> "Config":
        """The inverse of `to_dict`.  Raises OptionError for an unknown, missing or impossible value.

        An option that is newer than the values takes the `since` of its row in Config.
        """
        since = {name: spec.since for name, spec in specs(cls).items() if spec.since is not REQUIRED}
        values = {**since, **values}
        if wrong := set(values) ^ set(specs(cls)):
            raise OptionError(f"configuration keys do not match: {', '.join(sorted(wrong))}")
        return rules.check(cls(**{name: from_json(value) for name, value in values.items()}))

    def agrees(self, name: str, value: object) -> bool:
        """Whether an option given so is that of this run, in which `--precision auto` is decided already."""
        return value == getattr(self, name) or (name, value) == ("precision", "auto")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return height_and_width(self.image_size)

    def make_schedule(self) -> Schedule:
        """The noise schedule that the run trains on."""
        if self.betas is not None:
            return from_betas(np.array(self.betas), logsnr_shift=self.logsnr_shift)
        return make_schedule(self.schedule, self.timesteps, self.beta_start, self.beta_end, self.logsnr_shift)


def resolve(given: Mapping[str, object], options: type = Config) -> Config:
    """The whole configuration from the options that were given: those, then the preset's, the data set's, the defaults.

    options: Config, or a dataclass with more options.  Raises OptionError for a value out of range, for options
    that contradict each other, and for one that would be ignored.
    """
    rules.check_values(given, options)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    preset = beneath(given, PRESETS[given["preset"]].options, options) if "preset" in given else {}
    dataset = DATASETS[{**defaults, **preset, **given}["dataset"]]
    values = {**defaults, **dataset.defaults, **preset, **given}
    if values["minutes"] is not None:
        values["epochs"] = None
    rules.refuse_ignored(given, values, options)
    return rules.check(options(**filled(values, options)))


def filled(values: Mapping[str, object], options: type = Config) -> dict[str, object]:
    """The values of all options, where each that is unset and has an effect takes its `fill`."""
    values = {**values, "image_size": square(values["image_size"])}
    for name, spec in specs(options).items():
        if values[name] is None and spec.is_of_use(values):
            values[name] = spec.filling(values)
    return values


def beneath(given: Mapping[str, object], lower: Mapping[str, object], options: type = Config) -> dict[str, object]:
    """The options of a preset or a file that stay in force when others are given on the command line.

    An option is dropped if it was given too, if the option that it follows was given another value, or if it would have
    no effect because of what was given.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    values, gone = {**defaults, **lower, **given}, set(given) | (rules.LENGTHS if rules.LENGTHS & set(given) else set())
    for name, spec in specs(options).items():
        leads = spec.follows
        if leads in given and given[leads] != lower.get(leads, given[leads]):
            gone.add(name)
        if spec.needs and spec.needs.option in given and not spec.is_of_use(values):
            gone.add(name)
    return {name: value for name, value in lower.items() if name not in gone}


def as_given(config: Config) -> dict[str, object]:
    """The options that resolve to this configuration, without those that have no effect in it."""
    values, rows = vars(config), specs(type(config)).items()
    return {name: values[name] for name, spec in rows if values[name] is not None and spec.is_of_use(values)}


def from_json(value: object) -> object:
    """An option's value from its JSON form, in which a tuple is a list."""
    return tuple(value) if isinstance(value, list) else value
