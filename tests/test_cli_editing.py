"""Editing from the command line: what goes in, what comes out, and what is refused in one line."""

import numpy as np
import pytest
from PIL import Image

from tiny_diffusion.data.files.fit import nearest


def save(path, pixels):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return path


def array(path):
    with np.load(path) as archive:
        return archive["arr_0"]


@pytest.fixture
def images(tmp_path):
    """A folder of two grey images of the model's size."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8))
    for name, image in zip(("a", "b"), pixels, strict=True):
        save(tmp_path / "images" / f"{name}.png", image)
    return tmp_path / "images"


@pytest.fixture
def mask(tmp_path):
    half = np.zeros((8, 8))
    half[4:] = 255
    return save(tmp_path / "masks" / "a.png", half)


@pytest.fixture
def edit(cli, loud, tmp_path):
    """edit(option, ...) -> (the images that were written, what was said)."""

    def run(*argv):
        said = cli.works("sample", "--checkpoint", loud, "--output", tmp_path / "out.npz", "--steps", 3, *argv).err
        return array(tmp_path / "out.npz"), said

    return run


def test_strength_0_returns_the_images_and_strength_1_is_plain_sampling(edit, images, tmp_path):
    plain, _ = edit("--num_images", 2, "--seed", 3)
    fresh, _ = edit("--init", images, "--strength", 1, "--seed", 3)
    same, _ = edit("--init", images, "--strength", 0)
    assert (fresh == plain).all()
    assert all((same[i, ..., 0] == Image.open(images / f"{name}.png")).all() for i, name in enumerate("ab"))
    assert (tmp_path / "out_before_after.png").exists()


def test_one_image_has_as_many_variants_as_asked(edit, images):
    found, _ = edit("--init", images / "a.png", "--num_images", 3, "--classes", "4")
    assert len(found) == 3 and (found[0] != found[1]).any()
    again, _ = edit("--init", images / "a.png", "--indices", "1", "--classes", "4")
    assert (again[0] == found[1]).all()


@pytest.mark.parametrize("sampler", ["heun", "sa_solver"])  # tests/test_edits.py has every sampler
def test_known_pixels_come_back_exactly(sampler, edit, images, mask):
    found, _ = edit("--inpaint", images, "--mask", mask, "--sampler", sampler)
    for image, name in zip(found, "ab", strict=True):
        assert (image[:4, :, 0] == np.asarray(Image.open(images / f"{name}.png"))[:4]).all()


def test_a_folder_of_masks_is_matched_by_name(edit, images, mask, cli, loud):
    refused = ["sample", "--checkpoint", loud, "--inpaint", images, "--mask", mask.parent]
    cli.refuses(2, refused, "--mask", "b", "one mask for all")
    save(mask.parent / "b.bmp", 255 - np.asarray(Image.open(mask)))
    found, _ = edit("--inpaint", images, "--mask", mask.parent)
    second = np.asarray(Image.open(images / "b.png"))
    assert (found[1, 4:, :, 0] == second[4:]).all() and (found[1, :4, :, 0] != second[:4]).any()


def test_an_image_of_another_size_and_colour_is_fitted_and_said(edit, tmp_path):
    photo = save(tmp_path / "photo.png", np.random.default_rng(0).integers(0, 256, (20, 40, 3)))
    found, said = edit("--init", photo, "--strength", 0)
    assert found.shape == (1, 8, 8, 1)
    assert "photo.png: 20x40 scaled and cropped from the centre and made grey to the model's 8x8" in said


def test_masks_are_fitted_by_the_nearest_pixel():
    checkers = np.indices((4, 6)).sum(0) % 2
    assert (nearest(np.kron(checkers, np.ones((3, 3))), (4, 6)) == checkers).all()
    assert (nearest(checkers, (4, 4)) == checkers[:, 1:5]).all()
    assert (nearest(checkers, (8, 12)) == np.kron(checkers, np.ones((2, 2)))).all()


@pytest.mark.parametrize("sampler", ["sa_solver", "abm"])
def test_an_interpolation_is_a_strip_and_an_animation_between_the_plain_samples(sampler, edit, tmp_path):
    frames, _ = edit("--interpolate", "3,8", "--frames", 4, "--sampler", sampler)
    plain, _ = edit("--indices", "3,8", "--sampler", sampler)
    assert (frames[[0, -1]] == plain).all() and len(frames) == 4
    assert Image.open(tmp_path / "out_strip.gif").n_frames == 4
    assert Image.open(tmp_path / "out_strip.png").size[0] > 4 * 8


def test_inversion_writes_the_noise_and_says_the_error(edit, images, tmp_path):
    found, said = edit("--invert", images)
    with np.load(tmp_path / "out_noise.npz") as archive:
        assert archive["noise"].shape == (2, 1, 8, 8) and archive["noise"].dtype == np.float32
    assert found.shape == (2, 8, 8, 1) and "mean absolute error" in said


@pytest.mark.parametrize("ending", ["out.gif", "out.png", "folder/"])
@pytest.mark.parametrize("option", ["init", "inpaint", "interpolate", "invert"])
def test_every_edit_writes_every_kind_of_output(option, ending, cli, loud, images, mask, tmp_path):
    what = ["--interpolate", "0,1", "--frames", 3] if option == "interpolate" else [f"--{option}", images]
    what += ["--mask", mask] if option == "inpaint" else []
    cli.works("sample", "--checkpoint", loud, "--steps", 2, *what, "--output", f"{tmp_path}/{ending}")
    assert (tmp_path / ending.rstrip("/")).exists()
    if ending == "folder/":
        assert len(list((tmp_path / "folder").iterdir())) == (3 if option == "interpolate" else 2)


def test_an_edit_may_take_fewer_steps_than_its_frames_expect(cli, loud, images, tmp_path):
    options = ["--init", images, "--strength", 0, "--show_intermediate", "--output", tmp_path / "out.png"]
    cli.works("sample", "--checkpoint", loud, *options)
    assert (tmp_path / "intermediate" / "step_0000.png").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--strength", 0.5], ["--strength 0.5", "--init"]),
        (["--mask", "m.png"], ["--mask m.png", "--inpaint"]),
        (["--frames", 4], ["--frames 4", "--interpolate"]),
        (["--init", "a.png", "--strength", 1.5], ["--strength", "1.5", "at most 1"]),
        (["--init", "a.png", "--strength=-0.1"], ["--strength", "at least 0"]),
        (["--inpaint", "a.png"], ["--inpaint", "--mask"]),
        (["--init", "a.png", "--invert", "a.png"], ["--init", "--invert"]),
        (["--interpolate", "3"], ["--interpolate 3", "3,8"]),
        (["--interpolate", "1-2"], ["--interpolate 1-2"]),
        (["--interpolate", "1,2", "--num_images", 5], ["--num_images 5", "--frames"]),
        (["--invert", "IMAGE", "--seed", 5], ["--seed 5", "--invert"]),
        (["--invert", "IMAGE", "--sampler", "sa_solver"], ["--sampler sa_solver", "--invert", "ddim"]),
        (["--invert", "IMAGE", "--eta", 0.5], ["--eta 0.5", "--invert"]),
        (["--init", "IMAGE", "--guidance", 2], ["--guidance 2", "--classes"]),
        (["--inpaint", "IMAGE", "--mask", "BLACK"], ["black.png", "all black"]),
        (["--inpaint", "IMAGE", "--mask", "WHITE"], ["white.png", "all white"]),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line_and_nothing_is_written(argv, words, cli, loud, images, tmp_path):
    save(tmp_path / "black.png", np.zeros((8, 8)))
    save(tmp_path / "white.png", np.full((8, 8), 255))
    named = {"IMAGE": images / "a.png", "BLACK": tmp_path / "black.png", "WHITE": tmp_path / "white.png"}
    argv = [named.get(word, word) for word in argv]
    cli.refuses(2, ["sample", "--checkpoint", loud, *argv, "--output", tmp_path / "out.png"], *words)
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("name", ["no.png", "text.png", "empty"])
def test_an_image_that_cannot_be_read_is_named(name, cli, loud, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    cli.refuses(1, ["sample", "--checkpoint", loud, "--init", tmp_path / name], "--init", name)
