"""The docs and the README: every command parses, every link resolves, every quote of code is where its link points."""

import importlib
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from tiny_diffusion.cli import COMMANDS
from tiny_diffusion.cli.arguments import parse

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", ROOT / "tests" / "README.md", *DOCS]
LINKS = runpy.run_path(str(ROOT / "docs" / "line_links.py"))
SCRIPTS = {"train.py": "train", "sample.py": "sample", "visualize_diffusion.py": "visualize"}
every_text = pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """(command, its words) of each command of ours in a text, whether on a line of its own or between backticks."""
    found = []
    for line in re.findall(r"(?:torchrun|python|tiny-diffusion) [^`\n]*", text):
        words = shlex.split(line.replace("\\", "/"), comments=True)
        for script, command in SCRIPTS.items():
            if script in words:
                found.append((command, words[words.index(script) + 1 :]))
        rest = words[words.index("tiny_diffusion") + 1 :] if "tiny_diffusion" in words else []
        rest = words[1:] if words[0] == "tiny-diffusion" else rest
        if rest and rest[0] in COMMANDS:
            found.append((rest[0], rest[1:]))
    return found


@every_text
def test_every_command_parses(text):
    aliases = {"steps": ("timesteps",)}
    for command, words in commands_of(text.read_text("utf-8")):
        words = [word for word in words if word != "..."]
        sets = importlib.import_module(COMMANDS[command][0]).OPTIONS
        parse(words, command, "", *sets, aliases=aliases if command == "sample" else None)


def test_commands_are_found():
    text = "`python train.py --dataset digits`, then\npython -m tiny_diffusion info x.pt   # what it holds\n"
    assert commands_of(text) == [("train", ["--dataset", "digits"]), ("info", ["x.pt"])]
    assert len(commands_of((ROOT / "README.md").read_text("utf-8"))) >= 15


@every_text
def test_every_relative_link_resolves(text):
    for target in re.findall(r"\]\(([^)\s]+)\)", text.read_text("utf-8")):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            there = text.parent / path if path else text
            assert there.exists(), target
            if anchor and not re.fullmatch(r"L\d+", anchor):
                assert anchor in headings(there), target


def headings(path: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("text", DOCS, ids=lambda path: path.name)
def test_every_quote_of_code_stands_where_its_link_points(text):
    """python docs/line_links.py sets the numbers again where code has moved."""
    written = text.read_text("utf-8")
    assert LINKS["with_right_numbers"](written, text.parent) == written


def test_the_tour_quotes_every_part_of_the_method():
    text = (ROOT / "docs" / "how_it_works.md").read_text("utf-8")
    assert len(LINKS["QUOTE"].findall(text)) == text.count("```python") >= 15
    files = ("process", "schedules", "predictions", "timesteps", "samplers", "grids", "guidance")
    assert not [name for name in files if f"diffusion/{name}.py#L" not in text]


def test_moved_code_is_found_again_and_changed_code_is_not(tmp_path):
    folder = tmp_path / "docs"
    (tmp_path / "tiny_diffusion").mkdir()
    folder.mkdir()
    (tmp_path / "tiny_diffusion" / "a.py").write_text("def f():\n    x = 1\n    return x\n")
    link = "[a](../tiny_diffusion/a.py#L7)\n\n```python\nx = 1\nreturn x\n```\n"
    assert LINKS["with_right_numbers"](link, folder) == link.replace("L7", "L2")
    with pytest.raises(ValueError, match="does not hold"):
        LINKS["with_right_numbers"](link.replace("x = 1", "x = 2"), folder)


def test_pictures_of_the_docs_are_small():
    assert not [path.name for path in (ROOT / "docs").glob("*.png") if path.stat().st_size > 250_000]


def test_the_notebook_holds_only_what_anybody_can_run():
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text("utf-8"))
    assert notebook["nbformat"] == 4
    assert len(json.dumps(notebook)) < 400_000
    assert not [
        cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "/work" in "".join(cell["source"])
    ]


NEEDS_FILES = {"--init", "--inpaint", "--invert", "--guide_checkpoint"}


@pytest.mark.slow
@pytest.mark.parametrize("text", [ROOT / "README.md", *DOCS], ids=lambda path: path.name)
def test_the_commands_that_sample_run_in_short(text, cli, loud):
    """On a small model, with few images and steps."""
    short = {"--checkpoint": str(loud), "--num_images": "4", "--steps": "2", "--timesteps": "2", "--frames": "3"}
    for command, words in commands_of(text.read_text("utf-8")):
        if command == "sample" and not NEEDS_FILES & set(words):
            pairs = zip(["", *words], words, strict=False)
            cli.works(command, *(short.get(before, word) for before, word in pairs))
