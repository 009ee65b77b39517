"""From argv to the options that were given, by what config.py says of each.  Loads no torch."""

import argparse
import dataclasses
import textwrap
from difflib import get_close_matches

from tiny_diffusion.config.image_size import square
from tiny_diffusion.config.option import COLOUR, SIZE, Spec, problem, specs

GROUPS = {
    "data": "data",
    "diffusion": "the noising process and what the network learns",
    "network": "the network",
    "run": "the run",
    "output": "what is written",
    "start": "starting, going on",
}


def parse(argv: list[str], program: str, description: str, *option_sets: type, aliases=None) -> dict[str, object]:
    """The options that were given, by name; those that were not are absent.

    option_sets: dataclasses of config.py.  aliases: other spellings of an option, by name.
    Ends the process with one line and exit code 2 for an option that is unknown or out of range.
    """
    parser = _Parser(
        prog=program,
        description=textwrap.dedent(description).strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups = {}
    for options in option_sets:
        defaults = {field.name: field.default for field in dataclasses.fields(options)}
        for name, spec in specs(options).items():
            place = parser
            if len(option_sets) > 1 or spec.group != "run":
                place = groups.setdefault(spec.group, None) or parser.add_argument_group(GROUPS[spec.group])
                groups[spec.group] = place
            flags = [f"--{name}", *(f"--{alias}" for alias in (aliases or {}).get(name, ()))]
            if spec.kind is bool:
                place.add_argument(*flags, action="store_true", help=_help(spec, defaults[name]))
            else:
                optional = {"nargs": "?", "const": ""} if spec.bare else {}
                place.add_argument(
                    *flags, type=_converter(spec), metavar=_metavar(spec), help=_help(spec, defaults[name]), **optional
                )
    return vars(parser.parse_args([_snake_case(word) for word in argv]))


class _Parser(argparse.ArgumentParser):
    def parse_args(self, argv):
        given, unknown = self.parse_known_args(argv)
        if unknown:
            # Without the dashes, which would make any two short names look alike.
            names = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
            near = get_close_matches(unknown[0].lower().lstrip("-").split("=")[0], names, n=1)
            hint = f"Did you mean --{near[0]}?" if near and unknown[0].startswith("-") else "See --help."
            self.error(f"{unknown[0]!r} is not an option here. {hint}")
        return given

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _snake_case(word: str) -> str:
    """--batch-size=3 as --batch_size=3; values stay as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _converter(spec: Spec):
    """text -> value, checked; what is wrong with it becomes argparse's one line."""

    def convert(text: str):
        if not (text or spec.bare):
            raise argparse.ArgumentTypeError("'' is empty. Give it a value, or leave it out")
        try:
            if isinstance(spec.kind, tuple):
                value = () if text.strip() == "none" else tuple(spec.kind[0](word) for word in text.split(","))
            elif spec.kind == SIZE:
                sides = tuple(int(side) for side in text.lower().split("x"))
                value = sides[0] if len(sides) == 1 else square(sides)
            else:
                value = text if spec.kind == COLOUR else spec.kind(text)
        except ValueError:
            if spec.kind == SIZE:
                what = "is not a whole number of pixels such as 64, nor a size such as 96x64"
                raise argparse.ArgumentTypeError(f"{text!r} {what}") from None
            kind = spec.kind[0] if isinstance(spec.kind, tuple) else spec.kind
            several = (
                "list of numbers such as 1,2"
                if isinstance(spec.kind, tuple)
                else f"{'whole ' if kind is int else ''}number"
            )
            raise argparse.ArgumentTypeError(f"{text!r} is not a {several}") from None
        if wrong := problem(spec, value):
            raise argparse.ArgumentTypeError(wrong)
        return value

    return convert


def _metavar(spec: Spec) -> str:
    if spec.metavar:
        return spec.metavar
    if spec.choices:
        return "{" + ",".join(spec.choices) + "}"
    if isinstance(spec.kind, tuple):
        return "N,N" if spec.kind[0] is int else "NAME,NAME"
    return {int: "N", float: "X", SIZE: "N|HxW", COLOUR: "COLOUR"}.get(spec.kind, "PATH")


def _help(spec: Spec, default: object) -> str:
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    text = spec.help if default is None or spec.kind is bool else f"{spec.help} [{shown}]"
    return text.replace("%", "%%")
