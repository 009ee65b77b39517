"""What `train` does with the folder of a run and with files of options; `distill` takes a part of it."""

from dataclasses import dataclass

from tiny_diffusion.config.option import Flag, Text, option
from tiny_diffusion.config.rules import LENGTHS
from tiny_diffusion.errors import OptionError


@dataclass(frozen=True)
class TrainActions:
    """What `train` does with the run's folder and with files of options; no part of the configuration."""

    # fmt: off
    resume: str | None = option(
        Text(bare=True), None, "continue the run in --output_dir, or from this checkpoint", group="start")
    extend: bool = option(
        Flag(), False, "train past the end of the run; --epochs or --minutes is its new total length", group="start")
    overwrite: bool = option(Flag(), False, "delete the run in --output_dir and start again", group="start")
    init_from: str | None = option(Text(), None, "start a new run from this checkpoint's weights", group="start")
    config: str | None = option(
        Text(), None, "read options from this file; those on the command line win", group="start")
    save_config: str | None = option(
        Text(), None, "write the resolved options to this file, for --config", group="start")
    dry_run: bool = option(Flag(), False, "print the resolved options and stop", group="start")
    # fmt: on

    def refuse_contradictions(self, given: dict) -> None:
        """Raises OptionError for actions that exclude each other.  given: the other options of the command."""
        set_ = {"resume": self.resume is not None, "extend": self.extend, "overwrite": self.overwrite}
        chosen = [f"--{name}" for name, is_set in set_.items() if is_set]
        if len(chosen) > 1:
            raise OptionError(f"{' and '.join(chosen)} contradict each other. Give one of them.")
        if self.init_from is not None and self.continues:
            raise OptionError(f"--init_from starts a new run, {chosen[0]} continues one. Give one of them.")
        if self.save_config is not None and self.continues:
            raise OptionError("--save_config is for a new run; --dry_run prints the options of this one. Leave it out.")
        if self.extend and not LENGTHS & set(given):
            raise OptionError("--extend needs the new total length of the run, as --epochs or --minutes.")

    @property
    def continues(self) -> bool:
        """Whether the command continues a run, and does not start one."""
        return self.resume is not None or self.extend
