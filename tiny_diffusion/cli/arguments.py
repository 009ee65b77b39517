"""Parses a command line by the fields of its options, and makes its --help.  Loads no torch."""

import argparse
import dataclasses
import functools
import importlib
import itertools
import textwrap
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

from tiny_diffusion.config import synonyms
from tiny_diffusion.config.option import Flag, Spec, Type, specs
from tiny_diffusion.runtime.program import CONSOLE, is_console, version

GROUPS = {
    "data": "data",
    "diffusion": "the noising process and what the network learns",
    "network": "the network",
    "run": "the run",
    "output": "what is written",
    "editing": "editing images instead of sampling from noise",
    "start": "starting and continuing",
}


def parse(argv: list[str], program: str, description: str, *option_sets: type, aliases=None) -> dict[str, object]:
    """The options that were given, by name; those that were not are absent.

    description: PROGRAM in it becomes the words that start this command.  option_sets: dataclasses whose fields were
    made by config.option.option.  aliases: name of an option -> its other names.  Ends the process with one line and
    exit code 2 for an option that is unknown or out of range.
    """
    as_typed = program if is_console() else f"python {'' if program.endswith('.py') else '-m '}{program}"
    description = description.replace("python -m tiny_diffusion", CONSOLE) if is_console() else description
    parser = _Parser(
        prog=program,
        description=textwrap.dedent(description).replace("PROGRAM", as_typed).strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    add_options(parser, option_sets, aliases)
    return vars(parser.parse_args([_snake_case(word) for word in argv]))


def add_options(parser: argparse.ArgumentParser, option_sets: Iterable[type], aliases=None) -> None:
    """Adds the options to a parser, in the groups of --help; each argparse action gets its Spec, as `spec`."""
    groups = {"": parser}
    for field in itertools.chain(*map(dataclasses.fields, option_sets)):
        spec = field.metadata["spec"]
        if spec.group not in groups:
            groups[spec.group] = parser.add_argument_group(GROUPS[spec.group])
        flags = [f"--{name}" for name in (field.name, *(aliases or {}).get(field.name, ()))]
        value = {"type": _reader(spec.type), "metavar": spec.type.metavar}
        if isinstance(spec.type, Flag):
            value = {"action": "store_true"}
            if spec.type.can_be_off:
                groups[spec.group].add_argument(
                    f"--no_{field.name}", action="store_false", dest=field.name, help=f"turn off --{field.name}"
                )
        elif spec.type.bare:
            value |= {"nargs": "?", "const": ""}
        groups[spec.group].add_argument(*flags, help=_help(spec, field.default), **value).spec = spec


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line with a way out."""

    def parse_args(self, argv):
        given, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
            options = {action.dest for action in self._actions}
            self.error(f"{unknown[0]!r} is not an option here. {hint(unknown[0], options, flags)}")
        return given

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        print(version())
        parser.exit()


def hint(word: str, options: Collection[str], flags: Sequence[str] = ()) -> str:
    """What to say of a word that is no option here.   options: those that there are; flags: with their other names."""
    if not word.startswith("-"):
        return "See --help."
    name = synonyms.plain(word)  # without dashes, which would make any two short names look alike
    if name in options:
        return f"Did you mean --{name}?"
    if known := synonyms.answer(word, options) or _elsewhere(synonyms.meanings(word)):
        return known
    if near := get_close_matches(name, flags or options, n=1):
        return f"Did you mean --{near[0]}?"
    respelt = synonyms.respelt(word)
    return synonyms.answer(respelt, options) or _elsewhere(synonyms.meanings(respelt)) or "See --help."


def _elsewhere(names: Iterable[str]) -> str | None:
    """Which other commands have an option of the first of these names that any has."""
    from tiny_diffusion.cli import COMMANDS

    for name in names:
        if commands := [command for command in COMMANDS if name in _names(command)]:
            return f"--{name} is an option of {', '.join(commands)}."
    return None


@functools.cache
def _names(command: str) -> set[str]:
    """The options of another command."""
    from tiny_diffusion.cli import COMMANDS

    return {name for options in importlib.import_module(COMMANDS[command][0]).OPTIONS for name in specs(options)}


def _snake_case(word: str) -> str:
    """--batch-size=3 as --batch_size=3; values stay as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _reader(type_: Type):
    """text -> value, with errors that argparse shows in one line."""

    def read(text: str):
        try:
            return type_.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _help(spec: Spec, default: object) -> str:
    """The --help text of an option, with its default in brackets."""
    shown = spec.fill if default is None and not callable(spec.fill) else default
    text = spec.help if shown is None or shown is False else f"{spec.help} [{spec.type.show(shown)}]"
    return text.replace("%", "%%")
