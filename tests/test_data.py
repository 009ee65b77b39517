"""Data sets: what is opened, from which folder, what is refused, and which images step k trains on."""

import gzip
import importlib.util
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from import_helpers import torchvision
from set_helpers import FILES, IDX_SETS, content, idx, make_set, write_cifar10, write_idx

from tiny_diffusion.data import arrays
from tiny_diffusion.data.batches import Batches
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.data.pixels import to_float
from tiny_diffusion.data.sources import data_folder, open_dataset
from tiny_diffusion.diffusion.samplers import SAMPLERS
from tiny_diffusion.errors import FileError

pytestmark = pytest.mark.usefixtures("nothing_from_outside")

SHARED = Path(__file__).parents[2] / "shared" / "data"
DEBIANS = arrays.SYSTEM_FOLDERS
PLACES = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "cifar-10-batches-py",
    "flowers102": "flowers-102",
}
every_idx_set = pytest.mark.parametrize("name", IDX_SETS)


def shared(name):
    """The folder of the real sets.  Skips the test if this set is not in it."""
    if name in PLACES and not (SHARED / PLACES[name]).is_dir():
        pytest.skip(f"{SHARED / PLACES[name]} is not there")
    return str(SHARED)


# The digits


def test_training_and_heldout_digits_are_scikit_learns_digits_each_once():
    from sklearn.datasets import load_digits

    everything = load_digits()
    pixels = np.rint(everything.images * 255 / 16).astype(np.uint8)
    wanted = Counter((image.tobytes(), label) for image, label in zip(pixels, everything.target.tolist(), strict=True))
    found = Counter()
    for heldout, count in ((False, 1498), (True, 299)):
        part = open_dataset("digits", heldout=heldout)
        assert part.images.shape == (count, 1, 8, 8) and part.images[:].dtype == torch.uint8
        assert part.labels.shape == (count,) and part.labels.dtype == torch.int64
        pairs = zip(part.images[:].numpy(), part.labels.tolist(), strict=True)
        found.update((image.tobytes(), label) for image, label in pairs)
    assert found == wanted


def test_a_scikit_learn_that_keeps_its_digits_elsewhere_is_asked_for_them(monkeypatch):
    wanted = arrays.read_digits()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for got, digits in zip(arrays.read_digits.__wrapped__(), wanted, strict=True):
        np.testing.assert_array_equal(got, digits)


def test_the_digits_cover_black_to_white_and_every_class_is_in_both_parts():
    for heldout in (False, True):
        part = open_dataset("digits", heldout=heldout)
        assert (part.images[:].min(), part.images[:].max()) == (0, 255)
        assert part.labels.bincount(minlength=10).min() > 0.08 * len(part.labels)
        assert part.class_names == tuple("0123456789")


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "folder"])
@pytest.mark.parametrize("heldout", [False, True])
def test_a_sets_row_in_the_catalogue_says_what_is_opened(heldout, name):
    row = DATASETS[name]
    data = open_dataset(name, heldout=heldout, data_dir=shared(name), **({"cache_bytes": 0} if row.image_files else {}))
    splits = [split for split in row.splits if (split in row.train) != heldout]
    assert data.images.shape == (row.images(splits), row.channels, row.size, row.size)
    assert data.channels == row.channels
    assert data.class_names == row.classes
    assert row.sampler in SAMPLERS
    assert data.labels.unique().tolist() == (list(range(len(row.classes))) if splits else [])


# Real sets, if they are there


COUNTS = {  # images of each class; MNIST's as LeCun's page and every textbook has them
    ("mnist", False): [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    ("mnist", True): [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
    ("fashion_mnist", False): [6000] * 10,
    ("fashion_mnist", True): [1000] * 10,
}
FIRST_LABELS = {
    ("mnist", False): [5, 0, 4, 1, 9, 2, 1, 3, 1, 4],
    ("mnist", True): [7, 2, 1, 0, 4, 1, 4, 9, 5, 9],
    ("fashion_mnist", False): [9, 0, 0, 3, 0, 2, 7, 2, 5, 5],
    ("fashion_mnist", True): [9, 2, 1, 1, 6, 1, 4, 6, 5, 7],
}
MEAN_AND_STD = {"mnist": (0.1307, 0.3081), "fashion_mnist": (0.2860, 0.3530)}  # of training pixels in [0, 1]


@pytest.mark.parametrize("name, heldout", COUNTS)
def test_real_sets_have_the_published_size_balance_and_order(name, heldout):
    data = open_dataset(name, heldout=heldout, data_dir=shared(name))
    assert data.images.shape == (sum(COUNTS[name, heldout]), 1, 28, 28) and data.images[:].dtype == torch.uint8
    assert data.labels.bincount().tolist() == COUNTS[name, heldout]
    assert data.labels[:10].tolist() == FIRST_LABELS[name, heldout]
    if not heldout:
        std, mean = torch.std_mean(data.images[:].float() / 255, correction=0)
        assert (round(mean.item(), 4), round(std.item(), 4)) == MEAN_AND_STD[name]


# idx files


@every_idx_set
@pytest.mark.parametrize("heldout", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_read_back_as_they_were_written(compressed, heldout, name, tmp_path):
    raw = tmp_path / IDX_SETS[name] / "raw"
    written = {"train": make_set(20, 0), "t10k": make_set(7, 1)}
    for split, (images, labels) in written.items():
        write_idx(raw, split, images, labels, compressed)
    data = open_dataset(name, heldout=heldout, data_dir=str(tmp_path))
    images, labels = written["t10k" if heldout else "train"]
    assert data.images[:].dtype == torch.uint8 and data.labels.dtype == torch.int64
    np.testing.assert_array_equal(data.images[:][:, 0].numpy(), images)
    np.testing.assert_array_equal(data.labels.numpy(), labels)


def test_a_plain_file_and_a_compressed_one_make_a_pair(tmp_path):
    raw, (images, labels) = tmp_path / "MNIST" / "raw", make_set()
    write_idx(raw, "train", images, labels)
    (raw / FILES[1]).rename(tmp_path / "labels")
    (raw / f"{FILES[1]}.gz").write_bytes(gzip.compress((tmp_path / "labels").read_bytes()))
    np.testing.assert_array_equal(open_dataset("mnist", data_dir=str(tmp_path)).labels.numpy(), labels)


@pytest.mark.parametrize("name", ["{}-{}-ubyte/{}-{}-ubyte", "{}.{}-ubyte", "{}.{}-ubyte.gz"])
@pytest.mark.parametrize("heldout, split", [(False, "train"), (True, "t10k")])
def test_idx_files_may_have_the_names_that_kaggle_gives_them(heldout, split, name, tmp_path):
    raw, (images, labels) = tmp_path / "MNIST" / "raw", make_set()
    for kind, axes, array in (("images", "idx3", images), ("labels", "idx1", labels)):
        path = raw / name.format(f"{split}-{kind}", axes, f"{split}-{kind}", axes)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(idx(array)) if path.suffix == ".gz" else idx(array))
    data = open_dataset("mnist", heldout=heldout, data_dir=str(tmp_path))
    np.testing.assert_array_equal(data.images[:][:, 0].numpy(), images)
    np.testing.assert_array_equal(data.labels.numpy(), labels)


IMAGES, LABELS = make_set()
WHOLE_IMAGES, WHOLE_LABELS = idx(IMAGES), idx(LABELS)
BROKEN = {  # (damaged file, its bytes)
    **{f"images cut to {n} bytes": (FILES[0], WHOLE_IMAGES[:n]) for n in (0, 3, 4, 15, 16, 784)},
    **{f"labels cut to {n} bytes": (FILES[1], WHOLE_LABELS[:n]) for n in (0, 4, len(WHOLE_LABELS) - 1)},
    "a byte is missing": (FILES[0], WHOLE_IMAGES[:-1]),
    "a byte is too many": (FILES[0], WHOLE_IMAGES + b"\0"),
    "it starts with something else": (FILES[0], b"\x01" + WHOLE_IMAGES[1:]),
    "its values are floats": (FILES[0], b"\0\0\x0d" + WHOLE_IMAGES[3:]),
    "it is a page of text": (FILES[0], b"<html>404 not found</html>" * 100),
    "it says it has 255 axes": (FILES[0], b"\0\0\x08\xff" + WHOLE_IMAGES[4:]),
    "it says it has no axes": (FILES[0], b"\0\0\x08\0" + b"\0"),
    "its sizes multiply to 2^96": (FILES[0], b"\0\0\x08\x03" + b"\xff" * 12 + WHOLE_IMAGES[16:]),
    "images are 27 pixels wide": (FILES[0], idx(IMAGES[:, :, 1:])),
    "images are flat": (FILES[0], idx(IMAGES.reshape(20, 784))),
    "labels stand where images should": (FILES[0], WHOLE_LABELS),
    "images stand where labels should": (FILES[1], WHOLE_IMAGES),
    "a label is missing": (FILES[1], idx(LABELS[1:])),
    "an image is missing": (FILES[0], idx(IMAGES[1:])),
    "a label is 10": (FILES[1], idx(np.where(LABELS == 3, 10, LABELS))),
    "a label is 255": (FILES[1], idx(np.where(LABELS == 3, 255, LABELS))),
}


@pytest.mark.parametrize("file, wrong", BROKEN.values(), ids=BROKEN)
def test_a_damaged_file_is_refused_by_name(file, wrong, tmp_path):
    """Plain or compressed."""
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, "train", IMAGES, LABELS)
    (raw / file).write_bytes(wrong)
    for path in (raw / file, raw / f"{file}.gz"):
        with pytest.raises(FileError, match="MNIST") as refused:
            open_dataset("mnist", data_dir=str(tmp_path))
        assert str(raw) in str(refused.value) and "\n" not in str(refused.value)
        if path.suffix != ".gz":
            path.unlink()
            (raw / f"{file}.gz").write_bytes(gzip.compress(wrong))


def test_a_set_of_no_images_is_refused(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw", "train", IMAGES[:0], LABELS[:0])
    with pytest.raises(FileError, match="MNIST"):
        open_dataset("mnist", data_dir=str(tmp_path))


@pytest.mark.parametrize("place", [0, 2, 80, 160, -8, -1])
def test_a_damaged_gzip_is_refused_by_name(place, tmp_path):
    """gzip finds damage in the header and the trailer; zlib finds it inside the stream, with an error of its own."""
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, "train", IMAGES // 64 * 64, LABELS, compressed=True)
    path = raw / f"{FILES[0]}.gz"
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(FileError, match=r"images-idx3-ubyte\.gz"):
        open_dataset("mnist", data_dir=str(tmp_path))


@pytest.mark.parametrize("kept", [0, 10, 5000, -1])
def test_a_truncated_gzip_is_refused_by_name(kept, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, "train", IMAGES, LABELS, compressed=True)
    path = raw / f"{FILES[0]}.gz"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FileError, match=r"images-idx3-ubyte\.gz"):
        open_dataset("mnist", data_dir=str(tmp_path))


# Flowers-102


def flowers_tables():
    from scipy.io import loadmat

    place = Path(shared("flowers102")) / "flowers-102"
    labels = loadmat(place / "imagelabels.mat")["labels"][0].astype(int) - 1
    splits = loadmat(place / "setid.mat")
    return labels, {name: splits[key][0].tolist() for name, key in FLOWER_SPLITS.items()}


FLOWER_SPLITS = {"train": "trnid", "val": "valid", "test": "tstid"}
SOME_FLOWERS = {"data_dir": str(SHARED), "cache_bytes": 0, "channels": 3}


def test_the_splits_of_flowers_are_disjoint_complete_and_as_large_as_the_catalogue_says():
    labels, splits = flowers_tables()
    assert {name: len(ids) for name, ids in splits.items()} == DATASETS["flowers102"].splits
    assert sorted(sum(splits.values(), [])) == list(range(1, 8190)) and len(labels) == 8189
    assert DATASETS["flowers102"].train == ("train", "val", "test")  # all of them, to generate


def test_flowers_have_the_labels_of_their_table_in_every_split():
    labels, splits = flowers_tables()
    for chosen, heldout, opened in (
        (("train",), False, ["train"]),
        (("train", "val"), False, ["train", "val"]),
        (("train",), True, ["val", "test"]),
    ):
        data = open_dataset("flowers102", splits=chosen, heldout=heldout, **SOME_FLOWERS)
        ids = [number for name in opened for number in splits[name]]
        assert data.labels.tolist() == labels[np.array(ids) - 1].tolist()
        assert [int(name[-9:-4]) for name in data.images.files.names] == ids


def test_flowers_are_called_what_torchvision_calls_them():
    assert DATASETS["flowers102"].classes == tuple(torchvision.datasets.Flowers102.classes)
    assert len(set(DATASETS["flowers102"].classes)) == 102


def test_a_flower_is_the_photograph_of_its_number():
    """Scaled to cover 96x96, of which the shorter side is 96 already: the centre of the file's own pixels."""
    from PIL import Image

    folder = Path(shared("flowers102")) / "flowers-102"
    data = open_dataset("flowers102", splits=("train",), size=96, **SOME_FLOWERS)
    for index in (0, 500, 1019):
        pixels = np.asarray(Image.open(folder / data.images.files.names[index]))
        height, width = (side - 96 for side in pixels.shape[:2])
        if height % 2 or width % 2:
            continue  # whose centre is between two pixels
        centre = pixels[height // 2 : height // 2 + 96, width // 2 : width // 2 + 96]
        assert np.array_equal(data.take(np.array([index]))[0].permute(1, 2, 0).numpy(), centre)


@pytest.mark.slow
def test_all_flowers_fit_in_memory_and_are_what_is_read_from_disk():
    kept = open_dataset("flowers102", data_dir=shared("flowers102"))
    read = open_dataset("flowers102", **SOME_FLOWERS)
    assert kept.images.shape == (8189, 3, 64, 64)
    chosen = np.arange(0, 8189, 100)
    assert torch.equal(kept.take(chosen), read.take(chosen)) and torch.equal(kept.labels, read.labels)


# CIFAR-10


@pytest.mark.parametrize("heldout", [False, True])
def test_cifar10_is_read_from_torchvisions_files(heldout, tmp_path, monkeypatch):
    images, labels = write_cifar10(tmp_path, monkeypatch)
    data = open_dataset("cifar10", heldout=heldout, data_dir=str(tmp_path))
    part = slice(20, 26) if heldout else slice(0, 20)
    assert data.images[:].dtype == torch.uint8 and data.labels.dtype == torch.int64
    np.testing.assert_array_equal(data.images[:].numpy(), images[part])
    np.testing.assert_array_equal(data.labels.numpy(), labels[part])
    assert data.class_names == DATASETS["cifar10"].classes and len(data.class_names) == 10


@pytest.mark.parametrize(
    "damage, file",
    [("a byte", "data_batch_3"), ("cut", "test_batch"), ("gone", "data_batch_3"), ("empty", "batches.meta")],
)
def test_a_damaged_batch_of_cifar10_is_refused_with_what_to_do(damage, file, tmp_path, monkeypatch):
    """Whichever part is opened: its md5 is checked before Python's unpickler may see it."""
    write_cifar10(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / file
    whole = path.read_bytes()
    wrong = {"a byte": whole[:-9] + b"!" + whole[-8:], "cut": whole[: len(whole) // 2], "empty": b"", "gone": None}[
        damage
    ]
    path.unlink() if wrong is None else path.write_bytes(wrong)
    for heldout in (False, True):
        with pytest.raises(FileError, match="md5 differs") as refused:
            open_dataset("cifar10", heldout=heldout, data_dir=str(tmp_path))
        message = str(refused.value)
        assert str(path.parent) in message and "--dataset folder" in message and "\n" not in message


# Splits


@every_idx_set
def test_splits_train_together_in_the_catalogues_order_and_the_rest_is_held_out(name, tmp_path):
    written = {"train": make_set(20, 0), "test": make_set(7, 1)}
    for split, (images, labels) in written.items():
        write_idx(tmp_path / IDX_SETS[name] / "raw", "t10k" if split == "test" else split, images, labels)

    def assert_opens(parts, **options):
        data = open_dataset(name, data_dir=str(tmp_path), **options)
        images = [written[part][0] for part in parts] or [np.empty((0, 28, 28))]
        np.testing.assert_array_equal(data.images[:][:, 0].numpy(), np.concatenate(images))
        np.testing.assert_array_equal(
            data.labels.numpy(), np.concatenate([np.empty(0), *(written[p][1] for p in parts)])
        )
        assert data.images[:].dtype == torch.uint8 and data.labels.dtype == torch.int64
        assert data.images.shape[1:] == (1, 28, 28) and len(data.class_names) == 10

    for both in (("train", "test"), ("test", "train")):
        assert_opens(["train", "test"], splits=both)
        assert_opens([], splits=both, heldout=True)
    for part, other in (("train", "test"), ("test", "train")):
        assert_opens([part], splits=(part,))
        assert_opens([other], splits=(part,), heldout=True)
    assert_opens(["train"])
    assert_opens(["test"], heldout=True)


def test_where_nothing_is_held_out_nothing_is_opened(tmp_path):
    """The held-out images of a set without held-out splits need no files and no network."""
    for name in ("mnist", "cifar10", "flowers102"):
        row = DATASETS[name]
        data = open_dataset(name, heldout=True, splits=tuple(row.splits), size=(6, 4), data_dir=str(tmp_path))
        assert len(data) == 0 and data.images.shape == (0, row.channels, 6, 4)
    assert not list(tmp_path.iterdir())


# The folder of data sets


def test_data_dir_comes_before_the_environment_and_that_before_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for count, place in ((1, "argument"), (2, "environment"), (3, "data")):
        write_idx(tmp_path / place / "MNIST" / "raw", "train", *make_set(count))
    monkeypatch.setenv("TINY_DIFFUSION_DATA", str(tmp_path / "environment"))
    assert len(open_dataset("mnist", data_dir=str(tmp_path / "argument")).images) == 1
    assert len(open_dataset("mnist").images) == 2
    monkeypatch.setenv("TINY_DIFFUSION_DATA", "")
    assert len(open_dataset("mnist").images) == 3
    monkeypatch.delenv("TINY_DIFFUSION_DATA")
    assert len(open_dataset("mnist").images) == 3
    assert data_folder(None) == Path("data")


@pytest.mark.parametrize("heldout, count", [(False, 20), (True, 7)])
def test_the_systems_fashion_mnist_is_used_where_it_is_installed(heldout, count, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "SYSTEM_FOLDERS", {"FashionMNIST": tmp_path / "usr"})
    write_idx(tmp_path / "usr", "train", *make_set(20), compressed=True)
    write_idx(tmp_path / "usr", "t10k", *make_set(7, 1), compressed=True)
    data = open_dataset("fashion_mnist", heldout=heldout, data_dir=str(tmp_path / "data"))
    np.testing.assert_array_equal(data.images[:][:, 0].numpy(), make_set(count, int(heldout))[0])
    assert not (tmp_path / "data").exists()


def test_the_users_own_fashion_mnist_comes_before_the_systems(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "SYSTEM_FOLDERS", {"FashionMNIST": tmp_path / "usr"})
    write_idx(tmp_path / "usr", "train", *make_set(20), compressed=True)
    write_idx(tmp_path / "FashionMNIST" / "raw", "train", *make_set(3))
    assert len(open_dataset("fashion_mnist", data_dir=str(tmp_path)).images) == 3


def test_debians_own_fashion_mnist_opens(tmp_path, monkeypatch):
    if not DEBIANS["FashionMNIST"].is_dir():
        pytest.skip(f"{DEBIANS['FashionMNIST']} is not there: apt install dataset-fashion-mnist")
    monkeypatch.setattr(arrays, "SYSTEM_FOLDERS", DEBIANS)
    assert len(open_dataset("fashion_mnist", data_dir=str(tmp_path)).images) == 60_000


@pytest.mark.parametrize("compressed", [False, True])
def test_opening_a_set_that_is_there_changes_nothing_in_its_folder(compressed, tmp_path):
    """So it may be read-only, which the test tries too unless it runs as root."""
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, "train", *make_set(), compressed)
    before = content(tmp_path)
    folders = [raw, raw.parent, tmp_path]
    try:
        for folder in folders:
            folder.chmod(0o555)
        open_dataset("mnist", data_dir=str(tmp_path))
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert content(tmp_path) == before


# Sizes


@pytest.mark.parametrize("heldout, size", [(False, 4), (True, 7), (True, 8), (False, 33)])
def test_images_come_in_the_size_that_is_asked_for(heldout, size):
    own, data = open_dataset("digits", heldout=heldout), open_dataset("digits", heldout=heldout, size=size)
    assert data.images.shape == (len(own.images), 1, size, size) and data.images[:].dtype == torch.uint8
    assert torch.equal(data.labels, own.labels)
    if size == 8:
        assert torch.equal(data.images[:], own.images[:])


@pytest.mark.parametrize("size", [4, 9, 14, 32, 57])
def test_resizing_keeps_a_constant_image_constant(size, tmp_path):
    greys = np.array([0, 1, 7, 127, 128, 200, 254, 255])
    write_idx(tmp_path / "MNIST" / "raw", "train", np.broadcast_to(greys[:, None, None], (8, 28, 28)), greys % 10)
    images = open_dataset("mnist", data_dir=str(tmp_path), size=size).images[:]
    assert torch.equal(images, torch.from_numpy(greys.astype(np.uint8))[:, None, None, None].expand(8, 1, size, size))


@pytest.mark.parametrize("size", [(14, 28), (28, 14), (28, 28), (5, 28), (28, 4)])
def test_a_size_that_is_not_square_is_cropped_from_the_centre(size, tmp_path):
    """Where one side is the image's own, nothing is scaled and pixels are as they were."""
    images, labels = make_set(9)
    write_idx(tmp_path / "MNIST" / "raw", "train", images, labels)
    data = open_dataset("mnist", data_dir=str(tmp_path), size=size)
    top, left = ((28 - side) // 2 for side in size)
    np.testing.assert_array_equal(data.images[:][:, 0].numpy(), images[:, top : top + size[0], left : left + size[1]])


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (20, 10), (57, 56)])
@pytest.mark.parametrize("axis", [0, 1])
def test_scaling_covers_the_size_and_keeps_a_ramp_a_ramp(axis, size, tmp_path):
    """A ramp of 9 a pixel; a kernel that is fair keeps a straight line straight, away from the ends."""
    ramp = np.broadcast_to(np.expand_dims(9 * np.arange(28), (0, 2 - axis)), (1, 28, 28))
    write_idx(tmp_path / "MNIST" / "raw", "train", ramp, np.zeros(1))
    image = open_dataset("mnist", data_dir=str(tmp_path), size=size).images[:][0, 0].double()
    scale = max(size) / 28
    cut = (round(28 * scale) - size[axis]) // 2
    places = (torch.arange(size[axis]) + cut + 0.5) / scale - 0.5  # in source pixels
    margin = 3 * max(1, 1 / scale)
    inside = (places > margin) & (places < 27 - margin)
    wanted = (9 * places[inside]).double().unsqueeze(1 - axis)
    got = image[inside] if axis == 0 else image[:, inside]
    torch.testing.assert_close(got, wanted.expand_as(got), rtol=0, atol=0.75)


@pytest.mark.parametrize("size", [9, 14, 32, 57])
def test_resizing_an_edge_overshoots_into_white_and_not_around_to_black(size, tmp_path):
    """Bicubic kernels overshoot at edges; in uint8 256 would be 0."""
    edge = np.zeros((1, 28, 28))
    edge[:, :, 14:] = 255
    write_idx(tmp_path / "MNIST" / "raw", "train", edge, np.zeros(1))
    image = open_dataset("mnist", data_dir=str(tmp_path), size=size).images[:][0, 0].float()
    assert image[:, : size // 2 - 1].max() < 64
    assert image[:, size // 2 + 2 :].min() > 191


# Batches


@pytest.fixture
def numbered():
    """23 images of 2 x 3 pixels; image i holds 6 i .. 6 i + 5 and has label i."""
    return ImageSet(torch.arange(23 * 6, dtype=torch.uint8).view(23, 1, 2, 3), torch.arange(23), tuple("abc"))


batch_sizes = pytest.mark.parametrize("batch_size", [1, 5, 22, 23, 24, 50])


@batch_sizes
def test_every_epoch_has_every_image_once(batch_size, numbered):
    """Also where epochs end inside a batch, and where a batch is several epochs."""
    batches = Batches(numbered, batch_size, seed=0)
    seen = np.concatenate([batches.at(step)[1].numpy() for step in range(23 * 6 // batch_size + 1)])
    for epoch in range(6):
        assert sorted(seen[epoch * 23 : (epoch + 1) * 23]) == list(range(23))
    assert len(batches) == 23


@batch_sizes
@pytest.mark.parametrize("hflip", [False, True])
def test_a_batch_depends_on_the_seed_and_the_step_alone(hflip, batch_size, numbered):
    in_order = Batches(numbered, batch_size, seed=3, hflip=hflip)
    wanted = [in_order.at(step) for step in range(40)]
    jumping = Batches(numbered, batch_size, seed=3, hflip=hflip)
    for step in np.random.default_rng(0).permutation(40):
        for got, want in zip(jumping.at(int(step)), wanted[step], strict=True):
            assert torch.equal(got, want)
    for got, want in zip(Batches(numbered, batch_size, seed=3, hflip=hflip).at(39), wanted[39], strict=True):
        assert torch.equal(got, want)


def test_every_seed_and_every_epoch_has_an_order_of_its_own(numbered):
    orders = {tuple(Batches(numbered, 23, seed).at(epoch)[1].tolist()) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_the_stream_is_the_same_whatever_it_is_cut_into(numbered):
    streams = [
        np.concatenate([Batches(numbered, size, seed=1).at(step)[1].numpy() for step in range(100 // size)])
        for size in (1, 5, 25, 100)
    ]
    assert all(np.array_equal(stream, streams[0]) for stream in streams)


@pytest.mark.parametrize("hflip", [False, True])
def test_images_keep_their_labels(hflip, numbered):
    batches = Batches(numbered, 16, seed=0, hflip=hflip)
    for step in range(5):
        clean, label = batches.at(step)
        assert clean.shape == (16, 1, 2, 3) and clean.dtype == torch.float32 and label.dtype == torch.int64
        torch.testing.assert_close(((clean.amin((1, 2, 3)) + 1) * 127.5).round().long(), 6 * label)


def test_without_hflip_images_come_as_they_are(numbered):
    clean, label = Batches(numbered, 46, seed=0).at(0)
    assert torch.equal(clean, to_float(numbered.images[label]))


def test_hflip_mirrors_about_half_of_the_images_and_changes_nothing_else(numbered):
    batches, mirrored, count = Batches(numbered, 50, seed=0, hflip=True), 0, 0
    for step in range(40):
        clean, label = batches.at(step)
        own = to_float(numbered.images[label])
        flipped = (clean == own.flip(-1)).flatten(1).all(1)
        assert torch.equal(flipped, ~(clean == own).flatten(1).all(1))
        mirrored, count = mirrored + int(flipped.sum()), count + len(label)
    assert abs(mirrored - count / 2) < 5 * np.sqrt(count) / 2


def test_hflip_chooses_anew_at_every_step_and_for_every_seed(numbered):
    """hflip does not change which images are in a batch, so the labels show which of them are mirrored."""
    choices = set()
    for seed in range(5):
        for step in range(20):
            clean, label = Batches(numbered, 23, seed, hflip=True).at(step)
            choices.add(tuple((clean != to_float(numbered.images[label])).flatten(1).any(1).tolist()))
    assert len(choices) == 100


@pytest.mark.parametrize("batch_size", [16, 2000])
def test_batches_of_digits_lie_in_minus_one_to_one(batch_size, digits):
    clean, _ = Batches(digits, batch_size, seed=0).at(93)
    assert clean.shape == (batch_size, 1, 8, 8)
    assert (clean.min(), clean.max()) == (-1, 1)


def test_a_copy_of_a_data_folder_is_the_same_set(tmp_path):
    write_idx(tmp_path / "a" / "MNIST" / "raw", "train", *make_set())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = (open_dataset("mnist", data_dir=str(tmp_path / place)) for place in "ab")
    assert torch.equal(first.images[:], second.images[:]) and torch.equal(first.labels, second.labels)
