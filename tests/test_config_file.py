"""--save_config and --config: a run's options in a file, which those of the command line override."""

import json

import pytest
from cli_helpers import SOME_VALUES, TINY, contents, typed

from tiny_diffusion.config.option import specs
from tiny_diffusion.config.presets import PRESETS
from tiny_diffusion.config.training import Config, as_given, resolve
from tiny_diffusion.errors import OptionError
from tiny_diffusion.runs.checkpoint import load_checkpoint

RUNS = {
    "nothing": {},
    "digits": {"dataset": "digits", "minutes": 2.5, "class_cond": True, "label_dropout": 0.3},
    "betas": {"schedule": "exponential", "beta_start": 1e-5, "beta_end": 0.05, "prediction": "epsilon"},
    "no attention": {"attention_levels": (), "channel_mult": (1, 3), "optimizer": "adam", "hflip": True},
    "a folder": {
        "dataset": "folder",
        "data_dir": "фото",
        "image_size": (96, 64),
        "background": "#123456",
        "workers": 0,
    },
    "photographs": {"dataset": "flowers102", "splits": ("train", "val"), "random_crop": True, "cache_mb": 100},
    "numbers": {"seed": 2**63 - 1, "lr": 1 / 3, "ema_decay": 0.0, "logsnr_shift": -0.1, "max_steps": 7, "keep_last": 2},
    **{f"preset {name}": {"preset": name, "data_dir": "photos"} for name in PRESETS},
    "a preset with changes": {"preset": "fashion", "channel_mult": (1, 2), "minutes": 3.0, "dataset": "mnist"},
}
runs = pytest.mark.parametrize("given", RUNS.values(), ids=RUNS)


@pytest.fixture
def write(tmp_path):
    """write(values) -> the name of a file in the working folder that holds them, as JSON unless it is text."""

    def write(values, name="run.json"):
        (tmp_path / name).write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
        return name

    return write


@pytest.fixture
def resolved(cli):
    """resolved(*words) -> the configuration that `train` with these words would run."""
    return lambda *words: Config.from_dict(json.loads(cli.works("train", *words, "--dry_run").out))


# There and back


@runs
def test_a_saved_file_resolves_to_the_same_run(given, resolved):
    wanted = resolve(given)
    assert resolved(*typed(given), "--save_config", "run.json") == wanted
    assert resolved("--config", "run.json") == wanted


@runs
def test_a_saved_file_holds_the_options_as_they_would_be_given(given, cli, tmp_path):
    cli.works("train", *typed(given), "--save_config", "sub/run.json", "--dry_run")
    read = json.loads((tmp_path / "sub/run.json").read_text("utf-8"))
    wanted = as_given(resolve(given))
    assert read == {name: list(value) if isinstance(value, tuple) else value for name, value in wanted.items()}
    assert set(read) <= set(specs(Config)) and None not in read.values()


@runs
def test_what_dry_run_prints_is_a_file_too(given, cli, write, resolved):
    """It holds all options, also those that have no effect in the run."""
    printed = cli.works("train", *typed(given), "--dry_run").out
    assert set(json.loads(printed)) == set(specs(Config))
    assert resolved("--config", write(printed)) == resolve(given)


def test_the_options_in_a_checkpoint_are_a_file_too(trained, write, resolved):
    about = load_checkpoint(trained / "model_final.pt").about
    assert resolved("--config", write(about["config"])).to_dict() == about["config"]


@pytest.mark.slow
def test_the_options_that_a_run_saves_train_the_same_weights(cli, tmp_path):
    argv = [*TINY, "--image_size", "12x8", "--max_steps", 2, "--output_dir", "run"]
    ended = cli.works("train", *argv, "--save_config", "run.json")
    assert "options: run.json" in ended.err
    cli.works("train", "--config", "run.json", "--output_dir", "again")
    first, again = (load_checkpoint(tmp_path / name / "model_final.pt") for name in ("run", "again"))
    assert {**again.about["config"], "output_dir": "run"} == first.about["config"]
    assert all((first.tensors[name] == tensor).all() for name, tensor in again.tensors.items())


@pytest.mark.slow
def test_the_same_command_with_resume_continues_the_run(cli, write, tmp_path):
    """--extend and --overwrite work with a file as they do without one."""
    config = write({"dataset": "digits", "base_channels": 4, "channel_mult": [1], "batch_size": 750, "epochs": 2})
    argv = ["train", "--config", config, "--output_dir", "run", "--num_samples", 1]
    cli.works(*argv, "--max_steps", 2)
    assert "resuming from run/model_final.pt, step 2" in cli.works(*argv, "--resume").err
    assert "is finished, at step 4" in cli.works(*argv, "--resume").err
    cli.works(*argv, "--extend", "--epochs", 3)
    assert load_checkpoint(tmp_path / "run/model_final.pt").about["step"] == 6
    cli.refuses(2, argv, "--output_dir run holds a run already")
    cli.works(*argv, "--overwrite", "--max_steps", 1)
    assert load_checkpoint(tmp_path / "run/model_final.pt").about["step"] == 1


def test_a_file_that_contradicts_the_run_is_refused_by_the_option(cli, write, trained):
    config = write({"dataset": "digits", "base_channels": 16})
    cli.refuses(2, ["train", "--config", config, "--resume", "--output_dir", trained], "--base_channels 16", "run's 8")


# Written by hand


PARTIAL = {
    "nothing": ({}, [], {}),
    "one option": ({"lr": 0.01}, [], {"lr": 0.01}),
    "a whole number for a fraction": ({"lr": 1, "minutes": 5}, [], {"lr": 1.0, "minutes": 5.0}),
    "lists": ({"channel_mult": [1, 1], "splits": ["test"]}, [], {"channel_mult": (1, 1), "splits": ("test",)}),
    "an empty list": ({"attention_levels": []}, [], {"attention_levels": ()}),
    "a square as a pair": ({"image_size": [32, 32]}, [], {"image_size": 32}),
    "a pair": ({"image_size": [32, 48]}, [], {"image_size": (32, 48)}),
    "null, which is unsaid": ({"minutes": None, "epochs": 3, "beta_end": None}, [], {"epochs": 3}),
    "a preset": ({"preset": "tiny", "epochs": 3}, [], {"preset": "tiny", "epochs": 3}),
    "a preset said twice": ({"preset": "tiny", "epochs": 3}, ["--preset", "tiny"], {"preset": "tiny", "epochs": 3}),
    "what is off has no use anywhere": ({"random_crop": False, "keep_best": False}, [], {}),
    "switches": ({"hflip": True, "class_cond": False}, [], {"hflip": True, "class_cond": False}),
    "a switch that is off unless turned on": ({"auto_batch": False}, [], {}),
    "a switch that a preset turns on": (
        {"preset": "flowers", "hflip": False},
        [],
        {"preset": "flowers", "hflip": False},
    ),
    "a file for any data set": (
        {"data_dir": "photos", "hflip": True},
        ["--dataset", "folder"],
        {"dataset": "folder", "data_dir": "photos", "hflip": True},
    ),
    "what the command line makes possible": (
        {"background": "black", "beta_end": 0.03, "label_dropout": 0.2, "random_crop": True},
        ["--dataset", "folder", "--data_dir", "x", "--schedule", "linear", "--class_cond"],
        {"dataset": "folder", "data_dir": "x", "schedule": "linear", "class_cond": True, "background": "black",
         "beta_end": 0.03, "label_dropout": 0.2, "random_crop": True},
    ),
    "another length": ({"epochs": 9}, ["--minutes", 4], {"minutes": 4.0}),
    "another schedule": ({"schedule": "linear", "beta_end": 0.03}, ["--schedule", "cosine"], {}),
    "what the command line leaves without effect": (
        {"beta_end": 0.03, "attention_heads": 4},
        ["--schedule", "cosine", "--attention_levels", "none"],
        {"attention_levels": ()},
    ),
    "another data set": (
        {"dataset": "folder", "data_dir": "x", "background": "black", "cache_mb": 5, "lr": 0.5},
        ["--dataset", "mnist"],
        {"lr": 0.5, "image_size": 28},
    ),
}  # fmt: skip


@pytest.mark.parametrize("values, words, wanted", PARTIAL.values(), ids=PARTIAL)
def test_a_file_gives_some_options_and_the_command_line_others(values, words, wanted, write, resolved):
    assert resolved("--config", write(values), *words) == resolve(wanted)


@pytest.mark.parametrize("option", [option for option in specs(Config) if option != "preset"])
def test_the_command_line_wins(option, write, resolved):
    """An option of the command line has the value given there, whatever the file holds."""
    beside = {"dataset": "folder", "data_dir": "x", "schedule": "linear", "class_cond": True, "batch_size": 12}
    beside["eval_interval"] = 2
    beside |= {"schedule": "betas", "timesteps": 2} if option == "betas" else {}
    spec = specs(Config)[option]
    values = [
        value for value in SOME_VALUES.get(option) or spec.type.choices or [True] if resolves({**beside, option: value})
    ]
    values.sort(key=bool)  # what counts as False first: it must win as well
    for other, value in ((values[-1], values[0]), (values[0], values[-1])):
        words = typed({"data_dir": "x", "prediction": "v", option: value})
        assert getattr(resolved("--config", write({**beside, option: other}), *words), option) == value


def resolves(given):
    try:
        return resolve(given) is not None
    except OptionError:
        return False


def test_a_file_may_begin_with_the_mark_that_windows_writes(write, resolved):
    assert resolved("--config", write("\ufeff" + json.dumps({"lr": 0.5}))).lr == 0.5


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_is_read_in_whatever_encoding_a_shell_writes(encoding, resolved, tmp_path):
    """`train.py --dry_run > run.json` in Windows' PowerShell makes a file of UTF-16."""
    (tmp_path / "run.json").write_bytes(json.dumps({"output_dir": "猫"}, ensure_ascii=False).encode(encoding))
    assert resolved("--config", "run.json").output_dir == "猫"


def test_a_path_in_a_file_may_begin_with_the_home_folder(write, resolved, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "ada"))
    config = resolved("--config", write({"output_dir": "~/runs", "dataset": "folder", "data_dir": "~/photos"}))
    assert (config.output_dir, config.data_dir) == (str(tmp_path / "ada" / "runs"), str(tmp_path / "ada" / "photos"))


# Refused


WRONG = {  # values, and words of the message
    "an unknown option": ({"colour": "red"}, ["'colour' is not one of", "dataset"]),
    "a misspelt option": ({"learning_rate": 1, "lr": 1}, ["'learning_rate' is not one of"]),
    "a near option": ({"batchsize": 3}, ["Did you mean 'batch_size'?"]),
    "hyphens": ({"batch-size": 3}, ["Did you mean 'batch_size'?"]),
    "an action": ({"resume": True}, ["'resume' is not one of"]),
    "text for a number": ({"lr": "fast"}, ["--lr", "'fast' is not a finite number"]),
    "a number as text": ({"batch_size": "64"}, ["--batch_size", "'64' is not a whole number"]),
    "a fraction": ({"epochs": 1.5}, ["--epochs", "1.5 is not a whole number"]),
    "true for a number": ({"epochs": True}, ["--epochs", "True is not a whole number"]),
    "NaN": ('{"lr": NaN}', ["--lr", "nan is not a finite number"]),
    "out of range": ({"lr": -1}, ["--lr", "-1 is too small"]),
    "a number for a switch": ({"hflip": 1}, ["--hflip", "1 is not true or false"]),
    "a number for a text": ({"output_dir": 3}, ["--output_dir", "3 is not a text"]),
    "an empty text": ({"data_dir": ""}, ["--data_dir", "'' is empty"]),
    "a text for a list": ({"channel_mult": "1,2"}, ["--channel_mult", "'1,2' is not a list"]),
    "a number for a list": ({"channel_mult": 2}, ["--channel_mult", "2 is not a list"]),
    "a list in a list": ({"channel_mult": [[1]]}, ["--channel_mult", "[1] is not a whole number"]),
    "a list for a number": ({"seed": [1]}, ["--seed", "(1,) is not a whole number"]),
    "an object for a number": ({"seed": {}}, ["--seed", "{} is not a whole number"]),
    "a size as text": ({"image_size": "96x64"}, ["--image_size", "'96x64' is not a side", "96, 64"]),
    "a misspelt choice": ({"schedule": "cosin"}, ["--schedule", "Did you mean 'cosine'?"]),
    "what contradicts": ({"epochs": 3, "minutes": 2}, ["--epochs 3", "--minutes 2"]),
    "what would be ignored": ({"dataset": "mnist", "random_crop": True}, ["--random_crop", "--dataset mnist"]),
    "a list of options": ([{"lr": 1}], ["one JSON object"]),
    "a number": ("3", ["one JSON object"]),
    "nothing at all": ("null", ["one JSON object"]),
}


@pytest.mark.parametrize("values, words", WRONG.values(), ids=WRONG)
def test_a_file_of_wrong_options_is_refused_by_name(values, words, cli, write, tmp_path):
    write(values)
    before = contents(tmp_path)
    cli.refuses(2, ["train", "--config", "run.json"], "--config run.json", *words)
    assert contents(tmp_path) == before


NO_JSON = {
    "empty": b"",
    "text": b"lr = 0.1\n",
    "a comma too many": b'{"lr": 1,}',
    "single quotes": b"{'lr': 1}",
    "half a file": b'{"lr": 1, "sch',
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "too deep": b"[" * 100_000,
    "half a letter of UTF-16": b"\xff\xfe{\x00}",
    "two": b'{"lr": 1} {"lr": 2}',
}


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_a_file_that_is_not_json_is_refused_by_name(content, cli, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    cli.refuses(1, ["train", "--config", "run.json"], "--config run.json is not a JSON file")


def test_a_file_that_cannot_be_read_is_refused_by_name(cli, tmp_path):
    cli.refuses(1, ["train", "--config", "none.json"], "--config none.json cannot be read", "No such file")
    cli.refuses(1, ["train", "--config", tmp_path], f"--config {tmp_path} cannot be read", "directory")


def test_a_preset_beside_a_file_is_refused(cli, write):
    for values in ({}, {"lr": 1}, {"preset": "tiny"}):
        line = cli.refuses(2, ["train", "--preset", "fashion", "--config", write(values)], "--preset fashion")
        assert "--config run.json" in line and "Give one of them" in line


def test_saving_never_overwrites_another_file(cli, write, tmp_path):
    argv = ["train", "--dataset", "digits", "--dry_run", "--save_config", "run.json"]
    cli.works(*argv)
    cli.works(*argv)  # the same again changes nothing
    before = contents(tmp_path)
    for words in (["--lr", 0.5], ["--epochs", 3]):
        cli.refuses(2, [*argv, *words], "--save_config run.json exists and holds something else")
        assert contents(tmp_path) == before
    for content in (b"", b"my notes", b"\xff\xfe\x00"):
        (tmp_path / "run.json").write_bytes(content)
        cli.refuses(2, argv, "--save_config run.json exists and holds something else")
        assert (tmp_path / "run.json").read_bytes() == content


def test_a_path_that_cannot_be_written_is_refused(cli, tmp_path):
    (tmp_path / "file").write_text("mine")
    argv = ["train", "--dataset", "digits", "--save_config"]
    cli.refuses(1, [*argv, "file/run.json"], "--save_config file/run.json cannot be written")
    cli.refuses(1, [*argv, tmp_path], "--save_config", "folder")
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_refused_command_saves_no_options(cli, trained, tmp_path):
    save = ["--save_config", "run.json"]
    cli.refuses(2, ["train", *TINY, "--output_dir", trained, *save], "holds a run already")
    cli.refuses(2, ["train", "--dataset", "digits", "--channel_mult", "1,2,4,8", *save], "--channel_mult")
    cli.refuses(2, ["train", "--resume", "--output_dir", trained, *save], "--save_config is for a new run")
    assert not contents(tmp_path)
