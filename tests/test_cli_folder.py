"""The commands on folders of images as people have them: named classes, any size, and faulty folders."""

import io
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from cli_helpers import call, contents
from image_helpers import plain, png, smooth, write
from PIL import Image, ImageSequence

from tiny_diffusion.cli.selection import labels_of
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.runs.checkpoint import load_checkpoint, load_model
from tiny_diffusion.runs.writer import RunWriter

NAMES = ["café", "cats, dogs", "кошки", "الزهور", "猫"]  # in their order as text
SMALL = [
    "--timesteps",
    5,
    "--base_channels",
    4,
    "--channel_mult",
    1,
    "--attention_levels",
    "none",
    "--num_samples",
    5,
    "--device",
    "cpu",
]
FOLDER = ["train", "--dataset", "folder", "--data_dir", "photos", *SMALL]
WIDE = [*FOLDER, "--image_size", "16x24", "--batch_size", 8]


def make_photos(folder, names=NAMES, each=3):
    """Photographs of each class: colour, grey, with transparency, in several formats, sizes and file endings."""
    for k, name in enumerate(names):
        for i in range(each):
            image = smooth(20 + 3 * i, 30 - 2 * k, seed=10 * k + i)
            alpha = np.dstack([image, np.full(image.shape[:2], 255 // (i + 2), np.uint8)])
            write(folder / name / f"{i}.{('png', 'JPG', 'jpeg')[i % 3]}", (alpha, image, image[..., 0])[i % 3])
    write(folder / "notes.txt", b"mine")
    return folder


@pytest.fixture
def photos(tmp_path):
    """The folder "photos" of the working folder, with five classes of three images."""
    return make_photos(tmp_path / "photos")


@pytest.fixture
def grey(tmp_path):
    """The folder "grey": five images of one channel, none in a sub-folder."""
    for i in range(5):
        write(tmp_path / "grey" / f"{i}.png", plain(40 * i, 20, 30))
    return tmp_path / "grey"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The folder of a class-conditional run of three steps on images of 16x24, and what it printed."""
    folder = tmp_path_factory.mktemp("wide")
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as said:
        patch.chdir(folder)
        patch.setattr(sys, "stderr", said)
        make_photos(folder / "photos")
        assert call(*WIDE, "--epochs", 3, "--max_steps", 3, "--output_dir", "run") == 0
        return folder / "run", said.getvalue()


def captions_of(monkeypatch):
    """A list to which the names of the classes in every grid are added from now on, None for a plain grid."""
    from tiny_diffusion.visuals import class_grid

    captions, save = [], class_grid.save_grid

    def spy(path, images, labels=None, names=()):
        captions.append(None if labels is None else [names[label] for label in labels])
        save(path, images, labels, names)

    monkeypatch.setattr(class_grid, "save_grid", spy)
    return captions


def weights(path):
    return load_checkpoint(path).tensors


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def refuses_at_the_end(cli, code, argv, *words):
    """The command ends with this exit code, and the last line on standard error is the error with these words."""
    ended = cli(*argv)
    assert (ended.code, ended.out) == (code, "") and "Traceback" not in ended.err, ended
    *reported, last = ended.err.splitlines()
    assert last.startswith(f"tiny_diffusion {argv[0]}: error: ") and not any("error:" in line for line in reported)
    for word in words:
        assert str(word) in last
    return last


# Classes by their names


def test_the_report_describes_the_folder(wide):
    _, said = wide
    for words in ("10 JPEG, 5 PNG", "colour", "5 classes: " + ", ".join(f"{name} 3" for name in NAMES)):
        assert words in said
    assert "folder: 15 images of 3x16x24 train, none held out" in said
    assert "loss of the averaged weights" in said and "held-out loss" not in said


def test_class_names_travel_in_the_checkpoint_and_info_shows_them(wide, cli):
    folder, _ = wide
    about = load_checkpoint(folder / "model_final.pt").about
    assert about["class_names"] == NAMES and (about["image_size"], about["channels"]) == ([16, 24], 3)
    assert (about["background"], about["heldout_history"]) == ("white", [])
    text = cli.works("info", "--checkpoint", folder / "model_final.pt").out
    assert f"3 x 16 x 24, classes {', '.join(NAMES)}" in text and "class-conditional" in text
    assert re.search(r"--image_size +16x24\n", text) and re.search(r"--data_dir +photos\n", text)


def test_photographs_are_sampled_without_fresh_noise_by_default(wide, cli):
    """The catalogue decides the sampler, the checkpoint holds it, and info shows it."""
    folder, _ = wide
    about = load_checkpoint(folder / "model_final.pt").about
    assert (about["sampling"]["sampler"], about["sampling"]["eta"]) == ("abm", None)
    assert "abm, 5 steps" in cli.works("info", "--checkpoint", folder / "model_final.pt").out


def test_info_is_printed_on_an_ascii_console(wide, monkeypatch):
    page = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", page)
    assert call("info", "--checkpoint", wide[0] / "model_final.pt") == 0
    page.flush()
    assert "caf\\xe9, cats, dogs" in page.buffer.getvalue().decode("ascii")


def test_grids_of_a_run_are_labelled_with_the_names(photos, cli, monkeypatch):
    captions = captions_of(monkeypatch)
    cli.works(*WIDE, "--max_steps", 1, "--output_dir", "run", "--num_samples", 7)
    assert captions == [[*NAMES, *NAMES[:2]]]


def test_grids_of_a_run_without_classes_are_not_labelled(photos, cli, monkeypatch):
    captions = captions_of(monkeypatch)
    cli.works(*FOLDER, "--image_size", 8, "--no_class_cond", "--max_steps", 1, "--output_dir", "run")
    assert captions == [None]
    assert load_checkpoint("run/model_final.pt").about["class_names"] == NAMES


BY_NAME = {
    "": NAMES,
    "猫": ["猫"],
    "кошки,café": ["кошки", "café"],
    "cats, dogs": ["cats, dogs"],
    "猫,cats, dogs,café": ["猫", "cats, dogs", "café"],
    "cafe\u0301": ["café"],  # as another computer composes it
    "0": ["café"],
    "1-3,猫": ["cats, dogs", "кошки", "الزهور", "猫"],
}


@pytest.mark.parametrize("text", BY_NAME)
def test_classes_are_sampled_by_name_and_by_number(text, wide, cli, monkeypatch):
    captions = captions_of(monkeypatch)
    argv = ["sample", "--checkpoint", wide[0] / "model_final.pt", "--num_images", 5, "--steps", 1, "--output", "x.png"]
    cli.works(*argv, *([f"--classes={text}"] if text else []))
    assert captions == [[BY_NAME[text][i % len(BY_NAME[text])] for i in range(5)]]


@pytest.mark.parametrize(
    "text, labels",
    [
        (" a", [0]), ("a", [1]), ("b ", [2]), ("a,b , a,1", [1, 2, 0, 1]), ("c, d,  c, d", [4, 4]), ("1 , 4 ", [1, 4]),
    ],
)  # fmt: skip
def test_a_class_may_begin_and_end_with_white_space(text, labels):
    assert labels_of(text, True, [" a", "a", "b ", "x", "c, d"]) == tuple(labels)


@pytest.mark.parametrize(
    "text, words",
    [
        ("кошка", ["'кошка' is not one of", *NAMES, "Did you mean 'кошки'?"]),
        ("cats", ["'cats' is not one of", "Did you mean 'cats, dogs'?"]),
        ("5", ["no class 5", "0 to 4", *NAMES]),
        ("3-5", ["no class 5"]),
        ("猫,", ["'' is not one of"]),
    ],
)
def test_an_unknown_class_is_refused_with_the_classes_of_the_folder(text, words, wide, cli):
    argv = ["sample", "--checkpoint", wide[0] / "model_final.pt", f"--classes={text}"]
    cli.refuses(2, argv, f"--classes {text}", *words)


def test_numbers_are_names_where_the_folders_are_numbered(cli, tmp_path, monkeypatch):
    """Folders 01 to 12: class 3 is the folder 03, at any position among them."""
    names = ["01", "2", "03", "10", "12"]
    make_photos(tmp_path / "photos", names, each=1)
    cli.works(*FOLDER, "--image_size", 8, "--class_cond", "--max_steps", 1, "--output_dir", "run")
    assert load_checkpoint("run/model_final.pt").about["class_names"] == names
    captions = captions_of(monkeypatch)
    argv = ["sample", "--checkpoint", "run/model_final.pt", "--num_images", 4, "--steps", 1, "--output", "x.png"]
    for text, drawn in [("3", ["03"]), ("1-3", ["01", "2", "03"]), ("12,01", ["12", "01"]), ("10", ["10"])]:
        cli.works(*argv, "--classes", text)
        assert captions.pop() == [drawn[i % len(drawn)] for i in range(4)]
    for text in ("0", "4", "10-12"):
        cli.refuses(2, [*argv, "--classes", text], f"--classes {text}", "no class", "1 to 12", ", ".join(names))


# Sizes that are not square


@pytest.mark.slow
def test_images_that_are_not_square_are_sampled_in_every_format(wide, cli, tmp_path):
    argv = ["sample", "--checkpoint", wide[0] / "model_final.pt", "--num_images", 3, "--steps", 2, "--output"]
    argv[3:3] = ["--guidance", 0]
    for output in ("x.png", "x.npz", "x.gif", "x/"):
        cli.works(*argv, output)
    with np.load("x.npz") as file:
        images = file["arr_0"]
    assert images.shape == (3, 16, 24, 3) and images.dtype == np.uint8
    for i, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"x/{i:05d}.png")), image)
    picture = np.asarray(Image.open("x.png"))
    assert np.array_equal(picture[2 : 2 + 3 * 16, 2 : 2 + 3 * 24], images[0].repeat(3, 0).repeat(3, 1))  # enlarged
    with Image.open("x.gif") as animation:
        assert len(list(ImageSequence.Iterator(animation))) == 3


def test_the_picture_of_a_run_has_its_images_shape(wide):
    width, height = Image.open(next((wide[0] / "samples").iterdir())).size
    assert 2 + 3 * (24 * 3 + 2) <= width and 16 * 3 < height < width


def test_the_forward_process_is_shown_on_images_that_are_not_square(photos, cli):
    shapes = {}
    for size in ("16x24", "24x16", "20"):
        argv = ["visualize", "--dataset", "folder", "--data_dir", "photos", "--num_images", 2, "--image_size", size]
        cli.works(*argv, "--save_path", "x.png")
        shapes[size] = np.divide(*Image.open("x.png").size)
    assert shapes["24x16"] < shapes["20"] < shapes["16x24"]


@pytest.mark.parametrize(
    "words",
    [["--random_crop", "--hflip"], pytest.param(["--cache_mb", 0, "--random_crop"], marks=pytest.mark.slow)],
    ids=str,
)
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(words, photos, cli):
    argv = [*WIDE, "--epochs", 4, *words]
    cli.works(*argv, "--output_dir", "whole")
    cli.works(*argv, "--output_dir", "run", "--max_steps", 3)
    cli.works(*argv, "--output_dir", "run", "--resume")
    assert_same_weights("whole/model_final.pt", "run/model_final.pt")


# How the images are read


IN_PLACE, IN_THREADS = ["--workers", 0], ["--cache_mb", 0, "--workers", 3]


@pytest.mark.parametrize(
    "crop, others",
    [([], [IN_THREADS]), (["--random_crop"], [IN_PLACE, IN_THREADS, ["--cache_mb", 0, *IN_PLACE]])],
    ids=["centre", "random"],
)
def test_where_images_are_decoded_changes_nothing(crop, others, photos, cli):
    argv = [*WIDE, "--max_steps", 3, *crop]
    cli.works(*argv, "--output_dir", "kept")
    for words in others:
        cli.works(*argv, "--output_dir", "read", "--overwrite", *words)
        assert_same_weights("kept/model_final.pt", "read/model_final.pt")


CHANGES = {
    "crops": ["--random_crop"],
    "flips": ["--hflip"],
    "background": ["--background", "#ff0000"],
    "seed": ["--seed", 1],
}


def test_an_option_changes_the_weights(photos, cli):
    losses = {}
    for name, words in {"none": [], **CHANGES}.items():
        cli.works(*FOLDER, "--image_size", 16, "--max_steps", 2, "--output_dir", "run", "--overwrite", *words)
        losses[name] = tuple(json.loads(line)["loss"] for line in open("run/log.jsonl"))
    assert len(set(losses.values())) == len(losses), losses


def test_the_second_run_finds_the_images_decoded(photos, cli):
    first = cli.works(*FOLDER, "--image_size", 8, "--max_steps", 1, "--output_dir", "one").err
    second = cli.works(*FOLDER, "--image_size", 8, "--max_steps", 1, "--output_dir", "two").err
    assert "15 images decoded in" in first and "15 images, decoded before" in second
    assert_same_weights("one/model_final.pt", "two/model_final.pt")


def test_a_folder_smaller_than_a_batch_trains_on_each_image_as_often(grey, cli):
    """Five images in batches of 64: step k ends epoch 64 k / 5, and twenty epochs are two steps."""
    cli.works("train", "--dataset", "folder", "--data_dir", "grey", *SMALL, "--image_size", 8, "--output_dir", "run")
    lines = [json.loads(line) for line in open("run/log.jsonl")]
    assert [line["step"] for line in lines] == [1, 2]
    assert [line["epoch"] for line in lines] == pytest.approx([12.8, 25.6])
    about = load_checkpoint("run/model_final.pt").about
    assert about["finished"] and about["channels"] == 1 and about["class_names"] == []
    cli.works("sample", "--checkpoint", "run/model_final.pt", "--num_images", 2, "--steps", 2, "--output", "x.npz")
    with np.load("x.npz") as file:
        assert file["arr_0"].shape == (2, 8, 8, 1)


def test_one_image_is_enough(cli, tmp_path):
    write(tmp_path / "photos/alone.png", smooth(12, 12))
    cli.works(*FOLDER, "--image_size", 8, "--epochs", 100, "--output_dir", "run")
    assert load_checkpoint("run/model_final.pt").about["step"] == 2  # 100 images in batches of 64


def test_a_class_with_one_image_is_reported_and_trains(cli, tmp_path):
    make_photos(tmp_path / "photos", ["many"], each=4)
    write(tmp_path / "photos/single/1.png", smooth(20, 20))
    ended = cli.works(*FOLDER, "--image_size", 8, "--class_cond", "--max_steps", 1, "--output_dir", "run")
    warning = next(line for line in ended.err.splitlines() if line.startswith("warning:"))
    assert "single" in warning and "one image" in warning and "many" not in warning


def test_a_few_files_that_cannot_be_read_are_named_and_skipped(photos, cli):
    write(photos / "猫/torn.png", (photos / "猫/0.png").read_bytes()[:60])
    ended = cli.works(*FOLDER, "--image_size", 8, "--max_steps", 1, "--output_dir", "run")
    assert "torn.png" in ended.err and "folder: 15 images" in ended.err
    assert "notes.txt" not in ended.err


def test_sub_folders_train_and_test_are_parts_of_the_set(cli, tmp_path):
    for part, each in (("train", 3), ("test", 2)):
        make_photos(tmp_path / "photos" / part, NAMES[:2], each)
        (tmp_path / "photos" / part / "notes.txt").unlink()
    argv = [*FOLDER, "--image_size", 8, "--max_steps", 1, "--class_cond"]
    ended = cli.works(*argv, "--output_dir", "run")
    assert "folder: 6 images" in ended.err and "4 are held out" in ended.err and "held-out loss" in ended.err
    assert load_checkpoint("run/model_final.pt").about["class_names"] == NAMES[:2]
    ended = cli.works(*argv, "--splits", "train,test", "--output_dir", "both")
    assert "folder: 10 images" in ended.err and "none held out" in ended.err
    refuses_at_the_end(cli, 2, [*argv, "--splits", "train,val", "--output_dir", "x"], "--splits val", "test, train")


def test_a_model_is_the_start_for_another_folder(photos, cli, tmp_path):
    """--init_from keeps the network and its meaning; the images and all other options are those of the new run."""
    cli.works(*FOLDER, "--image_size", 8, "--max_steps", 1, "--output_dir", "first")
    make_photos(tmp_path / "other", ["a", "b"])
    argv = ["train", "--init_from", "first/model_final.pt", "--max_steps", 1, "--num_samples", 1, "--device", "cpu"]
    cli.works(*argv, "--data_dir", "other", "--output_dir", "second")
    about = load_checkpoint("second/model_final.pt").about
    assert about["class_names"] == ["a", "b"] and about["config"]["base_channels"] == 4
    assert about["config"]["class_cond"]  # the two new classes started as the null class of the first run
    cli.works(*argv, "--preset", "folder", "--data_dir", "other", "--image_size", 12, "--output_dir", "third")
    config = load_checkpoint("third/model_final.pt").config
    assert (config.preset, config.data_dir, config.image_size) == ("folder", "other", 12)
    assert (config.base_channels, config.schedule, config.hflip) == (4, "cosine", True)
    assert load_model(load_checkpoint("third/model_final.pt")) is not None


@pytest.mark.parametrize("words", [["--dataset", "digits"], ["--dataset", "folder", "--data_dir", "grey"]], ids=str)
def test_a_model_of_other_images_cannot_be_the_start(words, photos, grey, cli):
    cli.works(*FOLDER, "--image_size", 8, "--max_steps", 1, "--output_dir", "first")
    argv = ["train", "--init_from", "first/model_final.pt", *words, "--output_dir", "second"]
    refuses_at_the_end(cli, 2, argv, "--init_from first/model_final.pt", "3 channels", "Name images of the same kind")


def test_a_folder_decides_whether_there_are_classes_to_learn(photos, cli, tmp_path):
    """Sub-folders are classes, a flat folder has none, and one class is none; an option for classes is then refused."""
    for name, folder, learnt in (("five", "photos", True), ("flat", "photos/猫", False), ("one", "single", False)):
        make_photos(tmp_path / "single", ["only"])
        argv = ["train", "--dataset", "folder", "--data_dir", folder, *SMALL, "--image_size", 8, "--max_steps", 1]
        cli.works(*argv, "--output_dir", name)
        assert load_checkpoint(f"{name}/model_final.pt").config.class_cond is learnt
        if not learnt:
            again = [*argv, "--output_dir", "again", "--label_dropout", 0.3]
            refuses_at_the_end(cli, 2, again, "--label_dropout 0.3", folder, "sub-folder")


# Faulty folders


def broken(folder, number):
    for i in range(number):
        write(folder / f"{i}.png", b"\x89PNG\r\n\x1a\n" + bytes(50))


WRONG = {  # makes the folder "photos"; the exit code; words of the message
    "nothing there": (lambda folder: None, 1, ["--data_dir photos does not exist"]),
    "empty": (lambda folder: folder.mkdir(), 1, ["--data_dir photos holds nothing", "png, jpg"]),
    "empty sub-folders": (lambda folder: (folder / "a/b").mkdir(parents=True), 1, ["--data_dir photos holds nothing"]),
    "text files": (lambda folder: [write(folder / name, b"x") for name in ("a.txt", "b.md")], 1, ["no image", "2"]),
    "every image broken": (lambda folder: broken(folder, 3), 1, ["none of the 3 images", "0.png", "1.png", "2.png"]),
    "too many broken": (
        lambda folder: (broken(folder / "a", 11), make_photos(folder / "b", ["c"], 9)),
        1,
        ["11 of the 20 images", "cannot be read", "10%"],
    ),
    "a decompression bomb": (
        lambda folder: write(folder / "bomb.png", png(60_000, 60_000, 8, 2, bytes(1000))),
        1,
        ["bomb.png", "decompression bomb"],
    ),
    "a file": (lambda folder: write(folder, b"x"), 1, ["--data_dir photos is a file, not a folder"]),
    "a link to nothing": (
        lambda folder: (folder.mkdir(), os.symlink("nowhere.png", folder / "a.png")),
        1,
        ["none of the 1 images", "a.png"],
    ),
}


@pytest.mark.parametrize("make, code, words", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("command", ["train", "visualize"])
def test_a_faulty_folder_is_refused_in_one_line(command, make, code, words, cli, tmp_path):
    make(tmp_path / "photos")
    argv = [command, "--dataset", "folder", "--data_dir", "photos", "--image_size", 8]
    line = cli.refuses(code, argv, *words)
    assert len(line) < 500 and not contents(tmp_path / "outputs")


def test_a_folder_must_be_named_whatever_the_environment_says(photos, cli, monkeypatch):
    monkeypatch.setenv("TINY_DIFFUSION_DATA", "photos")
    for argv in (
        ["train", "--dataset", "folder"],
        ["visualize", "--dataset", "folder"],
        ["train", "--preset", "folder"],
    ):
        cli.refuses(2, argv, "--dataset folder needs --data_dir", "--dataset digits needs no files")


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--class_cond"], ["--class_cond needs classes", "grey", "sub-folder"]),
        (["--splits", "train"], ["--splits train would be ignored", "grey"]),
        (["--splits", "train,val,test"], ["--splits train,val,test would be ignored"]),
        (["--random_crop", "--image_size", "20x30"], ["--random_crop would be ignored", "20x30"]),
        (["--random_crop", "--image_size", "10x15"], ["--random_crop would be ignored", "10x15"]),
        (["--image_size", "30x20", "--patch_size", 4], ["--patch_size 4", "30x20", "--image_size 28x20 or 32x20"]),
        (["--image_size", "6x20", "--channel_mult", "1,1,1"], ["6x20 image", "--image_size 10x20"]),
    ],
    ids=str,
)
def test_options_that_a_folder_excludes_are_refused(words, parts, grey, cli, tmp_path):
    argv = ["train", "--dataset", "folder", "--data_dir", "grey", "--output_dir", "run", *words]
    cli.refuses(2, argv, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("output_dir", ["photos", "photos/run", "photos/../photos/a/b"])
def test_a_run_is_not_written_among_its_images(output_dir, photos, cli):
    """Its pictures would become images of a new class, and the run could not be resumed."""
    before = contents(photos)
    cli.refuses(2, [*FOLDER, "--output_dir", output_dir], f"--output_dir {output_dir} lies in --data_dir photos")
    assert contents(photos) == before


@pytest.mark.slow
@pytest.mark.parametrize("words, size", [(["--patch_size", 4], "30x20"), (["--channel_mult", "1,1,1"], "6x20")])
def test_the_sizes_that_are_suggested_work(words, size, photos, cli):
    argv = [*FOLDER[: FOLDER.index("--channel_mult")], "--device", "cpu", "--num_samples", 1, "--max_steps", 1, *words]
    suggested = cli.refuses(2, [*argv, "--image_size", size]).rpartition("--image_size ")[2].rstrip(".").split(" or ")
    for fitting in suggested:
        cli.works(*argv, "--image_size", fitting, "--output_dir", fitting)
        assert "x".join(map(str, load_checkpoint(f"{fitting}/model_final.pt").about["image_size"])) == fitting


OF_IMAGE_FILES = {
    "random_crop": [], "background": ["black"], "cache_mb": [10], "workers": [2],
}  # fmt: skip


@pytest.mark.parametrize("name", OF_IMAGE_FILES)
@pytest.mark.parametrize("dataset", DATASETS)
def test_an_option_of_image_files_is_refused_for_other_sets(dataset, name, cli, trained):
    if DATASETS[dataset].transparent if name == "background" else DATASETS[dataset].image_files:
        return
    words = [f"--{name}", *OF_IMAGE_FILES[name]]
    cli.refuses(2, ["train", "--dataset", dataset, *words], f"--{name}", "would be ignored", f"--dataset {dataset}")
    if name == "background":
        cli.refuses(2, ["visualize", "--dataset", dataset, *words], "--background black would be ignored")
    if dataset == "digits" and name in ("cache_mb", "workers"):
        cli.refuses(2, ["train", "--resume", "--output_dir", trained, *words], f"--{name}", "would be ignored")


# What changes under a run


@pytest.mark.slow
def test_a_folder_that_vanishes_ends_the_run_and_leaves_its_last_checkpoint(photos, cli, monkeypatch):
    write_report, away = RunWriter.write_report, photos.with_name("away")

    def write_and_vanish(self, report, *rest):
        if report.step == 7:
            photos.rename(away)
        return write_report(self, report, *rest)

    argv = [*WIDE, "--epochs", 6, "--save_interval", 1, "--sample_interval", 9, "--cache_mb", 0]
    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "write_report", write_and_vanish)
        line = refuses_at_the_end(cli, 1, [*argv, "--output_dir", "run"], "--data_dir photos", "vanished")
    assert len(line) < 300
    saved = load_checkpoint("run/checkpoints/model_epoch_003.pt")
    assert saved.about["step"] == 6 and load_model(saved) is not None
    refuses_at_the_end(cli, 1, [*argv, "--output_dir", "run", "--resume"], "--data_dir photos does not exist")
    away.rename(photos)
    cli.works(*argv, "--output_dir", "run", "--resume")
    cli.works(*argv, "--output_dir", "whole")
    assert_same_weights("run/model_final.pt", "whole/model_final.pt")


def test_a_set_in_memory_trains_on_after_its_folder_has_vanished(photos, cli, monkeypatch):
    write_report = RunWriter.write_report

    def write_and_delete(self, report, *rest):
        shutil.rmtree(photos, ignore_errors=True)
        return write_report(self, report, *rest)

    monkeypatch.setattr(RunWriter, "write_report", write_and_delete)
    cli.works(*WIDE, "--max_steps", 4, "--output_dir", "run")
    assert not photos.exists()


OTHER_CLASSES = {
    "one more": lambda photos: write(photos / "новый/1.png", smooth(20, 20)),
    "one less": lambda photos: shutil.rmtree(photos / "猫"),
    "another name": lambda photos: (photos / "猫").rename(photos / "犬"),
    "none any more": lambda photos: write(photos / "beside.png", smooth(20, 20)),
    "no colour any more": lambda photos: [
        write(path.with_suffix(".png"), smooth(20, 20)[..., 0]) and path.suffix == ".png" or path.unlink()
        for path in list(photos.rglob("*.*"))
        if path.suffix != ".txt"
    ],
}


@pytest.fixture(scope="module", params=[["--class_cond"], []], ids=["class_cond", "plain"])
def one_step(request, tmp_path_factory):
    """A working folder with photos and a run of one step on them, and the command of the run."""
    folder, argv = tmp_path_factory.mktemp("one"), [*FOLDER, "--image_size", 8, *request.param, "--output_dir", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_photos(folder / "photos")
        assert call(*argv, "--max_steps", 1) == 0
    return folder, argv


@pytest.mark.parametrize("change", OTHER_CLASSES.values(), ids=OTHER_CLASSES)
def test_a_run_is_not_resumed_with_other_classes(change, one_step, cli, tmp_path):
    folder, argv = one_step
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path / "run")
    change(tmp_path / "photos")
    refuses_at_the_end(cli, 2, [*argv, "--resume"])
    assert contents(tmp_path / "run") == before


def test_a_run_is_resumed_after_its_folder_has_moved(photos, cli):
    """But not with more images, even of the same classes: the run would not end as one that was not stopped."""
    cli.works(*WIDE, "--max_steps", 2, "--output_dir", "run")
    photos.rename(photos.with_name("moved"))
    refuses_at_the_end(cli, 1, ["train", "--resume", "--output_dir", "run"], "--data_dir photos does not exist")
    cli.works("train", "--resume", "--output_dir", "run", "--data_dir", "moved", "--max_steps", 3)
    write(photos.with_name("moved") / "猫/more.png", smooth(20, 20))
    argv = ["train", "--resume", "--output_dir", "run", "--data_dir", "moved", "--max_steps", 4]
    refuses_at_the_end(cli, 2, argv, "--data_dir moved: the images have changed", "15 images then, 16 now")
    assert load_checkpoint("run/model_final.pt").config.data_dir == "moved"
