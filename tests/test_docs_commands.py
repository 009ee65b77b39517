"""Every command line of the README, the docs, the examples and --help runs in a short form and writes its files.

SHORT says how a command is shortened, NOT_RUN which lines are left out and why.  Each line runs in a copy of one small
workspace, which has what the texts take for granted: data sets, trained models, images to edit.
"""

import importlib
import importlib.util
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import OPTIONS, call
from command_lines import FENCED, Line, lines_of_help, lines_of_markdown
from image_helpers import smooth, write
from process_helpers import run_together
from set_helpers import IDX_SETS, make_set, write_cifar10, write_flowers102, write_idx

from tiny_diffusion.cli import COMMANDS
from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.runs.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
SHORT = {  # command, a word: the options added to a command line with this word; the last value of an option counts
    ("train", ""): "--max_steps 2 --batch_size 8 --base_channels 8 --num_samples 2",
    ("train", "--eval_interval"): "--eval_images 100",
    ("sample", "--num_images"): "--num_images 4",
    ("sample", "--steps"): "--steps 2",
    ("sample", "--timesteps"): "--steps 2",
    ("distill", ""): "--max_steps 2 --num_samples 2",
    ("evaluate", ""): "--num_images 20",
    ("evaluate", "--steps"): "--steps 2,3",
    ("benchmark", ""): "--seconds 0.1 --batch_size 4 --base_channels 8 --num_images 2",
    ("classifier", ""): "--epochs 1",
    ("", "examples/from_scratch.py"): "--steps 3",
    ("", "benchmarks/editing.py"): "--num_images 2 --half_steps 2",
    ("", "benchmarks/precision.py"): "--only mnist --threads 1 --rounds 2 --batch_size 2",
}
NOT_RUN = {  # the beginning of a command line: why it is not run
    "make demo": "installs the package; the commands of its recipe are run",
    "make test": "it is these tests",
    "python -m venv": "makes an environment for what is not installed here",
    "py -m venv": "the same",
    "python -m pip": "downloads",
    "pip install": "downloads",
    "uv tool install": "downloads",
    "python -m ruff": "checks the style of the sources; CI runs it",
    "python -m tiny_diffusion.page.assemble": "writes into the package; test_page.py assembles the kernel",
    "python benchmarks/peers.py": "trains with other libraries, each in processes of its own",
    "python benchmarks/time_to_quality.py": "trains and scores in many processes of its own",
    "torchrun --nnodes=2": "needs two machines",
    "torchrun --max_restarts=3": "names an option and no command",
}
NEEDS = {  # a word of a line: the package without which it is skipped
    "tensorboard": "tensorboard",
    "diffusers": "diffusers",
    "ddpm-cifar10-32": "diffusers",
    "onnx": "onnxscript",
    "--print_completion": "shtab",
}


def all_lines() -> dict[str, Line]:
    """The command lines of all texts, each once."""
    texts = [path.read_text("utf-8") for path in (ROOT / "README.md", *DOCS)]
    recipes = (ROOT / "Makefile").read_text("utf-8").replace("$(RUN)", "python")
    scripts = [path.read_text("utf-8") for path in (*ROOT.glob("*.py"), *(ROOT / "examples").glob("*.py"))]
    modules = {command: importlib.import_module(module) for command, (module, _) in COMMANDS.items()}
    helps = [m.DESCRIPTION.replace("PROGRAM", f"python -m tiny_diffusion {c}") for c, m in modules.items()]
    helps.append(importlib.import_module("tiny_diffusion.cli.completion").DESCRIPTION)
    lines = [line for text in texts for line in lines_of_markdown(text)]
    lines += [line for text in (recipes, *scripts, *helps) for line in lines_of_help(text)]
    return {line.text: line for line in lines}


LINES = all_lines()
RUNNABLE = [line for text, line in LINES.items() if not text.startswith(tuple(NOT_RUN))]
# sample.py and `tiny-diffusion sample` with the same words are the same command, and run once.
DIFFERENT = {(line.command, line.words, line.processes): line for line in RUNNABLE}
RUN = {line.text: line for line in DIFFERENT.values()}


def shortened(line: Line) -> list[str]:
    added = [shlex.split(SHORT[row]) for row in SHORT if _is_for(row, line)]
    return [*line.words, *sum(added, [])]


def _is_for(row: tuple[str, str], line: Line) -> bool:
    """Whether a row of SHORT is about this command line."""
    command, word = row
    return line.command == command and (not word or word in line.words)


def written_by(command: str, words: list[str]) -> list[Path]:
    """The files that a command of ours writes: those that its words name or, without them, those that the docs name."""
    given = parse(words, command, "", *OPTIONS[command], aliases={"steps": ("timesteps",)})
    named = [Path(given[name]) for name in ("output", "save_path", "json", "save_config") if name in given]
    if command in ("train", "distill"):
        folder = Path(given.get("output_dir", "outputs"))
        return named if "dry_run" in given else [*named, *(folder / name for name in RUN_FILES)]
    if not named and command in DEFAULT_OUTPUT:
        named = [DEFAULT_OUTPUT[command](given)]
    frames = [named[0].parent / "intermediate" / "step_0000.png"] if "show_intermediate" in given else []
    return [*named, *frames]


def run_of(given: dict[str, object]) -> Path:
    """The folder of the run that --run or --checkpoint names."""
    path = Path(given.get("run") or given["checkpoint"])
    return path.parent if path.suffix == ".pt" else path


RUN_FILES = ("model_final.pt", "log.jsonl", "training_loss.png", "latest.png", "samples", "checkpoints")
DEFAULT_OUTPUT = {  # by the options that were given
    "sample": lambda given: run_of(given) / "generated_samples.png",
    "report": lambda given: run_of(given) / "report.html",
    "evaluate": lambda given: Path("outputs" if "images" in given else run_of(given), "evaluation", "evaluation.json"),
    "classifier": lambda given: Path(f"{given.get('dataset', 'mnist')}-classifier.safetensors"),
    "visualize": lambda given: Path("outputs", "schedules.png" if "what" in given else "forward_diffusion.png"),
}


# The workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with everything that the docs take for granted, to be copied."""
    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("tiny_diffusion.runs.images.VALIDATION_IMAGES", 8)
        write_data(patch)
        write_images()
        train("outputs/mnist", "--dataset mnist --minutes 10")
        shutil.copytree("outputs/mnist", "outputs", dirs_exist_ok=True)
        finish(Path("outputs/mnist/model_final.pt"))
        shutil.copy("outputs/mnist/model_final.pt", "outputs/mnist/checkpoints/model_epoch_005.pt")
        assert call("sample", "--checkpoint", "outputs/mnist", "--num_images", 20, "--output", "samples.npz") == 0
        train("outputs/fashion", "--dataset fashion_mnist")
        train("outputs/digits", "--dataset digits")
        train("outputs/demo", "--dataset digits")
        train("outputs/photos", "--dataset folder --data_dir photos --image_size 64")
        for name in ("mnist2", "two"):
            words = line_like(f"distill --checkpoint outputs/mnist/model_final.pt --output_dir outputs/{name}")
            assert call("distill", *words) == 0
        train("plain", "--dataset cifar10 --patch_size 1 --no_class_cond --prediction epsilon --timesteps 50")
        if importlib.util.find_spec("diffusers"):
            words = "--checkpoint plain --format diffusers --output ddpm-cifar10-32"
            assert call("export", *words.split()) == 0
            words = "--checkpoint outputs/mnist --format diffusers --output outputs/mnist/diffusers"
            assert call("export", *words.split()) == 0
        words = "classifier --dataset folder --data_dir sorted --image_size 64 --output sorted.safetensors"
        assert call("classifier", *line_like(words)) == 0
        words = line_like("train --preset tiny --schedule cosine --save_config run.json --dry_run")
        assert call("train", *words) == 0
        yield folder


def write_data(patch) -> None:
    for name in IDX_SETS.values():
        for split, seed in (("train", 1), ("t10k", 2)):
            write_idx(Path("data", name, "raw"), split, *make_set(300, seed))
    write_cifar10(Path("data"), patch)
    write_flowers102(Path("data"), patch)


def write_images() -> None:
    for number in range(12):
        write(f"photos/{'ab'[number % 2]}/{number}.png", smooth(100, 110, number))
        write(f"sorted/{('train', 'test')[number // 9]}/{'ab'[number % 2]}/{number}.png", smooth(100, 110, number))
    for number in range(3):
        for folder in ("digits", "drawn", "real", "samples"):
            write(f"{folder}/{number}.png", smooth(28, 28, number)[..., 0])
    shutil.copy("digits/0.png", "digit.png")
    mask = np.zeros((28, 28), np.uint8)
    mask[14:] = 255
    write("mask.png", mask)


def line_like(text: str) -> list[str]:
    """The words of a command of ours in its short form, as if a text named it."""
    command, *words = text.split()
    return shortened(Line(text, command, tuple(words)))


def train(folder: str, words: str) -> None:
    assert call("train", *line_like(f"train {words} --output_dir {folder}")) == 0


def finish(path: Path) -> None:
    """Marks a run as ended, so that nothing waits for it."""
    checkpoint = load_checkpoint(path)
    about = {key: value for key, value in checkpoint.about.items() if key not in ("format", "sha256")}
    save_checkpoint(path, about | {"finished": True}, checkpoint.tensors)


@pytest.fixture
def copy(workspace, tmp_path, monkeypatch, nothing_from_outside):
    """A copy of the workspace, as the working folder."""
    shutil.copytree(workspace, tmp_path / "work", symlinks=True)
    times = dict.fromkeys(("help_seconds", "import_torch_seconds", "first_step_seconds"), 1.0)
    monkeypatch.setattr("tiny_diffusion.benchmarking.speed.start_up_times", lambda: times)  # of nine fresh processes
    monkeypatch.setattr("tiny_diffusion.runs.images.VALIDATION_IMAGES", 8)
    monkeypatch.chdir(tmp_path / "work")


# The laws


def test_every_line_left_out_is_in_a_text_and_most_lines_are_run():
    """No row of the tables is stale."""
    assert not [start for start in NOT_RUN if not any(text.startswith(start) for text in LINES)]
    assert not [row for row in SHORT if not any(_is_for(row, line) for line in RUN.values())]
    assert {line.command for line in RUN.values()} >= set(COMMANDS) and len(RUN) >= 70


@pytest.mark.parametrize("text", RUN, ids=str)
def test_the_command_runs_and_writes_its_files(text, cli, copy, request):
    line = RUN[text]
    for word, module in NEEDS.items():
        if word in text:
            pytest.importorskip(module)
    words = shortened(line)
    files = written_by(line.command, words) if line.command in COMMANDS and "--help" not in words else []
    if "--resume" not in words:
        for path in files:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if line.processes > 1:
        run_in_ranks(line, words, request.getfixturevalue("warm"))
    elif line.command:
        assert cli.works(line.command, *words).out or files
    else:
        run_script(words, request.getfixturevalue("monkeypatch"))
    assert [str(path) for path in files if not path.exists()] == []


def run_in_ranks(line: Line, words: list[str], warm) -> None:
    """As torchrun would start it: forks that know of one another."""
    ended = run_together(warm, line.command, *words, size=line.processes, faults=(("work_in", str(Path.cwd())),))
    assert set(ended.codes) == {0}, ended.said


def run_script(words: list[str], monkeypatch) -> None:
    """python SCRIPT ..., in this process."""
    program, script, *options = words
    assert program == "python"
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("name", ["python.md", "other_programs.md"])
def test_the_python_of_the_docs_runs(name, copy, capsys):
    """The blocks of a page one after the other, as a reader would type them."""
    if name == "other_programs.md":
        pytest.importorskip("diffusers")
    names = {}
    for language, block in FENCED.findall((ROOT / "docs" / name).read_text("utf-8")):
        if language == "python":
            exec(block, names)
    assert len(names["images"]) == 16
