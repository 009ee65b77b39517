"""What an option is: its type, default, help, what it needs, and what checkpoints without it mean.

An option is a field of a dataclass, made by `option`.  The command line, `--help`, configuration files, checkpoints and
every check read that one field.  Nothing here knows which options a command has.  To add a type: a subclass of `Type`.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tiny_diffusion.config.image_size import square
from tiny_diffusion.data.catalog import background_colour
from tiny_diffusion.errors import not_one_of

MIN_SIDE, MAX_SIDE = 4, 1024  # of an image, in pixels
MAX_LISTED = 8  # values of a list option
EMPTY = "'' is empty. Give it a value, or leave it out"
REQUIRED = object()  # Spec.since of an option that every checkpoint has


class Type:
    """The type of an option's values.

    metavar: the value in --help.  choices: all values, if they are few names.  bare: whether the flag may be given
    without a value, which then is the empty text.
    """

    metavar: str = ""
    choices: tuple[str, ...] = ()
    bare: bool = False

    def parse(self, text: str) -> object:
        """The value of a text on the command line.  Raises ValueError saying what is wrong with it."""
        return text

    def check(self, value: object) -> str | None:
        """What is wrong with this value, or None."""
        raise NotImplementedError

    def show(self, value: object) -> str:
        """The text that `parse` reads as this value."""
        return str(value)

    def read(self, text: str) -> object:
        """The value of a text, checked.  Raises ValueError saying what is wrong with it."""
        if not text and not self.bare:
            raise ValueError(EMPTY)
        value = self.parse(text)
        if wrong := self.check(value):
            raise ValueError(wrong)
        return value


@dataclass(frozen=True)
class Number(Type):
    """A finite number of at least low (of more than low, if open_low) and at most high."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    metavar, kind, name, finite_name = "X", float, "number", "finite number"

    def parse(self, text):
        try:
            return self.kind(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a {self.name}") from None

    def check(self, value):  # a bool is an int in Python; NaN is not below infinity
        if isinstance(value, bool) or not isinstance(value, int | self.kind) or not abs(value) < math.inf:
            return f"{value!r} is not a {self.finite_name}"
        if value <= self.low if self.open_low else value < self.low:
            return f"{value} is too small; it must be {'more than' if self.open_low else 'at least'} {self.low}"
        return f"{value} is too large; it must be at most {self.high}" if value > self.high else None

    def show(self, value):
        return str(value).removesuffix(".0")


class Int(Number):
    """A whole number from low to high."""

    metavar, kind, name, finite_name = "N", int, "whole number", "whole number"


class Choice(Type):
    """One of some names."""

    def __init__(self, choices: Iterable[str]):
        self.choices = tuple(choices)
        self.metavar = "{" + ",".join(self.choices) + "}"

    def check(self, value):
        return None if value in self.choices else not_one_of(str(value), self.choices)


@dataclass(frozen=True)
class Text(Type):
    """Any text; the empty one only if bare.  If it is a path, ~ at its beginning is the user's home."""

    metavar: str = "PATH"
    bare: bool = False

    def parse(self, text):
        return os.path.expanduser(text) if self.metavar == "PATH" else text

    def check(self, value):
        if not isinstance(value, str):
            return f"{value!r} is not a text"
        if any(letter == "\0" or "\ud800" <= letter < "\udc80" or "\udcff" < letter <= "\udfff" for letter in value):
            return f"{value!r} holds a character that no path can have"
        return None if value or self.bare else EMPTY


@dataclass(frozen=True)
class Flag(Type):
    """Whether something is done: a flag without a value.   can_be_off: whether --no_NAME turns it off."""

    can_be_off: bool = False

    def check(self, value):
        return None if isinstance(value, bool) else f"{value!r} is not true or false"


class Colour(Type):
    """A name of data.catalog.COLOURS, or #rrggbb."""

    metavar = "COLOUR"

    def check(self, value):
        return background_colour(value)[1]


@dataclass(frozen=True)
class Size(Type):
    """The size of an image: its side in pixels, or a pair (height, width), with sides from low to high."""

    low: int = MIN_SIDE
    high: int = MAX_SIDE
    metavar = "N|HxW"

    def parse(self, text):
        try:
            sides = tuple(int(side) for side in text.lower().split("x"))
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number of pixels such as 64, nor a size such as 96x64") from None
        return sides[0] if len(sides) == 1 else square(sides)

    def check(self, value):
        sides = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(side, int) for side in sides) or len(sides) != (2 if isinstance(value, tuple) else 1):
            return f"{value!r} is not a side in pixels such as 64, nor a height and width such as 96, 64"
        return _first_problem(Int(self.low, self.high), sides)

    def show(self, value):
        return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class ListOf(Type):
    """At most `longest` values of one type, between commas; `none` for an empty list."""

    item: Type
    longest: int = MAX_LISTED

    @property
    def choices(self):
        return self.item.choices

    @property
    def metavar(self):
        return self.item.metavar if self.choices else f"{self.item.metavar},{self.item.metavar}"

    def parse(self, text):
        try:
            return () if text.strip() == "none" else tuple(map(self.item.parse, text.split(",")))
        except ValueError:
            raise ValueError(f"{text!r} is not a list of numbers such as 1,2") from None

    def check(self, value):
        if not isinstance(value, tuple) or len(value) > self.longest:
            items = "numbers" if isinstance(self.item, Number) else "names"
            return f"{value!r} is not a list of at most {self.longest} {items}"
        return _first_problem(self.item, value)

    def show(self, value):
        return ",".join(map(str, value)) or "none"


def _first_problem(type_: Type, values: Iterable) -> str | None:
    return next(filter(None, map(type_.check, values)), None)


@dataclass(frozen=True)
class Need:
    """What an option needs to have an effect.

    option: the other option that decides.  met: called with the values of all options by name; whether the need is met.
    why_not: what a refusal says after "would be ignored"; a name of an option in braces stands for its value.
    """

    option: str
    met: Callable[[Mapping[str, object]], object]
    why_not: str


@dataclass(frozen=True)
class Spec:
    """Everything about an option except its name and its default.

    needs: what it needs to have an effect; None if it always has one.
    follows: another option.  If the command line changes that one, a preset's value of this option is dropped.
    fill: its value where it has an effect and was not given: a value, or a function of the values of all options.
    since: its value in checkpoints that are older than the option.  Without it, such a checkpoint is refused.
    free: whether a resumed run may change it.   group: its section of --help, a key of cli.arguments.GROUPS.
    """

    type: Type
    help: str
    needs: Need | None = None
    follows: str = ""
    fill: object = None
    since: object = REQUIRED
    free: bool = False
    group: str = ""

    def is_of_use(self, values: Mapping[str, object]) -> bool:
        """Whether the option has an effect, given the values of all options."""
        return self.needs is None or bool(self.needs.met(values))

    def filling(self, values: Mapping[str, object]) -> object:
        """The value that the option takes where it was not given, by the values of all options."""
        return self.fill(values) if callable(self.fill) else self.fill


def option(type: Type, default: object, help: str, **rest):
    """A dataclass field that is also a command-line option.  rest: see Spec."""
    return dataclasses.field(default=default, metadata={"spec": Spec(type, help, **rest)})


def again(options: type, name: str, **changes):
    """Another command's option of this name, with changes to its `default` or its Spec."""
    field = options.__dataclass_fields__[name]
    default = changes.pop("default", field.default)
    spec = dataclasses.replace(field.metadata["spec"], **{"group": "", **changes})
    return dataclasses.field(default=default, metadata={"spec": spec})


def specs(options: type) -> dict[str, Spec]:
    """The options of a dataclass by name."""
    return {field.name: field.metadata["spec"] for field in dataclasses.fields(options)}
