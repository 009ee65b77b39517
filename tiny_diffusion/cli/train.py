"""train: from options to a run that starts, goes on, or is refused.  `cli.session` carries it out."""

import dataclasses
import json
import sys
from pathlib import Path

from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.cli.files import run_of
from tiny_diffusion.config import Config, resolve
from tiny_diffusion.errors import OptionError
from tiny_diffusion.options import TrainActions, specs

DESCRIPTION = """
Train a diffusion model.  Nothing but --dataset needs to be said; what is in brackets is the default.

  train.py --dataset digits --output_dir outputs/digits        a minute or two on two cores, no download
  train.py --dataset mnist --minutes 10                        digits to read after ten minutes
  train.py --dataset mnist --minutes 10 --resume               go on with a run that was stopped
"""


def run(argv: list[str], program: str, started: float) -> int:
    given = parse(argv, program, DESCRIPTION, Config, TrainActions)
    actions = TrainActions(**{name: given.pop(name) for name in specs(TrainActions) if name in given})
    _check_actions(actions, given)
    if actions.resume is None and not actions.extend:
        return _start(given, actions, started)
    return _go_on(given, actions, started)


def _check_actions(actions: TrainActions, given: dict) -> None:
    chosen = [f"--{name}" for name in ("resume", "extend", "overwrite") if getattr(actions, name) not in (None, False)]
    if len(chosen) > 1:
        raise OptionError(f"{' and '.join(chosen)} contradict each other. Give one of them.")
    if actions.init_from is not None and (actions.resume is not None or actions.extend):
        raise OptionError(f"--init_from starts a new run, {chosen[0]} goes on with one. Give one of them.")
    if actions.extend and not {"epochs", "minutes"} & set(given):
        raise OptionError("--extend needs the new length of the run in all, as --epochs or --minutes.")


def _start(given: dict, actions: TrainActions, started: float) -> int:
    source = None
    if actions.init_from is not None:
        from tiny_diffusion.checkpoint import load_checkpoint

        source = load_checkpoint(actions.init_from)
        inherited = _network_of(source.config)
        if given.get("schedule", source.config.schedule) != source.config.schedule:
            inherited = {name: value for name, value in inherited.items() if not name.startswith("beta_")}
        given = {**inherited, **given}
    config = resolve(given)
    if actions.dry_run:
        return _print_options(config)
    from tiny_diffusion.cli.session import Session
    from tiny_diffusion.run_folder import RunFolder

    folder = RunFolder(config.output_dir)
    if folder.holds_a_run() and not actions.overwrite:
        raise OptionError(
            f"--output_dir {config.output_dir} holds a run already. "
            "Go on with it by --resume, lengthen it by --extend, delete it by --overwrite, or name another folder."
        )
    session = Session(config, folder, started)
    if source is not None:
        session.take_weights(source, actions.init_from)
    if actions.overwrite:
        folder.clear()
    return session.train()


def _network_of(config: Config) -> dict:
    """The options that make up the network and what its output means."""
    names = [
        name
        for name, spec in specs(Config).items()
        if spec.group == "network" or name in ("schedule", "timesteps", "prediction")
    ]
    values = {name: getattr(config, name) for name in (*names, "dataset", "image_size")}
    if config.beta_start is not None:
        values |= {"beta_start": config.beta_start, "beta_end": config.beta_end}
    if not config.class_cond:
        del values["label_dropout"]
    if not config.attention_levels:
        del values["attention_heads"]
    return values


def _go_on(given: dict, actions: TrainActions, started: float) -> int:
    from tiny_diffusion.checkpoint import load_checkpoint
    from tiny_diffusion.run_folder import RunFolder

    if actions.resume:
        path, checkpoint = Path(actions.resume), load_checkpoint(actions.resume)
        output_dir = given.get("output_dir", checkpoint.config.output_dir)
        if run_of(path.resolve()) != Path(output_dir).resolve() and RunFolder(output_dir).holds_a_run():
            raise OptionError(
                f"--output_dir {output_dir} holds another run than --resume {path}, which would overwrite it. "
                "Name the checkpoint's own folder, or a new one, by --output_dir."
            )
    else:
        output_dir = given.get("output_dir", Config.output_dir)
        if (newest := RunFolder(output_dir).newest()) is None:
            way_out = (
                "The run there was stopped before its first one: start again by --overwrite."
                if RunFolder(output_dir).holds_a_run()
                else "Leave out --resume to start a run there."
            )
            raise OptionError(f"--output_dir {output_dir} holds no checkpoint to go on from. {way_out}")
        path, checkpoint = newest
    config = _merge(checkpoint.config, {**given, "output_dir": str(output_dir)}, actions.extend)
    if actions.dry_run:
        return _print_options(config)
    step, finished = checkpoint.about["step"], checkpoint.about["finished"]
    reached = config.max_steps is not None and step >= config.max_steps
    if (finished and not actions.extend) or reached:
        why = f"has reached --max_steps {config.max_steps}" if reached and not finished else "is finished"
        print(
            f"{path}: this run {why}, at step {step}. Nothing to do; --extend --epochs N makes it longer.",
            file=sys.stderr,
        )
        return 0
    from tiny_diffusion.cli.session import Session

    session = Session(config, RunFolder(config.output_dir), started)
    session.resume(path, checkpoint, actions.extend)
    return session.train()


def _merge(config: Config, given: dict, extend: bool) -> Config:
    """The checkpoint's configuration with what may change changed.  Raises OptionError for what may not."""
    free = {name for name, spec in specs(Config).items() if spec.free} | ({"epochs", "minutes"} if extend else set())
    for name, value in given.items():
        if name not in free and value != getattr(config, name):
            way_out = (
                "use --extend to change the length of a run"
                if name in ("epochs", "minutes")
                else "leave it out, or start a run in another folder"
            )
            raise OptionError(
                f"--{name} {_text(value)} differs from this run's {_text(getattr(config, name))} and would change its "
                f"result: {way_out}."
            )
    changed = {"max_steps": None, **{name: value for name, value in given.items() if name in free}}
    if extend:
        changed = {"epochs": None, "minutes": None, **changed}
    return Config.from_dict(dataclasses.replace(config, **changed).to_dict())


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "(not set)" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _print_options(config: Config) -> int:
    print(json.dumps(config.to_dict(), indent=2))
    return 0
