"""Options: what is filled in, what is refused and how, and that a configuration survives its JSON."""

import dataclasses
import itertools
import json
import math
import random
import re

import pytest
import torch
from cli_helpers import SOME_VALUES, call, typed

from tiny_diffusion.cli import main
from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.cli.train_actions import TrainActions
from tiny_diffusion.config.option import (
    REQUIRED,
    Choice,
    Colour,
    Flag,
    Int,
    ListOf,
    Need,
    Number,
    Size,
    Text,
    not_one_of,
    option,
    specs,
)
from tiny_diffusion.config.rules import check
from tiny_diffusion.config.training import Config, as_given, beneath, resolve
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.diffusion.predictions import PREDICTIONS
from tiny_diffusion.diffusion.schedules import SCHEDULES
from tiny_diffusion.errors import MAX_NAMED, OptionError
from tiny_diffusion.models.build import make_model

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
    "not square": {"image_size": (16, 24), "hflip": True, "checkpoint_activations": True},
    "both splits": {"splits": ("train", "test"), "optimizer": "adam", "auto_batch": True},
    "photographs": {"dataset": "flowers102", "splits": ("val",), "random_crop": True, "cache_mb": 0, "workers": 3},
    "a folder": {"dataset": "folder", "data_dir": "photos", "background": "#FF8000", "image_size": (96, 64)},
    "less noise": {"image_size": 64, "logsnr_shift": 0.5},
    "a preset": {"preset": "fashion", "epochs": 3},
}
several = pytest.mark.parametrize("given", SEVERAL.values(), ids=SEVERAL)


# What is filled in


@every_dataset
def test_every_default_resolves_and_leaves_nothing_open(dataset):
    row, given = DATASETS[dataset], {"dataset": dataset, **({"data_dir": "x"} if dataset == "folder" else {})}
    config = resolve(given)
    filled = {
        "image_size": row.size,
        "class_cond": True if row.classes else None,
        "splits": row.train,
        "cache_mb": 2048 if row.image_files else None,
        "background": "white" if row.transparent else None,
        "logsnr_shift": math.log(32 / max(32, row.size)),
        "patch_size": 1 if dataset == "digits" else 2,
        "channel_mult": (1, 2) if row.size <= 32 else (1, 2, 2),
        "time_emb_dim": 4 * config.base_channels,
        "attention_levels": (len(config.channel_mult) - 1,),
    }
    wanted = {name: getattr(Config, name) for name in specs(Config)} | filled | dict(row.defaults) | given
    assert vars(config) == wanted


SIDES = [*range(4, 36), 48, 63, 64, 65, 96, 127, 128, 129, 130, 255, 256, 512, 1021, 1022, 1023, 1024]


def test_every_image_size_suits_the_network_that_is_made_for_it():
    """A level is half of the one above, rounded up; attention at the coarsest is between 16x16 patches or fewer up to
    256 pixels; images are unshuffled by 2, from 128 pixels on by 4, as far as that divides both sides."""
    for height, width in itertools.product(SIDES, SIDES[::3]):
        config = resolve({"image_size": (height, width)})
        patch = config.patch_size
        assert config.size == (height, width)
        assert height % patch == width % patch == 0 and patch in (1, 2, 4)
        even, large = not (height % 2 or width % 2), max(height, width) >= 128
        assert (patch > 1) == even and (patch == 4) <= large
        coarsest = [math.ceil(side / patch / 2 ** (len(config.channel_mult) - 1)) for side in config.size]
        assert min(coarsest) >= 2
        if min(height, width) >= 20 and even and max(height, width) <= 256:
            assert max(coarsest) <= 16


def test_noise_grows_with_the_image_above_32_pixels_and_not_below():
    """ln(32 / side); the side is that of a square of as many pixels."""
    for side in SIDES:
        assert resolve({"image_size": side}).logsnr_shift == pytest.approx(min(0, math.log(32 / side)))
    for height, width in itertools.product(SIDES[::5], SIDES[::5]):
        shift = resolve({"image_size": (height, width)}).logsnr_shift
        assert shift == pytest.approx(min(0, 0.5 * math.log(32 * 32 / (height * width))))
        config = resolve({"image_size": (height, width), "schedule": "linear"})
        plain = resolve({"image_size": (height, width), "schedule": "linear", "logsnr_shift": 0.0})
        assert config.make_schedule().log_snr == pytest.approx(plain.make_schedule().log_snr + shift)


def test_a_square_is_stated_by_its_side():
    """One size is one value, so that two ways to write it make the same configuration."""
    for side in (4, 28, 64):
        assert resolve({"image_size": (side, side)}) == resolve({"image_size": side})
        assert resolve({"image_size": side}).size == (side, side)


def test_a_given_option_beats_the_data_sets_default_which_beats_the_options():
    assert Config.epochs != DATASETS["digits"].defaults["epochs"] and resolve({}).patch_size == 2
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
def test_resolving_does_not_change_its_argument(given):
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
    "label_dropout": (
        {"label_dropout": 0.2, "class_cond": False},
        ["--label_dropout", "--class_cond", "Leave one"],
    ),
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
    "a size of three": ({"image_size": (8, 8, 3)}, ["--image_size", "(8, 8, 3)"]),
    "a side too small": ({"image_size": (64, 3)}, ["--image_size", "3 is too small", "at least 4"]),
    "a side too large": ({"image_size": (1025, 64)}, ["--image_size", "1025 is too large", "at most 1024"]),
    "patches of one side": (
        {"image_size": (30, 28), "patch_size": 4},
        ["--patch_size 4", "30x28", "one of 1, 2", "--image_size 28 or 32x28"],
    ),
    "patches of an odd side": ({"image_size": 29, "patch_size": 2}, ["29x29", "Use 1", "--image_size 28 or 30"]),
    "too many levels for one side": (
        {"image_size": (16, 128), "channel_mult": (1, 2, 2, 2)},
        ["16x128", "4x4 patches: 4x32", "3 times", "at most 2", "--image_size 36x128"],
    ),
    "colour": (
        {"dataset": "folder", "data_dir": "x", "background": "red"},
        ["--background", "'red'", "white", "#rrggbb"],
    ),
    "splits": ({"splits": ("train", "val", "test")}, ["--splits", "'val'", "train, test"]),
    "spelling of splits": ({"splits": ("tset",)}, ["--splits", "Did you mean 'test'?"]),
    "the same twice": ({"splits": ("test", "test")}, ["--splits test,test", "twice"]),
    "no splits": ({"splits": ()}, ["--splits none", "train, test"]),
    "no folder": ({"dataset": "folder"}, ["--dataset folder", "--data_dir", "--dataset digits"]),
    "no folder of a preset": ({"preset": "folder"}, ["--dataset folder", "--data_dir"]),
    "preset": ({"preset": "flower"}, ["--preset", "'flower'", "tiny", "Did you mean 'flowers'?"]),
    "optimizer": ({"optimizer": "sgd"}, ["--optimizer", "'sgd'", "muon, adamw, adam"]),
    "measured never": ({"eval_images": 500}, ["--eval_images", "--eval_interval 1"]),
    "the best of none": ({"keep_best": True}, ["--keep_best", "--eval_interval 1"]),
    "shift": ({"logsnr_shift": 21.0}, ["--logsnr_shift", "21.0 is too large", "at most 20"]),
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
def test_the_command_line_refuses_the_same_options_with_exit_code_2(given, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = call("train", *typed(given))
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "error: " in err
    assert not list(tmp_path.iterdir())


def test_the_way_out_of_too_many_levels_is_accepted():
    assert resolve({"channel_mult": (1, 2, 4, 8)}).channel_mult == (1, 2, 4, 8)
    assert resolve({"dataset": "digits", "channel_mult": (1, 2, 4)}).channel_mult == (1, 2, 4)


def sizes_suggested(given):
    """The sizes that the refusal of these options suggests; none if they are accepted."""
    try:
        resolve(given)
    except OptionError as error:
        assert "--patch_size" in str(error) or "--channel_mult" in str(error)
        _, _, tail = str(error).partition("--image_size ")
        sides = [tuple(map(int, size.split("x"))) for size in re.findall(r"\d+(?:x\d+)?", tail)]
        return [size * 2 if len(size) == 1 else size for size in sides]
    return []


NETWORK_SHAPES = [(1, (1,) * 5), (3, (1,)), (3, (1, 1)), (8, (1, 1)), (8, (1,) * 5), (16, (1,))]


@pytest.mark.parametrize("patch_size, channel_mult", NETWORK_SHAPES)
def test_the_nearest_sizes_that_a_network_can_take_are_named_and_it_takes_them(patch_size, channel_mult):
    """No size between the refused one and the suggested one would be accepted."""
    options = {"patch_size": patch_size, "channel_mult": channel_mult}

    def is_taken(height, width):
        try:
            return resolve({**options, "image_size": (height, width)}).size == (height, width)
        except OptionError:
            return False

    taken = {side for side in range(4, 300) if is_taken(side, side)}
    for side in set(range(4, 100)) - taken:
        nearest = [max((s for s in taken if s < side), default=None), min(s for s in taken if s > side)]
        wanted = [(s, s) for s in nearest if s]
        assert sizes_suggested({**options, "image_size": side}) == wanted
    for height, width in itertools.product((4, 5, 17, 40), (6, 31, 64, 1023)):
        for size in sizes_suggested({**options, "image_size": (height, width)}):
            assert is_taken(*size)


def test_no_size_is_suggested_where_none_is_near():
    """The largest image has 1,024 pixels a side, and 2 halvings of 16-pixel patches need 80."""
    options = {"patch_size": 16, "channel_mult": (1, 1, 1)}
    assert sizes_suggested({**options, "image_size": (1023, 4)}) == [(1024, 80)]
    options = {"patch_size": 15, "channel_mult": (1,) * 8}  # 129 patches, 1,935 pixels
    assert sizes_suggested({**options, "image_size": 1024}) == []


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
        (4, 7, 12, (6, 8), (5, 20)), (1, 2, 4), (4, 6), ((1,), (1, 2), (2, 3), (1, 2, 2)), ((), (0,), (1,), (0, 2)),
        (1, 2, 3),
    )
    if levels or heads == 2
][::5]  # fmt: skip


@pytest.mark.slow
def test_accepted_options_make_a_network_and_those_refused_for_their_heads_do_not():
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
        image = torch.zeros(1, 1, *config.size)
        assert make_model(config, 1, 10)(image, torch.zeros(1)).shape == image.shape
    assert accepted > 30


IGNORED = {
    ("random_crop", True): ["digits", "mnist", "fashion_mnist", "cifar10"],
    ("cache_mb", 100): ["digits", "mnist", "fashion_mnist", "cifar10"],
    ("workers", 2): ["digits", "mnist", "fashion_mnist", "cifar10"],
    ("background", "black"): ["digits", "mnist", "fashion_mnist", "cifar10", "flowers102"],
}


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("name, value", IGNORED)
def test_an_option_that_the_data_set_would_ignore_is_refused_with_those_that_take_it(name, value, dataset):
    given = {"dataset": dataset, "data_dir": "x", name: value}
    if dataset not in IGNORED[name, value]:
        assert getattr(resolve(given), name) == value
        return
    with pytest.raises(OptionError) as refused:
        resolve(given)
    words = ["would be ignored", f"--dataset {dataset}", "Leave it out", *set(DATASETS) - set(IGNORED[name, value])]
    assert str(refused.value).startswith(f"--{name}") and all(word in str(refused.value) for word in words)


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


NOT_IN_THE_FIRST_VERSION = {  # the values of these options that describe its runs
    "preset": None, "splits": ("train",), "random_crop": False, "background": None, "cache_mb": None, "workers": None,
    "logsnr_shift": 0.0, "checkpoint_activations": False, "auto_batch": False, "eval_interval": None,
    "eval_images": None, "keep_best": False, "deterministic": False, "activation": "silu",
    "log": (),
}  # fmt: skip


def test_a_configuration_of_the_first_version_is_the_run_that_it_was():
    now = resolve({"dataset": "digits"})
    before = {key: value for key, value in now.to_dict().items() if key not in NOT_IN_THE_FIRST_VERSION}
    assert Config.from_dict(before) == now
    assert {name: getattr(now, name) for name in NOT_IN_THE_FIRST_VERSION} == NOT_IN_THE_FIRST_VERSION


@every_option
def test_a_missing_key_is_refused_by_name_unless_the_option_has_a_since(name):
    values, spec = resolve({}).to_dict(), specs(Config)[name]
    del values[name]
    if spec.since is not REQUIRED:
        assert getattr(Config.from_dict(values), name) == spec.since
        return
    with pytest.raises(OptionError, match=f"keys do not match: {name}$"):
        Config.from_dict(values)


def test_an_unknown_key_is_refused_by_name():
    with pytest.raises(OptionError, match=r"keys do not match: colour$"):
        Config.from_dict({**resolve({}).to_dict(), "colour": "red"})


OF_NO_OPTION = [math.nan, math.inf, -math.inf, -1, -0.5, 10**30, 1e300, [[1, 2]], [1] * 9, {"a": 1}, {}, [math.nan]]
MAY_BE_NEGATIVE = {"logsnr_shift"}


@every_option
def test_absurd_values_are_refused_by_the_options_name(name):
    for value in OF_NO_OPTION:
        if name in MAY_BE_NEGATIVE and value in (-1, -0.5):
            continue
        with pytest.raises(OptionError, match=f"--{name}"):
            Config.from_dict({**resolve({}).to_dict(), name: value})


OF_A_TYPE = [True, "1", "", 1.5, 2, [1], ["1"], [True], [1.0], [None], [""], [8, 8], [8, 8, 8], [8, "8"], [8, 8.0]]


def is_of_type(kind, value):
    """A whole number counts as a float, True does not count as a number, nor an empty text as a text."""
    if isinstance(kind, ListOf):
        return isinstance(value, list) and all(is_of_type(kind.item, item) for item in value)
    if isinstance(kind, Size):
        return type(value) is int or (isinstance(value, list) and [type(side) for side in value] == [int, int])
    if isinstance(kind, Text | Colour | Choice):
        return type(value) is str and value != ""
    return type(value) in {Number: {int, float}, Int: {int}, Flag: {bool}}[type(kind)]


@every_option
def test_a_value_of_another_type_is_refused_by_the_options_name(name):
    wrong = [value for value in OF_A_TYPE if not is_of_type(specs(Config)[name].type, value)]
    assert len(wrong) >= 7
    for value in wrong:
        with pytest.raises(OptionError, match=f"--{name}"):
            Config.from_dict({**resolve({}).to_dict(), name: value})


@every_option
def test_unset_is_refused_where_every_resolved_configuration_has_a_value(name):
    configs = [resolve(given).to_dict() for given in ({}, {"dataset": "folder", "data_dir": "x"})]
    unset = [values for values in configs if values[name] is None]
    assert all(getattr(Config.from_dict(values), name) is None for values in unset)
    if not unset:
        with pytest.raises(OptionError, match=f"--{name}"):
            Config.from_dict({**configs[0], name: None})


@pytest.mark.parametrize("name", ["epochs", "base_channels", "seed", "lr", "minutes", "channel_mult"])
def test_a_number_too_large_for_a_float_is_refused_too(name):
    """JSON has no largest number, and float(10**400) raises OverflowError."""
    value = [10**400] if name == "channel_mult" else 10**400
    with pytest.raises(OptionError, match=f"--{name}"):
        Config.from_dict({**resolve({}).to_dict(), name: value})


def many_configurations():
    """(options, what they resolve to) of many random combinations that are accepted."""
    draw = random.Random(0)
    for _ in range(1000):
        given = {}
        for name in draw.sample(list(specs(Config)), draw.randint(0, 8)):
            given[name] = draw.choice(SOME_VALUES.get(name) or specs(Config)[name].type.choices or [True])
        if given.get("dataset") == "folder":
            given.setdefault("data_dir", "x")
        if "betas" in given or given.get("schedule") == "betas":
            given |= {"schedule": "betas", "betas": draw.choice(SOME_VALUES["betas"]), "timesteps": 2}
        try:
            yield given, resolve(given)
        except OptionError:
            continue


def test_the_options_of_a_configuration_resolve_to_it():
    """`as_given` leaves out only options that have no effect, which would be refused."""
    seen, names = 0, set()
    for given, config in many_configurations():
        again = as_given(config)
        assert resolve(again) == config, given
        assert resolve(json_of(again)) == config
        seen, names = seen + 1, names | set(given)
    assert seen > 300 and names == set(specs(Config))


def json_of(options):
    """The options after they were written as JSON and read again."""
    read = json.loads(json.dumps(options))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}


@pytest.mark.parametrize("epochs, minutes", [(None, None), (3, 1.0)])
def test_a_run_needs_exactly_one_length(epochs, minutes):
    with pytest.raises(OptionError, match="--epochs and --minutes"):
        Config.from_dict({**resolve({}).to_dict(), "epochs": epochs, "minutes": minutes})


def test_checking_changes_nothing():
    config = resolve({})
    assert check(config) is config


# One value


PROBLEMS = [  # (type, right values, wrong ones)
    (Text(), [" ", "anything"], ["", 1, None, ("a",), True]),
    (Text(bare=True), ["", "anything"], [1, None, ("a",), True]),
    (Choice(("a", "b")), ["a", "b"], ["c", "", "A", 1, None]),
    (ListOf(Text()), [(), ("a",), ("a", "b b")], ["a", ["a"], ("",), (1,), (None,), ("a",) * 9]),
    (
        Size(4, 64),
        [4, 64, (4, 64)],
        [3, 65, 8.0, "8", True, None, (8,), (8, 65), (8, 8.0), (8,) * 3],
    ),
    (
        Colour(),
        ["white", "black", "grey", "#00fF80"],
        ["", "White", "#fff", "#00fg80", "00ff80", 0, None, (0, 0)],
    ),
    (Flag(), [True, False], [0, 1, "True", None]),
    (Int(2, 5), [2, 3, 5], [1, 6, 2.0, 2.5, "3", True, None, math.inf, math.nan, (2,)]),
    (Int(), [-(10**9), 0, 10**9], ["1", 0.5, False]),
    (
        Number(0, 0.9, open_low=True),
        [1e-9, 0.9, 0.5],
        [0, 0.0, -1e-9, 0.91, math.nan, math.inf, -math.inf, "0.5", True, None, (0.5,)],
    ),
    (Number(0, 1), [0, 1, 0.0, 1.0], [-1e-300, 1.0000001, 2]),
    (
        ListOf(Int(1, 64)),
        [(), (1,), (1, 64), (2,) * 8],
        [1, [1], (0,), (65,), (1.0,), (True,), ("1",), ((1,),), (1,) * 9, None],
    ),
]
every_kind = pytest.mark.parametrize("kind, right, wrong", PROBLEMS)


@every_kind
def test_right_values_are_accepted_and_read_from_the_texts_that_show_them(kind, right, wrong):
    for value in right:
        assert kind.check(value) is None, value
        assert isinstance(kind, Flag) or kind.read(kind.show(value)) == value


@every_kind
def test_the_message_about_a_wrong_value_names_it(kind, right, wrong):
    for value in wrong:
        one = isinstance(kind, ListOf) and isinstance(value, tuple) and len(value) == 1
        named = value[0] if one else value[1] if value == (8, 65) else value
        assert str(named) in kind.check(value) or repr(named) in kind.check(value), value


@pytest.mark.parametrize("value, near", [("cosin", "cosine"), ("sigmoids", "sigmoid"), ("flow ", "flow")])
def test_the_nearest_choice_is_suggested(value, near):
    message = not_one_of(value, SCHEDULES)
    assert all(choice in message for choice in SCHEDULES) and message.endswith(f"Did you mean {near!r}?")


def test_nothing_is_suggested_where_nothing_is_near():
    assert not_one_of("xyz", SCHEDULES).endswith("flow.")


def test_of_very_many_choices_the_first_are_named_and_the_rest_counted():
    """Naming all classes of a folder of a thousand would make the line unreadable."""
    names = [f"class number {n}" for n in range(1000)]
    message = not_one_of("class numbr 7", names)
    assert message.count("class number") == MAX_NAMED + 1 and message.endswith("Did you mean 'class number 7'?")
    assert f" and {1000 - MAX_NAMED:,} more." in message


@every_option
def test_every_default_is_a_right_value(name):
    default = getattr(Config, name)
    assert default is None or specs(Config)[name].type.check(default) is None


@pytest.mark.parametrize("options", [Config, TrainActions])
def test_every_option_is_explained_in_a_few_words(options):
    for name, spec in specs(options).items():
        assert 5 < len(spec.help) < 100, name


# A new option


@pytest.fixture
def longer():
    """A Config with one more option, which is this field and nothing else."""
    mixing = Need(
        "class_cond", lambda values: values["class_cond"] is not False, " without --class_cond. Leave it out."
    )
    field = option(Number(0, 1), 0.5, "how much of a second image is mixed in", needs=mixing, since=0.0, group="run")
    return dataclasses.make_dataclass("Longer", [("mixup", float, field)], bases=(Config,), frozen=True)


@pytest.mark.parametrize("words, value", [([], None), (["--class_cond"], True), (["--no-class-cond"], False)])
def test_a_flag_whose_default_is_not_off_can_be_turned_off(words, value):
    assert parse(words, "train.py", "", Config).get("class_cond") is value


def test_labelled_sets_learn_their_classes_unless_an_option_or_a_known_systems_recipe_says_not_to():
    labelled = [name for name, row in DATASETS.items() if row.classes]
    assert [resolve({"dataset": name}).class_cond for name in labelled] == [True] * len(labelled)
    assert [resolve({"dataset": name, "class_cond": False}).class_cond for name in labelled] == [False] * len(labelled)
    assert (
        resolve({"dataset": "folder", "data_dir": "x"}).class_cond is None
    )  # only opening it shows whether it has any
    assert resolve({"preset": "tiny"}).class_cond is False and resolve({"preset": "quick"}).class_cond is True


def test_one_field_puts_an_option_on_the_command_line_and_in_its_help(longer, capsys):
    assert parse(["--mixup", "0.25", "--lr=1"], "train.py", "", longer, TrainActions) == {"mixup": 0.25, "lr": 1.0}
    with pytest.raises(SystemExit):
        parse(["--help"], "train.py", "", longer, TrainActions)
    text = " ".join(capsys.readouterr().out.split())
    assert "--mixup X how much of a second image is mixed in [0.5]" in text
    with pytest.raises(SystemExit):
        parse(["--mixup", "2"], "train.py", "", longer, TrainActions)
    assert "argument --mixup: 2.0 is too large; it must be at most 1" in capsys.readouterr().err


def test_one_field_puts_an_option_into_the_configuration_and_its_json(longer):
    config = resolve({"mixup": 0.25, "class_cond": True}, longer)
    assert (config.mixup, resolve({}, longer).mixup) == (0.25, 0.5)
    assert longer.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert resolve(as_given(config), longer) == config
    with pytest.raises(OptionError, match="--mixup: 2 is too large"):
        longer.from_dict({**config.to_dict(), "mixup": 2})


def test_one_field_says_what_checkpoints_without_the_option_mean(longer):
    older = resolve({"class_cond": True}).to_dict()
    assert longer.from_dict(older).mixup == 0.0


def test_one_field_states_where_the_option_would_be_ignored(longer):
    """There it is refused if given, left out by `as_given`, and dropped from a preset or a file."""
    with pytest.raises(OptionError, match="--mixup 0.25 would be ignored without --class_cond. Leave it out."):
        resolve({"mixup": 0.25, "class_cond": False}, longer)
    assert "mixup" not in as_given(resolve({"class_cond": False}, longer))
    assert "mixup" in as_given(resolve({"class_cond": True}, longer))
    lower = {"mixup": 0.25, "class_cond": True}
    assert beneath({"class_cond": False}, lower, longer) == {} and beneath({}, lower, longer) == lower


# The command line


@several
def test_dry_run_prints_what_is_resolved_and_writes_nothing(given, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry_run", *typed(given)]) == 0
    assert Config.from_dict(json.loads(capsys.readouterr().out)) == resolve(given)
    assert not list(tmp_path.iterdir())


def test_a_number_too_large_for_a_float_is_refused_on_the_command_line_too(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--dry_run", "--seed", "1" + "0" * 400])
    assert ended.value.code == 2
    assert "--seed" in capsys.readouterr().err


SCHEDULE_PAIRS = [
    pair for pair in itertools.product(SCHEDULES, SCHEDULES)
    if len({SCHEDULES[name].ends is None for name in pair}) == 2
]  # fmt: skip


@pytest.mark.parametrize("name, other", SCHEDULE_PAIRS)
def test_a_configuration_with_the_betas_of_another_schedule_is_refused(name, other):
    """A checkpoint or a file may hold any combination, which `resolve` never makes."""
    values = {**resolve({"dataset": "digits", "schedule": name}).to_dict(), "schedule": other}
    with pytest.raises(OptionError, match=f"--schedule {other} with beta_start"):
        Config.from_dict(values)


@pytest.mark.parametrize("letter", ["\0", "\ud800", "\udfff"])
@pytest.mark.parametrize("option", ["data_dir", "output_dir"])
def test_a_path_of_impossible_characters_is_refused(option, letter):
    values = resolve({"dataset": "digits"}).to_dict()
    with pytest.raises(OptionError, match=f"--{option}.*no path"):
        Config.from_dict({**values, option: f"a{letter}b"})
    assert Config.from_dict({**values, option: "a\udcff"}), "a name of bytes that are no UTF-8"
