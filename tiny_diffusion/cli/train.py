"""train: from options to a run that starts, continues, or is refused.  runs/session.py carries the run out."""

import dataclasses
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.cli.start_run import begin, continue_run
from tiny_diffusion.cli.train_actions import TrainActions
from tiny_diffusion.config.option import specs
from tiny_diffusion.config.option_file import network_options, read_options
from tiny_diffusion.config.presets import PRESETS
from tiny_diffusion.config.training import Config, beneath, resolve
from tiny_diffusion.errors import OptionError
from tiny_diffusion.runtime.torchrun_store import has_begun

DESCRIPTION = """
Train a diffusion model.  No option is required but --data_dir for --dataset folder; defaults are in brackets.

  PROGRAM --dataset digits --output_dir outputs/digits        a minute or two on two cores, no download
  PROGRAM --dataset mnist --minutes 10                        digits to read after ten minutes
  PROGRAM --dataset mnist --minutes 10 --resume               continue a run that was stopped
  PROGRAM --dataset folder --data_dir photos --minutes 30     your own images, in sub-folders for classes or flat
  PROGRAM --preset flowers --dry_run                          what a whole recipe resolves to

Recipes; an option that you give replaces the recipe's own:
"""


OPTIONS = (Config, TrainActions)


def run(argv: list[str], program: str, started: float) -> int:
    """Trains, and returns the exit code.  started: when the process began, by time.monotonic."""
    presets = "".join(f"  --preset {name:<9}{preset.title}\n" for name, preset in PRESETS.items())
    given = parse(argv, program, DESCRIPTION + presets, *OPTIONS)
    actions = TrainActions(**{name: given.pop(name) for name in specs(TrainActions) if name in given})
    if actions.config is not None:
        given = _with_file(given, Path(actions.config))
    actions.refuse_contradictions(given)
    actions = after_restart(actions, given)
    with ExitStack() as until_the_end:
        return (continue_run if actions.continues else _start)(given, actions, started, until_the_end)


def _with_file(given: dict, path: Path) -> dict:
    """The options of the command line, and beneath them those of the file."""
    values = read_options(path)
    if "preset" in given and given["preset"] != values.get("preset"):
        raise OptionError(
            f"--preset {given['preset']} would be ignored: --config {path} says the options. Give one of them."
        )
    return {**beneath(given, values), **given}


def after_restart(actions: TrainActions, given: dict) -> TrainActions:
    """The actions; but where torchrun has started the command again after a failure, those that continue its run."""
    elsewhere = actions.resume and "output_dir" not in given
    if elsewhere or actions.dry_run or not has_begun(os.environ):
        return actions
    from tiny_diffusion.runs.sync import newest_after_restart

    continues, path = newest_after_restart(given.get("output_dir", Config.output_dir), given, actions.extend)
    if not continues:
        return actions
    if path is None:
        return actions if actions.continues else dataclasses.replace(actions, overwrite=True)
    print(f"started again by torchrun: --resume from {path}", file=sys.stderr)
    return dataclasses.replace(actions, resume="", extend=False, overwrite=False, init_from=None, save_config=None)


def _start(given: dict, actions: TrainActions, started: float, until_the_end: ExitStack) -> int:
    """Starts a new run, and returns the exit code."""
    source = None
    if actions.init_from is not None:
        from tiny_diffusion.runs.checkpoint import load_checkpoint
        from tiny_diffusion.runs.folder import newest_in

        actions = dataclasses.replace(actions, init_from=newest_in(actions.init_from))
        source = load_checkpoint(actions.init_from)
        source.refuse_unknown_images(f"--init_from {actions.init_from}", given)
        given = {**beneath(given, network_options(source.config, "preset" not in given)), **given}
    try:
        config = resolve(given)
    except OptionError as error:
        raise error if actions.config is None else OptionError(f"with --config {actions.config}: {error}") from error
    return begin(config, actions, started, until_the_end, (source, actions.init_from, "init_from"))
