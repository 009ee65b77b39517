"""--help, the spelling of options, and unknown commands: what a user sees before anything is computed."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import OPTIONS
from run_helpers import RUN

from tiny_diffusion.cli import COMMANDS
from tiny_diffusion.cli.arguments import hint, parse
from tiny_diffusion.cli.guidance import Interval
from tiny_diffusion.config.option import Colour, Flag, Int, ListOf, Number, Size, Text, specs
from tiny_diffusion.config.presets import PRESETS
from tiny_diffusion.config.unet_details import DetailList

every_command = pytest.mark.parametrize("command", COMMANDS)
EVERY_OPTION = [(c, name) for c, option_sets in OPTIONS.items() for options in option_sets for name in specs(options)]
TORCH_AND_ITS_LIKE = ["torch", "torchvision", "matplotlib", "sklearn", "scipy", "PIL", "tqdm", "imageio"]


def names_of(command):
    return [name for c, name in EVERY_OPTION if c == command]


def type_of(command, name):
    return next(specs(options)[name].type for options in OPTIONS[command] if name in specs(options))


def a_value(kind):
    """Some value of a type."""
    if isinstance(kind, DetailList):
        return ("norm_eps=1e-06",)
    if isinstance(kind, ListOf):
        return (a_value(kind.item),)
    if isinstance(kind, Size):
        return kind.low, kind.high
    if isinstance(kind, Number):
        return kind.low if isinstance(kind, Int) else float(kind.high)
    if isinstance(kind, Interval):
        return 0.25, 0.5
    return "white" if isinstance(kind, Colour) else next(iter(kind.choices), "some/place")


def test_every_command_has_its_options_in_the_tests():
    """A new command needs a row in the table of cli_helpers.py, which these laws run over."""
    assert set(OPTIONS) == set(COMMANDS)


# --help


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_without_a_command_every_command_is_listed_with_what_it_does(argv, cli):
    ended = cli.works(*argv)
    for command, (_, what) in COMMANDS.items():
        assert re.search(rf"^  {command} +{re.escape(what)}$", ended.out, re.MULTILINE)
    assert ended.err == ""


@every_command
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_option_with_its_description_and_its_default(flag, command, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no phrase is broken at a hyphen
    ended = cli.works(command, flag)
    text = " ".join(ended.out.split())
    listed = re.findall(r"^  (?:-h, )?--(\w+)", ended.out[ended.out.index("\noptions:") :], re.MULTILINE)
    off = [f"no_{name}" for name in names_of(command) if getattr(type_of(command, name), "can_be_off", False)]
    assert sorted(listed) == sorted(["help", "version", *names_of(command), *off]) and ended.err == ""
    for options in OPTIONS[command]:
        for field in dataclasses.fields(options):
            spec = field.metadata["spec"]
            assert spec.help in text
            for choice in spec.type.choices:
                assert choice in text
            if field.default is not None and not isinstance(spec.type, Flag):
                assert f"{spec.help} [{spec.type.show(field.default)}]" in text
            if spec.fill is not None and not callable(spec.fill):
                assert f"{spec.help} [{spec.type.show(spec.fill)}]" in text


@every_command
def test_help_begins_with_commands_to_try_that_name_real_options(command, cli):
    text = cli(command, "--help").out
    description = text.split("options:")[0] if command == "info" else text[text.index("\n\n") :].split("\n\n  -h")[0]
    begins = rf"  python -m tiny_diffusion {command} --"
    examples = [line for line in description.splitlines() if re.match(begins, line)]
    assert examples or command == "info"
    for example in examples:
        assert set(re.findall(r"--(\w+)", example)) <= set(names_of(command))


def test_help_and_refused_options_load_no_torch():
    """One process runs all of them: a module that any of them loads is still loaded at the end."""
    program = f"""
import contextlib, io, sys
from tiny_diffusion.cli import COMMANDS, main
argvs = [["--help"], ["nonsense"], ["train", "--lr", "0"], ["train", "--schedule", "flow", "--prediction", "epsilon"],
         ["train", "--preset", "folder"], ["train", "--config", "none.json"], ["sample"],
         *([command, "--help"] for command in COMMANDS)]
for argv in argvs:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(argv)
print([name for name in {TORCH_AND_ITS_LIKE} if name in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"
    assert len(ended.stderr.splitlines()) == 6  # of the refused commands


# Spelling


@every_command
@pytest.mark.parametrize("spelt", ["underscores", "hyphens"])
def test_all_options_are_accepted_with_underscores_and_with_hyphens(spelt, command):
    """All of a command's at once, each followed by its value or joined to it by an equals sign."""
    kinds = {name: type_of(command, name) for name in names_of(command)}
    values = {name: True if isinstance(kind, Flag) else a_value(kind) for name, kind in kinds.items()}
    for joined in (False, True):
        argv = []
        for name, value in values.items():
            flag, shown = f"--{name if spelt == 'underscores' else name.replace('_', '-')}", kinds[name].show(value)
            argv += [flag] if value is True else [f"{flag}={shown}"] if joined else [flag, shown]
        given = parse(argv, "test", "", *OPTIONS[command])
        assert given == values
        assert [type(given[name]) for name in values] == [type(value) for value in values.values()]


@pytest.mark.parametrize(
    "text, size",
    [
        ("64", 64),
        ("64x64", 64),
        ("96x64", (96, 64)),
        ("96X64", (96, 64)),
        (" 96 x 64", (96, 64)),
        ("4x1024", (4, 1024)),
    ],
)
def test_an_image_size_is_a_side_or_height_x_width(text, size):
    for command in ("train", "visualize"):
        assert parse(["--image_size", text], "test", "", *OPTIONS[command]) == {"image_size": size}


def test_help_describes_every_preset(cli):
    text = cli.works("train", "--help").out
    for name, preset in PRESETS.items():
        assert re.search(rf"^  --preset {name} +{re.escape(preset.title)}$", text, re.MULTILINE)


def test_hyphens_in_a_value_are_kept():
    given = parse(["--output-dir", "my-run", "--data-dir=a-b"], "test", "", *OPTIONS["train"])
    assert given == {"output_dir": "my-run", "data_dir": "a-b"}


@pytest.mark.parametrize("command, name", [c for c in EVERY_OPTION if type_of(*c) in (Text(), Text(bare=True))])
def test_a_path_may_begin_with_the_home_folder(command, name, monkeypatch):
    """A shell leaves the ~ of --output_dir=~/runs as it is."""
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("USERPROFILE", "/home/ada")
    for text, path in {"~/a b/": "/home/ada/a b/", "~": "/home/ada", "a~": "a~", "./~/a": "./~/a"}.items():
        assert parse([f"--{name}={text}"], "test", "", *OPTIONS[command]) == {name: path}


def test_resume_takes_a_checkpoint_or_none():
    """Alone, --resume means the newest checkpoint of --output_dir."""
    for argv, value in [(["--resume"], ""), (["--resume", "--lr", "1"], ""), (["--resume", "a.pt"], "a.pt")]:
        assert parse(argv, "test", "", *OPTIONS["train"])["resume"] == value


@every_command
def test_an_abbreviated_option_is_refused(command, cli):
    name = next(name for name in names_of(command) if name[:-1] not in names_of(command))
    cli.refuses(2, [command, f"--{name[:-1]}=1"], f"'--{name[:-1]}=1' is not an option here")


@every_command
def test_a_misspelt_option_is_answered_with_the_right_one(command, cli):
    names = names_of(command)
    for name in names:
        for misspelt in (f"{name}x", name.upper()) if len(name) > 3 else ():
            assert hint(f"--{misspelt}", names) == f"Did you mean --{name}?"
    line = cli.refuses(2, [command, f"--{names[0]}x", "1"], f"'--{names[0]}x' is not an option here")
    assert line.endswith(f"Did you mean --{names[0]}?")


@every_command
def test_a_stray_argument_is_refused_without_a_guess(command, cli):
    for argv in (["digits"], ["-x", "3"], ["--zzz"]):
        assert cli.refuses(2, [command, *argv], repr(argv[0])).endswith("is not an option here. See --help.")


@pytest.mark.parametrize(
    "typed, hint", [("trian", " Did you mean 'train'?"), ("samples", " Did you mean 'sample'?"), ("xyz", "")]
)
def test_an_unknown_command_is_answered_with_the_known_ones(typed, hint, cli):
    ended = cli(typed, "--epochs", 3)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"tiny_diffusion: error: command {typed!r} is not one of {', '.join(COMMANDS)}.{hint}\n"


def test_the_last_of_two_values_counts(cli):
    given = parse(["--lr", "1", "--lr", "2"], "test", "", *OPTIONS["train"])
    assert given == {"lr": 2.0}


SCRIPTS = ["train.py", "sample.py", "visualize_diffusion.py"]


@pytest.mark.parametrize("script", [*SCRIPTS, None])
def test_hints_name_commands_as_the_program_was_started(script, cli, monkeypatch, tmp_path):
    """An installed package has no scripts."""
    if script:
        monkeypatch.setattr(sys, "argv", [str(Path("somewhere", script))])
    start = f"python {Path('somewhere', 'train.py')}" if script else "python -m tiny_diffusion train"
    assert f"Train one first: {start} --dataset digits" in cli("info", "--checkpoint", "none.pt").err
    for name in SCRIPTS:
        command = name.split(".")[0].split("_")[0]
        text, others = cli(command, "--help").out, {*SCRIPTS} - {script}
        assert not [other for other in others if other in text]
        assert f"  python {script or f'-m tiny_diffusion {command}'} --" in text or (script and name != script)


def test_a_run_ends_with_how_to_sample_from_it(cli, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    ended = cli.works(*RUN, "--max_steps", 1, "--output_dir", "run")
    assert f"python sample.py --checkpoint {Path('run', 'model_final.pt')}" in ended.err


@pytest.mark.parametrize("script", SCRIPTS)
def test_errors_begin_with_the_script_that_was_started(script, cli, monkeypatch):
    command = script.split(".")[0].split("_")[0]
    monkeypatch.setattr(sys, "argv", [f"somewhere/{script}"])
    ended = cli(command, "--nonsense")
    assert ended.code == 2 and ended.err.startswith(f"{script}: error: '--nonsense'")
