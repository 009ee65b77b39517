"""Parses options that choose images of a seed, or classes: lists of numbers, ranges and names."""

import unicodedata
from collections.abc import Iterator

from tiny_diffusion.errors import OptionError, listed, not_one_of

MAX_NUMBERS = 10_000_000


def number_list(name: str, text: str) -> list[int]:
    """The numbers of a list such as 0-63 or 1,2,5-10.  name: the option, for error messages."""
    numbers = []
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise OptionError(f"--{name} {text}: {word.strip()!r} is not a number or a range such as 0-63 or 1,2,5-10.")
        if int(last or first) >= 2**63 or len(numbers) + int(last or first) - int(first) >= MAX_NUMBERS:
            raise OptionError(f"--{name} {text}: {word.strip()!r} is too large.")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def labels_of(text: str, class_cond: bool, names: list[str]) -> tuple[int, ...]:
    """The labels of classes that are given by names, numbers and ranges.

    If some class names are numbers, a number in the list means such a name; otherwise it means a label.
    """
    if not class_cond:
        raise OptionError(
            f"--classes {text} needs a model trained with --class_cond, which this one was not. Leave it out."
        )
    numbered = {int(name): label for label, name in enumerate(names) if name.isdecimal()}
    numbered = numbered or {label: label for label in range(len(names))}
    labels = []
    for word in _at_commas(unicodedata.normalize("NFC", text), names):
        if word in names:
            labels.append(names.index(word))
        elif word and all(part.isdecimal() for part in word.split("-", 1)):
            for number in number_list("classes", word):
                if number not in numbered:
                    having = f"{min(numbered)} to {max(numbered)}: {listed(names)}"
                    raise OptionError(f"--classes {text}: there is no class {number}; this model has {having}.")
                labels.append(numbered[number])
        else:
            raise OptionError(f"--classes {text}: {not_one_of(word, names)}")
    return tuple(labels)


def _at_commas(text: str, names: list[str]) -> Iterator[str]:
    """The words of a list of class names, which may hold commas, and white space at their ends, themselves."""
    rest = f"{text},"
    while rest:
        if not (named := [name for name in names if rest.startswith(f"{name},")]):
            rest = rest.lstrip()
            named = [name for name in names if rest.startswith(f"{name},")]
        word = max(named, key=len, default=rest.partition(",")[0])
        yield word if named else word.strip()
        rest = rest[len(word) + 1 :]
