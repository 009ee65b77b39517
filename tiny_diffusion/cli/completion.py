"""--print_completion: what a shell needs to complete the commands, their options and the values of those.

shtab writes the script; it is read once by the shell, so that completing starts no Python.
"""

import argparse
import importlib
from dataclasses import dataclass

from tiny_diffusion.cli import COMMANDS
from tiny_diffusion.cli.arguments import add_options, parse
from tiny_diffusion.config.option import Choice, Text, option
from tiny_diffusion.errors import FileError
from tiny_diffusion.runtime.program import CONSOLE

DESCRIPTION = f"""
Print the completion of a shell for {CONSOLE}, the command of an installed package.

  {CONSOLE} --print_completion bash > ~/.local/share/bash-completion/completions/{CONSOLE}
  {CONSOLE} --print_completion zsh > "${{fpath[1]}}/_{CONSOLE}"
  {CONSOLE} --print_completion fish > ~/.config/fish/completions/{CONSOLE}.fish
"""
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class CompletionOptions:
    """Which shell is to complete."""

    print_completion: str = option(Choice(SHELLS), None, "the shell whose completion is printed")


OPTIONS = (CompletionOptions,)


def run(argv: list[str], program: str, started: float) -> int:
    """Prints the script.  Returns the exit code."""
    print(script(parse(argv, program, DESCRIPTION, *OPTIONS)["print_completion"]))
    return 0


def script(shell: str) -> str:
    """The completion of this shell.  Raises FileError if shtab is missing or does not know the shell."""
    try:
        import shtab
    except ImportError as error:
        raise FileError(f"--print_completion {shell} needs shtab. Run: pip install shtab") from error
    if shell not in shtab.SUPPORTED_SHELLS:
        raise FileError(f"--print_completion {shell} needs a newer shtab. Run: pip install --upgrade shtab")
    return shtab.complete(_whole_parser(shtab.FILE), shell)


def _whole_parser(files: object) -> argparse.ArgumentParser:
    """A parser with a sub-parser for each command.   files: what shtab takes as the completion of a path."""
    whole = argparse.ArgumentParser(prog=CONSOLE)
    whole.add_argument("--version", action="store_true", help="show the version and exit")
    whole.add_argument("--print_completion", choices=SHELLS, help="print the completion of a shell")
    commands = whole.add_subparsers()
    for name, (module, what) in COMMANDS.items():
        parser = commands.add_parser(name, help=what)
        add_options(parser, importlib.import_module(module).OPTIONS)
        for action in parser._actions:
            spec = getattr(action, "spec", None)
            if spec is None or action.nargs == 0:
                continue
            action.metavar = "value"
            if spec.type.choices:
                action.choices, action.metavar = spec.type.choices, None
            elif isinstance(spec.type, Text) and spec.type.metavar == "PATH":
                action.complete = files
    return whole
