"""Which options make sense together: what is refused before a run begins.

The rules know the catalogue and the tables of diffusion/, and open nothing.  An error names the option, the value, the
reason and a way out.  To add a rule: a Need in the row of an option that has no effect without another; for anything
else, a few lines in the function of its subject.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from tiny_diffusion.config.network_shape import check_network
from tiny_diffusion.config.option import MAX_SIDE, MIN_SIDE, Need, specs
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.diffusion.predictions import determinant
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.diffusion.schedules import GIVEN, SCHEDULES
from tiny_diffusion.errors import OptionError, not_one_of

LENGTHS = {"epochs", "minutes"}  # either of them sets the length of a run


def _image_files(attribute: str, what: str) -> Need:
    """A data set whose row in DATASETS has this attribute set.  what: the images that other data sets lack."""
    sets = " and ".join(name for name, row in DATASETS.items() if getattr(row, attribute))
    return Need(
        "dataset",
        lambda values: getattr(DATASETS[values["dataset"]], attribute),
        f": it is for {what} ({sets}), and --dataset {{dataset}} has none. Leave it out.",
    )


IMAGE_FILES = _image_files("image_files", "image files")
TRANSPARENCY = _image_files("transparent", "image files with transparency")
BETAS = Need(
    "schedule",
    lambda values: ends_of(values["schedule"]) is not None,
    ": --schedule {schedule} has no betas. Leave it out, or use "
    f"{', '.join(name for name, row in SCHEDULES.items() if row.ends)}.",
)
GIVEN_BETAS = Need(
    "schedule", lambda values: values["schedule"] == GIVEN, f" without --schedule {GIVEN}. Leave one of them out."
)
ATTENTION = Need(
    "attention_levels",
    lambda values: values["attention_levels"] != (),
    " with --attention_levels none. Leave one of them out.",
)
CLASSES = Need(
    "class_cond", lambda values: values["class_cond"] is not False, " without --class_cond. Leave one of them out."
)
MEASURED = Need(
    "eval_interval",
    lambda values: values["eval_interval"] is not None,
    " without --eval_interval. Add --eval_interval 1, for example.",
)


def ends_of(schedule: str) -> tuple[float, float] | None:
    """The default first and last beta of a schedule; None if it has none to choose."""
    return SCHEDULES[schedule].ends if schedule in SCHEDULES else None


def has_classes(dataset: str) -> bool | None:
    """Whether the images of this data set have classes; None for a folder, where only opening it shows that."""
    return bool(DATASETS[dataset].classes) if DATASETS[dataset].splits else None


def refuse_nested_folders(config) -> None:
    """Raises OptionError if the run would write among its images, or read images from among its own pictures."""
    if config.dataset != "folder":
        return
    output, data = Path(config.output_dir).resolve(), Path(config.data_dir).resolve()
    if output.is_relative_to(data):
        raise OptionError(
            f"--output_dir {config.output_dir} lies in --data_dir {config.data_dir}, where its pictures would count "
            "among the images. Name a folder elsewhere."
        )
    if data.is_relative_to(output):
        raise OptionError(
            f"--data_dir {config.data_dir} lies in --output_dir {config.output_dir}, where the run writes its own "
            "pictures. Name another --output_dir, for example a sub-folder."
        )


def refuse_ignored(given: Mapping[str, object], values: Mapping[str, object], options: type) -> None:
    """Raises OptionError for an option that was given and would have no effect.  values: those of all options."""
    if all(given.get(name) is not None for name in LENGTHS):
        raise OptionError(
            f"--epochs {given['epochs']} and --minutes {given['minutes']:g} both set the length. Give one of them."
        )
    for name, spec in specs(options).items():
        value = given.get(name)
        if not (value is None or value is False or spec.is_of_use(values)):
            shown = "" if value is True else f" {spec.type.show(value)}"
            raise OptionError(f"--{name}{shown} would be ignored{spec.needs.why_not.format(**values)}")


def refuse_falling_betas(start: float, end: float) -> None:
    """Raises OptionError if the first beta is larger than the last."""
    if start > end:
        raise OptionError(
            f"--beta_start {start:g} is larger than --beta_end {end:g}, but noise must grow. Swap them, or give both."
        )


def refuse_sampling(
    config,
    usual: Mapping[str, object],
    *,
    samplers: Sequence[str],
    steps: Sequence[int],
    eta: float | None,
    guidance: Sequence[float],
    interval: tuple[float, float] | None = None,
    guide: str | None = None,
) -> None:
    """Raises OptionError for sampling options that a model of this Config cannot follow, or would ignore.

    usual: the checkpoint's default sampling.   samplers, steps, guidance: all those of a sweep; steps and guidance are
    empty, and eta, interval and guide, which is a path, are None, where they were not given.
    """
    if steps and max(steps) > config.timesteps:
        raise OptionError(
            f"--steps {max(steps)} is more than this model's {config.timesteps} timesteps. "
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
    _refuse_guidance(config, guidance or [usual["guidance"]], bool(guidance), interval, guide)


def _refuse_guidance(
    config, weights: Sequence[float], given: bool, interval: tuple[float, float] | None, guide: str | None
) -> None:
    """Raises OptionError for guidance that the model cannot follow, or that would be ignored.

    weights: of guidance, all those of a sweep.   given: whether by an option, and not by the checkpoint.
    """
    if guide is not None and set(weights) & {0, 1}:
        weight = next(weight for weight in weights if weight in (0, 1))
        what = "the guide" if weight else "this model"
        raise OptionError(
            f"--guide_checkpoint {guide} would be ignored in part: --guidance {weight:g} leaves {what} out. "
            "Add --guidance 1.5, for example, or leave the guide out."
        )
    if given and not config.class_cond and guide is None:
        raise OptionError(
            f"--guidance {weights[0]:g} needs a model trained with --class_cond; this one was not. "
            "Leave it out, or add --guide_checkpoint with an earlier or smaller model."
        )
    if interval is not None and weights[0] == 1 and len(set(weights)) == 1:
        shown = ",".join(f"{end:g}" for end in interval)
        classes = config.class_cond or guide is not None
        raise OptionError(
            f"--guidance_interval {shown} would be ignored: "
            + (
                "guidance is 1, which is none. Add --guidance 1.5, for example, or leave it out."
                if classes
                else "this model has no classes to be guided by. Leave it out."
            )
        )
    needs_null = next((weight for weight in weights if weight != 1), None)
    if given and needs_null is not None and guide is None and not config.label_dropout:
        raise OptionError(
            f"--guidance {needs_null:g} needs a model that was trained without classes, too; this one was trained with "
            "--label_dropout 0. Leave it out."
        )


def refuse_no_folder(data_dir: str | None, dataset: str) -> None:
    """Raises OptionError for --dataset folder without --data_dir, which has no default for it."""
    if dataset == "folder" and data_dir is None:
        raise OptionError(
            "--dataset folder needs --data_dir, the folder of images: --data_dir path/to/images. "
            "To try without one, --dataset digits needs no files."
        )


def check(config):
    """Returns the configuration if it makes sense.  Raises OptionError naming the option, the value and a way out."""
    check_values(vars(config), type(config))
    for name, spec in specs(type(config)).items():
        if getattr(config, name) is None and spec.needs is None and spec.filling(vars(config)) is not None:
            raise OptionError(f"argument --{name}: not set; `resolve` fills it in")
    if (config.epochs is None) == (config.minutes is None):
        raise OptionError("the length of a run is set by one of --epochs and --minutes. Give one of them.")
    refuse_no_folder(config.data_dir, config.dataset)
    _check_splits(config)
    _check_process(config)
    check_network(config, (MIN_SIDE, MAX_SIDE))
    if config.batch_size % config.accumulate:
        divisors = [str(n) for n in range(1, 4097) if config.batch_size % n == 0]
        raise OptionError(
            f"--accumulate {config.accumulate} does not divide --batch_size {config.batch_size}. "
            f"Use one of {', '.join(divisors)}."
        )
    return config


def check_values(values: Mapping[str, object], options: type) -> None:
    """Raises OptionError for a value that its option refuses.  None is accepted where the field's type says so."""
    for field in dataclasses.fields(options):
        value = values.get(field.name)
        if field.name not in values or (value is None and type(None) in get_args(field.type)):
            continue
        if wrong := field.metadata["spec"].type.check(value):
            raise OptionError(f"argument --{field.name}: {wrong}")


def _check_splits(config) -> None:
    """Raises OptionError unless the parts to train on exist, are named once each, and are at least one."""
    having = DATASETS[config.dataset].splits
    if having and not config.splits:
        raise OptionError(f"--splits none leaves nothing to train on. Use some of {', '.join(having)}.")
    for name in config.splits:
        if having and name not in having:
            raise OptionError(f"argument --splits: {not_one_of(name, having)}")
    if len(set(config.splits)) < len(config.splits):
        raise OptionError(f"--splits {','.join(config.splits)} names a part twice. Name each once.")


def _check_process(config) -> None:
    """Raises OptionError unless noise grows with every step and the network's output always determines the image."""
    ends = (config.beta_start, config.beta_end)
    if any((end is None) == (ends_of(config.schedule) is not None) for end in ends):
        raise OptionError(
            f"--schedule {config.schedule} with beta_start {ends[0]} and beta_end {ends[1]}: "
            f"{'it needs both' if ends_of(config.schedule) else 'it has no betas, leave them out'}."
        )
    count, wanted = len(config.betas or ()), config.timesteps if config.schedule == GIVEN else 0
    if count != wanted:
        raise OptionError(f"--betas are {count:,} in number; --schedule {config.schedule} takes {wanted:,} of them.")
    schedule = config.make_schedule()
    if config.beta_start is not None:
        refuse_falling_betas(config.beta_start, config.beta_end)
    if not (schedule.log_snr[1:] < schedule.log_snr[:-1]).all() or not (schedule.alpha[:-1] > 0).all():
        if config.betas is not None:
            raise OptionError("--betas must all be more than 0, and less than 1 before the last. Leave them out.")
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
