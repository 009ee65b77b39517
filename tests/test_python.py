"""The commands as Python functions: the same words, the same images, the same refusals."""

import doctest

import numpy as np
import pytest
from PIL import Image

import tiny_diffusion
from tiny_diffusion.cli import python
from tiny_diffusion.config.student import Student
from tiny_diffusion.config.training import resolve
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.errors import OptionError
from tiny_diffusion.runs.checkpoint import load_checkpoint
from tiny_diffusion.runs.writer import default_sampling_of

WORDS = {
    "the defaults": {},
    "classes and guidance": {"classes": "3,7", "guidance": 2},
    "another sampler": {"sampler": "ddim", "eta": 0.5, "seed": 7},
    "some images": {"indices": [4, 1]},
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_the_same_words_sample_the_same_images_as_the_command(words, cli, loud, tmp_path):
    words = {"steps": 3, **({} if "indices" in words else {"num_images": 5}), **words}
    images = tiny_diffusion.open_model(loud).sample(**words)
    cli.works("sample", "--checkpoint", loud, "--output", "x.npz", *python.words_of(words))
    np.testing.assert_array_equal(images, np.load(tmp_path / "x.npz")["arr_0"])


def test_a_loop_over_the_steps_ends_with_the_images(loud):
    from tiny_diffusion.data.pixels import to_pictures

    model = tiny_diffusion.open_model(loud)
    steps = list(model.steps(num_images=2, steps=4))
    assert len(steps) == 5 and steps[-1].level.sigma == 0
    np.testing.assert_array_equal(to_pictures(steps[-1].x), model.sample(num_images=2, steps=4))
    assert Image.fromarray(model.sample(num_images=1, steps=1)[0].squeeze()).size == (8, 8)


@pytest.mark.parametrize("words", [{"steps": 31}, {"classes": "ten"}, {"output": "x.png"}, {"step": 3}], ids=str)
def test_what_the_command_refuses_is_refused_by_name(words, loud):
    with pytest.raises(OptionError, match=next(iter(words))):
        tiny_diffusion.open_model(loud).sample(**words)


def test_an_option_out_of_range_is_an_error_and_no_exit(loud):
    for words in ({"num_images": 0}, {"seed": "x"}):
        with pytest.raises(OptionError):
            tiny_diffusion.open_model(loud).sample(**words)
    with pytest.raises(OptionError, match="train"):
        tiny_diffusion.train(dataset="digits", epochs=0)


def test_the_examples_of_the_docstrings_are_true(loud, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(python, extraglobs={"model": tiny_diffusion.open_model(loud), **vars(python)})
    assert found.attempted >= 5 and not found.failed
    assert load_checkpoint("outputs/python/model_final.pt").config.base_channels == 8


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_model_samples_with_its_data_sets_guidance_only_where_it_also_learns_no_class(dataset):
    row, data_dir = DATASETS[dataset], {"data_dir": "x"} if dataset == "folder" else {}
    for options, guided in (({"class_cond": True}, True), ({"class_cond": False}, False)):
        usual = default_sampling_of(resolve({"dataset": dataset, **data_dir, **options}))
        assert usual["guidance"] == (row.guidance if guided else 1.0)
        assert ("guidance_interval" in usual) == (guided and row.guidance_interval is not None)
    config = resolve({"dataset": dataset, **data_dir, "class_cond": True, "label_dropout": 0.0})
    assert default_sampling_of(config)["guidance"] == 1.0
    student = Student(steps=2, segments=1, guidance=1.5, teacher="")
    assert default_sampling_of(resolve({"dataset": dataset, **data_dir}), student)["guidance"] == 1.0
