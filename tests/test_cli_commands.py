"""The commands at work: which files they write, what is in them, and what each option changes in them.

Going on with a run, extending it and starting anew are in test_resume.py.
"""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import TINY, call, contents
from PIL import Image, ImageSequence

from tiny_diffusion.config.option import specs
from tiny_diffusion.config.training import Config, resolve
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.diffusion.grids import GRIDS
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.models.build import make_diffusion, make_model
from tiny_diffusion.runs.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
SMALLEST = [*TINY, "--no_class_cond", "--base_channels", 4, "--attention_levels", "none", "--timesteps", 5]
SMALLEST += ["--splits", "test", "--batch_size", 150]
STEPS_AN_EPOCH = 299 / 150
TILE = 7 * 8 + 2  # an 8x8 image in a grid: each pixel 7x7, and 2 pixels between


THREE_EPOCHS = [*SMALLEST, "--epochs", 3, "--sample_interval", 1, "--save_interval", 2]


@pytest.fixture(scope="module")
def run(tmp_path_factory, figures):
    """A run of three epochs, samples after each, a checkpoint after each second."""
    folder = tmp_path_factory.mktemp("run")
    with figures():
        assert call("train", *THREE_EPOCHS, "--output_dir", folder) == 0
    return folder


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def array(path):
    with np.load(path) as file:
        assert file.files[0] == "arr_0"
        return file["arr_0"]


@pytest.fixture(scope="module")
def sampled():
    """Options -> the images that an earlier test sampled with them."""
    return {}


@pytest.fixture
def sample_images(cli, loud, sampled):
    """sample_images("--steps", 5, ...) -> (N, H, W, C): the images that `sample` writes, in few steps by default."""

    def sample_images(*given):
        if given not in sampled:
            sampled[given] = sample(*given)
        return sampled[given]

    def sample(*given):
        defaults = {"--steps": 4, "--num_images": 6}
        if "--indices" in given:
            del defaults["--num_images"]
        words = [word for name, value in defaults.items() if name not in given for word in (name, value)]
        cli.works("sample", "--checkpoint", loud, *words, *given, "--output", "sampled.npz")
        return array("sampled.npz")

    return sample_images


# train


def test_training_writes_the_files_of_the_contract_and_no_others(run):
    assert set(contents(run)) == {
        "samples/epoch_001.png",
        "samples/epoch_002.png",
        "samples/epoch_003.png",
        "checkpoints/model_epoch_002.pt",
        "training_loss.png",
        "latest.png",
        "model_final.pt",
        "log.jsonl",
    }


def test_every_optimiser_step_has_a_line_in_the_log(run):
    lines = log_of(run)
    assert [line["step"] for line in lines] == list(range(1, math.ceil(3 * STEPS_AN_EPOCH) + 1))
    for line in lines:
        assert set(line) == {"step", "epoch", "loss", "grad_norm", "lr", "images_per_second"}
        assert line["epoch"] == pytest.approx(line["step"] / STEPS_AN_EPOCH, abs=1e-3)
        assert min(line["loss"], line["grad_norm"], line["images_per_second"]) > 0
        assert 0 < line["lr"] <= Config.lr


def test_checkpoints_say_when_they_were_saved(run):
    early, late = (load_checkpoint(run / name) for name in ("checkpoints/model_epoch_002.pt", "model_final.pt"))
    assert (early.about["step"], late.about["step"]) == (math.ceil(2 * STEPS_AN_EPOCH), math.ceil(3 * STEPS_AN_EPOCH))
    assert (early.about["finished"], late.about["finished"]) == (False, True)
    assert early.config == late.config
    assert [step for step, _ in late.about["heldout_history"]] == [math.ceil(k * STEPS_AN_EPOCH) for k in (1, 2, 3)]


def test_sample_pictures_have_the_number_of_images_asked_for(run):
    for path in (run / "samples").iterdir():
        assert Image.open(path).size == (2 * TILE + 2, 2 * TILE + 2)


def test_the_newest_samples_are_also_latest_png(run):
    assert (run / "latest.png").read_bytes() == (run / "samples/epoch_003.png").read_bytes()


def test_the_same_command_trains_the_same_weights(cli, run, tmp_path, figures):
    with figures():
        cli.works("train", *THREE_EPOCHS, "--output_dir", "again")
    first, second = (load_checkpoint(folder / "model_final.pt") for folder in (run, tmp_path / "again"))
    assert all((first.tensors[name] == tensor).all() for name, tensor in second.tensors.items())
    for one, other in zip(log_of(run), log_of(tmp_path / "again"), strict=True):
        assert {**one, "images_per_second": 0} == {**other, "images_per_second": 0}
    for name in ("samples/epoch_001.png", "samples/epoch_003.png", "training_loss.png"):
        assert (run / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_another_seed_trains_other_weights(cli, run, tmp_path):
    cli.works("train", *SMALLEST, "--epochs", 3, "--seed", 1, "--max_steps", 1, "--output_dir", "other")
    assert log_of(tmp_path / "other")[0]["loss"] != log_of(run)[0]["loss"]


def test_resuming_a_finished_run_says_so_and_changes_nothing(cli, run):
    before = contents(run)
    ended = cli.works("train", "--output_dir", run, "--resume")
    assert "is finished, at step 6" in ended.err and "--extend" in ended.err
    assert contents(run) == before


def test_resuming_with_the_options_of_the_run_is_no_contradiction(cli, run):
    ended = cli.works("train", *SMALLEST, "--epochs", 3, "--output_dir", run, "--resume")
    assert "is finished" in ended.err


def test_keep_last_keeps_the_newest_numbered_checkpoints(cli, tmp_path):
    options = ["--epochs", 3, "--sample_interval", 9, "--save_interval", 1, "--keep_last", 2]
    cli.works("train", *SMALLEST, *options, "--output_dir", "run")
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["model_epoch_002.pt", "model_epoch_003.pt"]


def test_dry_run_prints_the_options_in_full_and_writes_nothing(cli, tmp_path):
    ended = cli.works("train", "--dataset", "digits", "--minutes", 2, "--dry_run")
    assert Config.from_dict(json.loads(ended.out)) == resolve({"dataset": "digits", "minutes": 2.0})
    parameters = sum(parameter.numel() for parameter in make_model(resolve({"dataset": "digits"}), 1, 10).parameters())
    assert ended.err == f"a network of {parameters:,} parameters\n" and not contents(tmp_path)


def test_dry_run_of_overwriting_deletes_nothing(cli, run):
    before = contents(run)
    cli.works("train", *SMALLEST, "--output_dir", run, "--overwrite", "--dry_run")
    assert contents(run) == before


@pytest.mark.slow
def test_a_run_by_the_clock_ends_in_time_with_a_trained_model(cli, tmp_path):
    cli.works("train", *SMALLEST, "--minutes", 0.1, "--output_dir", "run")
    about = load_checkpoint(tmp_path / "run/model_final.pt").about
    assert about["finished"] and about["step"] > 0 and about["elapsed_seconds"] < 60
    assert {"model_final.pt", "training_loss.png", "log.jsonl"} <= set(contents(tmp_path / "run"))


def test_a_time_budget_that_is_refused_leaves_an_earlier_run_as_it_was(cli, tmp_path):
    cli.works("train", *SMALLEST, "--max_steps", 1, "--output_dir", "run")
    before = contents(tmp_path / "run")
    cli.refuses(2, ["train", *SMALLEST, "--minutes", 1e-9, "--output_dir", "run", "--overwrite"], "Give more minutes")
    assert contents(tmp_path / "run") == before


def test_training_prints_its_messages_and_the_path_of_the_model_on_standard_error(cli):
    ended = cli.works("train", *SMALLEST, "--epochs", 1, "--output_dir", "run")
    assert ended.out == ""
    for words in ("299 images of 1x8x8 train (test), 1,498 are held out", "sample --checkpoint run/model_final.pt"):
        assert words in ended.err


def test_class_conditional_samples_carry_the_names_of_their_classes(cli, monkeypatch):
    captions = spy_on_captions(monkeypatch)
    cli.works("train", *SMALLEST, "--class_cond", "--max_steps", 1, "--output_dir", "run", "--num_samples", 12)
    assert captions == [list("012345678901")]


# sample: which files are written


def spy_on_captions(monkeypatch):
    """A list to which the names of the classes in every grid are added from now on, None for a plain grid."""
    from tiny_diffusion.visuals import class_grid

    captions, save = [], class_grid.save_grid

    def spy(path, images, labels=None, names=()):
        captions.append(None if labels is None else [names[label] for label in labels])
        save(path, images, labels, names)

    monkeypatch.setattr(class_grid, "save_grid", spy)
    return captions


@pytest.mark.parametrize("checkpoint", ["model_final.pt", "checkpoints/model_epoch_002.pt"])
def test_samples_are_written_beside_the_run_by_default(checkpoint, cli, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    cli.works("sample", "--checkpoint", f"run/{checkpoint}", "--num_images", 2, "--steps", 2)
    assert set(contents(tmp_path / "run")) - set(contents(run)) == {"generated_samples.png"}


@pytest.mark.parametrize("number", [1, 3, 12, 65])
def test_a_grid_has_a_cell_for_each_image_and_few_empty_ones(number, cli, unlabelled):
    cli.works("sample", "--checkpoint", unlabelled, "--num_images", number, "--steps", 1, "--output", "x.png")
    (columns, rest), (rows, rest_too) = (divmod(side - 2, TILE) for side in Image.open("x.png").size)
    assert rest == rest_too == 0
    assert columns * rows - columns < number <= columns * rows and rows <= columns <= 3 * rows


@pytest.mark.parametrize("steps", [1, 20, 30])
def test_an_animation_has_a_frame_for_each_step_up_to_about_twenty(steps, cli, loud):
    cli.works("sample", "--checkpoint", loud, "--num_images", 4, "--steps", steps, "--output", "x.gif")
    with Image.open("x.gif") as animation:
        assert animation.n_frames == min(21, steps + 1)
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(animation)]
    assert durations[-1] - durations[0] in (2000, 2000 - 10)  # a hold on the last


@pytest.mark.parametrize("output", ["x.npz", "X.NPZ", "deep/er/x.npz"])
def test_an_array_is_uint8_images_last_axis_channels(output, cli, loud, tmp_path):
    cli.works("sample", "--checkpoint", loud, "--num_images", 70, "--steps", 1, "--output", output)
    images = array(tmp_path / output)
    assert images.shape == (70, 8, 8, 1) and images.dtype == np.uint8
    assert images.min() < 50 and images.max() > 200
    assert set(contents(tmp_path)) == {output}


@pytest.mark.parametrize("output", ["folder/", "new/folder/", "there", "like.png/"])
def test_a_folder_has_a_png_for_each_image(output, cli, sample_images, loud, tmp_path):
    expected = sample_images("--num_images", 3)
    (tmp_path / "there").mkdir()
    cli.works("sample", "--checkpoint", loud, "--num_images", 3, "--steps", 4, "--output", output)
    names = sorted(path.name for path in (tmp_path / output).iterdir() if path.name != "labels.csv")
    assert names == ["00000.png", "00001.png", "00002.png"]
    for name, image in zip(names, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / output / name)), image[..., 0])


def test_a_picture_has_the_images_of_the_array_enlarged(cli, sample_images, loud):
    images = sample_images("--num_images", 4, "--classes", "3")
    cli.works("sample", "--checkpoint", loud, "--num_images", 4, "--steps", 4, "--classes", "3", "--output", "x.png")
    picture = np.asarray(Image.open("x.png"))[..., 0]
    height = TILE
    for i, image in enumerate(images):
        y, x = picture.shape[0] - (2 - i // 2) * height, 2 + (i % 2) * TILE
        np.testing.assert_array_equal(picture[y : y + 56, x : x + 56], image[..., 0].repeat(7, 0).repeat(7, 1))


@pytest.mark.parametrize("output", ["x.png", "x.gif", "x.npz", "x/"])
def test_the_same_command_writes_the_same_bytes(output, cli, loud, tmp_path):
    before = None
    for _ in range(2):
        cli.works(
            "sample", "--checkpoint", loud, "--num_images", 5, "--steps", 3, "--output", output, "--show_intermediate"
        )  # fmt: skip
        assert before in (None, contents(tmp_path))
        before = contents(tmp_path)
        shutil.rmtree(tmp_path / "intermediate", ignore_errors=True)
    assert len(before) > 4


# sample: intermediate steps


def frames_of(folder):
    return {int(re.fullmatch(r"step_(\d{4})\.png", path.name)[1]): path for path in sorted(folder.glob("step_*"))}


@pytest.mark.parametrize("steps", [1, 5, 20, 30])
def test_intermediate_frames_are_spread_evenly_from_the_noise_to_the_last_step(steps, cli, loud, tmp_path):
    cli.works(
        "sample", "--checkpoint", loud, "--num_images", 2, "--steps", steps, "--show_intermediate", "--output", "x.png"
    )
    numbers = list(frames_of(tmp_path / "intermediate"))
    assert numbers[0] == 0 and numbers[-1] == steps and len(numbers) == min(21, steps + 1)
    gaps = np.diff(numbers)
    assert gaps.max() - gaps.min() <= 1
    assert set(contents(tmp_path)) == {
        "x.png", "intermediate/strip.png", *(f"intermediate/step_{number:04d}.png" for number in numbers)
    }  # fmt: skip


@pytest.mark.slow
def test_a_thousand_steps_have_the_noise_and_twenty_frames(cli, trained, tmp_path):
    """The command of the contract: --show_intermediate --timesteps 1000."""
    argv = ["--num_images", 1, "--output", "x.png", "--show_intermediate", "--timesteps", 1000]
    cli.works("sample", "--checkpoint", trained / "model_final.pt", *argv)
    numbers = list(frames_of(tmp_path / "intermediate"))
    assert len(numbers) == 21 and (numbers[0], numbers[-1]) == (0, 1000)
    assert set(np.diff(numbers)) == {50}


def test_step_0000_is_the_same_noise_for_all_options(cli, loud, tmp_path):
    frames = []
    for steps, sampler in [(3, "ddim"), (7, "heun")]:
        argv = ["--num_images", 4, "--steps", steps, "--sampler", sampler, "--grid", "trailing", "--show_intermediate"]
        cli.works("sample", "--checkpoint", loud, *argv, "--output", "x.png")
        frames.append(frames_of(tmp_path / "intermediate")[0].read_bytes())
    assert frames[0] == frames[1]


def test_the_last_frame_shows_the_picture(cli, unlabelled, tmp_path):
    argv = ["--num_images", 9, "--steps", 3, "--show_intermediate", "--output", "x.png"]
    cli.works("sample", "--checkpoint", unlabelled, *argv)
    picture, frame = (np.asarray(Image.open(path)) for path in ("x.png", "intermediate/step_0003.png"))
    height, width, _ = picture.shape
    np.testing.assert_array_equal(frame[-height:, :width], picture)  # x_t at left ...
    np.testing.assert_array_equal(frame[-height:, -width:], picture)  # ... is at last the estimate of x_0 at right
    first = np.asarray(Image.open("intermediate/step_0000.png"))
    assert first.shape == frame.shape and (first[-height:, :width] != picture).mean() > 0.5


def test_frames_of_an_earlier_longer_command_are_removed(cli, loud, tmp_path):
    for steps in (9, 2):
        argv = ["--num_images", 1, "--steps", steps, "--show_intermediate", "--output", "x.png"]
        cli.works("sample", "--checkpoint", loud, *argv)
    assert list(frames_of(tmp_path / "intermediate")) == [0, 1, 2]


def test_frames_are_written_beside_a_folder_of_images_which_holds_nothing_else(cli, loud, tmp_path):
    cli.works("sample", "--checkpoint", loud, "--num_images", 1, "--steps", 1, "--show_intermediate", "--output", "x/")
    frames = {f"intermediate/{name}.png" for name in ("step_0000", "step_0001", "strip")}
    assert set(contents(tmp_path)) == {"x/00000.png", "x/labels.csv"} | frames


@pytest.mark.parametrize("output", ["x.gif", "x.png"])
def test_a_film_shows_the_images_of_all_batches(output, cli, loud, tmp_path):
    films = []
    for batch_size in (2, 5):
        argv = ["--num_images", 5, "--steps", 2, "--output", output, "--show_intermediate", "--batch_size", batch_size]
        cli.works("sample", "--checkpoint", loud, *argv)
        films.append(contents(tmp_path))
    assert films[0] == films[1] and len(films[0]) == 5


def test_frames_of_very_many_images_show_the_first_and_say_so(cli, loud, monkeypatch):
    monkeypatch.setattr("tiny_diffusion.cli.sample.IMAGES_IN_FRAMES", 4)
    monkeypatch.setattr("tiny_diffusion.cli.sample_files.IMAGES_IN_FRAMES", 4)
    said, shown = [], []
    for number in (4, 9):
        argv = ["--num_images", number, "--steps", 1, "--output", "x/", "--show_intermediate", "--batch_size", 3]
        said.append(cli.works("sample", "--checkpoint", loud, *argv).err)
        shown.append(contents(Path("intermediate")))
    assert shown[0] == shown[1]
    assert "of the first 4 images" in said[1] and "first" not in said[0]


# sample: images are written as they come, each named by its index


def test_two_parts_of_a_seed_in_a_folder_are_the_whole(cli, loud, tmp_path):
    """Files that were there before stay, and are reported."""
    argv = ["sample", "--checkpoint", loud, "--steps", 1, "--output"]
    cli.works(*argv, "whole/", "--num_images", 8)
    first = cli.works(*argv, "parts/", "--indices", "0-4").err
    second = cli.works(*argv, "parts/", "--indices", "7,5-6").err
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert "before" not in first and "also holds 5 other images" in second
    assert "before" not in cli.works(*argv, "whole/", "--num_images", 8).err


def test_an_index_that_is_named_twice_would_be_one_file(cli, loud, tmp_path):
    argv = ["sample", "--checkpoint", loud, "--steps", 1, "--indices", "3,0-4", "--output"]
    cli.refuses(2, [*argv, "x/"], "--indices 3,0-4", "twice")
    assert not contents(tmp_path)
    cli.works(*argv, "x.npz")
    assert len(array("x.npz")) == 6


@pytest.mark.parametrize(
    "output, left", [("x/", {"x/labels.csv", *(f"x/{i:05d}.png" for i in range(4))}), ("x.npz", set())]
)
def test_a_folder_keeps_what_was_sampled_before_a_stop_and_a_file_is_whole_or_absent(
    output, left, cli, loud, tmp_path, monkeypatch
):
    from tiny_diffusion.diffusion import sampling

    denoising, batches = sampling.denoising, []

    def stopped_in_the_third_batch(*given):
        batches.append(given)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return denoising(*given)

    monkeypatch.setattr(sampling, "denoising", stopped_in_the_third_batch)
    argv = ["--num_images", 9, "--batch_size", 2, "--steps", 1, "--output", output]
    assert cli("sample", "--checkpoint", loud, *argv).code == 130
    assert set(contents(tmp_path)) == left


# sample: what each option changes


def test_images_of_a_seed_are_the_same_alone_and_together(sample_images):
    together = sample_images("--num_images", 12)
    np.testing.assert_array_equal(sample_images("--indices", "3,5"), together[[3, 5]])
    np.testing.assert_array_equal(sample_images("--indices", "0-3,11,4-6"), together[[0, 1, 2, 3, 11, 4, 5, 6]])
    np.testing.assert_array_equal(sample_images("--num_images", 12, "--batch_size", 5), together)
    np.testing.assert_array_equal(sample_images("--num_images", 4), together[:4])
    assert len(np.unique(together, axis=0)) == 12


CHANGES = {
    "seed": (["--seed", 1], ["--seed", 2]),
    "weights": (["--weights", "raw"], ["--weights", "ema"]),
    "guidance": (["--guidance", 3], ["--guidance", 1]),
    "eta": (["--sampler", "ddim", "--eta", 0.5], ["--sampler", "ddim", "--eta", 0]),
    "eta of sa_solver": (["--sampler", "sa_solver", "--eta", 1], ["--sampler", "sa_solver"]),
    "steps": (["--steps", 5], ["--steps", 4]),
    "classes": (["--classes", "1"], ["--classes", "2"]),
    "grid": (["--grid", "trailing"], ["--grid", "log_snr"]),
    "sampler": (["--sampler", "ddim"], ["--sampler", "heun"]),
}
EQUALS = {
    "seed 0 is the default": (["--seed", 0], []),
    "averaged weights are the default": (["--weights", "ema"], []),
    "guidance 1 is plain": (["--guidance", 1], []),
    "timesteps are steps": (["--timesteps", 5], ["--steps", 5]),
    "eta 0 is ddim": (["--sampler", "ddim", "--eta", 0], ["--sampler", "ddim"]),
    "eta 1 is ddpm": (["--sampler", "ddim", "--eta", 1], ["--sampler", "ddpm"]),
    "sa_solver on turns of the angle, eta 1.5, is the default": (
        ["--sampler", "sa_solver", "--grid", "angle", "--eta", 1.5],
        [],
    ),
    "all classes in turn": (["--classes", "0-9"], ["--classes", "all"]),
    "classes by name and by range": (["--classes", "2,3,4"], ["--classes", "2-4"]),
    "the first images are the default": (["--indices", "0-5"], []),
    "hyphens are underscores": (["--batch-size", 2], ["--batch_size", 6]),
}


@pytest.mark.parametrize("one, other", CHANGES.values(), ids=CHANGES)
def test_an_option_changes_the_images(one, other, sample_images):
    first, second = sample_images(*one), sample_images(*other)
    assert first.shape == second.shape and (first != second).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("one, other", EQUALS.values(), ids=EQUALS)
def test_two_spellings_of_the_same_options_sample_the_same_images(one, other, sample_images):
    np.testing.assert_array_equal(sample_images(*one), sample_images(*other))


@pytest.mark.parametrize(
    "sampler, grid", [*((name, "angle") for name in SAMPLERS), *(("ddim", name) for name in GRIDS)]
)
def test_every_sampler_works_on_every_grid(sampler, grid, sample_images):
    assert sample_images("--sampler", sampler, "--grid", grid, "--steps", 3, "--num_images", 2).shape == (2, 8, 8, 1)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 30])
def test_every_sampler_works_in_one_step_and_in_as_many_as_the_model_has_timesteps(steps, sampler, sample_images):
    assert sample_images("--sampler", sampler, "--steps", steps, "--num_images", 1).shape == (1, 8, 8, 1)


def test_ddpm_takes_every_timestep_by_default(cli, loud, tmp_path):
    for name, given in [("default.npz", []), ("all.npz", ["--timesteps", 30]), ("few.npz", ["--timesteps", 10])]:
        cli.works("sample", "--checkpoint", loud, "--sampler", "ddpm", "--num_images", 2, "--output", name, *given)
    np.testing.assert_array_equal(array("default.npz"), array("all.npz"))
    assert (array("default.npz") != array("few.npz")).any()


def test_classes_are_sampled_in_turn(sample_images):
    """Image i of a class does not depend on the other classes that are asked for."""
    threes, fives = sample_images("--classes", "3"), sample_images("--classes", "5")
    np.testing.assert_array_equal(
        sample_images("--classes", "3,5"), np.where(np.arange(6)[:, None, None, None] % 2, fives, threes)
    )


@pytest.mark.parametrize(
    "given, labels",
    [
        ([], "3645197820"),  # by the shares of the training images, the largest class first
        (["--classes", "all"], "0123456789"),
        (["--classes", "3,5"], "3535353535"),
        (["--classes", "7-9"], "7897897897"),
        (["--classes", "8,0-1"], "8018018018"),
        (["--classes", "4"], "4444444444"),
    ],
)
def test_images_of_classes_carry_their_names(given, labels, cli, loud, monkeypatch):
    captions = spy_on_captions(monkeypatch)
    cli.works("sample", "--checkpoint", loud, "--num_images", 10, "--steps", 1, *given, "--output", "x.png")
    assert captions == [list(labels)]


def test_sampling_without_classes_is_that_of_the_null_class(cli, loud, tmp_path):
    argv = ["sample", "--checkpoint", loud, "--num_images", 3, "--steps", 2]
    cli.works(*argv, "--classes", "none", "--output", "none.npz")
    cli.works(*argv, "--guidance", 0, "--output", "zero.npz")
    none, zero = np.load(tmp_path / "none.npz"), np.load(tmp_path / "zero.npz")
    np.testing.assert_array_equal(none["arr_0"], zero["arr_0"])
    assert none.files == zero.files == ["arr_0"]
    cli.refuses(2, [*argv, "--classes", "none", "--guidance", 2], "--guidance 2", "--classes none")


def test_an_array_and_a_folder_of_samples_say_the_class_of_each_image(cli, loud, tmp_path):
    argv = ["sample", "--checkpoint", loud, "--classes", "7,2", "--steps", 1]
    cli.works(*argv, "--num_images", 3, "--output", "x.npz")
    saved = np.load(tmp_path / "x.npz")
    assert saved["labels"].tolist() == [7, 2, 7] and saved["class_names"].tolist() == list("0123456789")
    cli.works(*argv, "--num_images", 3, "--output", "x/")
    text = "file,label,class\n00000.png,7,7\n00001.png,2,2\n00002.png,7,7\n"
    assert (tmp_path / "x/labels.csv").read_text() == text
    cli.works(*argv[:-4], "--classes", "5", "--steps", 1, "--indices", "2-3", "--output", "x/")
    cli.works(*argv[:-4], "--classes", "none", "--steps", 1, "--indices", "0", "--output", "x/")
    text = "file,label,class\n00001.png,2,2\n00002.png,5,5\n00003.png,5,5\n"
    assert (tmp_path / "x/labels.csv").read_text() == text
    (tmp_path / "x/labels.csv").write_text("mine\n")
    cli.refuses(1, [*argv, "--output", "x/"], "labels.csv", "another program's")
    assert (tmp_path / "x/labels.csv").read_text() == "mine\n"


def test_images_without_classes_carry_no_names(cli, unlabelled, monkeypatch):
    captions = spy_on_captions(monkeypatch)
    cli.works("sample", "--checkpoint", unlabelled, "--num_images", 2, "--steps", 1, "--output", "x.png")
    assert captions == [None]


def test_a_model_that_has_learnt_nothing_is_recognised_by_its_flat_images(cli, trained, monkeypatch):
    monkeypatch.setattr("tiny_diffusion.data.pixels.to_pictures", lambda x: np.full((len(x), 8, 8, 1), 7, np.uint8))
    ended = cli.works("sample", "--checkpoint", trained / "model_final.pt", "--num_images", 2, "--output", "x.png")
    assert "warning: every image is one flat colour" in ended.err


# visualize and info


@pytest.mark.parametrize("schedule, number", [("linear", 1), ("flow", 3)])
def test_the_forward_figure_is_a_picture_with_a_row_for_each_image(schedule, number, cli, tmp_path):
    argv = ["visualize", "--dataset", "digits", "--schedule", schedule, "--num_images", number, "--save_path", "x.png"]
    ended = cli.works(*argv)
    assert ended.err == "figure: x.png\n" and set(contents(tmp_path)) == {"x.png"}
    width, height = Image.open("x.png").size
    assert number * 100 < height < 200 + number * 200 and width > 8 * 100


def test_figures_are_written_to_outputs_by_default(cli, tmp_path):
    cli.works("visualize", "--dataset", "digits", "--num_images", 1)
    cli.works("visualize", "--what", "schedules")
    assert set(contents(tmp_path)) == {"outputs/forward_diffusion.png", "outputs/schedules.png"}
    assert min(Image.open("outputs/schedules.png").size) > 400


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        ["--dataset", "digits", "--num_images", 1, "--schedule", "linear", "--beta_start", 1e-3, "--image_size", 16],
        ["--what", "schedules", "--beta_start", 1e-3, "--beta_end", 0.1],
    ],
)
def test_the_same_figure_is_the_same_bytes(given, cli):
    for name in ("a.png", "b.png"):
        cli.works("visualize", *given, "--save_path", name)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_every_option_changes_the_forward_figure(cli):
    figures = set()
    for changed in ([], ["--seed", 1], ["--schedule", "flow"], ["--timesteps", 50], ["--image_size", 9]):
        cli.works("visualize", "--dataset", "digits", "--num_images", 1, *changed, "--save_path", "x.png")
        figures.add(Path("x.png").read_bytes())
    assert len(figures) == 5


@pytest.mark.parametrize("timesteps, times", [(1000, [0, 50, 100, 200, 400, 600, 800, 999]), (2, [0, 1])])
def test_the_forward_figure_shows_the_times_of_the_contract_and_the_ends_of_any_other(
    timesteps, times, cli, monkeypatch
):
    shown = []
    monkeypatch.setattr(
        "tiny_diffusion.visuals.figures.save_forward_figure", lambda path, images, times, **k: shown.append(times)
    )
    cli.works("visualize", "--dataset", "digits", "--num_images", 1, "--timesteps", timesteps)
    assert shown == [times]


def test_info_shows_what_a_checkpoint_holds(cli, run):
    ended = cli.works("info", "--checkpoint", run / "model_final.pt")
    config, text = load_checkpoint(run / "model_final.pt").config, ended.out
    for name in specs(Config):
        value = getattr(config, name)
        shown = (",".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)
        assert re.search(rf"^  --{name} +{re.escape(shown)}$", text, re.MULTILINE), name
    assert "1 x 8 x 8" in text and "unconditional" in text and "step 6" in text and "(finished)" in text
    assert "sa_solver, eta 1.5, 5 steps on the angle grid" in text
    assert ", ".join(DATASETS["digits"].classes) in text and ended.err == ""


def test_info_escapes_names_of_a_checkpoint_that_would_act_on_the_terminal(cli, loud, tmp_path):
    """Names of classes may hold escape sequences, line ends and direction marks, and have any length."""
    checkpoint = load_checkpoint(loud)
    about = {key: value for key, value in checkpoint.about.items() if key not in ("format", "sha256")}
    about["class_names"] = ["\x1b[31mred", "two\nlines", "a\u202eb", "x" * 100_000, "cafe\u0301", *"56789"]
    save_checkpoint(tmp_path / "odd.pt", about, checkpoint.tensors)
    text = cli.works("info", "--checkpoint", "odd.pt").out
    assert "classes \\x1b[31mred, two\\nlines, a\\u202eb, xxx" in text and len(text) < 5000
    assert all(line.isprintable() for line in text.splitlines())
    started = time.monotonic()
    argv = ["sample", "--checkpoint", "odd.pt", "--steps", 1, "--num_images", 5]
    cli.works(*argv, "--output", "x.png")
    assert time.monotonic() - started < 10
    line = cli.refuses(2, [*argv, "--classes", "\x1b[2J"], "is not one of \\x1b[31mred")
    assert line.isprintable() and len(line) < 5000


@pytest.mark.parametrize("size, argv", [(8, []), (48, ["--image_size", 48])])
def test_the_forward_figure_has_the_shift_that_training_has_at_this_size(size, argv, cli, monkeypatch):
    """Its levels are those of a run on images of this size, whose log-SNR is shifted above 32 pixels."""
    captions = []
    monkeypatch.setattr(
        "tiny_diffusion.visuals.figures.save_forward_figure", lambda *args, **rest: captions.extend(rest["captions"])
    )
    cli.works("visualize", "--dataset", "digits", "--schedule", "cosine", "--num_images", 1, *argv)
    schedule = make_diffusion(resolve({"dataset": "digits", "image_size": size, "schedule": "cosine"})).schedule
    levels = [schedule.level(t) for t in (0, 50, 100, 200, 400, 600, 800, 999)]
    assert captions == [f"α {level.alpha:.2f}  σ {level.sigma:.2f}" for level in levels]


def test_info_of_a_stopped_run_says_how_to_continue(cli, loud):
    text = cli.works("info", "--checkpoint", loud).out
    assert "class-conditional" in text and "not finished; --resume continues it" in text


# As processes


def process(folder, *words):
    ended = subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.slow
def test_the_three_scripts_run_from_anywhere_one_after_the_other(tmp_path):
    code, out, err = process(tmp_path, ROOT / "train.py", *SMALLEST, "--epochs", 1, "--output_dir", "run")
    assert (code, out) == (0, "") and (tmp_path / "run/model_final.pt").is_file()
    code, out, err = process(tmp_path, ROOT / "sample.py", "--checkpoint", "run/model_final.pt", "--num_images", 4)
    assert (code, out) == (0, "") and "4 images: run/generated_samples.png" in err
    code, out, err = process(tmp_path, ROOT / "visualize_diffusion.py", "--dataset", "digits")
    assert (code, out, err) == (0, "", "figure: outputs/forward_diffusion.png\n")


@pytest.mark.slow
def test_the_package_runs_as_a_module(tmp_path):
    words = ["-m", "tiny_diffusion", "visualize", "--what", "schedules", "--save_path", tmp_path / "x.png"]
    assert process(ROOT, *words) == (0, "", f"figure: {tmp_path / 'x.png'}\n")
    code, out, err = process(ROOT, "-m", "tiny_diffusion", "info")
    assert (code, out) == (2, "") and err.startswith("tiny_diffusion info: error: --checkpoint is required")
