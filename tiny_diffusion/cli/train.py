"""train: from options to a run that starts, goes on, or is refused.  `cli.session` carries it out."""

import dataclasses
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.config.image_size import square
from tiny_diffusion.config.option import TrainActions, not_one_of, specs
from tiny_diffusion.config.presets import PRESETS
from tiny_diffusion.config.rules import check_values, refuse_ignored
from tiny_diffusion.config.training import Config, as_given, beneath, from_json, resolve
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.errors import FileError, OptionError
from tiny_diffusion.files import write_text
from tiny_diffusion.runs.lock import locked
from tiny_diffusion.runtime.ranks import is_main
from tiny_diffusion.runtime.torchrun_store import has_begun

DESCRIPTION = """
Train a diffusion model.  Nothing but --dataset needs to be said; what is in brackets is the default.

  train.py --dataset digits --output_dir outputs/digits        a minute or two on two cores, no download
  train.py --dataset mnist --minutes 10                        digits to read after ten minutes
  train.py --dataset mnist --minutes 10 --resume               go on with a run that was stopped
  train.py --dataset folder --data_dir photos --minutes 30     your own images, in sub-folders for classes or flat
  train.py --preset flowers --dry_run                          what a whole recipe resolves to

Recipes, of which every part can be changed by its own option:
"""


def run(argv: list[str], program: str, started: float) -> int:
    presets = "".join(f"  --preset {name:<9}{preset.title}\n" for name, preset in PRESETS.items())
    given = parse(argv, program, DESCRIPTION + presets, Config, TrainActions)
    actions = TrainActions(**{name: given.pop(name) for name in specs(TrainActions) if name in given})
    if actions.config is not None:
        given = _with_file(given, Path(actions.config))
    _check_actions(actions, given)
    actions = _after_restart(actions, given)
    go = _start if actions.resume is None and not actions.extend else _go_on
    with ExitStack() as until_the_end:
        return go(given, actions, started, until_the_end)


def _after_restart(actions: TrainActions, given: dict) -> TrainActions:
    """The actions; where torchrun has started the command again after a failure, to go on with its run instead."""
    elsewhere = actions.resume and "output_dir" not in given
    if elsewhere or actions.dry_run or not has_begun(os.environ):
        return actions
    from tiny_diffusion.runs.sync import newest_after_restart

    goes_on, path = newest_after_restart(given.get("output_dir", Config.output_dir), given, actions.extend)
    if not goes_on:
        return actions
    if path is None:
        fresh = actions.resume is None and not actions.extend
        return dataclasses.replace(actions, overwrite=True) if fresh else actions
    print(f"started again by torchrun: --resume from {path}", file=sys.stderr)
    return dataclasses.replace(actions, resume="", extend=False, overwrite=False, init_from=None, save_config=None)


def _lock(output_dir: str, actions: TrainActions, until_the_end: ExitStack) -> None:
    """Keeps other runs out of the folder.  --dry_run writes nothing, and the first of several processes is for all."""
    if not actions.dry_run and is_main():
        until_the_end.enter_context(locked(Path(output_dir)))


def _check_actions(actions: TrainActions, given: dict) -> None:
    chosen = [f"--{name}" for name in ("resume", "extend", "overwrite") if getattr(actions, name) not in (None, False)]
    if len(chosen) > 1:
        raise OptionError(f"{' and '.join(chosen)} contradict each other. Give one of them.")
    if actions.init_from is not None and (actions.resume is not None or actions.extend):
        raise OptionError(f"--init_from starts a new run, {chosen[0]} goes on with one. Give one of them.")
    if actions.save_config is not None and (actions.resume is not None or actions.extend):
        raise OptionError("--save_config is for a new run; --dry_run prints the options of this one. Leave it out.")
    if actions.extend and not {"epochs", "minutes"} & set(given):
        raise OptionError("--extend needs the new length of the run in all, as --epochs or --minutes.")


def _start(given: dict, actions: TrainActions, started: float, until_the_end: ExitStack) -> int:
    source = None
    if actions.init_from is not None:
        from tiny_diffusion.runs.checkpoint import load_checkpoint

        source = load_checkpoint(actions.init_from)
        given = {**beneath(given, _network_of(source.config, "preset" not in given)), **given}
    try:
        config = resolve(given)
    except OptionError as error:
        raise error if actions.config is None else OptionError(f"with --config {actions.config}: {error}") from error
    _refuse_inside(config)
    from tiny_diffusion.runs.folder import RunFolder

    _lock(config.output_dir, actions, until_the_end)
    folder = RunFolder(config.output_dir)
    if folder.holds_a_run() and not (actions.overwrite or actions.dry_run):
        raise OptionError(
            f"--output_dir {config.output_dir} holds a run already. "
            "Go on with it by --resume, lengthen it by --extend, delete it by --overwrite, or name another folder."
        )
    if actions.save_config is not None and is_main():
        _save_options(config, Path(actions.save_config))
    if actions.dry_run:
        return _print_options(config)
    from tiny_diffusion.runs.session import Session

    session = Session(config, folder, started, _callbacks())
    if source is not None:
        session.take_weights(source, actions.init_from)
    if actions.overwrite and is_main():
        folder.clear()
    return session.train()


def _callbacks():
    """What a run shows and measures."""
    from tiny_diffusion.evaluation.online import OnlineMeasure
    from tiny_diffusion.runs.writer import Callbacks
    from tiny_diffusion.visuals.figures import save_loss_curve
    from tiny_diffusion.visuals.images import save_grid

    return Callbacks(save_grid, save_loss_curve, OnlineMeasure)


def _refuse_inside(config: Config) -> None:
    """Raises OptionError if the run would write among its images, of which its pictures would be some next time."""
    if config.dataset == "folder" and Path(config.output_dir).resolve().is_relative_to(Path(config.data_dir).resolve()):
        raise OptionError(
            f"--output_dir {config.output_dir} lies in --data_dir {config.data_dir}, where its pictures would count "
            "among the images. Name a folder elsewhere."
        )


def _network_of(config: Config, with_data: bool) -> dict:
    """The options that make up the network and what its output means; with_data: and its images."""
    wanted = {name for name, spec in specs(Config).items() if spec.group == "network"}
    wanted |= {"schedule", "timesteps", "beta_start", "beta_end", "logsnr_shift", "prediction"}
    wanted |= {"dataset", "data_dir", "image_size"} if with_data else set()
    return {name: value for name, value in as_given(config).items() if name in wanted}


def _with_file(given: dict, path: Path) -> dict:
    """The options of a file that --save_config or --dry_run wrote, or somebody did, under those of the command line."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise FileError(f"--config {path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"--config {path} is not a JSON file: {error}.") from error
    if not isinstance(values, dict):
        raise OptionError(f"--config {path} holds no options: one JSON object of names and values is read.")
    for name in values:
        if name not in specs(Config):
            raise OptionError(f"--config {path}: {not_one_of(str(name), specs(Config))}")
    if "preset" in given and given["preset"] != values.get("preset"):
        raise OptionError(
            f"--preset {given['preset']} would be ignored: --config {path} says the options. Give one of them."
        )
    try:
        if set(values) == set(specs(Config)):  # in full, those too that have no use in it
            values = as_given(Config.from_dict(values))
        values = {name: from_json(value) for name, value in values.items() if value is not None}
        check_values(values, Config)
        values |= {"image_size": square(values["image_size"])} if "image_size" in values else {}
    except OptionError as error:
        raise OptionError(f"--config {path}: {error}") from error
    return {**beneath(given, values), **given}


def _save_options(config: Config, path: Path) -> None:
    """Writes what --config reads; a file that holds something else already is left alone."""
    from tiny_diffusion.files import check_writable

    text = json.dumps(as_given(config), indent=2)
    check_writable("save_config", path)
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text + "\n":
        raise OptionError(f"--save_config {path} exists and holds something else. Name another file, or delete it.")
    write_text(path, text + "\n")
    print(f"options: {path}", file=sys.stderr)


def _go_on(given: dict, actions: TrainActions, started: float, until_the_end: ExitStack) -> int:
    from tiny_diffusion.runs.checkpoint import load_checkpoint
    from tiny_diffusion.runs.folder import RunFolder, run_of

    if actions.resume:
        # Read again once the folder is this run's own: another one may just be ending in it.
        output_dir = given.get("output_dir") or load_checkpoint(actions.resume).config.output_dir
        _lock(output_dir, actions, until_the_end)
        path, checkpoint = Path(actions.resume), load_checkpoint(actions.resume)
        if run_of(path.resolve()) != Path(output_dir).resolve() and RunFolder(output_dir).holds_a_run():
            raise OptionError(
                f"--output_dir {output_dir} holds another run than --resume {path}, which would overwrite it. "
                "Name the checkpoint's own folder, or a new one, by --output_dir."
            )
    else:
        output_dir = given.get("output_dir", Config.output_dir)
        _lock(output_dir, actions, until_the_end)
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
    from tiny_diffusion.runs.session import Session

    session = Session(config, RunFolder(config.output_dir), started, _callbacks())
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
                f"--{name} {_text(name, value)} differs from this run's {_text(name, getattr(config, name))} and would "
                f"change its result: {way_out}."
            )
    changed = {"max_steps": None, **{name: value for name, value in given.items() if name in free}}
    if extend:
        changed = {"epochs": None, "minutes": None, **changed}
    merged = Config.from_dict(dataclasses.replace(config, **changed).to_dict())
    refuse_ignored(given, vars(merged))
    return merged


def _text(name: str, value: object) -> str:
    if isinstance(value, tuple):
        return ("x" if name == "image_size" else ",").join(map(str, value)) or "none"
    return "(not set)" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _print_options(config: Config) -> int:
    """The options as JSON on standard output; on standard error what they come to."""
    from tiny_diffusion.models.build import count_parameters

    dataset = DATASETS[config.dataset]
    print(json.dumps(config.to_dict(), indent=2))
    parameters = count_parameters(config, dataset.channels, len(dataset.classes))
    of = "" if dataset.splits else " for colour images" + (" without classes" if config.class_cond else "")
    print(f"a network of {parameters:,} parameters{of}", file=sys.stderr)
    if config.preset:
        preset = PRESETS[config.preset]
        faster = preset.faster_on(config.dataset, config.data_dir)
        slow = f". Without a GPU this is slow; faster: train.py {faster}" if preset.faster else ""
        print(f"{preset.title}{slow}", file=sys.stderr)
    return 0
