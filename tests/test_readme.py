"""The README: its tree names every file, and what a learner reads is short."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PACKAGE = ROOT / "tiny_diffusion"
MAX_LINES = 1400  # of the files that a learner reads


def tree() -> str:
    """The block that shows the folders."""
    return next(block for block in README.split("```") if "tiny_diffusion/\n" in block)


def reading_list() -> list[str]:
    """The files of the table that begins at the noise and ends at an image."""
    rows = README.split("| file | what it adds |")[1].split("```")[0].splitlines()
    return [name for row in rows for name in re.findall(r"`([a-z_/]+\.py)`", row.split("|")[1] if "|" in row else "")]


def test_the_tree_names_every_file_of_the_package():
    files = {file.name for file in PACKAGE.rglob("*.py") if not file.name.startswith("__")}
    commands = {file.name for file in (PACKAGE / "cli").glob("*.py")}  # a file per command, says the tree
    assert not [name for name in sorted(files - commands) if name not in tree()]


def test_the_tree_names_no_file_that_is_not_there():
    there = {file.name for file in ROOT.rglob("*.py") if ".venv" not in file.parts}
    assert set(re.findall(r"\w+\.py", tree())) <= there


def test_what_a_learner_reads_is_short_and_goes_from_noise_to_image():
    files = reading_list()
    assert files[0] == "diffusion/levels.py" and files[-1] == "diffusion/sampling.py" and len(set(files)) == len(files)
    lines = sum(len((PACKAGE / file).read_text("utf-8").splitlines()) for file in files)
    assert lines <= MAX_LINES, lines


def test_every_link_to_a_file_resolves():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
