"""Shell habits: versions, completion, run folders as checkpoints, narrow terminals, no control characters in a pipe."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import OPTIONS, TINY

import tiny_diffusion
from tiny_diffusion.cli import COMMANDS
from tiny_diffusion.config.option import specs
from tiny_diffusion.diffusion.samplers import SAMPLERS

CONSOLE = "tiny-diffusion"


# Versions


@pytest.mark.parametrize("argv", [["--version"], ["-V"], *([command, "--version"] for command in COMMANDS)], ids=str)
def test_the_version_is_printed_with_that_of_torch(argv, cli):
    import torch

    printed = cli.works(*argv).out
    assert printed.startswith(f"{CONSOLE} {tiny_diffusion.__version__} (torch {torch.__version__.split('+')[0]}")
    assert printed.count("\n") == 1


# The installed program


@pytest.fixture
def console(cli, monkeypatch):
    """Commands as the installed console script starts them."""
    monkeypatch.setattr(sys, "argv", [str(Path("somewhere", "bin", CONSOLE))])
    return cli


def test_hints_and_examples_name_the_installed_program(console):
    assert f"Train one first: {CONSOLE} train --dataset digits" in console("info", "--checkpoint", "none.pt").err
    for command in COMMANDS:
        text = console(command, "--help").out
        assert "python" not in text.replace("Python", "") and f"usage: {CONSOLE} {command} " in text
        assert f"  {CONSOLE} {command} --" in text or command == "info"
    assert console("train", "--lr", 0).err.startswith(f"{CONSOLE} train: error: ")
    assert console("--help").out.startswith(f"usage: {CONSOLE} COMMAND")


# Completion

BASH_WORDS = """
source /dev/stdin <<< "$SCRIPT"
COMP_WORDS=(%s)
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_shtab_tiny_diffusion
printf '%%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts():
    pytest.importorskip("shtab", reason="shtab is an extra")
    from tiny_diffusion.cli.completion import SHELLS, script

    return {shell: script(shell) for shell in SHELLS}


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    "typed, completed",
    [
        (f"{CONSOLE} ''", set(COMMANDS)),
        (f"{CONSOLE} sam", {"sample"}),
        (f"{CONSOLE} sample --sampler ''", set(SAMPLERS)),
        (f"{CONSOLE} sample --no", set()),
        (f"{CONSOLE} train --no_class", {"--no_class_cond"}),
        (f"{CONSOLE} train --activation g", {"gelu"}),
        (f"{CONSOLE} info --", {"--help", "--checkpoint"}),
    ],
)
def test_bash_completes_commands_options_and_values(typed, completed, scripts):
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH_WORDS % typed],
        env={**os.environ, "SCRIPT": scripts["bash"]}, capture_output=True, text=True,
    )  # fmt: skip
    assert set(done.stdout.split()) == completed, done.stderr


def test_bash_completes_paths(scripts, tmp_path):
    (tmp_path / "model_final.pt").touch()
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH_WORDS % f"{CONSOLE} sample --checkpoint mod"], cwd=tmp_path,
        env={**os.environ, "SCRIPT": scripts["bash"]}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["model_final.pt"], done.stderr


@pytest.mark.skipif(not shutil.which("fish"), reason="needs fish")
def test_fish_completes_commands_options_and_values(scripts):
    for typed, completed in {f"{CONSOLE} sam": {"sample"}, f"{CONSOLE} train --activation g": {"gelu"}}.items():
        program = scripts["fish"] + f"\ncomplete -C '{typed}'"
        done = subprocess.run(["fish", "--no-config", "-c", program], capture_output=True, text=True)
        assert {line.split("\t")[0] for line in done.stdout.splitlines()} == completed, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_every_script_names_every_option_and_is_read_by_its_shell(shell, scripts, tmp_path):
    for sets in OPTIONS.values():
        for name in (name for options in sets for name in specs(options)):
            assert re.search(rf"(--|-l ){name}\b", scripts[shell]), name
    if shutil.which(shell):
        (tmp_path / "script").write_text(scripts[shell])
        done = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("argv", [["--print_completion", "bash"], ["--print-completion=fish"]], ids=str)
def test_the_completion_is_printed_by_the_program(argv, cli, scripts):
    assert cli.works(*argv).out == scripts[re.split("[ =]", " ".join(argv))[-1]] + "\n"


def test_an_unknown_shell_and_a_missing_library_are_refused_in_a_line(cli, monkeypatch):
    ended = cli("--print_completion", "elvish")
    assert ended.code == 2 and ended.err.endswith("'elvish' is not one of bash, zsh, fish. Did you mean 'fish'?\n")
    assert cli("--print_completion").code == 2
    monkeypatch.setitem(sys.modules, "shtab", None)
    ended = cli("--print_completion", "bash")
    assert (ended.code, ended.out) == (1, "") and "Run: pip install shtab" in ended.err and ended.err.count("\n") == 1


# The folder of a run where a checkpoint is wanted


@pytest.fixture
def run_folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def said(folder):
    return f"{folder}: its newest model is {folder / 'model_final.pt'}, at step 3\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["info", "--checkpoint"],
        ["sample", "--steps", 1, "--num_images", 1, "--output", "a.png", "--checkpoint"],
        ["train", "--dry_run", "--resume"],
        ["train", *TINY, "--dry_run", "--output_dir", "new", "--init_from"],
        pytest.param(
            ["distill", "--steps", 1, "--max_steps", 1, "--output_dir", "new", "--checkpoint"], marks=pytest.mark.slow
        ),
    ],
    ids=lambda argv: " ".join(map(str, argv[:2])),
)
def test_a_run_folder_stands_for_its_newest_model(argv, run_folder, cli):
    for folder in (run_folder, run_folder / "checkpoints"):
        shutil.rmtree("new", ignore_errors=True)  # of distill
        assert said(folder).replace("checkpoints/model", "model") in cli.works(*argv, folder).err


def test_samples_of_a_run_folder_lie_in_it_as_those_of_its_model_do(run_folder, cli):
    cli.works("sample", "--checkpoint", run_folder, "--steps", 1, "--num_images", 2)
    from_folder = (run_folder / "generated_samples.png").read_bytes()
    cli.works("sample", "--checkpoint", run_folder / "model_final.pt", "--steps", 1, "--num_images", 2)
    assert (run_folder / "generated_samples.png").read_bytes() == from_folder


@pytest.mark.slow
def test_the_newest_model_is_the_one_of_most_steps_that_can_be_read(run_folder, cli):
    cli.works("train", "--resume", run_folder, "--max_steps", 5)
    newest = run_folder / "model_final.pt"
    shutil.copy(newest, run_folder / "checkpoints" / "latest.pt")
    newest.write_bytes(newest.read_bytes()[:1000])
    assert (
        f"its newest model is {run_folder / 'checkpoints' / 'latest.pt'}, at step 5"
        in cli.works("info", "--checkpoint", run_folder).err
    )


def test_a_folder_that_is_no_run_is_refused_in_a_line(tmp_path, cli):
    for command in (["sample"], ["info"], ["distill"], ["evaluate"]):
        cli.refuses(1, [*command, "--checkpoint", tmp_path], f"{tmp_path} is a folder. It holds no checkpoint")


def test_python_opens_a_run_folder(run_folder):
    model = tiny_diffusion.open_model(run_folder)
    assert model.checkpoint.about["step"] == 3


# Terminals


class Terminal:
    """A terminal of some columns, as standard error; what was written to it."""

    def __init__(self, monkeypatch, columns):
        fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self.master, False)
        self.stream = open(slave, "w", encoding="utf-8")  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", self.stream)
        self.text = ""

    def read(self):
        self.stream.flush()
        while True:
            try:
                self.text += os.read(self.master, 65536).decode()
            except (BlockingIOError, OSError):
                return self.text


BAR = re.compile(r"\d+%\|")


def test_a_progress_bar_survives_a_narrow_terminal(cli, monkeypatch, trained, columns=40):
    """Each state of the bar fits into a line, so that the next one is written over it; without colours."""
    monkeypatch.setenv("NO_COLOR", "1")
    from tiny_diffusion.cli import main

    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    terminal = Terminal(monkeypatch, columns)
    argv = ["train", *TINY, "--max_steps", "3", "--output_dir", "narrow"]
    assert main(argv) == 0
    assert main(["sample", "--checkpoint", str(trained), "--steps", "2", "--num_images", "3", "--output", "a.png"]) == 0
    text = terminal.read()
    bars = [part for part in re.split(r"[\r\n]", text) if BAR.search(part)]
    assert len(bars) >= 2 and all(len(bar) <= columns for bar in bars), bars
    assert "\x1b[3" not in text and "\x1b[0" not in text


def test_nothing_but_lines_is_written_to_a_pipe(cli, trained):
    """No carriage return, no escape sequence, no bar."""
    ended = cli.works("train", *TINY, "--max_steps", 2, "--output_dir", "piped")
    for text in (ended.err, ended.out, cli.works("sample", "--checkpoint", trained, "--steps", 2).err):
        assert all(letter.isprintable() or letter == "\n" for letter in text) and not BAR.search(text)
    json.loads((Path("piped") / "log.jsonl").read_text().splitlines()[0])
