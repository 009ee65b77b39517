"""The command lines of the docs: how they are found in a text, and what each asks for.

In Markdown, a command line is a line of a fenced block without a language, or code between backticks, that begins with
a program of START.  In a help text it is any line that begins so.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from tiny_diffusion.cli import COMMANDS

SCRIPTS = {"train.py": "train", "sample.py": "sample", "visualize_diffusion.py": "visualize"}
START = re.compile(r"(?:\S*[/\\])?(?:python|py|pip|torchrun|tiny-diffusion|make|uv|uvx|pipx|git) ")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TORCHRUN_VALUES = re.compile(r"--\w+=\S+|--standalone")


class Line(NamedTuple):
    """A command line.  command: ours, with its words; or "" for another program, whose words are then all of them."""

    text: str
    command: str
    words: tuple[str, ...]
    processes: int = 1


def lines_of_markdown(text: str) -> list[Line]:
    fenced = "".join(block for language, block in FENCED.findall(text) if not language)
    between = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCED.sub("", text))]
    return [line_of(line) for line in (*fenced.splitlines(), *between) if START.match(line)]


def lines_of_help(text: str) -> list[Line]:
    """Of a docstring or a description, where two spaces begin the remark on a command."""
    lines = [re.split(r" {2,}", line.strip())[0] for line in text.splitlines()]
    return [line_of(line) for line in lines if START.match(line)]


def line_of(text: str) -> Line:
    """A command line and what it asks for.  Its comment and what > redirects are left out."""
    words = shlex.split(text.replace("\\", "/"), comments=True)
    words = words[: words.index(">")] if ">" in words else words
    words = words[3:] if words[:2] == ["uvx", "--from"] else words  # uvx --from . PROGRAM
    program, *rest = [Path(words[0]).name, *words[1:]]
    text = " ".join([program, *map(shlex.quote, rest)])
    processes = 1
    if program == "torchrun":
        rest = [word for word in rest if not TORCHRUN_VALUES.fullmatch(word)]
        processes = int((re.search(r"--nproc_per_node=(\d+)", text) or [0, 1])[1])
    if rest[:1] and rest[0] in SCRIPTS:
        return Line(text, SCRIPTS[rest[0]], tuple(rest[1:]), processes)
    if rest[:2] == ["-m", "tiny_diffusion"] and len(rest) > 2:
        rest = rest[2:]
    elif program != "tiny-diffusion":
        return Line(text, "", (program, *rest))
    command = rest[0] if rest[0] in COMMANDS or rest[0].startswith("--") else ""
    return Line(text, command, tuple(rest[1:] if command else rest), processes)
