"""Layers: every file imports only from what stands above it, and nothing heavy before it is needed.

The table is DESIGN.md's.  A new file or folder of the package has to be given a place in it.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_diffusion.cli import COMMANDS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tiny_diffusion"
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))

NO_TORCH = {
    "errors", "machine", "run_lock", "core", "data.catalog", "options", "presets", "checks", "image_sizes", "config",
}  # fmt: skip
WITH_TORCH = NO_TORCH | {"randomness", "models", "diffusion"}
FILES_AND_PROCESSES = WITH_TORCH | {"data", "checkpoint", "distributed", "memory", "job_store", "run_folder"}
EVERYTHING_BUT_TRAINING = FILES_AND_PROCESSES | {"sampling"}
MAY_IMPORT = {  # besides itself
    "errors": set(),
    "machine": set(),
    "run_lock": {"errors"},
    "core": set(),
    "data.catalog": {"errors"},
    "options": {"errors", "core", "data.catalog"},
    "presets": set(),
    "checks": {"errors", "core", "data.catalog", "options"},
    "image_sizes": set(),
    "config": NO_TORCH,
    "randomness": {"errors"},
    "models": {"errors"},
    "memory": set(),
    "diffusion": NO_TORCH | {"randomness"},
    "data": FILES_AND_PROCESSES,
    "checkpoint": FILES_AND_PROCESSES,
    "distributed": FILES_AND_PROCESSES,
    "job_store": set(),
    "run_folder": FILES_AND_PROCESSES,
    "sampling": FILES_AND_PROCESSES,
    "training": FILES_AND_PROCESSES | {"sampling"},
    "evaluation": EVERYTHING_BUT_TRAINING,
    "speed": EVERYTHING_BUT_TRAINING | {"training"},
    "visuals": EVERYTHING_BUT_TRAINING,
    "export": EVERYTHING_BUT_TRAINING,
    "cli": EVERYTHING_BUT_TRAINING | {"training", "evaluation", "speed", "visuals", "export"},
    "__init__": set(),
    "__main__": {"cli"},
}
HEAVY = {"torchvision", "matplotlib", "imageio", "sklearn", "PIL", "diffusers", "safetensors", "scipy", "onnx"}


def part_of(module: str) -> str:
    """The row of the table that `tiny_diffusion.some.module` belongs to."""
    path = module.removeprefix("tiny_diffusion").removeprefix(".")
    return path if path in MAY_IMPORT else path.split(".")[0] or "__init__"


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, inside_functions: bool = True) -> set[str]:
    """The dotted names that a file imports; those of `from package import module` with the module.

    inside_functions False: only what importing the file loads, which leaves out what is for type checkers too.
    """
    found, nodes = set(), [ast.parse(file.read_text("utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: write imports in full"
            for alias in node.names:
                if (node.module, alias.name) == ("tiny_diffusion", "__version__"):
                    continue  # a constant, which loads nothing
                is_module = (ROOT / node.module.replace(".", "/") / f"{alias.name}.py").exists()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
        elif inside_functions or not (is_function(node) or is_for_type_checkers(node)):
            nodes.extend(ast.iter_child_nodes(node))
    return found


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "tiny_diffusion"}


def third_party(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names - ours(names)} - sys.stdlib_module_names


def named(files):
    return pytest.mark.parametrize("file", files, ids=lambda file: str(file.relative_to(ROOT)))


@named(FILES)
def test_every_file_has_its_place_in_the_table(file):
    assert part_of(module_of(file)) in MAY_IMPORT


@named(FILES)
def test_a_file_imports_only_from_what_stands_above_it(file):
    own = part_of(module_of(file))
    assert {part_of(name) for name in ours(imports_of(file))} <= MAY_IMPORT.get(own, set()) | {own}


def test_the_table_has_no_circle_but_among_files_and_processes():
    """Following the rows never leads back, so no two layers can come to need each other."""
    same_row = FILES_AND_PROCESSES - WITH_TORCH
    after = {part: allowed - {part} - (same_row if part in same_row else set()) for part, allowed in MAY_IMPORT.items()}
    while after:
        free = {part for part, allowed in after.items() if not allowed & after.keys()}
        assert free, after
        after = {part: allowed for part, allowed in after.items() if part not in free}


@named([file for file in FILES if part_of(module_of(file)) == "core"])
def test_the_core_needs_nothing_but_numpy_and_the_standard_library(file):
    assert third_party(imports_of(file)) <= {"numpy"}


@named([file for file in FILES if part_of(module_of(file)) in NO_TORCH | {"__init__", "__main__"}])
def test_what_help_reads_imports_no_torch(file):
    assert third_party(imports_of(file, inside_functions=False)) <= {"numpy"}


@named(FILES)
def test_heavy_libraries_are_imported_inside_the_function_that_needs_them(file):
    assert not third_party(imports_of(file, inside_functions=False)) & HEAVY


@named(FILES)
def test_only_the_command_line_knows_the_command_line(file):
    knows = "tiny_diffusion.cli" in {".".join(name.split(".")[:2]) for name in imports_of(file)}
    assert not knows or part_of(module_of(file)) in ("cli", "__main__")


@named(SCRIPTS)
def test_the_scripts_only_call_the_command_line(file):
    assert imports_of(file) == {"sys", "tiny_diffusion.cli"}


def loaded_by(*command):
    """The top-level modules that a run of Python loads."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize("command", ["--help", *(f"{name} --help" for name in COMMANDS)])
def test_help_answers_before_torch_could_even_load(command):
    loaded = loaded_by("-m", "tiny_diffusion", *command.split())
    assert "tiny_diffusion" in loaded
    assert not loaded & (HEAVY | {"torch"})


@named(SCRIPTS)
def test_the_help_of_a_script_loads_no_torch(file):
    loaded = loaded_by(file.name, "--help")
    assert "tiny_diffusion" in loaded
    assert not loaded & (HEAVY | {"torch"})


def test_importing_the_package_loads_nothing_but_the_standard_library():
    assert not loaded_by("-c", "import tiny_diffusion") & (HEAVY | {"torch", "numpy"})


def test_the_package_resolves_its_public_names_when_they_are_asked_for():
    import tiny_diffusion

    assert "Diffusion" in dir(tiny_diffusion)
    assert all(getattr(tiny_diffusion, name) is not None for name in tiny_diffusion.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tiny_diffusion.nonsense
