"""Which options make sense together: everything that is refused before a run costs anything.

It knows the catalogue and the tables of the core, and opens nothing.  An error names the option, the value, the reason
and a way out.  To add a rule: a few lines in the function of its subject.
"""

import math
from collections.abc import Mapping, Sequence

from tiny_diffusion.config.option import MAX_SIDE, MIN_SIDE, not_one_of, problem, specs
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.diffusion.predictions import determinant
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.diffusion.schedules import SCHEDULES
from tiny_diffusion.errors import OptionError

MAX_PARAMETERS = 4e9  # beyond what one machine trains; refused before its memory is spent
DATASET_OPTIONS = tuple(dict.fromkeys(name for row in DATASETS.values() for name in row.takes))  # options not for all


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


def refuse_not_taken(given: Mapping[str, object], dataset: str) -> None:
    """Raises OptionError if the data set has no use for an option that was given."""
    for name in DATASET_OPTIONS:
        if given.get(name, False) is not False and name not in DATASETS[dataset].takes:
            taking = " and ".join(key for key, row in DATASETS.items() if name in row.takes)
            value = "" if given[name] is True else f" {given[name]}"
            raise OptionError(
                f"--{name}{value} would be ignored: it is for image files ({taking}), and --dataset {dataset} has "
                "none" + (" with transparency" if name == "background" else "") + ". Leave it out."
            )


def refuse_drawing(
    config, *, samplers: Sequence[str], steps: Sequence[int], eta: float | None, guidance: float | None
) -> None:
    """Raises OptionError if a model of this Config cannot be drawn from so, or if what was asked would be ignored."""
    if steps and (most := max(steps)) > config.timesteps:
        raise OptionError(
            f"--steps {most} is more than this model's {config.timesteps} timesteps. "
            f"Use at most {config.timesteps}{'; 20 are usually enough' if config.timesteps > 20 else ''}."
        )
    for name in samplers if eta is not None else ():
        if SAMPLERS[name].eta is None:
            taking = " or ".join(key for key, row in SAMPLERS.items() if row.eta is not None)
            raise OptionError(
                f"--eta {eta:g} would be ignored by --sampler {name}. Leave it out, or add --sampler {taking}."
            )
        if eta > SAMPLERS[name].max_eta:
            raise OptionError(
                f"--eta {eta:g} is more than --sampler {name} can take. Use 0 to {SAMPLERS[name].max_eta:g}."
            )
    if guidance is not None and not config.class_cond:
        raise OptionError(
            f"--guidance {guidance:g} needs a model trained with --class_cond; this one was not. Leave it out."
        )


def refuse_no_folder(data_dir: str | None, dataset: str) -> None:
    """Raises OptionError if it is not said where a set lies that has no usual place."""
    if dataset == "folder" and data_dir is None:
        raise OptionError(
            "--dataset folder needs --data_dir, the folder of images: --data_dir path/to/images. "
            "To try without one, --dataset digits needs no files."
        )


def refuse_ignored(given: Mapping[str, object], values: Mapping[str, object]) -> None:
    """Raises OptionError for an option that was given and would have no effect.  values: all options, as they are."""
    if "epochs" in given and "minutes" in given:
        raise OptionError(
            f"--epochs {given['epochs']} and --minutes {given['minutes']:g} both set the length. Give one of them."
        )
    refuse_betas(given, values["schedule"])
    refuse_not_taken(given, values["dataset"])
    if "label_dropout" in given and not values["class_cond"]:
        raise OptionError("--label_dropout would be ignored without --class_cond. Add --class_cond, or leave it out.")
    for name in ("eval_images", "keep_best"):
        if given.get(name) and values["eval_interval"] is None:
            raise OptionError(f"--{name} would be ignored without --eval_interval. Add --eval_interval 1, for example.")
    if "attention_heads" in given and values["attention_levels"] == ():
        raise OptionError("--attention_heads would be ignored with --attention_levels none. Leave one of them out.")


def check(config):
    """The same configuration, known to make sense.  Raises OptionError naming the option, the value and a way out."""
    check_values(vars(config), type(config))
    for name in REQUIRED:
        if getattr(config, name) is None:
            raise OptionError(f"argument --{name}: not set; `resolve` fills it in")
    if (config.epochs is None) == (config.minutes is None):
        raise OptionError("the length of a run is set by one of --epochs and --minutes. Give one of them.")
    refuse_no_folder(config.data_dir, config.dataset)
    _check_splits(config)
    _check_process(config)
    _check_network(config)
    if config.batch_size % config.accumulate:
        fits = [str(n) for n in range(1, 4097) if config.batch_size % n == 0]
        raise OptionError(
            f"--accumulate {config.accumulate} does not divide --batch_size {config.batch_size}. "
            f"Use one of {', '.join(fits)}."
        )
    return config


def check_values(values: Mapping[str, object], options: type) -> None:
    """Each option by itself, by what the dataclass says of it."""
    for name, spec in specs(options).items():
        if name in values:
            value = values[name]
            unset = value is None and (name in MAY_BE_UNSET or options.__dataclass_fields__[name].default is None)
            if not unset and (wrong := problem(spec, value)):
                raise OptionError(f"argument --{name}: {wrong}")


def _check_splits(config) -> None:
    having = DATASETS[config.dataset].splits
    if having and not config.splits:
        raise OptionError(f"--splits none leaves nothing to train on. Use some of {', '.join(having)}.")
    for name in config.splits:
        if having and name not in having:
            raise OptionError(f"argument --splits: {not_one_of(name, having)}")
    if len(set(config.splits)) < len(config.splits):
        raise OptionError(f"--splits {','.join(config.splits)} names a part twice. Name each once.")


def _check_process(config) -> None:
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


def _check_network(config) -> None:
    (height, width), patch, levels = config.size, config.patch_size, len(config.channel_mult)
    size = f"{height}x{width}"
    if not levels:
        raise OptionError("--channel_mult needs at least one value, for example 1,2.")
    if height % patch or width % patch or min(height, width) // patch < 2:
        fits = [str(p) for p in range(1, 17) if not (height % p or width % p) and min(height, width) // p >= 2]
        if height % patch or width % patch:
            raise OptionError(
                f"--patch_size {patch} does not divide the {size} image. "
                f"Use {'one of ' if len(fits) > 1 else ''}{', '.join(fits)}{_or_sizes(config)}."
            )
        raise OptionError(
            f"--patch_size {patch} leaves 1 pixel of the {size} image. Use at most {fits[-1]}{_or_sizes(config)}."
        )
    sides = [min(height, width) // patch]
    while len(sides) < levels:
        sides.append(math.ceil(sides[-1] / 2))
    if sides[-1] < 2:
        most = sum(side >= 2 for side in sides)
        raise OptionError(
            f"--channel_mult {','.join(map(str, config.channel_mult))} halves the {size} image"
            + (f" (in {patch}x{patch} patches: {height // patch}x{width // patch})" if patch > 1 else "")
            + f" {'once' if levels == 2 else f'{levels - 1} times'}, which leaves 1 pixel. "
            f"Use at most {most} of them, for example {','.join(str(2**k) for k in range(most))}{_or_sizes(config)}."
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
    if convolutions > MAX_PARAMETERS:
        raise OptionError(
            f"--base_channels {base} with --channel_mult {','.join(map(str, config.channel_mult))} makes a network of "
            f"{convolutions / 1e9:,.0f} billion parameters; at most {MAX_PARAMETERS / 1e9:.0f} are taken. Lower them."
        )


def _or_sizes(config) -> str:
    """The sizes closest to the one given that the network can take, if any, as they would be typed."""
    patch, least = config.patch_size, (2 ** (len(config.channel_mult) - 1) + 1 if len(config.channel_mult) > 1 else 2)

    def fitting(side: int, down: bool) -> int | None:
        patches = side // patch if down else math.ceil(side / patch)
        best = max(least, math.ceil(MIN_SIDE / patch), patches) * patch
        return best if best <= MAX_SIDE and (best <= side or not down) else None

    found = [[fitting(side, down) for side in config.size] for down in (True, False)]
    sizes = dict.fromkeys(tuple(sides) for sides in found if None not in sides)
    texts = [f"{h}" if h == w else f"{h}x{w}" for h, w in sizes]
    return f", or --image_size {' or '.join(texts)}" if texts else ""


MAY_BE_UNSET = ("epochs", "sample_interval", "save_interval")
REQUIRED = ("image_size", "splits", "logsnr_shift", "patch_size", "channel_mult", "time_emb_dim", "attention_levels")
