"""Bad input: one line that names the option, the value, the reason and a way out; the right exit code; nothing lost.

Exit codes: 2 for options that are wrong by themselves or against a readable checkpoint or folder; 1 for files, network,
disk, memory and divergence; 130 and 143 for Ctrl-C and SIGTERM.
"""

import dataclasses
import errno
import itertools
import os
import pickle
import shutil
import signal
import sys
import urllib.error
import zipfile
from pathlib import Path

import pytest
import torch
from cli_helpers import OPTIONS, TINY, change_tensors, contents

from tiny_diffusion.config.network_shape import MAX_PARAMETERS
from tiny_diffusion.config.option import Choice, Colour, Flag, Int, ListOf, Number, Size, Text, specs
from tiny_diffusion.config.training import resolve
from tiny_diffusion.data import arrays, downloads
from tiny_diffusion.data.catalog import COLOURS, DATASETS
from tiny_diffusion.diffusion.process import Diffusion
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.diffusion.schedules import SCHEDULES
from tiny_diffusion.errors import OptionError
from tiny_diffusion.models.build import make_model
from tiny_diffusion.runs.checkpoint import load_checkpoint

FAST = ["--image_size", 4, "--base_channels", 4, "--channel_mult", 1, "--attention_levels", "none", "--timesteps", 5]

EVERY_OPTION = [
    (command, name, spec.type)
    for command, option_sets in OPTIONS.items()
    for options in option_sets
    for name, spec in specs(options).items()
]


def of_type(*types):
    """The options of these types, or of lists of these in a tuple."""
    items = {type_[0] for type_ in types if isinstance(type_, tuple)}
    return [
        (command, name)
        for command, name, kind in EVERY_OPTION
        if type(kind) in types or (isinstance(kind, ListOf) and type(kind.item) in items)
    ]


def type_of(command, name):
    return next(kind for c, n, kind in EVERY_OPTION if (c, n) == (command, name))


def kind_of(command, name):
    """What decides how a text is read: the option's type, and that of the items of a list."""
    kind = type_of(command, name)
    return type(kind), type(getattr(kind, "item", None))


def one_of_each(options, key=kind_of):
    """The first of these options of each type in each command: the rest are read by the same lines."""
    return list({(row[0], key(*row)): row for row in reversed(options)}.values())


def with_texts(options, texts):
    """(command, name, text): the first text for an option of each type in each command, and each text for one of each.

    No text needs every option: only the type reads it, and these rows are chosen by their type.
    """
    of_each_type = {kind_of(*row): row for row in reversed(options)}.values()
    rows = [(*row, texts[0]) for row in one_of_each(options)]
    return list(dict.fromkeys(rows + [(*row, text) for row in of_each_type for text in texts]))


# Each option by itself


@pytest.mark.parametrize(
    "command, name, text", with_texts(of_type(Int, Number), ["many", "1,5", "0x10", "nan", "inf", "1e999", " "])
)
def test_a_value_that_is_not_a_finite_number_is_refused(command, name, text, cli):
    cli.refuses(2, [command, f"--{name}", text], f"--{name}", "number")


@pytest.mark.parametrize("command, name", one_of_each(of_type(Int, Size)))
def test_a_fraction_is_refused_by_options_of_whole_numbers(command, name, cli):
    cli.refuses(2, [command, f"--{name}", "1.5"], f"--{name}", "'1.5'", "whole number")


@pytest.mark.parametrize("command, name", of_type(Int, Number, Size))
def test_a_number_out_of_range_is_refused_with_the_range(command, name, cli):
    """Every number has a minimum and a maximum, so that no typing error starts a run of a year."""
    kind = type_of(command, name)
    to = float if type(kind) is Number else int
    low, high = to(kind.low if getattr(kind, "open_low", False) else kind.low - 1), to(kind.high + 1)
    cli.refuses(2, [command, f"--{name}={low}"], f"--{name}", low, "too small", kind.low)
    cli.refuses(2, [command, f"--{name}={high}"], f"--{name}", high, "too large", kind.high)


LISTS = ["1,,2", "1,2,", ",1", ",", "a", "1.5,2", "1;2", "1 2", "nan", "-1,2", "1,10000000", "1," * 9 + "1"]


@pytest.mark.parametrize("command, name, text", with_texts(of_type((Int,)), LISTS))
def test_a_malformed_list_is_refused(command, name, text, cli):
    cli.refuses(2, [command, f"--{name}={text}"], f"--{name}")


SIZES = ["many", "64x", "x64", "x", "64x64x64", "64.5x64", "64 64", "64,64", "nanx64", "0x40", "3x64", "64x1025"]
SIZES += ["-8x8"]


@pytest.mark.parametrize("command, name, text", with_texts(of_type(Size), SIZES))
def test_a_value_that_is_not_an_image_size_is_refused(command, name, text, cli):
    cli.refuses(2, [command, f"--{name}={text}"], f"--{name}")


NO_COLOURS = ["red", "#fff", "#gggggg", "#1234567", "ffffff", "#ff00ff ", "WHITE", "1,2,3", " "]


@pytest.mark.parametrize("command, name, text", with_texts(of_type(Colour), NO_COLOURS))
def test_an_unknown_colour_is_refused_with_the_named_ones(command, name, text, cli):
    cli.refuses(2, [command, f"--{name}={text}"], f"--{name}", repr(text), *COLOURS, "#rrggbb")


@pytest.mark.parametrize(
    "command, name, text",
    with_texts(of_type((Text,), (Choice,)), ["{0},,{0}", "{0},", ",{0}", ",", "{0}," * 12 + "{0}"]),
)
def test_a_list_of_names_is_refused_if_one_is_empty_or_they_are_too_many(command, name, text, cli):
    kind = type_of(command, name)
    text, at_most = text.format(next(iter(kind.choices), "train")), f"at most {kind.longest}"
    cli.refuses(2, [command, f"--{name}={text}"], f"--{name}", at_most if text.count(",") == 12 else "''")


@pytest.mark.parametrize("command, name", [(c, n) for c, n, kind in EVERY_OPTION if kind.choices])
def test_an_unknown_choice_is_refused_with_the_choices(command, name, cli):
    choices = type_of(command, name).choices
    cli.refuses(2, [command, f"--{name}", "zzz"], f"--{name}", "'zzz' is not one of", ", ".join(choices))


CHOSEN = {kind.choices: (command, name) for command, name, kind in EVERY_OPTION if kind.choices}  # one of each table


@pytest.mark.parametrize(
    "command, name, choice",
    [(*row, choice) for choices, row in CHOSEN.items() for choice in choices if len(choice) > 3],
)
def test_a_misspelt_choice_is_answered_with_the_right_one(command, name, choice, cli):
    others = [other for other in type_of(command, name).choices if other != choice]
    shortened = [choice[:-1] + "-"] if choice[:-1] not in others else []  # adamw without its w is nearer to adam
    for misspelt in (choice + "x", choice.upper(), *shortened):
        cli.refuses(2, [command, f"--{name}", misspelt], repr(misspelt), f"Did you mean {choice!r}?")


@pytest.mark.parametrize(
    "command, name",
    one_of_each([(c, n) for c, n, kind in EVERY_OPTION if not (isinstance(kind, Flag) or kind.bare)]),
)
def test_an_empty_value_is_refused(command, name, cli):
    """For example --output_dir "$UNSET", which would otherwise mean the working folder."""
    cli.refuses(2, [command, f"--{name}", ""], f"--{name}", "'' is empty")
    cli.refuses(2, [command, f"--{name}"], f"--{name}", "expected one argument")


@pytest.mark.parametrize("command, name", one_of_each(of_type(Flag)))
def test_a_switch_takes_no_value(command, name, cli):
    cli.refuses(2, [command, f"--{name}=maybe"], f"--{name}", "'maybe'")


# Checkpoints


class Payload:
    """Unpickling it makes a folder, which is harmless, but proves that code of the file has run."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def cut(share):
    def write(path, good):
        path.write_bytes(good[: int(len(good) * share)])

    return write


def flipped(path, good):
    content = bytearray(good)
    content[len(good) // 2] ^= 1
    path.write_bytes(content)


def zipped(path, good):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")


NO_CHECKPOINTS = {
    "nothing": lambda path, good: None,
    "a folder": lambda path, good: path.mkdir(),
    "an empty file": lambda path, good: path.touch(),
    "a text": lambda path, good: path.write_text("once upon a time\n" * 100),
    "a picture": lambda path, good: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000)),
    "half a checkpoint": cut(0.5),
    "a checkpoint but for its end": cut(0.999),
    "a checkpoint with a flipped bit": flipped,
    "another zip": zipped,
    "other weights": lambda path, good: torch.save({"conv.weight": torch.zeros(3)}, path),
    "a list": lambda path, good: torch.save([1, 2, 3], path),
    "a pickle": lambda path, good: path.write_bytes(pickle.dumps(Payload(path.with_name("mark")))),
    "a checkpoint with a payload": lambda path, good: torch.save(
        {"about": Payload(path.with_name("mark")), "tensors": {}}, path
    ),
}
READERS = {
    "sample": ["sample", "--checkpoint"],
    "info": ["info", "--checkpoint"],
    "resume": ["train", "--resume"],
    "init_from": ["train", *TINY, "--output_dir", "new", "--init_from"],
}


@pytest.mark.parametrize("write", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_file_that_is_not_a_checkpoint_is_refused_by_name_and_none_of_its_code_runs(
    reader, write, cli, trained, tmp_path
):
    write(tmp_path / "model.pt", (trained / "model_final.pt").read_bytes())
    before = contents(tmp_path)
    cli.refuses(1, [*reader, "model.pt"], "model.pt")
    assert contents(tmp_path) == before
    assert not (tmp_path / "mark").exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_missing_checkpoint_is_answered_with_how_to_train_one(reader, cli):
    train = "python -m tiny_diffusion train --dataset digits"
    cli.refuses(1, [*reader, "no/such/model.pt"], "no/such/model.pt does not exist", train)


@pytest.mark.parametrize("command", ["sample", "info"])
def test_a_checkpoint_must_be_named(command, cli):
    cli.refuses(2, [command], "--checkpoint is required", "outputs/model_final.pt")


def test_a_model_that_outputs_nan_has_diverged(cli, trained, tmp_path):
    change_tensors(
        trained / "model_final.pt",
        tmp_path / "model.pt",
        lambda name, tensor: tensor * 1e30 if name.startswith("ema/") else tensor,
    )
    cli.refuses(1, ["sample", "--checkpoint", "model.pt", "--num_images", 2], "NaN", "diverged", "earlier checkpoint")
    assert not (tmp_path / "generated_samples.png").exists()


# sample


@pytest.mark.parametrize(
    "given, words",
    [
        ("--steps 1001", ["--steps 1001", "1000 timesteps", "at most 1000"]),
        ("--timesteps 1001", ["--steps 1001", "1000 timesteps"]),
        ("--sampler dpmpp_2m --eta 0.5", ["--eta 0.5", "--sampler dpmpp_2m", "--sampler ddim"]),
        ("--sampler ddim --eta 1.5", ["--eta 1.5", "--sampler ddim", "0 to 1"]),
        ("--eta 1.6", ["--eta", "1.6", "1.5"]),
        ("--sampler ddpm --eta 0", ["--eta 0", "--sampler ddpm", "--sampler ddim"]),
        ("--indices 0-3 --num_images 4", ["--num_images 4", "--indices"]),
        ("--output picture.jpg", ["--output picture.jpg", ".png, .gif, .webp, .mp4, .npz", "trailing slash"]),
        ("--output picture", ["--output picture", ".png, .gif, .webp, .mp4, .npz", "trailing slash"]),
        ("--output .png", ["--output .png", ".png, .gif, .webp, .mp4, .npz"]),
    ],
)
def test_sample_refuses_what_this_model_cannot_do_or_would_ignore(given, words, cli, trained, tmp_path):
    cli.refuses(2, ["sample", "--checkpoint", trained / "model_final.pt", *given.split()], *words)
    assert not contents(tmp_path)


@pytest.mark.parametrize("given", ["--guidance 2", "--classes 3"])
def test_a_model_without_classes_refuses_what_needs_them(given, cli, unlabelled, tmp_path):
    cli.refuses(2, ["sample", "--checkpoint", unlabelled, *given.split()], given, "--class_cond")
    assert not contents(tmp_path)


@pytest.mark.parametrize("sampler", [name for name, row in SAMPLERS.items() if row.eta is None])
@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_eta_belongs_to_samplers_whose_noise_can_be_chosen(command, sampler, cli, trained):
    argv = [command, "--checkpoint", trained / "model_final.pt", "--sampler", sampler, "--eta", 0.5]
    cli.refuses(2, argv, "--eta 0.5", f"--sampler {sampler}", "ddim or sa_solver")


@pytest.mark.parametrize(
    "text", ["abc", "5-3", "1,,2", "-1", "1-", "1-2-3", "1.5", ",", "²", "0-99999999999", "9" * 30]
)
def test_indices_that_are_not_a_list_of_numbers_are_refused(text, cli, trained):
    argv = ["sample", "--checkpoint", trained / "model_final.pt", f"--indices={text}"]
    cli.refuses(2, argv, f"--indices {text}: ")


@pytest.mark.parametrize(
    "text, words",
    [
        ("10", ["no class 10", "0 to 9"]),
        ("0-10", ["no class 10", "0 to 9"]),
        ("9-10", ["no class 10", "0 to 9"]),
        ("seven", ["'seven' is not one of 0, 1, 2"]),
        ("3x", ["'3x' is not one of", "Did you mean '3'?"]),
        ("5-3", ["'5-3'"]),
        ("1,,2", ["'' is not one of"]),
        ("-1", ["'-1' is not one of"]),
        ("9" * 30, ["too large"]),
    ],
)
def test_a_class_that_does_not_exist_is_refused_with_those_that_do(text, words, cli, loud):
    cli.refuses(2, ["sample", "--checkpoint", loud, f"--classes={text}"], f"--classes {text}", *words)


@pytest.mark.parametrize("command", ["train", "sample", "visualize"])
@pytest.mark.parametrize(
    "device, available", [("cuda", torch.cuda.is_available), ("mps", torch.backends.mps.is_available)]
)
def test_a_device_that_this_machine_lacks_is_refused(command, device, available, cli, trained):
    if available():
        pytest.skip(f"this machine has {device}")
    rest = ["--checkpoint", trained / "model_final.pt"] if command == "sample" else ["--dataset", "digits"]
    cli.refuses(2, [command, *rest, "--device", device], f"--device {device}", "this machine has cpu")


# Paths that cannot be written


def unwritable(command, trained):
    """Options of a command that write under a regular file, for each kind of thing it writes."""
    sample = ["sample", "--checkpoint", trained / "model_final.pt", "--num_images", 1, "--steps", 1, "--output"]
    return {
        "png": [*sample, "file/x.png"],
        "gif below": [*sample, "file/sub/x.gif"],
        "npz": [*sample, "file/x.npz"],
        "folder": [*sample, "file/"],
        "forward": ["visualize", "--dataset", "digits", "--save_path", "file/x.png"],
        "schedules": ["visualize", "--what", "schedules", "--save_path", "file/sub/x.png"],
        "run": ["train", *TINY, "--output_dir", "file"],
        "run below": ["train", *TINY, "--output_dir", "file/sub"],
    }[command]


@pytest.mark.parametrize("what", ["png", "gif below", "npz", "folder", "forward", "schedules", "run", "run below"])
def test_a_path_under_a_file_cannot_be_written(what, cli, trained, tmp_path):
    (tmp_path / "file").write_text("mine")
    argv = unwritable(what, trained)
    cli.refuses(1, argv, f"{argv[-2]} {argv[-1]}".rstrip("/") + " cannot be written", "Name another")
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_figure_cannot_replace_a_folder(cli, tmp_path):
    (tmp_path / "x.png").mkdir()
    argv = ["visualize", "--dataset", "digits", "--save_path", "x.png"]
    cli.refuses(1, argv, "--save_path x.png cannot be written", "folder")


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_inside_torch(*args, **kwargs):
    """What torch.save does: its zip writer fails again while closing, which hides the reason."""
    try:
        full_disk()
    finally:
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 148160 vs 148048")


@pytest.mark.parametrize("output", ["x.png", "x.npz", "x/"])
def test_a_full_disk_is_reported_with_the_output(output, cli, trained, monkeypatch):
    monkeypatch.setattr("os.replace", full_disk)
    argv = ["sample", "--checkpoint", trained / "model_final.pt", "--num_images", 1, "--steps", 1, "--output", output]
    ended = cli(*argv)
    last = ended.err.splitlines()[-1]
    assert ended.code == 1 and f"--output {output.rstrip('/')} cannot be written: No space left on device" in last


@pytest.mark.parametrize("fault", [full_disk, full_disk_inside_torch])
def test_a_disk_that_fills_up_ends_training_with_one_line_and_leaves_the_saved_files(
    fault, cli, trained, tmp_path, monkeypatch
):
    shutil.copytree(trained, tmp_path / "run")
    good = (tmp_path / "run/model_final.pt").read_bytes()
    monkeypatch.setattr("tiny_diffusion.runs.writer.save_checkpoint", fault)
    ended = cli("train", "--output_dir", "run", "--resume", "--max_steps", 5)
    assert ended.code == 1 and "cannot be written: No space left on device" in ended.err.splitlines()[-1]
    assert (tmp_path / "run/model_final.pt").read_bytes() == good


# train: options that exclude one another


@pytest.mark.parametrize(
    "given, words",
    [
        ("--dataset minst", ["--dataset", "'minst'", "Did you mean 'mnist'?"]),
        (
            "--channel_mult 1,2,4,8 --dataset digits",
            ["--channel_mult 1,2,4,8", "8x8 image 3 times", "for example 1,2,4, or --image_size 9."],
        ),
        ("--channel_mult 1,2,4,8,8", ["28x28", "in 2x2 patches: 14x14", "at most 4"]),
        ("--channel_mult none", ["--channel_mult", "at least one", "for example 1,2"]),
        ("--patch_size 3", ["--patch_size 3", "28x28", "1, 2, 4, 7, 14"]),
        ("--patch_size 8 --dataset digits --channel_mult 1", ["--patch_size 8", "8x8", "at most 4"]),
        ("--attention_heads 7", ["--attention_heads 7", "64 channels", "one of 1, 2, 4, 8"]),
        ("--attention_levels 2", ["--attention_levels 2", "--channel_mult", "levels 0 to 1"]),
        ("--base_channels 33", ["--base_channels 33", "odd", "34"]),
        ("--schedule cosine --beta_start 0.1", ["--beta_start 0.1", "--schedule cosine", "linear"]),
        ("--schedule flow --beta_end 0.1", ["--beta_end 0.1", "--schedule flow", "linear"]),
        ("--schedule linear --beta_start 0.1 --beta_end 0.01", ["--beta_start 0.1", "--beta_end 0.01", "Swap"]),
        ("--schedule linear --beta_start 0.1", ["--beta_start 0.1", "--beta_end 0.02", "give both"]),
        ("--epochs 2 --minutes 3", ["--epochs 2", "--minutes 3", "one of them"]),
        ("--no_class_cond --label_dropout 0.2", ["--label_dropout", "--class_cond"]),
        ("--attention_levels none --attention_heads 4", ["--attention_heads", "--attention_levels none"]),
        ("--batch_size 64 --accumulate 7", ["--accumulate 7", "--batch_size 64", "1, 2, 4, 8, 16, 32, 64"]),
        ("--dataset digits --device cpu --precision fp16", ["--precision fp16", "cpu", "bf16 or fp32"]),
        ("--resume --overwrite", ["--resume", "--overwrite", "one of them"]),
        ("--resume --extend --epochs 9", ["--resume", "--extend", "one of them"]),
        ("--extend", ["--extend", "--epochs or --minutes"]),
        ("--extend --max_steps 5", ["--extend", "--epochs or --minutes"]),
        ("--init_from a.pt --resume", ["--init_from", "--resume", "one of them"]),
        ("--init_from a.pt --extend --epochs 5", ["--init_from", "--extend", "one of them"]),
        ("--resume --output_dir empty", ["--output_dir empty", "no checkpoint", "Leave out --resume"]),
        ("--base_channels 2048 --channel_mult 64", ["--base_channels 2048", "--channel_mult 64", "billion", "Lower"]),
    ],
)
def test_train_refuses_options_that_exclude_one_another(given, words, cli, tmp_path):
    (tmp_path / "empty").mkdir()
    cli.refuses(2, ["train", *given.split()], *words)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and not contents(tmp_path)


@pytest.mark.parametrize("timesteps", [2, 10, 1000])
def test_epsilon_on_flow_is_refused_with_the_step_that_makes_it_impossible(timesteps, cli):
    message = (
        f"--prediction epsilon cannot be used with --schedule flow: at step {timesteps - 1} alpha is 0, "
        "so the noise does not determine the image. Use v or flow."
    )
    argv = ["train", "--schedule", "flow", "--prediction", "epsilon", "--timesteps", timesteps]
    assert cli.refuses(2, argv).endswith(f"error: {message}")


@pytest.mark.parametrize("command", ["train", "visualize"])
@pytest.mark.parametrize("schedule", [name for name, row in SCHEDULES.items() if row.ends is None])
@pytest.mark.parametrize("name", ["beta_start", "beta_end"])
def test_betas_are_refused_by_schedules_that_have_none(name, schedule, command, cli):
    argv = [command, "--dataset", "digits", "--schedule", schedule, f"--{name}", 0.01]
    cli.refuses(2, argv, f"--{name} 0.01 would be ignored", f"--schedule {schedule}")


def test_an_odd_image_size_is_trained_without_patches_unless_they_are_asked_for(cli):
    assert resolve({"image_size": 29}).patch_size == 1
    cli.refuses(2, ["train", "--image_size", 29, "--patch_size", 2], "--patch_size 2", "29x29")


def test_the_estimate_of_a_networks_size_is_near_its_size():
    """The check against too large networks uses an estimate, which needs no torch."""
    for base, mult, layers in itertools.product((512, 2048), ((1,), (1, 2, 4)), (1, 16)):
        options = {"image_size": 32, "base_channels": base, "channel_mult": mult}
        config = dataclasses.replace(resolve({**options, "base_channels": 8}), **options, layers_per_block=layers)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in make_model(config, 1, 10).parameters())
        try:
            resolve({**options, "layers_per_block": layers})
            assert parameters < 1.6 * MAX_PARAMETERS
        except OptionError:
            assert parameters > MAX_PARAMETERS


@pytest.mark.parametrize("given", ["--dataset digits --base_channels 512", "--dataset mnist --image_size 512"])
def test_networks_and_data_larger_than_memory_are_refused_before_they_are_made(given, cli, tmp_path, monkeypatch):
    """On a computer of 1 GB: a network of 0.2 G parameters, and 60,000 images of 262,144 bytes."""
    if not hasattr(os, "sysconf"):
        pytest.skip("this system does not say how much memory it has")
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**9 // 4096}
    monkeypatch.setattr("os.sysconf", lambda name: sizes[name])
    cli.refuses(
        1, ["train", "--device", "cpu", *given.split()], "out of memory", "this computer has 1", "--base_channels"
    )
    assert not contents(tmp_path)


@pytest.fixture
def fails_with(monkeypatch):
    """fails_with(error): the network raises it from now on."""

    def fails_with(error):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr("tiny_diffusion.models.unet.UNet.forward", fail)

    return fails_with


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError("Unable to allocate 3.73 GiB for an array with shape (1000, 1000, 1000) and data type float32"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
    ids=lambda fault: str(fault)[:20],
)
def test_memory_that_runs_out_is_one_line(fault, cli, trained, fails_with):
    fails_with(fault)
    argv = ["sample", "--checkpoint", trained / "model_final.pt", "--num_images", 1]
    cli.refuses(1, argv, "out of memory", "--batch_size")
    if isinstance(fault, MemoryError):
        cli.refuses(1, ["train", *TINY], "out of memory", "--accumulate")


@pytest.mark.parametrize(
    "message",
    [
        "mat1 and mat2 shapes cannot be multiplied",
        "CUDA error: an illegal memory access was encountered",
        "Expected a tensor in channels_last memory format",
    ],
)
def test_a_defect_of_ours_keeps_its_traceback(message, cli, trained, fails_with):
    fails_with(RuntimeError(message))
    with pytest.raises(RuntimeError, match=message):
        cli("sample", "--checkpoint", trained / "model_final.pt", "--num_images", 1)


def test_a_library_that_is_missing_is_answered_with_how_to_install_it(cli, monkeypatch):
    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(arrays, "read_digits", arrays.read_digits.__wrapped__)  # not those that were read before
    cli.refuses(1, ["visualize", "--dataset", "digits"], "sklearn", "pip install -r requirements.txt")


# Data


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    monkeypatch.setattr(downloads, "NETWORK_TIMEOUT_S", 2.0)
    monkeypatch.setattr(arrays, "SYSTEM_FOLDERS", {})
    monkeypatch.delenv("TINY_DIFFUSION_DATA", raising=False)


@pytest.mark.parametrize("command", ["train", "visualize"])
@pytest.mark.parametrize("dataset", [name for name, row in DATASETS.items() if row.download])
def test_a_missing_data_set_without_a_network_is_answered_with_what_to_do(dataset, command, cli, no_network, tmp_path):
    row, argv = DATASETS[dataset], [command, "--dataset", dataset, "--data_dir", "sets"]
    line = cli.refuses(1, argv, "is missing and the download failed", "--data_dir", "--dataset digits")
    assert f"Put {row.download} in {Path('sets', row.download_to)}" in line
    assert not contents(tmp_path)


def test_overwriting_a_run_deletes_nothing_if_the_data_is_missing(cli, no_network, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    before = contents(tmp_path / "run")
    cli.refuses(1, ["train", "--dataset", "mnist", "--output_dir", "run", "--overwrite"], "data/MNIST/raw is missing")
    assert contents(tmp_path / "run") == before


# Folders that hold a run


REFUSED_RUNS = {
    "a second run": ([], ["--output_dir run", "--resume", "--extend", "--overwrite", "another folder"]),
    "another rate": (["--resume", "--lr", 1e-4], ["--lr 0.0001", "0.002", "leave it out"]),
    "another batch": (["--resume", "--batch_size", 3], ["--batch_size 3", "64"]),
    "another network": (["--resume", "--channel_mult", "1,2,2"], ["--channel_mult 1,2,2", "this run's 1 "]),
    "another seed": (["--resume", "--seed", 1], ["--seed 1", "0"]),
    "other attention": (["--resume", "--attention_levels", "none"], ["--attention_levels none", "this run's 0 "]),
    "betas": (["--resume", "--beta_start", 0.01], ["--beta_start 0.01", "not set"]),
    "more epochs": (["--resume", "--epochs", 99], ["--epochs 99", "60", "--extend"]),
    "minutes": (["--resume", "--minutes", 4], ["--minutes 4", "not set", "--extend"]),
    "another set": (["--resume", "--dataset", "mnist"], ["--dataset mnist", "digits"]),
    "an end that is past": (["--extend", "--minutes", 1e-5], ["--extend", "this run has trained for", "larger"]),
    "an end of both kinds": (["--extend", "--epochs", 99, "--minutes", 9], ["--epochs", "--minutes", "one of them"]),
    "measuring nothing": (["--resume", "--keep_best"], ["--keep_best", "--eval_interval"]),
    "another rate, extended": (["--extend", "--epochs", 99, "--lr", 1e-4], ["--lr 0.0001", "0.002"]),
}


@pytest.mark.parametrize("given, words", REFUSED_RUNS.values(), ids=REFUSED_RUNS)
def test_a_refused_command_leaves_an_existing_run_as_it_is(given, words, cli, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    before = contents(tmp_path)
    cli.refuses(2, ["train", *([] if given else TINY), "--output_dir", "run", *given], *words)
    assert contents(tmp_path) == before


def test_resuming_another_runs_checkpoint_does_not_overwrite_this_run(cli, trained, loud, tmp_path):
    """Resuming a copy of a run continues the copy, and leaves the run that it was copied from as it is."""
    shutil.copytree(loud.parent, tmp_path / "run")
    before = contents(tmp_path)
    argv = ["train", "--resume", trained / "model_final.pt", "--max_steps", 5]
    cli.refuses(2, [*argv, "--output_dir", "run"], "--output_dir run holds another run", "model_final.pt")
    assert contents(tmp_path) == before

    original = contents(trained)
    shutil.copytree(trained, tmp_path / "copy")
    cli.works("train", "--resume", "copy/model_final.pt", "--max_steps", 5)
    assert contents(trained) == original and load_checkpoint("copy/model_final.pt").about["step"] == 5


def test_a_run_without_a_checkpoint_is_answered_with_overwrite(cli, tmp_path):
    """A new run and --resume both refuse its folder, and each names a way out."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    cli.refuses(2, ["train", *TINY, "--output_dir", "run"], "--overwrite")
    cli.refuses(2, ["train", *TINY, "--output_dir", "run", "--resume"], "no checkpoint", "--overwrite")
    cli.works("train", *TINY, "--output_dir", "run", "--overwrite", "--max_steps", 1)


@pytest.mark.parametrize("given", [["--channel_mult", "1,2,2"], ["--base_channels", 16]])
def test_weights_of_another_network_are_refused(given, cli, trained, tmp_path):
    argv = ["train", "--dataset", "digits", "--output_dir", "new", "--init_from", trained / "model_final.pt", *given]
    cli.refuses(2, argv, "--init_from", "model_final.pt", "network", "Leave out")
    assert not contents(tmp_path)


# Divergence


def test_a_loss_that_stays_nan_ends_the_run_and_keeps_the_last_good_checkpoint(cli, tmp_path, monkeypatch):
    """A few bad steps are skipped; twenty in a row end the run.  An epoch is 5 steps here."""
    loss, calls = Diffusion.loss, []

    def poisoned(self, model, *rest):
        calls.append(model.training)
        value = loss(self, model, *rest)
        bad = model.training and (sum(calls) in (2, 3) or sum(calls) > 7)
        return value * float("nan") if bad else value

    monkeypatch.setattr(Diffusion, "loss", poisoned)
    ended = cli(
        "train", *TINY, *FAST, "--batch_size", 300, "--output_dir", "run", "--save_interval", 1, "--sample_interval", 99
    )
    assert ended.code == 1
    last = ended.err.splitlines()[-1]
    assert "not finite for 20 steps in a row" in last and "Lower --lr (now 0.002)" in last
    saved = load_checkpoint(tmp_path / "run/checkpoints/model_epoch_001.pt")
    assert saved.about["step"] == 5 and not (tmp_path / "run/model_final.pt").exists()
    cli.works("sample", "--checkpoint", "run/checkpoints/model_epoch_001.pt", "--num_images", 1, "--steps", 2)


def test_weights_whose_heldout_loss_is_nan_do_not_overwrite_a_good_model(cli, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    good = (tmp_path / "run/model_final.pt").read_bytes()
    monkeypatch.setattr("tiny_diffusion.training.trainer.Trainer.heldout_loss", lambda *args: float("nan"))
    ended = cli("train", "--output_dir", "run", "--resume", "--max_steps", 5)
    assert ended.code == 1 and "averaged weights' loss is not finite" in ended.err and "--lr" in ended.err
    assert (tmp_path / "run/model_final.pt").read_bytes() == good


@pytest.mark.slow
@pytest.mark.parametrize("given", ["--optimizer muon", "--optimizer adamw --grad_clip 1e9 --prediction epsilon"])
def test_an_absurd_learning_rate_trains_or_is_reported_to_diverge(given, cli):
    short = ["--batch_size", 16, "--max_steps", 35]
    ended = cli("train", *TINY, *FAST, *short, "--output_dir", "run", "--lr", 10, *given.split())
    assert "Traceback" not in ended.err
    if ended.code == 0:
        cli.works("sample", "--checkpoint", "run/model_final.pt", "--num_images", 1, "--steps", 2)
    else:
        assert ended.code == 1
        assert "not finite" in ended.err.splitlines()[-1] and "Lower --lr (now 10)" in ended.err.splitlines()[-1]


# Stopping


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_saves_and_says_how_to_continue(number, code, cli, tmp_path, monkeypatch):
    from tiny_diffusion.runs.writer import RunWriter

    write = RunWriter.write_report

    def write_and_stop(self, report, *rest):
        if report.step == 2:
            os.kill(os.getpid(), number)
        return write(self, report, *rest)

    monkeypatch.setattr(RunWriter, "write_report", write_and_stop)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    ended = cli("train", *TINY, *FAST, "--output_dir", "run")
    assert ended.code == code
    assert (
        f"stopped by {number.name} at step 2; saved run/checkpoints/latest.pt" in ended.err and "--resume" in ended.err
    )
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers

    ended = cli.works("train", "--output_dir", "run", "--resume", "--max_steps", 4)
    assert "resuming from run/checkpoints/latest.pt, step 2" in ended.err
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == []


@pytest.mark.parametrize("command", ["train", "sample"])
def test_ctrl_c_outside_the_training_loop_is_one_line(command, cli, trained, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("tiny_diffusion.models.unet.UNet.forward", interrupt)
    rest = ["--checkpoint", trained / "model_final.pt"] if command == "sample" else TINY
    ended = cli(command, *rest)
    assert ended.code == 130 and ended.err.splitlines()[-1] == f"tiny_diffusion {command}: error: interrupted"


# visualize


@pytest.mark.parametrize(
    "given, words",
    [
        ("--save_path figure.jpg", ["--save_path figure.jpg", ".png"]),
        ("--save_path figure", ["--save_path figure", ".png"]),
        ("--save_path folder/", ["--save_path folder", ".png"]),
        ("--schedule cosin", ["--schedule", "'cosin'", "Did you mean 'cosine'?"]),
        ("--schedule linear --beta_start 0.1", ["--beta_start 0.1", "--beta_end 0.02"]),
        ("--schedule linear --beta_start 0.1 --beta_end 0.01", ["--beta_start 0.1", "--beta_end 0.01", "Swap"]),
        ("--image_size 1024 --num_images 50", ["--num_images 50", "1024x1024", "at most 3", "--image_size"]),
    ],
)
def test_visualize_refuses_what_it_cannot_show(given, words, cli, tmp_path):
    cli.refuses(2, ["visualize", "--dataset", "digits", *given.split()], *words)
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    "given", ["--dataset digits", "--data_dir x", "--image_size 9", "--num_images 3", "--schedule flow", "--seed 1"]
)
def test_the_figure_of_all_schedules_refuses_what_it_would_ignore(given, cli, tmp_path):
    cli.refuses(2, ["visualize", "--what", "schedules", *given.split()], given.split()[0], "ignored", "schedules")
    assert not contents(tmp_path)
