"""The docs and the README: every command parses, every link resolves, every quote of code is where its link points."""

import json
import re
import runpy
from pathlib import Path

import pytest
from cli_helpers import OPTIONS
from command_lines import lines_of_help, lines_of_markdown

from tiny_diffusion.cli import COMMANDS
from tiny_diffusion.cli.arguments import parse

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", ROOT / "tests" / "README.md", *DOCS]
LINKS = runpy.run_path(str(ROOT / "docs" / "line_links.py"))
every_text = pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))


@every_text
def test_every_command_parses(text):
    aliases = {"steps": ("timesteps",)}
    for line in lines_of_markdown(text.read_text("utf-8")):
        if line.command in COMMANDS:
            words = [word for word in line.words if word not in ("...", "--help")]
            sets = OPTIONS[line.command]
            parse(words, line.command, "", *sets, aliases=aliases if line.command == "sample" else None)


SOME_TEXT = r"""
Say `python train.py
--dataset digits`, then

```
.venv\Scripts\python -m tiny_diffusion info x         # its contents
torchrun --standalone --nproc_per_node=2 sample.py --steps 5 > log
```

```python
python = "no command"
```
"""


def test_commands_are_found_in_blocks_and_between_backticks():
    found = [(line.command, line.words, line.processes) for line in lines_of_markdown(SOME_TEXT)]
    wanted = [("info", ("x",), 1), ("sample", ("--steps", "5"), 2), ("train", ("--dataset", "digits"), 1)]
    assert found == wanted
    assert len(lines_of_markdown((ROOT / "README.md").read_text("utf-8"))) >= 25


def test_a_remark_in_a_help_text_is_no_part_of_the_command():
    found = lines_of_help("  python train.py --seed 3    another seed\nSee python train.py too.")
    assert [(line.command, line.words) for line in found] == [("train", ("--seed", "3"))]


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
