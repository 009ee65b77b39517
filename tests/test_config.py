"""Options: what is filled in, what is refused and how, and that a configuration survives its JSON."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from tiny_diffusion.checkpoint import make_model
from tiny_diffusion.cli import main
from tiny_diffusion.config import Config, check, resolve
from tiny_diffusion.core.predictions import PREDICTIONS
from tiny_diffusion.core.schedules import SCHEDULES
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.errors import OptionError
from tiny_diffusion.options import Spec, TrainActions, not_one_of, problem, specs

every_dataset = pytest.mark.parametrize("dataset", DATASETS)
every_option = pytest.mark.parametrize("name", specs(Config))
SEVERAL = {
    "nothing given": {},
    "digits": {"dataset": "digits"},
    "minutes": {"minutes": 0.5, "precision": "bf16"},
    "flow": {"schedule": "flow", "prediction": "flow", "timesteps": 50, "loss_weight": "uniform"},
    "betas": {"schedule": "linear", "beta_start": 1e-5, "beta_end": 0.03, "prediction": "epsilon"},
    "classes": {"class_cond": True, "label_dropout": 0.0, "hflip": True},
    "no attention": {"attention_levels": (), "channel_mult": (1, 2, 3), "time_emb_dim": 10},
    "large": {"image_size": 64, "channel_mult": (1, 1, 2, 2), "attention_levels": (2, 3), "attention_heads": 4},
    "numbers": {"seed": 2**63 - 1, "lr": 1.0 / 3, "ema_decay": 0.0, "max_steps": 10**9, "keep_last": 1},
    "folders": {"output_dir": "out put/ü", "data_dir": "/data"},
}
several = pytest.mark.parametrize("given", SEVERAL.values(), ids=SEVERAL)


# What is filled in


@every_dataset
def test_every_default_resolves_and_leaves_nothing_open(dataset):
    config, row = resolve({"dataset": dataset}), DATASETS[dataset]
    assert config.image_size == row.size
    assert config.time_emb_dim == 4 * config.base_channels
    assert config.attention_levels == (len(config.channel_mult) - 1,)
    for name, value in row.defaults.items():
        assert getattr(config, name) == value
    rest = set(specs(Config)) - set(row.defaults) - {"dataset", "image_size", "time_emb_dim", "attention_levels"}
    assert {name: getattr(config, name) for name in rest} == {name: getattr(Config, name) for name in rest}


def test_what_is_given_beats_the_data_sets_defaults_and_they_beat_the_options():
    assert Config.epochs != DATASETS["digits"].defaults["epochs"] and Config.patch_size == 2
    assert resolve({"dataset": "digits"}).epochs == DATASETS["digits"].defaults["epochs"]
    assert resolve({"dataset": "digits"}).patch_size == 1
    config = resolve({"dataset": "digits", "epochs": 3, "patch_size": 4, "image_size": 16, "time_emb_dim": 8})
    assert (config.epochs, config.patch_size, config.image_size, config.time_emb_dim) == (3, 4, 16, 8)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_betas_are_filled_in_for_the_schedules_that_have_them(schedule):
    config = resolve({"schedule": schedule})
    assert (config.beta_start, config.beta_end) == (SCHEDULES[schedule].ends or (None, None))
    if SCHEDULES[schedule].ends:
        assert resolve({"schedule": schedule, "beta_end": 0.04}).beta_start == SCHEDULES[schedule].ends[0]
        assert resolve({"schedule": schedule, "beta_end": 0.04}).beta_end == 0.04


def test_minutes_take_the_place_of_epochs():
    assert resolve({"dataset": "digits", "minutes": 2.0}).epochs is None
    assert resolve({"dataset": "digits"}).minutes is None


@several
def test_resolving_leaves_what_was_given_as_it_was(given):
    before = dict(given)
    config = resolve(given)
    assert given == before
    assert {name: getattr(config, name) for name in given} == given


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve({}).lr = 1.0


@several
def test_the_schedule_is_the_one_that_is_configured(given):
    config = resolve(given)
    schedule = config.make_schedule()
    assert (schedule.name, schedule.timesteps) == (config.schedule, config.timesteps)


# What is refused


REFUSED = {  # options, and what the message must say: the option, the value, a way out
    "two lengths": ({"epochs": 3, "minutes": 1.5}, ["--epochs 3", "--minutes 1.5", "one of them"]),
    "betas without": ({"beta_start": 0.01}, ["--beta_start 0.01", "--schedule cosine", "linear, exponential"]),
    "an end without": (
        {"beta_end": 0.02, "schedule": "flow"},
        ["--beta_end 0.02", "--schedule flow", "linear, exponential"],
    ),
    "label_dropout": ({"label_dropout": 0.2}, ["--label_dropout", "--class_cond", "leave it out"]),
    "heads of nothing": (
        {"attention_heads": 4, "attention_levels": ()},
        ["--attention_heads", "--attention_levels none", "Leave one"],
    ),
    "falling betas": (
        {"schedule": "linear", "beta_start": 0.5, "beta_end": 0.1},
        ["--beta_start 0.5", "--beta_end 0.1", "Swap"],
    ),
    "epsilon on flow": (
        {"schedule": "flow", "prediction": "epsilon"},
        ["--prediction epsilon", "--schedule flow", "step 999", "Use v or flow"],
    ),
    "betas that drown the image": (
        {"schedule": "linear", "beta_start": 0.9, "beta_end": 0.999},
        ["--beta_start 0.9", "--beta_end 0.999", "Use smaller ones"],
    ),
    "patches": ({"patch_size": 3}, ["--patch_size 3", "28x28", "1, 2, 4, 7, 14"]),
    "no levels": ({"channel_mult": ()}, ["--channel_mult", "at least one", "1,2"]),
    "too many levels": (
        {"channel_mult": (1, 2, 4, 8, 8)},
        ["--channel_mult 1,2,4,8,8", "28x28", "2x2 patches: 14x14", "4 times", "at most 4", "1,2,4,8"],
    ),
    "too many levels of digits": (
        {"dataset": "digits", "channel_mult": (1, 2, 4, 8)},
        ["--channel_mult 1,2,4,8", "8x8", "3 times", "at most 3", "1,2,4"],
    ),
    "the image is one patch": (
        {"dataset": "digits", "patch_size": 8, "channel_mult": (1,)},
        ["--patch_size 8", "8x8", "at most 4"],
    ),
    "attention below": ({"attention_levels": (1, 2)}, ["--attention_levels 1,2", "--channel_mult", "0 to 1"]),
    "odd width": ({"base_channels": 9}, ["--base_channels 9", "odd"]),
    "heads": ({"attention_heads": 3}, ["--attention_heads 3", "64 channels"]),
    "heads of a finer level": (
        {"base_channels": 6, "attention_levels": (0,), "attention_heads": 1},
        ["--attention_heads 1", "12 channels"],
    ),
    "parts": ({"batch_size": 64, "accumulate": 3}, ["--accumulate 3", "--batch_size 64"]),
    "spelling": ({"schedule": "cosin"}, ["--schedule", "'cosin'", "linear, cosine, sigmoid", "Did you mean 'cosine'?"]),
    "data set": ({"dataset": "mnits"}, ["--dataset", "'mnits'", "digits", "Did you mean 'mnist'?"]),
    "too small": ({"timesteps": 1}, ["--timesteps", "1 is too small", "at least 2"]),
    "too large": ({"dropout": 0.95}, ["--dropout", "0.95 is too large", "at most 0.9"]),
    "not more than 0": ({"lr": 0.0}, ["--lr", "0.0 is too small", "more than 0"]),
    "in a list": ({"channel_mult": (1, 0)}, ["--channel_mult", "0 is too small", "at least 1"]),
}


@pytest.mark.parametrize("given, parts", REFUSED.values(), ids=REFUSED)
def test_a_refusal_names_the_option_the_value_and_a_way_out(given, parts):
    with pytest.raises(OptionError) as refused:
        resolve(given)
    for part in parts:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("given", [given for given, _ in REFUSED.values()], ids=REFUSED)
def test_what_is_refused_is_refused_on_the_command_line_with_exit_code_2(given, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["train"]
    for name, value in given.items():
        argv += [f"--{name}", (",".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)]
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "error: " in err
    assert not list(tmp_path.iterdir())


def test_the_way_out_of_too_many_levels_is_accepted():
    assert resolve({"channel_mult": (1, 2, 4, 8)}).channel_mult == (1, 2, 4, 8)
    assert resolve({"dataset": "digits", "channel_mult": (1, 2, 4)}).channel_mult == (1, 2, 4)


@pytest.mark.parametrize("timesteps", [2, 1000])
@pytest.mark.parametrize("schedule, prediction", list(itertools.product(SCHEDULES, PREDICTIONS)))
def test_every_prediction_goes_with_every_schedule_but_epsilon_with_flow(schedule, prediction, timesteps):
    given = {"schedule": schedule, "prediction": prediction, "timesteps": timesteps}
    if (schedule, prediction) == ("flow", "epsilon"):
        with pytest.raises(OptionError, match="epsilon"):
            resolve(given)
    else:
        assert resolve(given).prediction == prediction


NETWORKS = [
    {"image_size": size, "patch_size": patch, "base_channels": base, "channel_mult": mult, "attention_levels": levels,
     "attention_heads": heads}
    for size, patch, base, mult, levels, heads in itertools.product(
        (4, 7, 12), (1, 2, 4), (4, 6), ((1,), (1, 2), (2, 3), (1, 2, 2)), ((), (0,), (1,), (0, 2)), (1, 2, 3)
    )
    if levels or heads == 2
][::5]  # fmt: skip


def test_what_is_accepted_is_a_network_and_what_is_refused_for_its_heads_is_none():
    accepted = 0
    for options in NETWORKS:
        given = {
            key: value for key, value in options.items() if key != "attention_heads" or options["attention_levels"]
        }
        try:
            config = resolve({**given, "layers_per_block": 1})
        except OptionError as error:
            if "--attention_heads" in str(error):
                config = dataclasses.replace(resolve({}), **options)
                with pytest.raises(ValueError, match="attention_heads"), torch.device("meta"):
                    make_model(config, 1, 10)
            continue
        accepted += 1
        image = torch.zeros(1, 1, config.image_size, config.image_size)
        assert make_model(config, 1, 10)(image, torch.zeros(1)).shape == image.shape
    assert accepted > 30


# JSON


@several
def test_a_configuration_survives_its_json(given):
    config = resolve(given)
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert {name: type(value) for name, value in vars(again).items()} == {
        name: type(value) for name, value in vars(config).items()
    }


@several
def test_the_dictionary_holds_every_option_as_plain_json(given):
    values = resolve(given).to_dict()
    assert set(values) == set(specs(Config))
    assert json.loads(json.dumps(values, allow_nan=False)) == values


@every_option
def test_a_missing_key_is_refused_by_name(name):
    values = resolve({}).to_dict()
    del values[name]
    with pytest.raises(OptionError, match=f"keys do not match: {name}$"):
        Config.from_dict(values)


def test_an_unknown_key_is_refused_by_name():
    with pytest.raises(OptionError, match=r"keys do not match: colour$"):
        Config.from_dict({**resolve({}).to_dict(), "colour": "red"})


OF_NO_OPTION = [math.nan, math.inf, -math.inf, -1, -0.5, 10**30, 1e300, [[1, 2]], [1] * 9, {"a": 1}, {}, [math.nan]]


@every_option
def test_absurd_values_are_refused_by_the_options_name(name):
    for value in OF_NO_OPTION:
        with pytest.raises(OptionError, match=f"--{name}"):
            Config.from_dict({**resolve({}).to_dict(), name: value})


OF_A_TYPE = [True, "1", "", 1.5, 2, [1], ["1"], [True], [1.0], [None]]
MAY_STAY_UNSET = {"data_dir", "beta_start", "beta_end", "minutes", "max_steps", "keep_last"}


def is_of_type(spec, value):
    """A whole number is a fine float; True is no number."""
    if isinstance(spec.kind, tuple):
        return isinstance(value, list) and all(type(item) is int for item in value)
    return type(value) in ({int, float} if spec.kind is float else {spec.kind})


@every_option
def test_a_value_of_another_type_is_refused_by_the_options_name(name):
    spec = specs(Config)[name]
    wrong = [value for value in OF_A_TYPE if not is_of_type(spec, value)]
    assert len(wrong) >= 7
    for value in wrong:
        with pytest.raises(OptionError, match=f"--{name}"):
            Config.from_dict({**resolve({}).to_dict(), name: value})


@every_option
def test_unset_is_refused_where_a_resolved_configuration_has_a_value(name):
    values = {**resolve({}).to_dict(), name: None}
    if name in MAY_STAY_UNSET:
        assert getattr(Config.from_dict(values), name) is None
    else:
        with pytest.raises(OptionError, match=f"--{name}"):
            Config.from_dict(values)


@pytest.mark.parametrize("name", ["epochs", "base_channels", "seed", "lr", "minutes", "channel_mult"])
def test_a_number_too_large_for_a_float_is_refused_too(name):
    """JSON has no largest number, and float(10**400) raises OverflowError."""
    value = [10**400] if name == "channel_mult" else 10**400
    with pytest.raises(OptionError, match=f"--{name}"):
        Config.from_dict({**resolve({}).to_dict(), name: value})


@pytest.mark.parametrize("epochs, minutes", [(None, None), (3, 1.0)])
def test_a_run_without_one_length_is_refused(epochs, minutes):
    with pytest.raises(OptionError, match="--epochs and --minutes"):
        Config.from_dict({**resolve({}).to_dict(), "epochs": epochs, "minutes": minutes})


def test_checking_what_is_right_changes_nothing():
    config = resolve({})
    assert check(config) is config


# One value


FLOAT = Spec("", float, low=0, open_low=True, high=0.9)
LIST = Spec("", (int,), low=1, high=64)
PROBLEMS = [  # (what an option takes, right values, wrong ones)
    (Spec(""), ["", "anything"], [1, None, ("a",), True]),
    (Spec("", choices=("a", "b")), ["a", "b"], ["c", "", "A", 1, None]),
    (Spec("", bool), [True, False], [0, 1, "True", None]),
    (Spec("", int, low=2, high=5), [2, 3, 5], [1, 6, 2.0, 2.5, "3", True, None, math.inf, math.nan, (2,)]),
    (Spec("", int), [-(10**9), 0, 10**9], ["1", 0.5, False]),
    (FLOAT, [1e-9, 0.9, 0.5], [0, 0.0, -1e-9, 0.91, math.nan, math.inf, -math.inf, "0.5", True, None, (0.5,)]),
    (Spec("", float, low=0, high=1), [0, 1, 0.0, 1.0], [-1e-300, 1.0000001, 2]),
    (LIST, [(), (1,), (1, 64), (2,) * 8], [1, [1], (0,), (65,), (1.0,), (True,), ("1",), ((1,),), (1,) * 9, None]),
]
RIGHT = [(spec, value) for spec, right, _ in PROBLEMS for value in right]
WRONG = [(spec, value) for spec, _, wrong in PROBLEMS for value in wrong]


@pytest.mark.parametrize("spec, value", RIGHT)
def test_there_is_no_problem_with_a_right_value(spec, value):
    assert problem(spec, value) is None


@pytest.mark.parametrize("spec, value", WRONG)
def test_the_problem_with_a_wrong_value_names_it(spec, value):
    named = value[0] if spec is LIST and isinstance(value, tuple) and len(value) == 1 else value
    assert str(named) in problem(spec, value) or repr(named) in problem(spec, value)


@pytest.mark.parametrize("value, near", [("cosin", "cosine"), ("sigmoids", "sigmoid"), ("flow ", "flow")])
def test_the_nearest_choice_is_suggested(value, near):
    message = not_one_of(value, SCHEDULES)
    assert all(choice in message for choice in SCHEDULES) and message.endswith(f"Did you mean {near!r}?")


def test_nothing_is_suggested_where_nothing_is_near():
    assert not_one_of("xyz", SCHEDULES).endswith("flow.")


@every_option
def test_every_default_is_a_right_value(name):
    default = getattr(Config, name)
    assert default is None or problem(specs(Config)[name], default) is None


@pytest.mark.parametrize("options", [Config, TrainActions])
def test_every_option_is_explained_in_a_few_words(options):
    for name, spec in specs(options).items():
        assert 5 < len(spec.help) < 100, name


# The command line


@several
def test_dry_run_prints_what_is_resolved_and_writes_nothing(given, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--dry_run"]
    for name, value in given.items():
        text = (",".join(map(str, value)) or "none") if isinstance(value, tuple) else repr(value).strip("'")
        argv += [f"--{name}"] if value is True else [f"--{name}", text]
    assert main(argv) == 0
    assert Config.from_dict(json.loads(capsys.readouterr().out)) == resolve(given)
    assert not list(tmp_path.iterdir())


def test_a_number_too_large_for_a_float_is_refused_on_the_command_line_too(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--dry_run", "--seed", "1" + "0" * 400])
    assert ended.value.code == 2
    assert "--seed" in capsys.readouterr().err
