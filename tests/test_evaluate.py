"""evaluate: equal images score equally from every source, bad ones score badly, every number has its full name."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from cli_helpers import TINY, call, contents

from tiny_diffusion.data.files.labels import FolderLabels
from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.data.sources import open_dataset
from tiny_diffusion.errors import OptionError
from tiny_diffusion.evaluation.classifier import make_classifier, save_classifier, train_classifier
from tiny_diffusion.evaluation.features import make_features
from tiny_diffusion.evaluation.generate import ModelImages
from tiny_diffusion.evaluation.images import NamedImages, random_indices, read_images
from tiny_diffusion.evaluation.online import OnlineEvaluation
from tiny_diffusion.evaluation.protocol import evaluate, floor_of, nearest_training, scores, train_on_synthetic
from tiny_diffusion.evaluation.reference import Real, make_reference
from tiny_diffusion.runs.checkpoint import load_checkpoint, save_checkpoint
from tiny_diffusion.runtime.world import SINGLE_PROCESS, World
from tiny_diffusion.visuals.images import save_folder, save_npz

SHAPE = (1, 8, 8)


@pytest.fixture(scope="session")
def digits_heldout():
    return open_dataset("digits", heldout=True)


@pytest.fixture(scope="session")
def features():
    return make_features("classifier", "digits", SHAPE, torch.device("cpu"))


@pytest.fixture(scope="session")
def reference(digits, digits_heldout, features):
    held = NamedImages("held out", digits_heldout.images[:], digits_heldout.labels, digits_heldout.class_names)
    real = Real(NamedImages("digits", digits.images[:], digits.labels, digits.class_names), "train", held)
    return make_reference(real, features)


@pytest.fixture
def judged(reference, features):
    """judged(images) -> the numbers, floor and warnings of `evaluate`."""

    def judge(images):
        return evaluate(reference, images, features, floor_of(reference, features, len(images.images))).numbers

    return judge


@pytest.fixture
def scored(judged):
    """scored(images) -> (metrics, floor) by their short names."""

    def score(images, labels=None, class_names=()):
        found = judged(NamedImages("given", images, labels, class_names))
        return tuple({name.split("[")[0]: v for name, v in found[part].items()} for part in ("metrics", "floor"))

    return score


@pytest.fixture
def unconditional(unlabelled):
    """A model without classes: `sample` and `evaluate` choose classes in different orders."""
    return unlabelled


@pytest.fixture(scope="module")
def sixty(unlabelled, tmp_path_factory):
    """A folder with sixty images of a model without classes as .npz and as a folder: what `sample` writes."""
    folder = tmp_path_factory.mktemp("sixty")
    for output in (folder / "drawn.npz", f"{folder / 'drawn'}/"):
        assert call("sample", "--checkpoint", unlabelled, "--num_images", 60, "--output", output) == 0
    return folder


@pytest.fixture
def drawn(cli, sixty, tmp_path):
    """A copy of them in the working folder."""
    shutil.copytree(sixty, tmp_path, dirs_exist_ok=True)
    return "drawn.npz", "drawn"


def report(folder) -> dict:
    return json.loads((folder / "evaluation.json").read_text("utf-8"))


def noise(count, seed=0, shape=(8, 8, 1)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def hwc(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


# Scores


def test_real_images_score_at_the_floor(scored, digits_heldout):
    found, floor = scored(digits_heldout.images[:], digits_heldout.labels, digits_heldout.class_names)
    for name in floor:
        assert found[name] == pytest.approx(floor[name], rel=1e-9), name
    assert found["relative_frechet_distance"] < 0.05
    assert found["precision"] > 0.7 and found["recall"] > 0.9 and found["label_accuracy"] > 0.97
    assert found["memorised_share"] < 0.05


def test_the_training_images_themselves_are_at_no_distance_and_all_memorised(scored, digits):
    found, _ = scored(digits.images[:])
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert (found["nearest_training_image"], found["memorised_share"]) == (0, 1)


def test_uniform_noise_scores_absurdly(scored):
    found, floor = scored(torch.from_numpy(noise(299)).permute(0, 3, 1, 2))
    assert found["relative_frechet_distance"] > 20 * floor["relative_frechet_distance"]
    assert found["recall"] < 0.1
    assert found["kernel_distance"] > 20 * abs(floor["kernel_distance"])


def test_one_repeated_image_is_caught_by_recall(scored, digits_heldout):
    found, floor = scored(digits_heldout.images[:1].repeat(299, 1, 1, 1))
    assert found["recall"] < 0.02 < floor["recall"]
    assert found["coverage"] < 0.1


def test_copies_with_slight_noise_are_caught_as_memorised_and_held_out_images_are_not(reference, digits, features):
    generator = torch.Generator().manual_seed(0)
    indices = torch.arange(0, 1400, 7)
    slight = torch.randint(-2, 3, (200, *SHAPE), generator=generator)
    copies = (digits.images[indices].int() + slight).clamp(0, 255).to(torch.uint8)
    floor = floor_of(reference, features, 200)
    close = nearest_training(reference, NamedImages("copies", copies), floor)
    assert close.share == 1 and torch.equal(close.nearest, indices)
    assert close.distances.max() < 3  # grey levels
    assert nearest_training(reference, reference.real.heldout, floor).share < 0.05


def test_the_order_of_images_does_not_change_their_scores(scored, digits_heldout):
    mixed = torch.randperm(299, generator=torch.Generator().manual_seed(0))
    one, other = scored(digits_heldout.images[:])[0], scored(digits_heldout.images[mixed])[0]
    assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_labels_count_only_where_they_mean_the_classifiers_classes(scored, digits_heldout):
    found, _ = scored(digits_heldout.images[:], digits_heldout.labels, tuple("abcdefghij"))
    assert "label_accuracy" not in found and "confidence" in found


@pytest.mark.parametrize("count", [2, 3, 5, 6])
def test_a_few_images_are_scored_as_far_as_they_go(judged, digits_heldout, count):
    found = judged(NamedImages("few", digits_heldout.images[:count]))
    named = {name.split("[")[0] for name in found["metrics"]}
    assert ("precision" in named) == (count >= 6)
    assert any("few for 64 features" in line for line in found["warnings"])
    assert any("left out" in line for line in found["warnings"]) == (count < 6)
    assert all(np.isfinite(value) for value in found["metrics"].values())


@pytest.mark.parametrize(
    "order", [lambda i: i % 10, lambda i: i // 400, lambda i: (i // 7) % 10], ids=["turns", "blocks", "runs"]
)
def test_a_subset_keeps_the_shares_of_the_classes_in_whatever_order_they_come(order):
    """Each class's count is hypergeometric: 100 expected, within four of its standard deviations, 8.2."""
    labels = order(torch.arange(4000))
    chosen = NamedImages("all", torch.zeros(4000, 1, 1, 1, dtype=torch.uint8), labels).subset(1000)
    counts = torch.bincount(chosen.labels, minlength=10)
    assert chosen.total == 4000 and len(random_indices(4000, 1000).unique()) == 1000
    assert (counts - 100).abs().max() < 33
    assert random_indices(3, 5).tolist() == [0, 1, 2]


@pytest.mark.parametrize("held", [[100, 100], [50, 500], [300, 40], [7, 0]], ids=str)
def test_a_subset_in_shares_has_as_many_images_as_its_classes_allow(held):
    """Nine to one.  A class without held-out images is left out of the shares."""
    labels = torch.repeat_interleave(torch.arange(2), torch.tensor(held))
    images = NamedImages("held out", torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels)
    most = min(held[0] * 10 // 9, held[1] * 10) if held[1] else held[0]
    for count in (5, 1000):
        chosen = images.subset(count, [900, 100])
        found = torch.bincount(chosen.labels, minlength=2)
        assert found.sum() == min(count, most)
        assert abs(found[1] - min(count, most) / 10 * bool(held[1])) < 1


def test_the_floor_of_an_unbalanced_set_has_its_shares(digits):
    """Nine to one in training, and as many of each class held out: all of these would be far from the training set."""
    features = make_features("pixels", "digits", SHAPE, torch.device("cpu"))
    places = [torch.where(digits.labels == label)[0] for label in (0, 1)]

    def some(zeros, ones):
        chosen = torch.cat([places[0][zeros], places[1][ones]])
        return NamedImages("some", digits.images[chosen], digits.labels[chosen], digits.class_names)

    held = some(slice(90, 140), slice(10, 60))
    reference = make_reference(Real(some(slice(90), slice(10)), "train", held), features)
    floor, evenly = (floor_of(reference, features, 100, counts) for counts in ([90, 10, *[0] * 8], ()))
    assert (floor.count, evenly.count) == (55, 100)
    assert floor.scores["relative_frechet_distance"] < evenly.scores["relative_frechet_distance"] / 3


def test_every_name_counts_the_images_that_its_number_is_computed_from(judged, digits_heldout, monkeypatch):
    """With at most 50 compared, the numbers of 100 images named n=50 are those of the 50 chosen ones."""
    monkeypatch.setattr("tiny_diffusion.evaluation.protocol.MAX_COMPARED", 50)
    images = NamedImages("given", digits_heldout.images[:100])
    whole, chosen = judged(images)["metrics"], judged(images.subset(50))["metrics"]
    pairwise = {name for name in whole if "n=50" in name}
    assert {name.split("[")[0] for name in pairwise} == {
        "kernel_distance",
        "precision",
        "recall",
        "density",
        "coverage",
    }
    assert {name: whole[name] for name in pairwise} == pytest.approx({name: chosen[name] for name in pairwise})
    assert all("n=100" in name for name in whole.keys() - pairwise)


def test_a_subset_of_the_images_is_said(cli, drawn, tmp_path):
    ended = cli.works("evaluate", "--images", drawn[0], "--dataset", "digits", "--num_images", 20, "--output", "out")
    assert "images: a random 20 of 60" in ended.out
    (result,) = report(tmp_path / "out")["results"]
    assert (result["num_images"], result["images_in_all"]) == (20, 60)


def test_train_on_synthetic_is_tested_on_the_held_out_images(reference, monkeypatch):
    """A classifier that always names class 1 is right about all samples here, and a tenth of the held-out ones."""
    ones = torch.nn.functional.one_hot(torch.tensor(1), 10)
    monkeypatch.setattr(
        "tiny_diffusion.evaluation.protocol.train_classifier", lambda data, steps, seed: lambda images: ones[None]
    )
    images, heldout = reference.real.images, reference.real.heldout
    of_one_class = NamedImages("samples", images.images[images.labels == 1], images.labels[images.labels == 1])
    (found,) = train_on_synthetic(of_one_class, heldout, seed=0).values()
    assert found == pytest.approx(float((heldout.labels == 1).double().mean()))


# Sources of images


@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_and_a_folder_of_the_same_images_are_read_alike(tmp_path, channels):
    images = noise(12, shape=(9, 7, channels))
    save_npz(tmp_path / "a.npz", images)
    save_folder(tmp_path / "a", images)
    one, other = (read_images("images", str(tmp_path / name)).images for name in ("a.npz", "a"))
    assert torch.equal(one, other) and np.array_equal(hwc(one), images)


def test_checkpoint_npz_and_folder_score_exactly_the_same(cli, unconditional, drawn, tmp_path):
    sources = [("--checkpoint", unconditional), *(("--images", name) for name in drawn)]
    found = []
    for number, source in enumerate(sources):
        output = tmp_path / f"out{number}"
        more = () if number == 0 else ("--dataset", "digits")
        cli.works("evaluate", *source, *more, "--num_images", 60, "--output", output)
        (result,) = report(output)["results"]
        found.append({name: v for name, v in result["metrics"].items() if not name.startswith("label_accuracy")})
    assert found[0] == found[1] == found[2]


def test_the_floor_has_the_shares_of_the_classes_that_the_images_carry(cli, digits, tmp_path):
    """Threes alone are compared with held-out threes.  The names of bare labels are those of the data set."""
    threes = np.flatnonzero(digits.labels == 3)[:20]
    images, labels = hwc(digits.images[:][threes]), np.full(20, 3)
    save_npz("named.npz", images, labels=labels, class_names=np.array(digits.class_names))
    save_npz("bare.npz", images, labels=labels)
    files, folder = save_folder(tmp_path / "folder", images, range(20)), FolderLabels(tmp_path / "folder")
    folder.add(files, labels.tolist(), digits.class_names)
    folder.save()
    found = []
    for name in ("named.npz", "bare.npz", "folder"):
        ended = cli.works("evaluate", "--images", name, "--dataset", "digits", "--output", tmp_path / "out")
        assert f"images: 20, {name}, each of a known class" in ended.out
        (result,) = report(tmp_path / "out")["results"]
        found.append([{key.split("[")[0]: value for key, value in result[of].items()} for of in ("metrics", "floor")])
    assert found[0] == found[1] == found[2]
    metrics, floor = found[0]
    assert metrics["label_accuracy"] > 0.9 and floor["label_accuracy"] > 0.9
    assert floor["class_entropy"] < 0.5  # of ten classes in equal shares it is 2.3


def test_sub_folders_are_classes_of_images_to_score_where_there_is_no_labels_csv(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "a" / name).mkdir(parents=True)
        save_folder(tmp_path / "a" / name, noise(label + 2, seed=label))
    images = read_images("images", str(tmp_path / "a"))
    assert (images.labels.tolist(), images.class_names) == ([0, 0, 1, 1, 1], ("cat", "dog"))
    assert images.class_counts == [2, 3]


def test_classes_of_other_names_are_not_taken_for_those_of_the_real_images():
    labels = torch.tensor([0, 1])
    real = NamedImages("real", torch.zeros(2, 1, 1, 1), labels, ("cat", "dog", "fox"))
    for names, same in ((("cat", ""), True), (("", ""), True), (("dog", "cat"), False), (("", "", "", "yak"), False)):
        images = NamedImages("given", real.images, labels, names).with_classes_of(real)
        assert images.class_names == (real.class_names if same else names)


def test_earlier_numbers_are_kept_and_said(cli, drawn, tmp_path):
    argv = ["evaluate", "--images", drawn[0], "--dataset", "digits", "--num_images", 20]
    assert "earlier" not in cli.works(*argv).out
    first = (tmp_path / "outputs" / "evaluation" / "evaluation.json").read_bytes()  # and not beside the images
    assert "(earlier ones: evaluation-1.json)" in cli.works(*argv, "--features", "pixels").out
    assert (tmp_path / "outputs" / "evaluation" / "evaluation-1.json").read_bytes() == first
    assert report(tmp_path / "outputs" / "evaluation")["features"]["name"] == "pixels"


@pytest.mark.parametrize("name", ["images", "reference"])
def test_figures_are_not_written_among_the_images(name, cli, tmp_path):
    """There they would count as more of them, or as another class."""
    for folder in ("outputs", "others"):
        save_folder(tmp_path / folder, noise(4))
    given = ["--images", "outputs", "--reference", "others"] if name == "images" else []
    given = given or ["--images", "others", "--reference", "outputs"]
    before = contents(tmp_path)
    for where in ([], ["--output", "outputs"], ["--output", tmp_path / "others" / ".." / "outputs" / "a" / "b"]):
        cli.refuses(2, ["evaluate", *given, *where], "--output", f"--{name} outputs")
    assert contents(tmp_path) == before


def test_an_ending_may_be_in_capitals(cli, unconditional, tmp_path):
    for output in ("A.NPZ", "b.npz"):
        cli.works("sample", "--checkpoint", unconditional, "--num_images", 5, "--steps", 1, "--output", output)
    shutil.copy(unconditional, tmp_path / "MODEL.PT")
    argv = ("evaluate", "--images", "A.NPZ", "--features", "pixels", "--num_images", 5)
    cli.works(*argv, "--reference", "b.npz", "--output", "one")
    cli.works(*argv, "--reference", "MODEL.PT", "--output", "other")
    assert report(tmp_path / "one")["reference"]["images"] == report(tmp_path / "other")["reference"]["images"] == 5
    network = make_classifier((8, 8), 10).eval()
    save_classifier(tmp_path / "C.SAFETENSORS", network, {"size": [8, 8], "classes": list("0123456789")})
    assert make_features("C.SAFETENSORS", "digits", SHAPE, torch.device("cpu")).classify is not None


def test_every_kind_of_reference_gives_the_same_numbers(cli, drawn, digits, tmp_path):
    save_npz(tmp_path / "real.npz", hwc(digits.images[:100]))
    save_folder(tmp_path / "real", hwc(digits.images[:100]))
    found = []
    for name in ("real.npz", "real"):
        cli.works("evaluate", "--images", drawn[0], "--reference", name, "--output", f"out-{name}")
        found.append(report(tmp_path / f"out-{name}"))
    assert found[0]["results"][0]["metrics"] == found[1]["results"][0]["metrics"]
    assert found[0]["reference"]["sha256"] == found[1]["reference"]["sha256"]
    assert found[0]["results"][0]["floor"] == {}
    assert all(name.endswith("n=60, reference]") for name in found[0]["results"][0]["metrics"])


def test_a_model_as_reference_is_sampled_from_the_next_seed(cli, drawn, unconditional, tmp_path):
    cli.works("sample", "--checkpoint", unconditional, "--num_images", 40, "--seed", 8, "--output", "other.npz")
    argv = ("evaluate", "--images", drawn[0], "--num_images", 40, "--seed", 7)
    found = []
    for name in (unconditional, "other.npz"):
        cli.works(*argv, "--reference", name, "--output", "out")
        found.append(report(tmp_path / "out"))
    assert found[0]["reference"]["sha256"] == found[1]["reference"]["sha256"]
    assert list(found[0]["results"][0]["metrics"].values()) == list(found[1]["results"][0]["metrics"].values())


def test_the_report_holds_the_whole_protocol(cli, loud, tmp_path, features):
    argv = ("evaluate", "--checkpoint", loud, "--num_images", 20, "--seed", 3, "--sampler", "ddim", "--steps", 4)
    ended = cli.works(*argv, "--weights", "raw", "--guidance", 2, "--output", "out")
    about = report(tmp_path / "out")
    (result,) = about["results"]
    wanted = {
        "checkpoint": str(loud), "checkpoint_sha256": load_checkpoint(loud).about["sha256"], "step": 1,
        "weights": "raw", "sampler": "ddim", "steps": 4, "grid": "trailing", "seed": 3, "guidance": 2.0,
        "evaluations": 8, "num_images": 20,
    }  # fmt: skip
    assert {name: result[name] for name in wanted} == wanted
    assert about["features"] == {"name": features.name, "hash": features.hash, "accuracy": features.accuracy}
    assert about["reference"]["split"] == "train" and about["reference"]["images"] == 1498
    assert about["reference"]["heldout"] == 299
    for name in (*result["metrics"], *result["floor"]):
        inside = name.partition("[")[2]
        assert inside.endswith("n=20, train]") and inside.startswith(("digits-classifier-v1, ", "pixels, "))
    assert "frechet_distance[digits-classifier-v1, n=20, train]" in ended.out
    assert features.hash in ended.out and "real: " in ended.out
    assert "20 images are few for 64 features" in ended.err


def test_a_sweep_is_a_table_a_figure_and_json(cli, loud, tmp_path, figures):
    argv = ("evaluate", "--checkpoint", loud, "--num_images", 12, "--sampler", "abm,ddim", "--steps", "2,3")
    with figures():
        ended = cli.works(*argv, "--output", "out")
    results = report(tmp_path / "out")["results"]
    pairs = [("abm", 2), ("abm", 3), ("ddim", 2), ("ddim", 3)]
    assert [(found["sampler"], found["steps"]) for found in results] == pairs
    lines = [line.split() for line in ended.out.splitlines()]
    for found in results:
        name = "relative_frechet_distance[digits-classifier-v1, n=12, train]"
        row = [found["sampler"], str(found["steps"]), str(found["evaluations"]), f"{found['metrics'][name]:.4g}"]
        assert row in lines
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"evaluation.json", "nearest.png", "error_by_noise.png", "sweep.png"}
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in written if "png" in name)


def test_eta_is_chosen_and_printed(cli, loud, tmp_path):
    argv = ("evaluate", "--checkpoint", loud, "--num_images", 12, "--sampler", "ddim,sa_solver", "--steps", 3)
    none, half = cli.works(*argv, "--output", "none", "--eta", 0), cli.works(*argv, "--output", "half", "--eta", 0.5)
    assert "ddim, eta 0, 3 steps" in none.out and "sa_solver, eta 0.5, 3 steps" in half.out
    for one, other in zip(report(tmp_path / "none")["results"], report(tmp_path / "half")["results"], strict=True):
        assert (one["eta"], other["eta"]) == (0, 0.5)
        assert one["metrics"] != other["metrics"]


@pytest.mark.slow
def test_a_sweep_scores_each_request_as_alone_and_the_held_out_images_once(cli, loud, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(
        "tiny_diffusion.evaluation.protocol.scores",
        lambda reference, images, features: taken.append(images.name) or scores(reference, images, features),
    )
    argv = ("evaluate", "--checkpoint", loud, "--num_images", 12, "--output", "out", "--sampler")
    cli.works(*argv, "ddpm,ddim", "--steps", "2,3")
    assert sorted(taken) == ["digits, held out", *["samples"] * 4]
    swept = report(tmp_path / "out")["results"]
    alone = []
    for sampler, steps in (("ddpm", 2), ("ddpm", 3), ("ddim", 2), ("ddim", 3)):
        cli.works(*argv, sampler, "--steps", steps)
        alone += report(tmp_path / "out")["results"]
    for found in (*swept, *alone):
        del found["seconds"]
    assert swept == alone


@pytest.mark.slow
def test_likelihood_and_train_on_synthetic_are_measured_on_held_out_images(cli, loud, tmp_path, monkeypatch):
    monkeypatch.setattr("tiny_diffusion.evaluation.likelihood.MAX_IMAGES", 4)
    monkeypatch.setattr(
        "tiny_diffusion.evaluation.protocol.train_classifier", lambda data, steps, seed: train_classifier(data, 2, seed)
    )
    argv = ("evaluate", "--checkpoint", loud, "--num_images", 20, "--steps", 2, "--output", "out")
    cli.works(*argv, "--train_on_synthetic", "--bits_per_dim")
    (result,) = report(tmp_path / "out")["results"]
    assert 0 <= result["metrics"]["train_on_synthetic_accuracy[n=20, 299 held-out]"] <= 1
    assert result["metrics"]["bits_per_dim[n=4, held-out, uniform dequantisation, null class]"] > 0


def test_grey_images_saved_as_rgb_are_compared_as_grey(cli, drawn, tmp_path):
    """Against a grey set and as the reference of grey images; one pixel of colour is refused."""
    save_npz("rgb.npz", np.load(drawn[0])["arr_0"].repeat(3, axis=-1))
    found = []
    for images, reference in (
        (drawn[0], "digits"),
        ("rgb.npz", "digits"),
        ("rgb.npz", drawn[0]),
        (drawn[0], "rgb.npz"),
    ):
        option = "--dataset" if reference == "digits" else "--reference"
        ended = cli.works("evaluate", "--images", images, option, reference, "--features", "pixels", "--output", "out")
        assert ("as grey" in ended.out) == ("rgb.npz" in (images, reference))
        found.append(report(tmp_path / "out")["results"][0]["metrics"])
    assert found[0] == found[1] and found[2] == found[3]
    coloured = np.load("rgb.npz")["arr_0"].copy()
    coloured[7, 3, 3, 1] ^= 1
    save_npz("coloured.npz", coloured)
    cli.refuses(
        2, ("evaluate", "--images", "coloured.npz", "--dataset", "digits"), "1x8x8", "3x8x8", "three equal channels"
    )


# Classes


@pytest.fixture(scope="session")
def unbalanced(tmp_path_factory):
    """The folder of a class-conditional run on 40 ones, 10 zeros and no twos, scored once while training."""
    folder = tmp_path_factory.mktemp("unbalanced")
    for name, count in (("one", 40), ("zero", 10)):
        save_folder(folder / f"set/train/{name}", noise(count, seed=count))
    save_folder(folder / "set/test/two", noise(12))
    argv = ["--dataset", "folder", "--data_dir", folder / "set", "--image_size", 8, "--class_cond", *TINY[2:]]
    argv += ["--epochs", 1, "--batch_size", 8, "--device", "cpu", "--seed", 5, "--label_dropout", 0]
    argv += ["--eval_interval", 1, "--eval_images", 100, "--keep_best"]
    assert call("train", *argv, "--output_dir", folder / "run") == 0
    return folder / "run"


def test_a_class_conditional_model_is_scored_in_the_shares_of_its_training_set(unbalanced):
    model = ModelImages(unbalanced / "model_final.pt", SINGLE_PROCESS)
    for request in model.requests(100, ["ddim", "abm"]):
        assert np.bincount(request.labels(), minlength=3).tolist() == [80, 0, 20]  # one, two, zero


def test_a_checkpoint_of_before_is_scored_in_the_shares_of_the_reference(unbalanced, tmp_path):
    checkpoint = load_checkpoint(unbalanced / "model_final.pt")
    about = {name: value for name, value in checkpoint.about.items() if name not in ("format", "sha256", "images")}
    save_checkpoint(tmp_path / "old.pt", about, checkpoint.tensors)
    model = ModelImages(tmp_path / "old.pt", SINGLE_PROCESS)
    requests, labels = model.requests(100), torch.tensor([2, 0, 0, 0])
    names = model.class_names
    for class_names, wanted in ((("x", "y", "z"), [34, 33, 33]), (names, [75, 0, 25])):
        real = NamedImages("real", torch.zeros(4, 3, 8, 8, dtype=torch.uint8), labels, class_names)
        (request,) = model.count_classes(requests, real)
        assert np.bincount(request.labels(), minlength=3).tolist() == wanted


def test_evaluate_samples_the_labels_that_training_sampled(cli, unbalanced, tmp_path):
    best = unbalanced / "checkpoints/best.pt"
    cli.works("evaluate", "--checkpoint", best, "--num_images", 100, "--seed", 5, "--output", "out")
    (result,) = report(tmp_path / "out")["results"]
    wanted = load_checkpoint(best).about["best_score"]
    assert result["metrics"][wanted["name"]] == pytest.approx(wanted["value"], rel=1e-4)


def test_a_class_without_training_images_is_sampled_neither_by_default_nor_by_name(cli, unbalanced):
    checkpoint = unbalanced / "model_final.pt"
    assert load_checkpoint(checkpoint).request(range(4)).labels() == [0, 0, 2, 0]  # three to one
    for asked in ("two", "zero,two", "0-2"):
        cli.refuses(2, ("sample", "--checkpoint", checkpoint, "--classes", asked), f"--classes {asked}", "class two")


@pytest.mark.parametrize(
    "command, option",
    [("sample", ("--guidance", 2)), ("sample", ("--guidance", 0)), ("evaluate", ("--guidance", 3)),
     ("evaluate", ("--bits_per_dim",))],
    ids=str,
)  # fmt: skip
def test_a_model_that_never_trained_without_a_class_refuses_what_needs_that(cli, unbalanced, command, option):
    argv = (command, "--checkpoint", unbalanced / "model_final.pt", *option)
    cli.refuses(2, argv, option[0], "--label_dropout 0")


def test_guidance_zero_samples_no_classes_and_shows_none(cli, loud, monkeypatch):
    captions = []
    monkeypatch.setattr(
        "tiny_diffusion.visuals.class_grid.save_grid", lambda path, images, labels, names: captions.append(labels)
    )
    for guidance in (0, 2):
        cli.works(
            "sample", "--checkpoint", loud, "--num_images", 2, "--steps", 2, "--guidance", guidance, "--output", "x.png"
        )
    assert captions == [None, [3, 6]]
    cli.refuses(2, ("evaluate", "--checkpoint", loud, "--guidance", 0, "--train_on_synthetic"), "--guidance 0")


# Refusals


@pytest.fixture
def bad(tmp_path, monkeypatch):
    """A working folder with one of each kind of broken set."""
    monkeypatch.chdir(tmp_path)
    save_npz("good.npz", noise(20))
    save_npz("wide.npz", noise(20, shape=(8, 9, 1)))
    save_npz("colour.npz", noise(20, shape=(8, 8, 3)))
    save_npz("one.npz", noise(1))
    np.savez("none.npz", noise(0))
    np.savez("flat.npz", np.zeros((20, 64), np.uint8))
    np.savez("named.npz", images=noise(5))
    np.savez("float.npz", noise(5) / 255)
    np.savez("nan.npz", np.full((5, 8, 8, 1), np.nan))
    save_npz("binary.npz", noise(20) // 128)
    save_npz("same.npz", np.zeros((20, 8, 8, 1), np.uint8))
    content = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "flipped.npz").write_bytes(content[:200] + bytes(b ^ 255 for b in content[200:260]) + content[260:])
    (tmp_path / "text.npz").write_text("nothing of the kind")
    with open("array.npz", "wb") as file:
        np.save(file, noise(5))
    (tmp_path / "empty").mkdir()
    save_folder("mixed", noise(3))
    save_folder("mixed/more", noise(3, shape=(9, 9, 1)))
    save_folder("torn", noise(3))
    (tmp_path / "torn" / "00001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "notes.txt").write_text("")
    return tmp_path


AGAINST_DIGITS = ("--dataset", "digits")


@pytest.mark.parametrize(
    "code, argv, words",
    [
        (2, (), ["--checkpoint", "--images"]),
        (2, ("--images", "good.npz", "--checkpoint", "m.pt"), ["one of them"]),
        (2, ("--images", "good.npz"), ["--dataset", "--reference"]),
        (2, ("--images", "good.npz", *AGAINST_DIGITS, "--reference", "good.npz"), ["Give one of them"]),
        (2, ("--images", "good.npz", "--reference", "good.npz", "--data_dir", "x"), ["--data_dir"]),
        (2, ("--images", "good.npz", "--dataset", "folder"), ["--data_dir"]),
        (2, ("--images", "good.npz", *AGAINST_DIGITS, "--steps", 5), ["--steps", "ignored"]),
        (2, ("--images", "good.npz", *AGAINST_DIGITS, "--sampler", "ddim"), ["--sampler", "ignored"]),
        (2, ("--images", "good.npz", *AGAINST_DIGITS, "--bits_per_dim"), ["--bits_per_dim", "ignored"]),
        (2, ("--images", "good.npz", *AGAINST_DIGITS, "--features", "nonsense"), ["nonsense", "pixels, classifier"]),
        (2, ("--images", "good.npz", "--reference", "good.npz", "--features", "classifier"), ["digits-classifier-v1"]),
        (1, ("--images", "good.npz", *AGAINST_DIGITS, "--features", "gone.safetensors"), ["gone.safetensors"]),
        (1, ("--images", "good.npz", *AGAINST_DIGITS, "--features", "gone.onnx"), ["gone.onnx"]),
        (1, ("--images", "binary.npz", *AGAINST_DIGITS), ["binary.npz", "0 to 255"]),
        (1, ("--images", "gone.npz", *AGAINST_DIGITS), ["gone.npz", "No such file"]),
        (1, ("--images", "gone", *AGAINST_DIGITS), ["gone", "does not exist"]),
        (2, ("--images", "notes.txt", *AGAINST_DIGITS), ["notes.txt", "neither"]),
        (1, ("--images", "none.npz", *AGAINST_DIGITS), ["none.npz", "no images"]),
        (1, ("--images", "empty", *AGAINST_DIGITS), ["--images empty", "nothing"]),
        (2, ("--images", "one.npz", *AGAINST_DIGITS), ["one.npz", "one image"]),
        (2, ("--images", "good.npz", "--reference", "one.npz"), ["--reference one.npz", "one image"]),
        (2, ("--images", "good.npz", "--reference", "same.npz"), ["same.npz", "nothing can be compared"]),
        (2, ("--images", "wide.npz", *AGAINST_DIGITS), ["1x8x8", "1x8x9"]),
        (2, ("--images", "colour.npz", *AGAINST_DIGITS), ["1x8x8", "3x8x8"]),
        (2, ("--images", "colour.npz", "--reference", "good.npz"), ["1x8x8", "3x8x8"]),
        (1, ("--images", "float.npz", *AGAINST_DIGITS), ["float64", "uint8"]),
        (1, ("--images", "nan.npz", *AGAINST_DIGITS), ["NaN", "uint8"]),
        (1, ("--images", "flat.npz", *AGAINST_DIGITS), ["(20, 64)"]),
        (1, ("--images", "named.npz", *AGAINST_DIGITS), ["arr_0", "images"]),
        (1, ("--images", "cut.npz", *AGAINST_DIGITS), ["cut.npz", "damaged"]),
        (1, ("--images", "flipped.npz", *AGAINST_DIGITS), ["flipped.npz", "damaged"]),
        (1, ("--images", "text.npz", *AGAINST_DIGITS), ["text.npz", "damaged"]),
        (1, ("--images", "array.npz", *AGAINST_DIGITS), ["array.npz", "damaged"]),
        (2, ("--images", "mixed", *AGAINST_DIGITS), ["--images mixed", "8x8", "9x9"]),
        (1, ("--images", "torn", *AGAINST_DIGITS), ["torn", "00001.png"]),
        (1, ("--images", "good.npz", "--reference", "empty"), ["--reference empty"]),
        (1, ("--images", "good.npz", *AGAINST_DIGITS, "--output", "notes.txt"), ["--output"]),
        (1, ("--checkpoint", "gone.pt"), ["gone.pt"]),
    ],
    ids=str,
)
def test_images_that_cannot_be_scored_are_refused_in_one_line(cli, bad, code, argv, words):
    before = contents(bad)
    cli.refuses(code, ("evaluate", *argv), *words)
    assert contents(bad) == before


@pytest.mark.parametrize(
    "argv, words",
    [
        (("--steps", "5,31"), ["--steps 31", "30"]),
        (("--sampler", "abm,dimm"), ["--sampler", "'dimm'", "ddim"]),
        (("--steps", "0"), ["--steps", "too small"]),
        (("--num_images", 1), ["--num_images"]),
        (("--reference", "good.npz", "--bits_per_dim"), ["--bits_per_dim", "held-out"]),
        (("--reference", "good.npz", "--train_on_synthetic"), ["--train_on_synthetic", "held-out"]),
        (("--reference", "wide.npz"), ["1x8x9", "1x8x8"]),
    ],
    ids=str,
)
def test_requests_that_a_model_cannot_fulfil_are_refused_in_one_line(cli, loud, bad, argv, words):
    cli.refuses(2, ("evaluate", "--checkpoint", loud, "--output", "out", *argv), *words)


@pytest.mark.parametrize("argv", [("--guidance", 2), ("--train_on_synthetic",)], ids=str)
def test_a_model_without_classes_refuses_what_needs_them(cli, unlabelled, argv):
    cli.refuses(2, ("evaluate", "--checkpoint", unlabelled, *argv), argv[0], "--class_cond")


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


BAD_CLASSES = {
    "too few labels": ({"labels": np.arange(3)}, "labels is int64 (3,)"),
    "labels that are no whole numbers": ({"labels": np.zeros(4)}, "labels is float64 (4,)"),
    "a label below zero": ({"labels": np.array([0, 1, 2, -1])}, "labels is int64 (4,)"),
    "too few names": ({"labels": np.arange(4), "class_names": np.array(["a", "b"])}, "the largest is 3"),
    "names that are numbers": ({"labels": np.arange(4), "class_names": np.arange(4)}, "class_names is int64 (4,)"),
}


@pytest.mark.parametrize("more, words", BAD_CLASSES.values(), ids=BAD_CLASSES)
def test_labels_that_do_not_fit_their_images_are_refused_in_one_line(cli, more, words):
    np.savez("bad.npz", arr_0=noise(4), **more)
    cli.refuses(1, ("evaluate", "--images", "bad.npz", *AGAINST_DIGITS), "--images bad.npz", words)


def test_a_pickle_inside_an_npz_is_refused_and_not_executed(cli, tmp_path):
    sprung = tmp_path / "sprung"
    np.savez("trap.npz", np.array([Trap(sprung)], dtype=object))
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Trap(sprung)))
    cli.refuses(1, ("evaluate", "--images", "trap.npz", *AGAINST_DIGITS), "Python objects, which are not executed")
    cli.refuses(1, ("evaluate", "--images", "bare.npz", *AGAINST_DIGITS), "bare.npz")
    assert not sprung.exists()
    np.load("trap.npz", allow_pickle=True)["arr_0"]
    assert sprung.exists()  # the trap works when it is unpickled


# While training


THREE_EPOCHS = (
    "train", *TINY, "--attention_levels", "none", "--splits", "test", "--batch_size", 100,
    "--epochs", 3, "--sample_interval", 9, "--seed", 1, "--device", "cpu",
)  # fmt: skip
EVALUATING = ("--eval_interval", 1, "--eval_images", 100, "--keep_best")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folders of two equal runs: (one that is evaluated after each epoch, one that is not)."""
    folder = tmp_path_factory.mktemp("evaluated")
    assert call(*THREE_EPOCHS, *EVALUATING, "--output_dir", folder / "evaluated") == 0
    assert call(*THREE_EPOCHS, "--output_dir", folder / "plain") == 0
    return folder / "evaluated", folder / "plain"


NAME = "relative_frechet_distance[digits-classifier-v1, n=100, test]"
CLOCK = "images_per_second"


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def scores_of(lines):
    return {line["step"]: line[NAME] for line in lines if NAME in line}


@pytest.mark.slow
def test_the_log_holds_a_score_for_each_epoch_and_nothing_else_changes(runs):
    lines, plain = map(lines_of, runs)
    assert len(scores_of(lines)) == 3
    for line, other in zip(lines, plain, strict=True):
        assert {k: v for k, v in line.items() if k not in (NAME, CLOCK)} == {
            k: v for k, v in other.items() if k != CLOCK
        }


def test_evaluating_does_not_change_the_training_by_a_bit(runs):
    one, other = (load_checkpoint(folder / "model_final.pt").tensors for folder in runs)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_checkpoint_is_the_one_with_the_smallest_number_in_the_log(runs):
    scores = scores_of(lines_of(runs[0]))
    best = load_checkpoint(runs[0] / "checkpoints" / "best.pt")
    assert best.about["step"] == min(scores, key=scores.get)
    assert best.about["best_score"] == {"name": NAME, "value": min(scores.values()), "step": best.about["step"]}
    assert not (runs[1] / "checkpoints" / "best.pt").exists()


def test_evaluate_prints_the_number_that_training_logged(cli, runs, tmp_path):
    """With the same weights, seed and number of images, under the same name."""
    best = runs[0] / "checkpoints" / "best.pt"
    cli.works("evaluate", "--checkpoint", best, "--num_images", 100, "--seed", 1, "--output", "out")
    (result,) = report(tmp_path / "out")["results"]
    wanted = load_checkpoint(best).about["best_score"]["value"]
    assert result["metrics"][NAME] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_scores_survive_a_resume(cli, runs, tmp_path):
    whole = scores_of(lines_of(runs[0]))
    cli.works(*THREE_EPOCHS, *EVALUATING, "--output_dir", "run", "--max_steps", 4)
    assert len(scores_of(lines_of(tmp_path / "run"))) == 1
    cli.works("train", "--output_dir", "run", "--resume")
    assert scores_of(lines_of(tmp_path / "run")) == whole
    best = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")
    assert best.about["step"] == min(whole, key=whole.get)


def test_the_plot_of_the_loss_shows_the_scores_beside_it(runs, make_trainer, digits):
    from tiny_diffusion.runs.folder import RunFolder
    from tiny_diffusion.runs.writer import Callbacks, RunWriter

    asked = {}
    callbacks = Callbacks(save_loss_curve=lambda *args, **named: asked.update(named))
    trainer, folder = make_trainer(), RunFolder(runs[0])
    lines = lines_of(runs[0])
    folder.open(from_step=lines[-1]["step"])
    folder.close()
    RunWriter(trainer.config, folder, trainer, digits, callbacks).plot_losses()
    assert asked["scores"] == {NAME: list(scores_of(lines).items())}


def test_overwriting_a_run_removes_its_best_checkpoint(cli, runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    cli.works("train", *TINY, "--max_steps", 1, "--output_dir", "run", "--overwrite")
    assert not (tmp_path / "run" / "checkpoints" / "best.pt").exists()


def test_a_classifier_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.safetensors"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save_classifier(path, make_classifier((8, 8), 10), {"size": [8, 8]})
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_scores_during_training_need_two_images():
    one = ImageSet(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ())
    with pytest.raises(OptionError, match="--eval_interval needs 2 images"):
        OnlineEvaluation("folder", one, World(torch.device("cpu")), ())
