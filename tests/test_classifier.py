"""The classifiers of photographs, and the command that trains any: which images they take, and what they tell apart."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_helpers import encoded, plain
from PIL import Image, ImageFilter

from tiny_diffusion.data.batches import Batches
from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.errors import OptionError
from tiny_diffusion.evaluation.classifier import load_classifier, train_classifier
from tiny_diffusion.evaluation.distances import Moments, frechet_distance
from tiny_diffusion.evaluation.features import default_features, make_features
from tiny_diffusion.evaluation.images import NamedImages
from tiny_diffusion.evaluation.protocol import scores
from tiny_diffusion.evaluation.reference import Real, make_reference

CPU = torch.device("cpu")
PHOTOGRAPHS = "cifar10-classifier-v1"
SIDE = 48  # pixels of the photographs


@pytest.fixture(scope="module")
def crops():
    """(2, 150, 48, 48, 3) uint8: two halves of random crops of two real photographs."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = [np.asarray(Image.fromarray(image).resize((240, 160))) for image in load_sample_images().images]
    corners = [(rng.integers(2), rng.integers(160 - SIDE), rng.integers(240 - SIDE)) for _ in range(300)]
    chosen = np.stack([photographs[which][y : y + SIDE, x : x + SIDE] for which, y, x in corners])
    return chosen.reshape(2, 150, SIDE, SIDE, 3)


def tensor(images):
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


def write_set(root: Path, sizes=((20, 24), (24, 20)), classes=("blue", "red"), splits=("train", "test")) -> Path:
    """A folder of images of one colour each, whose class is the colour."""
    rng = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(classes):
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(12):
                light, dark = int(rng.integers(150, 256)), int(rng.integers(0, 100))
                colour = (light, dark, dark) if label else (dark, dark, light)
                (place / f"{number}.png").write_bytes(encoded(plain(colour, *sizes[number % 2])))
    return root


# What the features see


CHANGES = {
    "blurred": lambda image, amount: image.filter(ImageFilter.GaussianBlur(amount)),
    "in blocks": lambda image, amount: image.resize([SIDE // 2**amount] * 2, Image.BOX).resize(
        (SIDE, SIDE), Image.NEAREST
    ),
    "without colour": lambda image, amount: Image.blend(image, image.convert("L").convert("RGB"), amount / 2),
    "noisy": lambda image, amount: Image.blend(image, Image.effect_noise((SIDE, SIDE), 90).convert("RGB"), amount / 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_distance_of_photographs_grows_with_what_is_done_to_them(crops, change):
    features = make_features(PHOTOGRAPHS, "folder", (3, SIDE, SIDE), CPU)
    real = Moments.of(features.of(tensor(crops[0])))
    distances = [frechet_distance(real, Moments.of(features.of(tensor(crops[1]))))]
    for amount in (1, 2):
        changed = [np.asarray(change(Image.fromarray(image), amount)) for image in crops[1]]
        distances.append(frechet_distance(real, Moments.of(features.of(tensor(changed)))))
    assert distances[2] > distances[1] > distances[0]


def test_features_of_photographs_take_any_size_but_neither_grey_nor_tiny_images():
    for shape in ((3, 16, 16), (3, 32, 32), (3, 96, 64)):
        features = make_features(PHOTOGRAPHS, "folder", shape, CPU)
        assert features.of(torch.zeros(2, *shape, dtype=torch.uint8)).shape == (2, 128)
    for shape in ((1, 32, 32), (3, 15, 32)):
        with pytest.raises(OptionError, match=r"takes images of 3x\(16 or more\)x\(16 or more\)"):
            make_features(PHOTOGRAPHS, "folder", shape, CPU)


@pytest.mark.parametrize(
    "dataset, shape, name",
    [
        ("cifar10", (3, 32, 32), "classifier"),
        ("flowers102", (3, 64, 64), PHOTOGRAPHS),
        ("folder", (3, 96, 64), PHOTOGRAPHS),
        (None, (3, 32, 32), PHOTOGRAPHS),
        ("folder", (3, 8, 8), "pixels"),
        ("folder", (1, 64, 64), "pixels"),
    ],
)
def test_photographs_are_compared_in_a_classifiers_features_unless_told_otherwise(dataset, shape, name):
    assert default_features(dataset, shape) == name


@pytest.mark.parametrize("names, counted", [(("blue", "red"), False), ((), True)])
def test_classes_are_counted_only_where_the_images_may_have_the_classifiers(crops, names, counted):
    """Confidence in one of CIFAR-10's classes says nothing of images that have other classes."""
    features = make_features(PHOTOGRAPHS, "folder", (3, SIDE, SIDE), CPU)
    labels = torch.arange(150) % 2 if names else None
    real, other = (NamedImages("photographs", tensor(half), labels, names) for half in crops)
    found = scores(make_reference(Real(real, "all"), features, None), other, features)
    assert ("confidence" in found) == ("class_entropy" in found) == counted


# The command


def test_the_command_learns_the_classes_of_a_folder(cli, tmp_path):
    write_set(tmp_path / "photos")
    words = ("classifier", "--dataset", "folder", "--data_dir", "photos", "--image_size", 16, "--epochs", 40)
    ended = cli.works(*words, "--output", "colours.safetensors")
    model, about = load_classifier(Path("colours.safetensors"))
    assert "100.00% of 24 held-out images" in ended.err
    assert about["command"] == "python -m tiny_diffusion classifier --dataset folder --data_dir photos " + (
        "--image_size 16 --epochs 40 --seed 0"
    )
    assert (about["channels"], about["size"], about["classes"]) == (3, [16, 16], ["blue", "red"])
    features = make_features("colours.safetensors", "folder", (3, 20, 20), CPU)
    pure = torch.stack([tensor(plain(colour, 20, 20)[None])[0] for colour in ((0, 0, 255), (255, 0, 0))])
    assert features.probabilities(pure).argmax(1).tolist() == [0, 1]
    assert features.of(pure).shape == (2, 128) and not model.training


def test_an_epoch_of_fewer_images_than_a_batch_is_a_step(cli, tmp_path):
    write_set(tmp_path / "photos")
    cli.works("classifier", "--dataset", "folder", "--data_dir", "photos", "--image_size", 16, "--epochs", 1)
    assert load_classifier(tmp_path / "folder-classifier.safetensors")[1]["training_images"] == 24


def test_photographs_are_mirrored_and_digits_are_not(digits, monkeypatch):
    """Mirrored digits are other characters."""
    mirrored = []

    class Recorded(Batches):
        def __init__(self, data, batch_size, seed, hflip):
            mirrored.append(hflip)
            super().__init__(data, batch_size, seed, hflip=hflip)

    monkeypatch.setattr("tiny_diffusion.evaluation.classifier.Batches", Recorded)
    colour = ImageSet(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), ("a", "b"))
    for data in (digits, colour):
        train_classifier(data, 1, 0)
    assert mirrored == [False, True]


@pytest.mark.parametrize(
    "splits, classes, words, reason",
    [
        (("train", "test"), ("all",), (), "has no classes"),
        (("train",), ("blue", "red"), (), "no held-out images"),
        (("train", "test"), ("blue", "red"), ("--image_size", 15), "below 16 pixels"),
    ],
)
def test_a_folder_that_cannot_teach_a_classifier_is_refused_in_one_line(cli, tmp_path, splits, classes, words, reason):
    write_set(tmp_path / "photos", classes=classes, splits=splits)
    cli.refuses(2, ("classifier", "--dataset", "folder", "--data_dir", "photos", *words), reason)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_folder_has_to_be_named(cli):
    cli.refuses(2, ("classifier", "--dataset", "folder"), "--data_dir", "Add it")
