"""Layers: the import order of the folders, read off the imports, and nothing heavy before it is needed.

ORDER is the README's sentence, word for word.  A new folder has to be given its place in both.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import TINY, call

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tiny_diffusion"
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))

ORDER = (
    "errors, files, randomness < runtime < diffusion < data < config < models < training < runs "
    "< evaluation, benchmarking, visuals, export, page < cli"
)
RANKS = [[name.strip() for name in group.split(",")] for group in ORDER.split("<")]
RANK_OF = {name: rank for rank, group in enumerate(RANKS) for name in group}
NO_TORCH = ("errors", "files", "config", "cli", "data.catalog", "runs.lock")
NO_TORCH += ("runtime.cpu", "runtime.program", "runtime.ranks")
ON_TENSORS = (
    "process",
    "guidance",
    "editing",
    "edits",
    "request",
    "sampling",
)  # the files of diffusion/ that work on torch tensors
HEAVY = {"torchvision", "matplotlib", "imageio", "sklearn", "PIL", "diffusers", "safetensors", "scipy", "onnx"}


def folder_of(module: str) -> str:
    """The folder, or the file at the top of the package, that `tiny_diffusion.some.module` belongs to."""
    return module.removeprefix("tiny_diffusion").removeprefix(".").split(".")[0] or "__init__"


def is_read_by_help(module: str) -> bool:
    return any(f"{module}.".startswith(f"tiny_diffusion.{name}.") for name in NO_TORCH)


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


@named([file for file in FILES if file.parent != PACKAGE or not file.name.startswith("__")])
def test_a_file_imports_only_from_its_own_folder_and_from_folders_before_it(file):
    own = folder_of(module_of(file))
    assert own in RANK_OF, f"{own} has no place in the order"
    for name in ours(imports_of(file)):
        other = folder_of(name)
        neighbours = other in (own, "__init__") or {own, other} <= set(RANKS[0])  # which stand in one folder
        assert neighbours or RANK_OF[other] < RANK_OF[own], f"{own} imports {name}"


def test_the_readme_states_the_order():
    assert ORDER in " ".join((ROOT / "README.md").read_text("utf-8").split())


def test_no_file_imports_in_a_circle():
    """Within a folder too: taking away files that import nothing of what is left ends with none left."""
    modules = {module_of(file) for file in FILES}
    left = {
        module_of(file): {name for name in ours(imports_of(file)) if name in modules} - {module_of(file)}
        for file in FILES
    }
    while left:
        free = {module for module, needed in left.items() if not needed & left.keys()}
        assert free, left
        left = {module: needed for module, needed in left.items() if module not in free}


def test_three_modules_stand_beside_the_folders():
    files = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert files == {"errors", "files", "randomness"}


@named([file for file in FILES if folder_of(module_of(file)) == "diffusion" and file.stem not in ON_TENSORS])
def test_the_mathematics_needs_nothing_but_numpy_and_the_standard_library(file):
    assert third_party(imports_of(file)) <= {"numpy"}


@named(
    [file for file in FILES if any(f"{module_of(file)}.".startswith(f"tiny_diffusion.{name}.") for name in NO_TORCH)]
)
def test_what_help_reads_imports_no_torch(file):
    assert third_party(imports_of(file, inside_functions=False)) <= {"numpy"}


@named(FILES)
def test_heavy_libraries_are_imported_inside_the_function_that_needs_them(file):
    assert not third_party(imports_of(file, inside_functions=False)) & HEAVY


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


def test_help_answers_before_torch_could_even_load():
    """Of every command, in one process: tests/test_cli_help.py."""
    loaded = loaded_by("-m", "tiny_diffusion", "--help")
    assert "tiny_diffusion" in loaded
    assert not loaded & (HEAVY | {"torch"})


@named(SCRIPTS)
def test_the_help_of_a_script_loads_no_torch(file):
    loaded = loaded_by(file.name, "--help")
    assert "tiny_diffusion" in loaded
    assert not loaded & (HEAVY | {"torch"})


def test_importing_the_package_loads_nothing_but_the_standard_library():
    assert not loaded_by("-c", "import tiny_diffusion") & (HEAVY | {"torch", "numpy"})


def train_and_sample_without_the_compiler(folder):
    for argv in (
        ["train", *TINY, "--max_steps", 1, "--output_dir", folder],
        ["sample", "--checkpoint", folder, "--num_images", 1, "--steps", 1],
    ):
        assert call(*argv) == 0
    assert not {"torch._dynamo", "torch._inductor", "sympy"} & sys.modules.keys()


@pytest.mark.slow
def test_a_run_that_compiles_nothing_and_its_samples_load_no_compiler(warm, tmp_path):
    """Torch's compiler takes longer to import than torch itself."""
    running = warm.start_function(train_and_sample_without_the_compiler, str(tmp_path / "run"), faults=(("no_plots",),))
    assert warm.wait(running) == 0, running.said()


def test_the_package_resolves_its_public_names_when_they_are_asked_for():
    import tiny_diffusion

    assert "Diffusion" in dir(tiny_diffusion)
    assert all(getattr(tiny_diffusion, name) is not None for name in tiny_diffusion.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tiny_diffusion.nonsense
