"""Data sets: what is opened, from where, what is refused, and which images step k trains on."""

import _thread
import gzip
import http.client
import shutil
import signal
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from tiny_diffusion.data import sources
from tiny_diffusion.data.batches import Batches, to_float
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.data.sources import ImageSet, data_folder, open_dataset
from tiny_diffusion.errors import FileError

SHARED = Path(__file__).parents[2] / "shared" / "data"
DEBIANS = sources.SYSTEM_FOLDERS
IDX_SETS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
every_idx_set = pytest.mark.parametrize("name", IDX_SETS)
FILES = [f"{split}-{part}-ubyte" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1")]


def idx(array):
    """An array as an idx file of uint8."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def make_set(count=20, seed=0):
    """Images and labels that no two seeds share."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10


def write_idx(raw, split, images, labels, compressed=False):
    raw.mkdir(parents=True, exist_ok=True)
    for part, array in (("images-idx3", images), ("labels-idx1", labels)):
        path = raw / f"{split}-{part}-ubyte"
        if compressed:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(array)))
        else:
            path.write_bytes(idx(array))


def content(folder):
    """Everything in a folder: path -> (time of change, bytes)."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch):
    """No test reaches the network, the system's data or the user's, but those that put something in their place."""

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(sources, "SYSTEM_FOLDERS", {})
    monkeypatch.delenv("TINY_DIFFUSION_DATA", raising=False)


# The digits


def test_training_and_heldout_digits_are_together_each_of_scikit_learns_once():
    from sklearn.datasets import load_digits

    everything = load_digits()
    pixels = np.rint(everything.images * 255 / 16).astype(np.uint8)
    wanted = Counter((image.tobytes(), label) for image, label in zip(pixels, everything.target.tolist(), strict=True))
    found = Counter()
    for heldout, count in ((False, 1498), (True, 299)):
        part = open_dataset("digits", heldout=heldout)
        assert part.images.shape == (count, 1, 8, 8) and part.images.dtype == torch.uint8
        assert part.labels.shape == (count,) and part.labels.dtype == torch.int64
        pairs = zip(part.images.numpy(), part.labels.tolist(), strict=True)
        found.update((image.tobytes(), label) for image, label in pairs)
    assert found == wanted


def test_the_digits_cover_black_to_white_and_every_class_is_in_both_parts():
    for heldout in (False, True):
        part = open_dataset("digits", heldout=heldout)
        assert (part.images.min(), part.images.max()) == (0, 255)
        assert part.labels.bincount(minlength=10).min() > 0.08 * len(part.labels)
        assert part.class_names == tuple("0123456789")


@pytest.mark.parametrize("name", DATASETS)
def test_a_sets_row_in_the_catalogue_says_what_is_opened(name):
    row = DATASETS[name]
    if row.download and not (SHARED / row.source).is_dir():
        pytest.skip(f"{SHARED / row.source} is not there")
    data = open_dataset(name, data_dir=str(SHARED))
    assert data.images.shape == (row.images, row.channels, row.size, row.size)
    assert data.class_names == row.classes
    assert data.labels.unique().tolist() == list(range(len(row.classes)))


# Real sets, where they are


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
    if not (SHARED / IDX_SETS[name]).is_dir():
        pytest.skip(f"{SHARED / IDX_SETS[name]} is not there")
    data = open_dataset(name, heldout=heldout, data_dir=str(SHARED))
    assert data.images.shape == (sum(COUNTS[name, heldout]), 1, 28, 28) and data.images.dtype == torch.uint8
    assert data.labels.bincount().tolist() == COUNTS[name, heldout]
    assert data.labels[:10].tolist() == FIRST_LABELS[name, heldout]
    if not heldout:
        std, mean = torch.std_mean(data.images.float() / 255, correction=0)
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
    assert data.images.dtype == torch.uint8 and data.labels.dtype == torch.int64
    np.testing.assert_array_equal(data.images[:, 0].numpy(), images)
    np.testing.assert_array_equal(data.labels.numpy(), labels)


def test_a_plain_file_and_a_compressed_one_make_a_pair(tmp_path):
    raw, (images, labels) = tmp_path / "MNIST" / "raw", make_set()
    write_idx(raw, "train", images, labels)
    (raw / FILES[1]).rename(tmp_path / "labels")
    (raw / f"{FILES[1]}.gz").write_bytes(gzip.compress((tmp_path / "labels").read_bytes()))
    np.testing.assert_array_equal(open_dataset("mnist", data_dir=str(tmp_path)).labels.numpy(), labels)


IMAGES, LABELS = make_set()
WHOLE_IMAGES, WHOLE_LABELS = idx(IMAGES), idx(LABELS)
BROKEN = {  # (file that is wrong, its bytes)
    **{f"images cut to {n} bytes": (FILES[0], WHOLE_IMAGES[:n]) for n in (0, 1, 3, 4, 7, 15, 16, 17, 784)},
    **{f"labels cut to {n} bytes": (FILES[1], WHOLE_LABELS[:n]) for n in (0, 2, 4, 8, len(WHOLE_LABELS) - 1)},
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


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("file, wrong", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_such_set_is_refused_by_name(file, wrong, compressed, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, "train", IMAGES, LABELS)
    (raw / file).write_bytes(wrong)
    if compressed:
        (raw / f"{file}.gz").write_bytes(gzip.compress((raw / file).read_bytes()))
        (raw / file).unlink()
    with pytest.raises(FileError, match="MNIST") as refused:
        open_dataset("mnist", data_dir=str(tmp_path))
    assert str(raw) in str(refused.value) and "\n" not in str(refused.value)


def test_a_set_of_no_images_is_refused(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw", "train", IMAGES[:0], LABELS[:0])
    with pytest.raises(FileError, match="MNIST"):
        open_dataset("mnist", data_dir=str(tmp_path))


@pytest.mark.parametrize("place", [0, 1, 2, 40, 80, 120, 160, -8, -7, -1])
def test_a_damaged_gzip_is_refused_by_name(place, tmp_path):
    """In the header and the trailer gzip finds the damage; inside the stream zlib does, with an error of its own."""
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, "train", IMAGES // 64 * 64, LABELS, compressed=True)
    path = raw / f"{FILES[0]}.gz"
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(FileError, match=r"images-idx3-ubyte\.gz"):
        open_dataset("mnist", data_dir=str(tmp_path))


@pytest.mark.parametrize("kept", [0, 1, 10, 100, 5000, -1])
def test_a_gzip_cut_short_is_refused_by_name(kept, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, "train", IMAGES, LABELS, compressed=True)
    path = raw / f"{FILES[0]}.gz"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FileError, match=r"images-idx3-ubyte\.gz"):
        open_dataset("mnist", data_dir=str(tmp_path))


# Which folder


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
    monkeypatch.setattr(sources, "SYSTEM_FOLDERS", {"FashionMNIST": tmp_path / "usr"})
    write_idx(tmp_path / "usr", "train", *make_set(20), compressed=True)
    write_idx(tmp_path / "usr", "t10k", *make_set(7, 1), compressed=True)
    data = open_dataset("fashion_mnist", heldout=heldout, data_dir=str(tmp_path / "data"))
    np.testing.assert_array_equal(data.images[:, 0].numpy(), make_set(count, int(heldout))[0])
    assert not (tmp_path / "data").exists()


def test_the_users_own_fashion_mnist_comes_before_the_systems(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SYSTEM_FOLDERS", {"FashionMNIST": tmp_path / "usr"})
    write_idx(tmp_path / "usr", "train", *make_set(20), compressed=True)
    write_idx(tmp_path / "FashionMNIST" / "raw", "train", *make_set(3))
    assert len(open_dataset("fashion_mnist", data_dir=str(tmp_path)).images) == 3


def test_debians_own_fashion_mnist_opens(tmp_path, monkeypatch):
    if not DEBIANS["FashionMNIST"].is_dir():
        pytest.skip(f"{DEBIANS['FashionMNIST']} is not there: apt install dataset-fashion-mnist")
    monkeypatch.setattr(sources, "SYSTEM_FOLDERS", DEBIANS)
    assert len(open_dataset("fashion_mnist", data_dir=str(tmp_path)).images) == 60_000


@pytest.mark.parametrize("compressed", [False, True])
def test_opening_a_set_that_is_there_changes_nothing_in_its_folder(compressed, tmp_path):
    """So it may be read-only; that is tried too, where the tests do not run as root."""
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


# Downloads


def assert_says_what_to_do(message, name, folder):
    source = IDX_SETS[name]
    files = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k"
    for part in (str(folder / source), str(folder / source / "raw"), *files, "--data_dir", "--dataset digits"):
        assert part in message
    assert "\n" not in message


@every_idx_set
@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no route to host"),
        urllib.error.HTTPError("http://example.org", 403, "Forbidden", None, None),
        ConnectionResetError("reset by peer"),
        TimeoutError("timed out"),
        http.client.RemoteDisconnected("closed"),
        http.client.BadStatusLine("<html>"),
        ssl.SSLError("certificate verify failed"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_without_a_network_the_message_says_what_to_do_and_nothing_is_left(failure, name, tmp_path, monkeypatch):
    def urlopen(*args, **kwargs):
        raise failure

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(FileError) as refused:
        open_dataset(name, data_dir=str(tmp_path / "data"))
    assert_says_what_to_do(str(refused.value), name, tmp_path / "data")
    assert not content(tmp_path).keys() - {"data"}


def test_a_data_folder_that_cannot_be_made_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError) as refused:
        open_dataset("mnist", data_dir=str(tmp_path / "file" / "data"))
    assert_says_what_to_do(str(refused.value), "mnist", tmp_path / "file" / "data")


@every_idx_set
def test_a_network_that_never_answers_is_given_up(name, tmp_path, monkeypatch):
    released = threading.Event()

    def urlopen(*args, **kwargs):
        released.wait(60)
        raise urllib.error.URLError("released")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(sources, "NETWORK_PATIENCE_S", 0.5)
    started = time.monotonic()
    try:
        with pytest.raises(FileError, match="no answer") as refused:
            open_dataset(name, data_dir=str(tmp_path / "data"))
        assert 0.5 < time.monotonic() - started < 10
        assert not content(tmp_path).keys() - {"data"}
    finally:
        released.set()
    assert_says_what_to_do(str(refused.value), name, tmp_path / "data")


@pytest.fixture
def torchvision_downloads(monkeypatch):
    """torchvision_downloads(function of the raw folder): what happens where torchvision would download MNIST."""

    def replace(work):
        def mnist(root, download):
            assert download
            raw = Path(root) / "MNIST" / "raw"
            raw.mkdir(parents=True)
            work(raw)

        monkeypatch.setattr(torchvision.datasets, "MNIST", mnist)

    return replace


def write_both_splits(raw):
    write_idx(raw, "train", *make_set(20, 0))
    write_idx(raw, "t10k", *make_set(7, 1))


def test_a_slow_download_is_not_given_up_while_bytes_arrive(tmp_path, monkeypatch, torchvision_downloads):
    def slowly(raw):
        with open(raw / "part", "wb", buffering=0) as file:
            for _ in range(15):
                file.write(b"x")
                time.sleep(0.1)
        (raw / "part").unlink()
        write_both_splits(raw)

    torchvision_downloads(slowly)
    monkeypatch.setattr(sources, "NETWORK_PATIENCE_S", 0.7)
    assert len(open_dataset("mnist", data_dir=str(tmp_path)).images) == 20


def test_a_set_that_was_downloaded_is_not_downloaded_again(tmp_path, torchvision_downloads):
    downloads = []

    def once(raw):
        downloads.append(raw)
        write_both_splits(raw)

    torchvision_downloads(once)
    np.testing.assert_array_equal(open_dataset("mnist", data_dir=str(tmp_path)).images[:, 0].numpy(), IMAGES)
    assert len(open_dataset("mnist", heldout=True, data_dir=str(tmp_path)).images) == 7
    assert len(open_dataset("mnist", data_dir=str(tmp_path)).images) == 20
    assert len(downloads) == 1
    assert set(content(tmp_path)) == {"MNIST", "MNIST/raw", *(f"MNIST/raw/{file}" for file in FILES)}


@pytest.mark.parametrize("failure", [RuntimeError("md5 differs"), OSError(28, "No space left on device")])
def test_a_download_that_fails_half_way_leaves_no_half_set(failure, tmp_path, torchvision_downloads):
    def half(raw):
        write_idx(raw, "train", *make_set())
        raise failure

    torchvision_downloads(half)
    with pytest.raises(FileError) as refused:
        open_dataset("mnist", data_dir=str(tmp_path))
    assert_says_what_to_do(str(refused.value), "mnist", tmp_path)
    assert content(tmp_path) == {}


@pytest.fixture
def ctrl_c():
    """Raises KeyboardInterrupt, also where the tests run in the background, which ignores it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("ctrl_c")
def test_a_download_that_is_interrupted_leaves_no_half_set(tmp_path, torchvision_downloads):
    def interrupted(raw):
        write_idx(raw, "train", *make_set())
        _thread.interrupt_main()
        time.sleep(0.5)

    torchvision_downloads(interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_dataset("mnist", data_dir=str(tmp_path))
    assert content(tmp_path) == {}


def test_a_download_completes_a_set_of_which_some_files_are_there(tmp_path, torchvision_downloads):
    torchvision_downloads(write_both_splits)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / FILES[0]).write_bytes(WHOLE_IMAGES)
    (raw / "notes.txt").write_text("mine")
    np.testing.assert_array_equal(open_dataset("mnist", data_dir=str(tmp_path)).images[:, 0].numpy(), IMAGES)
    assert {path.name for path in raw.iterdir()} == {*FILES, "notes.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]


def test_a_failed_download_leaves_the_users_files_alone(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / FILES[0]).write_bytes(WHOLE_IMAGES)
    before = content(tmp_path)["MNIST/raw/" + FILES[0]]
    with pytest.raises(FileError):
        open_dataset("mnist", data_dir=str(tmp_path))
    assert content(tmp_path)["MNIST/raw/" + FILES[0]] == before
    assert set(content(tmp_path)) == {"MNIST", "MNIST/raw", "MNIST/raw/" + FILES[0]}


# Sizes


@pytest.mark.parametrize("size", [4, 7, 8, 16, 33])
@pytest.mark.parametrize("heldout", [False, True])
def test_images_come_in_the_size_that_is_asked_for(heldout, size):
    own, data = open_dataset("digits", heldout=heldout), open_dataset("digits", heldout=heldout, size=size)
    assert data.images.shape == (len(own.images), 1, size, size) and data.images.dtype == torch.uint8
    assert torch.equal(data.labels, own.labels)
    if size == 8:
        assert torch.equal(data.images, own.images)


@pytest.mark.parametrize("size", [4, 9, 14, 32, 57])
def test_resizing_keeps_a_constant_image_constant(size, tmp_path):
    greys = np.array([0, 1, 7, 127, 128, 200, 254, 255])
    write_idx(tmp_path / "MNIST" / "raw", "train", np.broadcast_to(greys[:, None, None], (8, 28, 28)), greys % 10)
    images = open_dataset("mnist", data_dir=str(tmp_path), size=size).images
    assert torch.equal(images, torch.from_numpy(greys.astype(np.uint8))[:, None, None, None].expand(8, 1, size, size))


@pytest.mark.parametrize("size", [9, 14, 32, 57])
def test_resizing_an_edge_overshoots_into_white_and_not_around_to_black(size, tmp_path):
    """Bicubic kernels overshoot at edges; in uint8 256 would be 0."""
    edge = np.zeros((1, 28, 28))
    edge[:, :, 14:] = 255
    write_idx(tmp_path / "MNIST" / "raw", "train", edge, np.zeros(1))
    image = open_dataset("mnist", data_dir=str(tmp_path), size=size).images[0, 0].float()
    assert image[:, : size // 2 - 1].max() < 64
    assert image[:, size // 2 + 2 :].min() > 191


# Batches


@pytest.fixture
def numbered():
    """23 images of 2 x 3 pixels; image i holds 6 i .. 6 i + 5 and has label i."""
    return ImageSet(torch.arange(23 * 6, dtype=torch.uint8).view(23, 1, 2, 3), torch.arange(23), tuple("abc"))


batch_sizes = pytest.mark.parametrize("batch_size", [1, 4, 5, 16, 22, 23, 24, 46, 50, 100])


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
    """Which images are chosen does not change with hflip, so what is mirrored can be read from labels."""
    choices = set()
    for seed in range(5):
        for step in range(20):
            clean, label = Batches(numbered, 23, seed, hflip=True).at(step)
            choices.add(tuple((clean != to_float(numbered.images[label])).flatten(1).any(1).tolist()))
    assert len(choices) == 100


def test_black_is_minus_one_and_white_is_one_and_all_between_is_linear():
    greys = torch.arange(256, dtype=torch.uint8)
    values = to_float(greys)
    assert (values[0], values[255]) == (-1, 1)
    torch.testing.assert_close(values.double(), torch.linspace(-1, 1, 256, dtype=torch.float64), rtol=0, atol=1e-6)
    assert values.dtype == torch.float32 and torch.equal(greys, torch.arange(256, dtype=torch.uint8))


@pytest.mark.parametrize("batch_size", [16, 2000])
def test_batches_of_digits_lie_in_minus_one_to_one(batch_size, digits):
    clean, _ = Batches(digits, batch_size, seed=0).at(93)
    assert clean.shape == (batch_size, 1, 8, 8)
    assert (clean.min(), clean.max()) == (-1, 1)


def test_a_copy_of_a_data_folder_is_the_same_set(tmp_path):
    write_idx(tmp_path / "a" / "MNIST" / "raw", "train", *make_set())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = (open_dataset("mnist", data_dir=str(tmp_path / place)) for place in "ab")
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)
