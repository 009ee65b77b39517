"""distill: from a trained model to one that samples in one, two or four evaluations.  The run is one of train."""

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass

from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.cli.start_run import begin, continue_run
from tiny_diffusion.cli.train import after_restart
from tiny_diffusion.cli.train_actions import TrainActions
from tiny_diffusion.config.option import Choice, Number, Text, again, option, specs
from tiny_diffusion.config.rules import LENGTHS, refuse_ignored, refuse_sampling
from tiny_diffusion.config.student import METHODS, STEPS, Student
from tiny_diffusion.config.training import Config, filled
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.errors import OptionError

DESCRIPTION = """
Distill a trained model: a new model, made from its weights and its images, that samples in one, two or four
evaluations.  It is a run like one of train, and ends with a checkpoint that every command reads.

  python -m tiny_diffusion distill --checkpoint outputs/mnist/model_final.pt --minutes 10 --output_dir outputs/two
  python -m tiny_diffusion distill --output_dir outputs/two --resume
  python -m tiny_diffusion distill --checkpoint outputs/mnist/model_final.pt --steps 1 --guidance 1.5
"""
LR_SHARE = {True: 0.3, False: 0.1}  # of the teacher's learning rate: with the moments, and without
# Options of train with another default here, which is the teacher's.
TEACHERS = {
    "data_dir": "folder of the images [the teacher's]",
    "epochs": "length of the run, in passes over the data [the teacher's length]",
    "batch_size": "images per step [the teacher's]",
    "lr": "peak learning rate [0.3 of the teacher's with moments, else 0.1]",
}
OF_TRAIN = (
    *TEACHERS, "minutes", "max_steps", "accumulate", "auto_batch", "checkpoint_activations", "compile", "deterministic",
    "seed", "device", "output_dir", "sample_interval", "num_samples", "save_interval", "eval_interval", "eval_images",
    "keep_best", "keep_last", "log",
)  # fmt: skip
RunOptions = dataclasses.make_dataclass(
    "RunOptions",
    [
        (
            field.name,
            field.type if field.name not in TEACHERS else field.type | None,
            again(
                Config,
                field.name,
                group=field.metadata["spec"].group,
                **({"default": None, "help": TEACHERS[field.name]} if field.name in TEACHERS else {}),
            ),
        )
        for field in dataclasses.fields(Config)
        if field.name in OF_TRAIN
    ],
    frozen=True,
)
RunActions = dataclasses.make_dataclass(
    "RunActions",
    [
        (name, TrainActions.__dataclass_fields__[name].type, again(TrainActions, name, group="start"))
        for name in ("resume", "extend", "overwrite")
    ],
    frozen=True,
)


@dataclass(frozen=True)
class DistillOptions:
    """What `distill` makes of which model; the options of train say how the run goes."""

    # fmt: off
    checkpoint: str | None = option(Text(), None, "the teacher: model_final.pt, or any checkpoint of a run")
    steps: str = option(Choice(map(str, STEPS)), "2", "evaluations that the new model samples with")
    guidance: float = option(
        Number(0, 100), 1.0, "of the teacher's classes, baked into the new model; 1 learns from the images alone")
    method: str | None = option(
        Choice(METHODS), None,
        "consistency: jumps to the clean image with fresh noise between them; moments: and the features of samples get "
        "the mean and covariance of real images'; phased: jumps from level to level without noise "
        "[moments; consistency with --guidance]")
    # fmt: on


OPTIONS = (DistillOptions, RunOptions, RunActions)


def run(argv: list[str], program: str, started: float) -> int:
    """Distills, and returns the exit code.  started: when the process began, by time.monotonic."""
    given = parse(argv, program, DESCRIPTION, *OPTIONS)
    asked = {name: given.pop(name) for name in specs(DistillOptions) if name in given}
    actions = TrainActions(**{name: given.pop(name) for name in specs(RunActions) if name in given})
    actions.refuse_contradictions(given)
    if "checkpoint" not in asked and not actions.continues:
        raise OptionError("--checkpoint is required: the model to distill, for example outputs/model_final.pt")
    actions = after_restart(actions, given)
    with ExitStack() as until_the_end:
        if actions.continues:
            return continue_run(given, actions, started, until_the_end, lambda found: _refuse_another(found, asked))
        from tiny_diffusion.runs.checkpoint import load_checkpoint
        from tiny_diffusion.runs.folder import newest_in

        options = DistillOptions(**asked | {"checkpoint": newest_in(asked["checkpoint"])})
        teacher = load_checkpoint(options.checkpoint)
        student = _student(teacher, options)
        config = _configuration(teacher.config, student, given)
        return begin(config, actions, started, until_the_end, (teacher, options.checkpoint, "checkpoint"), student)


def _student(teacher, options: DistillOptions) -> Student:
    """What is to be made.  Raises OptionError where it cannot be made of this teacher."""
    config, path, steps = teacher.config, options.checkpoint, int(options.steps)
    if teacher.student is not None:
        raise OptionError(
            f"--checkpoint {path} is a distilled model already, for {teacher.student.steps} evaluations. "
            "Name the model that it was made from."
        )
    if config.prediction == "epsilon":
        raise OptionError(
            f"--checkpoint {path} predicts epsilon, which does not determine the image at pure noise, where a "
            "distilled model does most of its work. Train the teacher with --prediction v."
        )
    if steps > config.timesteps:
        raise OptionError(f"--steps {steps} is more than this model's {config.timesteps} timesteps. Use fewer.")
    if options.method == "moments" and options.guidance != 1:
        raise OptionError(
            f"--guidance {options.guidance:g} and --method moments want different samples: moments matches the "
            "training images as they are. Leave one out."
        )
    if options.guidance != 1:
        usual = teacher.about["sampling"]
        refuse_sampling(config, usual, samplers=[], steps=[], eta=None, guidance=[options.guidance])
    method = options.method or ("moments" if options.guidance == 1 else "consistency")
    segments = steps if method == "phased" else 1
    return Student(steps, segments, options.guidance, teacher.about["sha256"], method == "moments")


def _configuration(teacher: Config, student: Student, given: dict) -> Config:
    """The teacher's configuration, as a run of its own with these options."""
    own = {name: getattr(Config, name) for name in OF_TRAIN if name not in TEACHERS}
    own |= {name: value for name, value in DATASETS[teacher.dataset].defaults.items() if name in own}
    values = {**vars(teacher), **own, "preset": None, "precision": "fp32"}
    values["lr"] = LR_SHARE[student.moments] * teacher.lr
    if not LENGTHS & set(given):
        values["minutes"] = teacher.minutes
    elif "minutes" in given:
        values["epochs"] = None
    values |= given
    refuse_ignored(given, values, Config)
    return Config.from_dict(filled(values))


def _refuse_another(found, asked: dict) -> None:
    """Raises OptionError if the run to continue is another than these options ask for."""
    student = found.student
    if student is None:
        raise OptionError("--resume: this run was made by train, not by distill. Continue it by train --resume.")
    own = {"steps": str(student.steps), "guidance": student.guidance, "method": student.method}
    for name, value in asked.items():
        if (
            name in own
            and own[name] != value
            and not (student.steps == 1 and {own[name], value} == {"consistency", "phased"})
        ):
            raise OptionError(
                f"--{name} {value} differs from this run's {own[name]} and would change its result: "
                "leave it out, or start a run in another folder."
            )
    if "checkpoint" in asked:
        from tiny_diffusion.runs.checkpoint import load_checkpoint
        from tiny_diffusion.runs.folder import newest_in

        if load_checkpoint(newest_in(asked["checkpoint"])).about["sha256"] != student.teacher:
            raise OptionError(
                f"--checkpoint {asked['checkpoint']} is not the teacher that this run began with. "
                "Leave it out to continue, or start a run in another folder."
            )
