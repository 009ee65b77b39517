"""Features: what an image becomes before it is compared, and that a name and a hash say which."""

import dataclasses
import importlib.util
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch

from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.data.files.cache import Cache
from tiny_diffusion.data.sources import open_dataset
from tiny_diffusion.errors import FileError, OptionError
from tiny_diffusion.evaluation.classifier import WEIGHTS, accuracy, load_classifier, weights_path
from tiny_diffusion.evaluation.features import default_features, file_hash, make_features
from tiny_diffusion.evaluation.images import NamedImages
from tiny_diffusion.evaluation.reference import Real, make_reference

CPU, DIGIT = torch.device("cpu"), (1, 8, 8)
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
SHIPPED = ("digits", "mnist", "fashion_mnist", "cifar10")
OF_FILES = {"cifar10": "--dataset folder --data_dir cifar10-images --image_size 32 "}  # JPEG files of its photographs


def features_of(asked="classifier", dataset="digits", shape=DIGIT):
    return make_features(asked, dataset, shape, CPU)


class Halves(torch.nn.Module):
    """The grey levels of the upper and of the lower half: a network of a user's own."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().reshape(images.shape[0], 2, -1).mean(2)


class Fussy(torch.nn.Module):
    """Takes colour alone."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().reshape(images.shape[0], 3, -1) @ torch.ones(5)


@pytest.fixture
def scripted(tmp_path):
    path = tmp_path / "halves.pt"
    torch.jit.script(Halves()).save(str(path))
    return path


@pytest.mark.parametrize("asked", ["pixels", "classifier"])
def test_neither_order_nor_batch_size_change_an_images_features(asked, digits, monkeypatch):
    import tiny_diffusion.evaluation.features as module

    images, features = digits.images[:100], features_of(asked)
    mixed = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    whole = features.of(images)
    torch.testing.assert_close(features.of(images[mixed]), whole[mixed], rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(module, "BATCH", 7)
    torch.testing.assert_close(features.of(images), whole, rtol=1e-5, atol=1e-5)


# The classifiers that come with the package


@pytest.mark.parametrize("dataset", SHIPPED)
def test_the_weights_are_small_and_say_what_made_them(dataset):
    path = weights_path(dataset)
    _, about = load_classifier(path)
    assert path.stat().st_size < (1_000_000 if dataset == "cifar10" else 300_000)
    assert about["classes"] == list(DATASETS[dataset].classes)
    images = OF_FILES.get(dataset, f"--dataset {dataset} ")
    assert about["command"].startswith(f"python -m tiny_diffusion classifier {images}")


def test_nothing_else_lies_among_the_weights():
    assert {path.name for path in WEIGHTS.iterdir()} == {weights_path(dataset).name for dataset in SHIPPED}


@pytest.mark.parametrize("dataset", ["digits", *(pytest.param(n, marks=pytest.mark.slow) for n in SHIPPED[1:])])
def test_the_accuracy_in_the_header_is_what_is_measured(dataset, tmp_path):
    place = SHARED / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "cifar10-images.tar.gz"}.get(
        dataset, ""
    )
    if not place.exists():
        pytest.skip("the set is not here")
    model, about = load_classifier(weights_path(dataset))
    if dataset == "cifar10":
        with tarfile.open(place) as archive:
            first = [member for member in archive if "/test/" in member.name or member.name.endswith("/0000.jpg")]
            archive.extractall(tmp_path, members=first, filter="data")
        heldout = open_dataset("folder", heldout=True, data_dir=str(tmp_path / "cifar10-images"), size=32, channels=3)
    else:
        heldout = open_dataset(dataset, heldout=True, data_dir=str(SHARED))
    assert about["heldout_images"] == len(heldout)
    assert accuracy(model, heldout) == pytest.approx(about["accuracy"], abs=0.5 / len(heldout))


@pytest.mark.parametrize("dataset", SHIPPED)
def test_a_shipped_classifier_answers_to_the_name_it_is_printed_under(dataset):
    shape = {"digits": DIGIT, "cifar10": (3, 32, 32)}.get(dataset, (1, 28, 28))
    one = features_of("classifier", dataset, shape)
    other = features_of(one.name, "these images", shape)
    assert (one.name, one.hash) == (other.name, other.hash)
    assert one.hash == file_hash(weights_path(dataset)) and len(one.hash) == 12


def test_the_default_is_the_sets_own_classifier_where_it_takes_such_images():
    assert default_features("digits", DIGIT) == "classifier"
    assert default_features("digits", (1, 16, 16)) == "pixels"
    assert default_features(None, DIGIT) == "pixels"


def test_the_command_writes_a_classifier_that_can_be_used(cli, digits):
    ended = cli.works("classifier", "--dataset", "digits", "--epochs", 1, "--output", "mine.safetensors")
    _, about = load_classifier(Path("mine.safetensors"))
    assert file_hash(Path("mine.safetensors")) in ended.err
    assert f"{about['accuracy']:.2%}" in ended.err
    assert features_of("mine.safetensors").of(digits.images[:3]).shape == (3, 64)


# A user's own


def test_a_torchscript_file_gives_its_features(scripted, digits):
    features = features_of(str(scripted))
    wanted = digits.images[:5].float().reshape(5, 2, -1).mean(2)
    torch.testing.assert_close(features.of(digits.images[:5]), wanted)
    assert (features.name, features.hash) == ("halves", file_hash(scripted))


def test_a_torchscript_file_that_does_not_take_these_images_says_so_in_one_line(tmp_path, digits):
    path = tmp_path / "fussy.pt"
    torch.jit.script(Fussy()).save(str(path))
    with pytest.raises(OptionError, match="fails on uint8 images of 1x8x8") as raised:
        features_of(str(path)).of(digits.images[:5])
    assert "\n" not in str(raised.value)


def test_an_onnx_file_gives_its_features(tmp_path, digits):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    from onnx import TensorProto, helper

    node = helper.make_node("Flatten", ["x"], ["y"])
    graph = helper.make_graph(
        [node], "flat",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(tmp_path / "flat.onnx"))
    found = features_of(str(tmp_path / "flat.onnx")).of(digits.images[:3])
    torch.testing.assert_close(found, features_of("pixels").of(digits.images[:3]))


@pytest.mark.parametrize("name", ["broken.pt", "broken.ts", "broken.safetensors"])
def test_a_broken_file_of_features_is_refused_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"no network at all")
    with pytest.raises(FileError, match=name) as raised:
        features_of(str(tmp_path / name))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("about", [None, {}, {"size": [8, 8], "classes": []}, {"size": 3, "classes": "x"}])
def test_weights_of_something_else_are_no_classifier(tmp_path, about):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path, None if about is None else {"about": json.dumps(about)})
    with pytest.raises(FileError, match="is not a classifier of this program"):
        load_classifier(path)


def test_an_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(OptionError, match="pixels, classifier, inception, cifar10-classifier-v1, digits-classifier-v1"):
        features_of("nonsense")
    with pytest.raises(FileError, match="does not exist"):
        features_of("missing.pt")


def test_a_classifier_refuses_images_of_another_size():
    with pytest.raises(OptionError, match="takes images of 1x8x8, and these are 1x28x28"):
        features_of("classifier", "digits", (1, 28, 28))


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_inception_without_its_weights_is_one_line_and_no_substitute(cli, trained):
    evaluate = ("evaluate", "--checkpoint", trained / "model_final.pt", "--num_images", 4, "--features", "inception")
    cli.refuses(1, evaluate, "pip install torch-fidelity", "No other features are used instead")


# The cache


def test_features_are_kept_and_taken_from_the_cache_the_second_time(tmp_path, digits):
    real = Real(NamedImages("digits", digits.images[:50]), "train")
    cache = Cache(tmp_path / "cache")
    features = features_of()
    first = make_reference(real, features, cache)

    def never(images):
        raise AssertionError("taken again")

    second = make_reference(real, dataclasses.replace(features, extract=never), cache)
    torch.testing.assert_close(second.features, first.features, rtol=0, atol=0)
    torch.testing.assert_close(second.moments.scatter, first.moments.scatter, rtol=0, atol=0)


@pytest.mark.parametrize("change", ["images", "hash"])
def test_other_images_or_other_weights_are_not_taken_from_the_cache(tmp_path, digits, change):
    cache, features = Cache(tmp_path / "cache"), features_of()
    make_reference(Real(NamedImages("digits", digits.images[:50]), "train"), features, cache)
    images, asked = digits.images[:50], []
    if change == "images":
        images = images.clone()
        images[7, 0, 3, 3] ^= 1
    else:
        features = dataclasses.replace(features, hash="another")
    counted = dataclasses.replace(features, extract=lambda x: asked.append(len(x)) or features.extract(x))
    make_reference(Real(NamedImages("digits", images), "train"), counted, cache)
    assert asked == [50]


def test_pixels_are_not_kept(tmp_path, digits):
    cache = Cache(tmp_path / "cache")
    make_reference(Real(NamedImages("digits", digits.images[:50]), "train"), features_of("pixels"), cache)
    assert not (tmp_path / "cache").exists() or not os.listdir(tmp_path / "cache")
