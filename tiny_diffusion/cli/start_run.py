"""What `train` and `distill` share: a run begins, or continues from its checkpoint.  runs/session.py carries it out."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

from tiny_diffusion.cli.train_actions import TrainActions
from tiny_diffusion.config.option import specs
from tiny_diffusion.config.option_file import save_options
from tiny_diffusion.config.presets import PRESETS
from tiny_diffusion.config.rules import LENGTHS, refuse_ignored, refuse_nested_folders
from tiny_diffusion.config.training import Config, filled
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.errors import OptionError
from tiny_diffusion.runs.lock import locked
from tiny_diffusion.runtime.program import typed
from tiny_diffusion.runtime.ranks import is_main


def begin(
    config: Config, actions: TrainActions, started: float, until_the_end: ExitStack, source: tuple, student=None
) -> int:
    """Starts a run of this configuration, and returns the exit code.

    source: the checkpoint to start from or None, its path, and the option that named it.   student: what is distilled.
    """
    refuse_nested_folders(config)
    from tiny_diffusion.runs.folder import RunFolder

    _lock(config.output_dir, actions, until_the_end)
    folder = RunFolder(config.output_dir)
    if folder.holds_a_run() and not (actions.overwrite or actions.dry_run):
        raise OptionError(
            f"--output_dir {config.output_dir} holds a run already. "
            "Continue it by --resume, lengthen it by --extend, delete it by --overwrite, or name another folder."
        )
    if actions.save_config is not None and is_main():
        save_options(config, Path(actions.save_config))
        print(f"options: {actions.save_config}", file=sys.stderr)
    if actions.dry_run:
        return _print_options(config)
    from tiny_diffusion.runs.session import Session

    session = Session(config, folder, started, _callbacks(), student)
    if source[0] is not None:
        session.take_weights(*source)
    return session.train(actions.overwrite)


def continue_run(
    given: dict, actions: TrainActions, started: float, until_the_end: ExitStack, check=lambda it: None
) -> int:
    """Continues a run, and returns the exit code.   check: called with its checkpoint, may refuse it."""
    output_dir, path, checkpoint = _checkpoint_to_continue(given, actions, until_the_end)
    check(checkpoint)
    config = _merge(checkpoint.config, {**given, "output_dir": output_dir}, actions.extend)
    if actions.dry_run:
        return _print_options(config)
    step, finished = checkpoint.about["step"], checkpoint.about["finished"]
    reached = config.max_steps is not None and step >= config.max_steps
    if (finished and not actions.extend) or reached:
        why = f"has reached --max_steps {config.max_steps}" if reached and not finished else "is finished"
        way_out = "Nothing to do; --extend --epochs N makes it longer."
        print(f"{path}: this run {why}, at step {step}. {way_out}", file=sys.stderr)
        return 0
    from tiny_diffusion.runs.folder import RunFolder
    from tiny_diffusion.runs.session import Session

    session = Session(config, RunFolder(output_dir), started, _callbacks(), checkpoint.student)
    session.resume(path, checkpoint, actions.extend)
    return session.train()


def _checkpoint_to_continue(given: dict, actions: TrainActions, until_the_end: ExitStack):
    """(output_dir, path, checkpoint) of the run that --resume or --extend mean.  The folder is locked from here on."""
    from tiny_diffusion.runs.checkpoint import load_checkpoint
    from tiny_diffusion.runs.folder import RunFolder, newest_in, own_folder, run_of

    if not actions.resume:
        output_dir = given.get("output_dir", Config.output_dir)
        _lock(output_dir, actions, until_the_end)
        if newest := RunFolder(output_dir).newest():
            return output_dir, *newest
        way_out = (
            "The run there was stopped before its first one: start again by --overwrite."
            if RunFolder(output_dir).holds_a_run()
            else "Leave out --resume to start a run there."
        )
        raise OptionError(f"--output_dir {output_dir} holds no checkpoint to continue from. {way_out}")
    # The checkpoint is read again once the folder is locked: until then another run may be ending in it.
    path = Path(newest_in(actions.resume))
    output_dir = given.get("output_dir") or own_folder(path, load_checkpoint(path))
    _lock(output_dir, actions, until_the_end)
    checkpoint = load_checkpoint(path)
    if run_of(path.resolve()) != Path(output_dir).resolve() and RunFolder(output_dir).holds_a_run():
        raise OptionError(
            f"--output_dir {output_dir} holds another run than --resume {path}, which would overwrite it. "
            "Name the checkpoint's own folder, or a new one, by --output_dir."
        )
    return output_dir, path, checkpoint


def _merge(config: Config, given: dict, extend: bool) -> Config:
    """The checkpoint's configuration, with the options that were given where a resumed run may change them.

    Raises OptionError for an option that would change the run's result, and for one that would be ignored.
    """
    free = {name for name, spec in specs(Config).items() if spec.free} | (LENGTHS if extend else set())
    for name, value in given.items():
        if name in free or config.agrees(name, value):
            continue
        own = getattr(config, name)
        show, way_out = specs(Config)[name].type.show, "leave it out, or start a run in another folder"
        raise OptionError(
            f"--{name} {show(value)} differs from this run's {'(not set)' if own is None else show(own)} and would "
            f"change its result: {'use --extend to change the length of a run' if name in LENGTHS else way_out}."
        )
    reset = {"max_steps": None, **(dict.fromkeys(LENGTHS) if extend else {})}
    values = {**vars(config), **reset, **{name: value for name, value in given.items() if name in free}}
    refuse_ignored(given, values, Config)
    return Config.from_dict(filled(values))


def _lock(output_dir: str, actions: TrainActions, until_the_end: ExitStack) -> None:
    """Keeps other runs out of the folder.  Rank 0 locks it for all ranks; --dry_run locks nothing."""
    if not actions.dry_run and is_main():
        until_the_end.enter_context(locked(Path(output_dir)))


def _callbacks():
    """What a run shows and measures."""
    from tiny_diffusion.evaluation.online import OnlineEvaluation
    from tiny_diffusion.runs.writer import Callbacks
    from tiny_diffusion.visuals.class_grid import save_grid
    from tiny_diffusion.visuals.loss_curve import save_loss_curve

    return Callbacks(save_grid, save_loss_curve, OnlineEvaluation)


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
        slow = f". Without a GPU this is slow; faster: {typed('train')} {faster}" if preset.faster else ""
        print(f"{preset.title}{slow}", file=sys.stderr)
    return 0
