"""Errors that a user can cause, each with its exit code, and names in messages.

Any other error is our defect and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches

MAX_NAMED = 60  # choices in a message


class OptionError(ValueError):
    """An option that is wrong by itself, or against a readable checkpoint or folder."""

    exit_code = 2


class FileError(OSError):
    """A file, a folder, a data set or a checkpoint that is missing, unreadable, corrupt or cannot be written."""

    exit_code = 1


class DivergenceError(ArithmeticError):
    """Training or sampling that produces NaN or infinity."""

    exit_code = 1


class LostProcessError(RuntimeError):
    """Another rank of the same run has ended, or can no longer be reached."""

    exit_code = 1


def printable(text: str, max_letters: int = 80) -> str:
    """A name that came from a file, safe to print: shortened, with invisible characters escaped as in Python.

    Escape sequences, line ends and direction marks would otherwise act on the terminal.
    """
    shortened = text if len(text) <= max_letters else text[: max_letters - 1] + "…"
    joiners = "\u200c\u200d"  # invisible, but parts of words and of emoji
    return "".join(
        letter if letter.isprintable() or letter in joiners else letter.encode("unicode_escape").decode()
        for letter in shortened
    )


def not_one_of(value: str, choices: Iterable[str]) -> str:
    """The message for a value that is none of the choices.  It suggests the choice that is spelt most like it."""
    near = get_close_matches(value.lower(), lowered := {choice.lower(): choice for choice in choices}, n=1, cutoff=0.5)
    hint = f" Did you mean {lowered[near[0]]!r}?" if near else ""
    return f"{value!r} is not one of {listed(choices)}.{hint}"


def listed(choices: Iterable[str]) -> str:
    """The choices separated by commas; of more than MAX_NAMED, the first and how many follow."""
    names = list(choices)
    rest = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return ", ".join(map(printable, names[:MAX_NAMED])) + rest
