"""The training configuration: every option that makes a run what it is, and which combinations make sense.

Options that were not given stay unset until `resolve` has filled them from the data set's own defaults, so that one
which would be ignored can be refused.  The frozen Config is the JSON in every checkpoint.  No torch here.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from tiny_diffusion.core.predictions import PREDICTIONS, determinant
from tiny_diffusion.core.schedules import SCHEDULES, Schedule, make_schedule
from tiny_diffusion.core.timesteps import TIMESTEP_DISTRIBUTIONS
from tiny_diffusion.core.weights import WEIGHTS
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.errors import OptionError
from tiny_diffusion.options import option, problem, specs

MOST_PARAMETERS = 4e9  # beyond what one machine trains; refused before its memory is spent


@dataclass(frozen=True)
class Config:
    """A resolved training run: what the checkpoint holds and what every other command reads back."""

    dataset: str = option("mnist", "what to learn", choices=DATASETS, group="data")
    data_dir: str | None = option(
        None, "where data sets lie [$TINY_DIFFUSION_DATA, then data]", free=True, group="data"
    )
    image_size: int | None = option(None, "side in pixels [the data set's own]", int, low=4, high=1024, group="data")
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
    prediction: str = option("v", "what the network outputs", choices=PREDICTIONS, group="diffusion")
    loss: str = option("mse", "error measure", choices=("mse", "l1", "huber"), group="diffusion")
    loss_weight: str = option("uniform", "how much each noise level counts", choices=WEIGHTS, group="diffusion")
    timestep_distribution: str = option(
        "edm", "how often each noise level is trained", choices=TIMESTEP_DISTRIBUTIONS, group="diffusion"
    )

    base_channels: int = option(32, "width of the first level", int, low=4, high=2048, group="network")
    channel_mult: tuple[int, ...] = option(
        (1, 2), "width of each level, in base_channels: 1,2", (int,), low=1, high=64, group="network"
    )
    layers_per_block: int = option(1, "residual blocks a level", int, low=1, high=16, group="network")
    time_emb_dim: int | None = option(
        None, "width of the time embedding [4 x base_channels]", int, low=4, high=8192, group="network"
    )
    attention_levels: tuple[int, ...] | None = option(
        None, "levels with attention, 0 the finest: 1,2 or none [the coarsest]", (int,), low=0, high=7, group="network"
    )
    attention_heads: int = option(2, "heads of each attention", int, low=1, high=64, group="network")
    patch_size: int = option(
        2, "pixel-unshuffle images by this outside the network; 1 for none", int, low=1, high=16, group="network"
    )
    dropout: float = option(0.0, "share of activations dropped in training", float, low=0, high=0.9, group="network")
    class_cond: bool = option(False, "learn the classes, so that sample.py can draw chosen ones", bool, group="network")
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
        "muon", "muon (for convolutions; AdamW for the rest) or adamw", choices=("muon", "adamw"), group="run"
    )
    ema_decay: float = option(
        0.999, "longest memory of the averaged weights, a step", float, low=0, high=0.999999, group="run"
    )
    grad_clip: float = option(1.0, "largest gradient norm", float, low=0, open_low=True, high=1e9, group="run")
    precision: str = option("fp32", "arithmetic of the network", choices=("fp32", "bf16", "fp16"), group="run")
    compile: bool = option(
        False, "torch.compile the network: minutes of warm-up, then faster on a GPU", bool, free=True, group="run"
    )
    seed: int = option(0, "what every random number derives from", int, low=0, high=2**63 - 1, group="run")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"), free=True, group="run")

    output_dir: str = option("outputs", "folder that the run writes", free=True, group="output")
    sample_interval: int = option(
        1, "epochs between sample pictures", int, low=1, high=10**9, free=True, group="output"
    )
    num_samples: int = option(64, "images in a sample picture", int, low=1, high=4096, free=True, group="output")
    save_interval: int = option(
        5, "epochs between numbered checkpoints", int, low=1, high=10**9, free=True, group="output"
    )
    keep_last: int | None = option(
        None, "numbered checkpoints to keep [all]", int, low=1, high=10**9, free=True, group="output"
    )

    def to_dict(self) -> dict:
        """Plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping) -> "Config":
        """The inverse of `to_dict`.  Raises OptionError for an unknown, missing or impossible value."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise OptionError(f"configuration keys do not match: {', '.join(sorted(set(values) ^ names))}")
        return check(cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}))

    def make_schedule(self) -> Schedule:
        ends = (
            {} if SCHEDULES[self.schedule].ends is None else {"beta_start": self.beta_start, "beta_end": self.beta_end}
        )
        return make_schedule(self.schedule, self.timesteps, **ends)


def resolve(given: Mapping[str, object]) -> Config:
    """The whole configuration from the options that were given.

    Raises OptionError for a value out of range, for options that contradict each other, and for one that would be
    ignored.
    """
    defaults = {name: field.default for name, field in Config.__dataclass_fields__.items()}
    _check_values(given)
    dataset = DATASETS[given.get("dataset", defaults["dataset"])]
    values = {**defaults, **dataset.defaults, **given}
    _refuse_ignored(given, values)
    if values["minutes"] is not None:
        values["epochs"] = None
    if values["image_size"] is None:
        values["image_size"] = dataset.size
    if "patch_size" not in given and values["image_size"] % values["patch_size"]:
        values["patch_size"] = 1
    if values["time_emb_dim"] is None:
        values["time_emb_dim"] = 4 * values["base_channels"]
    if values["attention_levels"] is None:
        values["attention_levels"] = (max(0, len(values["channel_mult"]) - 1),)
    if ends := SCHEDULES[values["schedule"]].ends:
        values["beta_start"] = ends[0] if values["beta_start"] is None else values["beta_start"]
        values["beta_end"] = ends[1] if values["beta_end"] is None else values["beta_end"]
    return check(Config(**values))


def refuse_betas(given: Mapping[str, object], schedule: str) -> None:
    """Raises OptionError if a beta was given to a schedule that has none."""
    for name in ("beta_start", "beta_end"):
        if name in given and SCHEDULES[schedule].ends is None:
            having = ", ".join(key for key, row in SCHEDULES.items() if row.ends)
            raise OptionError(
                f"--{name} {given[name]} would be ignored: --schedule {schedule} has no betas. "
                f"Leave it out, or use {having}."
            )


def refuse_falling_betas(start: float, end: float) -> None:
    """Raises OptionError if the first beta is larger than the last."""
    if start > end:
        raise OptionError(
            f"--beta_start {start:g} is larger than --beta_end {end:g}, and noise grows. Swap them, or give both."
        )


def _refuse_ignored(given: Mapping[str, object], values: Mapping[str, object]) -> None:
    if "epochs" in given and "minutes" in given:
        raise OptionError(
            f"--epochs {given['epochs']} and --minutes {given['minutes']:g} both set the length. Give one of them."
        )
    refuse_betas(given, values["schedule"])
    if "label_dropout" in given and not values["class_cond"]:
        raise OptionError("--label_dropout would be ignored without --class_cond. Add --class_cond, or leave it out.")
    if "attention_heads" in given and values["attention_levels"] == ():
        raise OptionError("--attention_heads would be ignored with --attention_levels none. Leave one of them out.")


def check(config: Config) -> Config:
    """The same configuration, known to make sense.  Raises OptionError naming the option, the value and a way out."""
    _check_values(vars(config))
    for name in ("image_size", "time_emb_dim", "attention_levels"):
        if getattr(config, name) is None:
            raise OptionError(f"argument --{name}: not set; `resolve` fills it in")
    if (config.epochs is None) == (config.minutes is None):
        raise OptionError("the length of a run is set by one of --epochs and --minutes. Give one of them.")
    _check_process(config)
    _check_network(config)
    if config.batch_size % config.accumulate:
        fits = [str(n) for n in range(1, 4097) if config.batch_size % n == 0]
        raise OptionError(
            f"--accumulate {config.accumulate} does not divide --batch_size {config.batch_size}. "
            f"Use one of {', '.join(fits)}."
        )
    return config


def _check_values(values: Mapping[str, object]) -> None:
    """Each option by itself."""
    for name, spec in specs(Config).items():
        if name in values:
            value = values[name]
            unset = value is None and (name == "epochs" or Config.__dataclass_fields__[name].default is None)
            if not unset and (wrong := problem(spec, value)):
                raise OptionError(f"argument --{name}: {wrong}")


def _check_process(config: Config) -> None:
    schedule = config.make_schedule()
    if config.beta_start is not None:
        refuse_falling_betas(config.beta_start, config.beta_end)
    if not (schedule.log_snr[1:] < schedule.log_snr[:-1]).all() or not (schedule.alpha[:-1] > 0).all():
        raise OptionError(
            f"--beta_start {config.beta_start:g} and --beta_end {config.beta_end:g} erase the image before the last "
            "step. Use smaller ones, such as 1e-4 and 0.02."
        )
    singular = abs(determinant(config.prediction, schedule.alpha, schedule.sigma)) == 0
    if singular.any():
        raise OptionError(
            f"--prediction {config.prediction} cannot be used with --schedule {config.schedule}: "
            f"at step {int(singular.argmax())} alpha is 0, so the noise does not determine the image. Use v or flow."
        )


def _check_network(config: Config) -> None:
    size, patch, levels = config.image_size, config.patch_size, len(config.channel_mult)
    if size % patch or size // patch < 2:
        fits = [str(p) for p in range(1, 17) if size % p == 0 and size // p >= 2]
        if size % patch:
            raise OptionError(
                f"--patch_size {patch} does not divide the {size}x{size} image. Use one of {', '.join(fits)}."
            )
        raise OptionError(f"--patch_size {patch} leaves 1 pixel of the {size}x{size} image. Use at most {fits[-1]}.")
    if not levels:
        raise OptionError("--channel_mult needs at least one value, for example 1,2.")
    sides = [size // patch]
    while len(sides) < levels:
        sides.append(math.ceil(sides[-1] / 2))
    if sides[-1] < 2:
        most = sum(side >= 2 for side in sides)
        raise OptionError(
            f"--channel_mult {','.join(map(str, config.channel_mult))} halves the {size}x{size} image"
            + (f" (in {patch}x{patch} patches: {sides[0]}x{sides[0]})" if patch > 1 else "")
            + f" {'once' if levels == 2 else f'{levels - 1} times'}, which leaves 1 pixel. "
            f"Use at most {most} of them, for example {','.join(str(2**k) for k in range(most))}."
        )
    if any(level >= levels for level in config.attention_levels):
        raise OptionError(
            f"--attention_levels {','.join(map(str, config.attention_levels))}: "
            f"--channel_mult makes levels 0 to {levels - 1} only. Choose from those, or none."
        )
    if (base := config.base_channels) % 2:
        raise OptionError(f"--base_channels {base} is odd, but time needs as many sines as cosines. Use {base + 1}.")
    widths = [base * multiplier for multiplier in config.channel_mult]
    if config.attention_levels:
        common = math.gcd(widths[-1], *(widths[level] for level in config.attention_levels))
        fits = [n for n in range(1, 65) if widths[-1] % n == 0 and common % (widths[-1] // n) == 0]
        if config.attention_heads not in fits:
            raise OptionError(
                f"--attention_heads {config.attention_heads} does not split the {widths[-1]} channels of the coarsest "
                f"level into heads that fit every level with attention. Use one of {', '.join(map(str, fits))}."
            )
    layers = config.layers_per_block  # two 3x3 convolutions each; on the way up, one more, with a skip to read
    convolutions = sum(9 * width**2 * (2 * layers + 3 * (layers + 1)) for width in widths) + 36 * widths[-1] ** 2
    if convolutions > MOST_PARAMETERS:
        raise OptionError(
            f"--base_channels {base} with --channel_mult {','.join(map(str, config.channel_mult))} makes a network of "
            f"{convolutions / 1e9:,.0f} billion parameters; at most {MOST_PARAMETERS / 1e9:.0f} are taken. Lower them."
        )
