"""The commands as Python functions: the same words, the same images, the same refusals."""

import doctest
import importlib
import inspect

import numpy as np
import pytest
from PIL import Image

import tiny_diffusion
from tiny_diffusion.cli import COMMANDS, python
from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.config.option import Flag, specs
from tiny_diffusion.config.option_file import read_options
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
    cli.works("sample", "--checkpoint", loud, "--output", "x.npz", *python.words_of(words, "sample"))
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


@pytest.mark.slow
def test_the_examples_of_the_docstrings_are_true(loud, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(python, extraglobs={"model": tiny_diffusion.open_model(loud), "path": loud})
    assert found.attempted >= 20 and not found.failed
    assert load_checkpoint("outputs/python/model_final.pt").config.base_channels == 8


def test_every_public_name_is_there_and_every_function_has_a_docstring_and_types():
    for name in tiny_diffusion.__all__:
        value = getattr(tiny_diffusion, name)
        assert value.__doc__, name
        if inspect.isfunction(value):
            assert "return" in value.__annotations__, name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_can_be_true_or_false_in_python_and_means_that_on_the_command_line(command):
    sets = importlib.import_module(COMMANDS[command][0]).OPTIONS
    for options in sets:
        for name, spec in specs(options).items():
            if isinstance(spec.type, Flag):
                for value in (True, False):
                    given = parse(python.words_of({name: value}, command), command, "", *sets)
                    assert given.get(name, options.__dataclass_fields__[name].default) == value


def test_no_mirroring_is_said_in_python_against_a_preset_that_mirrors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, hflip in (({}, True), ({"hflip": False}, False)):
        tiny_diffusion.run_command("train", preset="cifar10", dry_run=True, save_config=f"{hflip}.json", **words)
        assert read_options(tmp_path / f"{hflip}.json").get("hflip", False) == hflip


def test_a_misspelt_flag_is_refused_whatever_its_value():
    for value in (True, False):
        with pytest.raises(OptionError):
            tiny_diffusion.train(dataset="digits", class_condition=value)


def test_the_path_of_a_run_is_that_of_the_run_which_was_continued(loud, tmp_path, monkeypatch):
    """A run that has reached its steps is left as it is."""
    monkeypatch.chdir(tmp_path)
    assert tiny_diffusion.train(resume=loud, max_steps=1) == loud
    assert tiny_diffusion.train(resume=True, output_dir=loud.parent, max_steps=1) == loud


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
