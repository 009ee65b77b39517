"""Downloads: what is downloaded, which existing files are used, and what is left after a failure."""

import _thread
import http.client
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from import_helpers import torchvision
from set_helpers import (
    FILES,
    IDX_SETS,
    content,
    idx,
    make_set,
    pack_cifar10,
    write_cifar10,
    write_flowers102,
    write_idx,
)

from tiny_diffusion.data import downloads
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.data.sources import open_dataset
from tiny_diffusion.errors import FileError

pytestmark = pytest.mark.usefixtures("nothing_from_outside")

IMAGES, LABELS = make_set()
SETS = [name for name, row in DATASETS.items() if row.download]
every_set = pytest.mark.parametrize("name", SETS)
every_idx_set = pytest.mark.parametrize("name", IDX_SETS)


def assert_says_what_to_do(message, name, folder):
    row = DATASETS[name]
    for part in (row.source, row.download, str(folder / row.download_to), "--data_dir", "--dataset digits"):
        assert part in message
    assert "\n" not in message


@every_set
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


def test_a_network_that_never_answers_is_given_up(tmp_path, monkeypatch):
    released = threading.Event()

    def urlopen(*args, **kwargs):
        released.wait(60)
        raise urllib.error.URLError("released")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(downloads, "NETWORK_TIMEOUT_S", 0.3)
    started = time.monotonic()
    try:
        with pytest.raises(FileError, match="no answer") as refused:
            open_dataset("mnist", data_dir=str(tmp_path / "data"))
        assert 0.3 < time.monotonic() - started < 10
        assert not content(tmp_path).keys() - {"data"}
    finally:
        released.set()
    assert_says_what_to_do(str(refused.value), "mnist", tmp_path / "data")


@pytest.fixture
def torchvision_downloads(monkeypatch):
    """torchvision_downloads(function of the raw folder): what happens where torchvision would download MNIST."""

    def replace(work):
        def mnist(root, download):
            assert download
            raw = Path(root) / "MNIST" / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            work(raw)

        monkeypatch.setattr(torchvision.datasets, "MNIST", mnist)

    return replace


def write_both_splits(raw):
    write_idx(raw, "train", *make_set(20, 0))
    write_idx(raw, "t10k", *make_set(7, 1))


def test_a_slow_download_is_not_given_up_while_bytes_arrive(tmp_path, monkeypatch, torchvision_downloads):
    def slowly(raw):
        with open(raw / "part", "wb", buffering=0) as file:
            for _ in range(10):
                file.write(b"x")
                time.sleep(0.1)
        (raw / "part").unlink()
        write_both_splits(raw)

    torchvision_downloads(slowly)
    monkeypatch.setattr(downloads, "NETWORK_TIMEOUT_S", 0.7)
    assert len(open_dataset("mnist", data_dir=str(tmp_path)).images) == 20


def test_a_set_that_was_downloaded_is_not_downloaded_again(tmp_path, torchvision_downloads):
    downloads = []

    def once(raw):
        downloads.append(raw)
        write_both_splits(raw)

    torchvision_downloads(once)
    np.testing.assert_array_equal(open_dataset("mnist", data_dir=str(tmp_path)).images[:][:, 0].numpy(), IMAGES)
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
    (raw / FILES[0]).write_bytes(idx(IMAGES))
    (raw / "notes.txt").write_text("mine")
    np.testing.assert_array_equal(open_dataset("mnist", data_dir=str(tmp_path)).images[:][:, 0].numpy(), IMAGES)
    assert {path.name for path in raw.iterdir()} == {*FILES, "notes.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]


def test_a_failed_download_leaves_the_users_files_alone(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / FILES[0]).write_bytes(idx(IMAGES))
    before = content(tmp_path)["MNIST/raw/" + FILES[0]]
    with pytest.raises(FileError):
        open_dataset("mnist", data_dir=str(tmp_path))
    assert content(tmp_path)["MNIST/raw/" + FILES[0]] == before
    assert set(content(tmp_path)) == {"MNIST", "MNIST/raw", "MNIST/raw/" + FILES[0]}


# Files that the user has put there


def test_an_archive_put_there_by_hand_is_unpacked_without_a_network(tmp_path, monkeypatch):
    images, labels = write_cifar10(tmp_path, monkeypatch)
    archive = pack_cifar10(tmp_path, monkeypatch)
    before = content(tmp_path)[archive.name]
    data = open_dataset("cifar10", data_dir=str(tmp_path))
    np.testing.assert_array_equal(data.images[:].numpy(), images[:20])
    np.testing.assert_array_equal(open_dataset("cifar10", heldout=True, data_dir=str(tmp_path)).labels, labels[20:])
    assert content(tmp_path)[archive.name] == before
    assert {path.name for path in tmp_path.iterdir()} == {archive.name, "cifar-10-batches-py"}


def test_photographs_and_tables_put_there_by_hand_are_unpacked_without_a_network(tmp_path, monkeypatch):
    labels = write_flowers102(tmp_path, monkeypatch)
    data = open_dataset("flowers102", data_dir=str(tmp_path))
    order = [12, 3, 1, 9, 5, 2, 4, 11, 10, 8, 7, 6]
    assert data.labels.tolist() == [labels[number - 1] for number in order]
    assert data.images.shape == (12, 3, 64, 64)
    greys = data.images[:].float().mean((1, 2, 3))
    torch.testing.assert_close(greys, torch.tensor([10.0 * number for number in order]), rtol=0, atol=2)
    assert [path.name for path in tmp_path.iterdir()] == ["flowers-102"]
    names = {path.name for path in (tmp_path / "flowers-102").iterdir()}
    assert names == {"102flowers.tgz", "imagelabels.mat", "setid.mat", "jpg"}


@pytest.mark.parametrize("file", ["imagelabels.mat", "setid.mat"])
def test_a_table_of_flowers_that_has_changed_is_refused_with_what_to_do(file, tmp_path, monkeypatch):
    write_flowers102(tmp_path, monkeypatch)
    open_dataset("flowers102", data_dir=str(tmp_path))
    (tmp_path / "flowers-102" / file).write_bytes(b"nonsense")
    with pytest.raises(FileError, match="md5 differs") as refused:
        open_dataset("flowers102", data_dir=str(tmp_path))
    assert str(tmp_path / "flowers-102") in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("wrong", [b"", b"<html>404 not found</html>", None])
def test_an_archive_with_another_md5_is_refused_and_kept_as_it_was(wrong, tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    archive = pack_cifar10(tmp_path, monkeypatch)
    archive.write_bytes(archive.read_bytes()[:-100] if wrong is None else wrong)
    before = content(tmp_path)
    with pytest.raises(FileError) as refused:
        open_dataset("cifar10", data_dir=str(tmp_path))
    assert_says_what_to_do(str(refused.value), "cifar10", tmp_path)
    assert "cifar-10-python.tar.gz is not enough" in str(refused.value)
    assert content(tmp_path) == before


def test_a_download_that_goes_wrong_does_not_touch_a_file_put_there_by_hand(tmp_path, monkeypatch):
    """torchvision overwrites a file whose md5 differs, so it is given a copy."""

    class Answer:
        url, length, parts = None, 6, [b"broken", b""]

        def __enter__(self):
            self.parts = list(type(self).parts)
            return self

        def __exit__(self, *error):
            pass

        def read(self, size):
            return self.parts.pop(0)

    write_cifar10(tmp_path, monkeypatch)
    archive = pack_cifar10(tmp_path, monkeypatch)
    archive.write_bytes(b"my own")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: Answer())
    with pytest.raises(FileError, match="corrupted"):
        open_dataset("cifar10", data_dir=str(tmp_path))
    assert archive.read_bytes() == b"my own"
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


# Folders that may only be read


@every_set
def test_a_folder_that_cannot_be_written_is_refused_with_what_to_do(name, tmp_path, monkeypatch):
    def mkdir(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(FileError, match="Read-only file system") as refused:
        open_dataset(name, data_dir=str(tmp_path / "data"))
    assert_says_what_to_do(str(refused.value), name, tmp_path / "data")


def test_sets_that_are_there_are_opened_without_writing(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    write_flowers102(tmp_path, monkeypatch)
    open_dataset("flowers102", data_dir=str(tmp_path))
    before = content(tmp_path)
    for name in ("cifar10", "flowers102"):
        open_dataset(name, data_dir=str(tmp_path))
        open_dataset(name, heldout=True, data_dir=str(tmp_path))
    assert content(tmp_path) == before


# Two at once


def assert_whole(folder, names):
    """A complete MNIST, and nothing else, is in the folder."""
    assert set(content(folder)) == {"MNIST", "MNIST/raw", *(f"MNIST/raw/{name}" for name in names)}
    np.testing.assert_array_equal(open_dataset("mnist", data_dir=str(folder)).images[:][:, 0].numpy(), IMAGES)


@pytest.mark.parametrize("there", [(), (FILES[0],), (FILES[0], FILES[2], FILES[3])])
def test_threads_that_download_the_same_set_at_once_all_succeed(there, tmp_path, torchvision_downloads):
    """Also if some files exist already, so that the whole folder cannot be renamed."""
    together, opened = threading.Barrier(4), []

    def all_at_once(raw):
        together.wait(20)
        write_both_splits(raw)
        together.wait(20)

    def open_it():
        opened.append(open_dataset("mnist", data_dir=str(tmp_path)))

    write_both_splits(tmp_path / "MNIST" / "raw")
    for name in set(FILES) - set(there):
        (tmp_path / "MNIST" / "raw" / name).unlink()
    torchvision_downloads(all_at_once)
    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4 and all(torch.equal(data.images[:], opened[0].images[:]) for data in opened)
    assert_whole(tmp_path, FILES)


UNPACK = """
import sys, time, types
from pathlib import Path
from tiny_diffusion.data.sources import open_dataset
folder = Path(sys.argv[1])

class MNIST:
    def __init__(self, root, download):
        (folder / f"started {sys.argv[2]}").touch()
        while len(list(folder.glob("started *"))) < 2:
            time.sleep(0.01)
        raw = Path(root) / "MNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for source in sorted((folder / "server").iterdir()):
            (raw / source.name).write_bytes(source.read_bytes())
            time.sleep(0.02)

sys.modules["torchvision"] = types.SimpleNamespace(datasets=types.SimpleNamespace(MNIST=MNIST))
print(int(open_dataset("mnist", data_dir=str(folder / "data")).images[:].sum()))
"""


@pytest.mark.slow  # the threads above show the same, sooner
def test_two_processes_that_download_the_same_set_at_once_both_succeed(tmp_path):
    write_both_splits(tmp_path / "server")
    processes = [
        subprocess.Popen([sys.executable, "-c", UNPACK, tmp_path, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    assert [process.communicate(timeout=120)[0] for process in processes] == [f"{IMAGES.sum()}\n"] * 2
    assert_whole(tmp_path / "data", FILES)


def test_threads_that_unpack_the_same_flowers_at_once_all_succeed(tmp_path, monkeypatch):
    """Their folder exists already, with the archive in it, so each thread moves its photographs one by one."""
    labels = write_flowers102(tmp_path, monkeypatch)
    opened, start = [], threading.Barrier(3)

    def open_it():
        start.wait()
        opened.append(open_dataset("flowers102", data_dir=str(tmp_path), splits=("train",)))

    threads = [threading.Thread(target=open_it) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [data.labels.tolist() for data in opened] == [[labels[11], labels[2]]] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["flowers-102"]
    assert len(list((tmp_path / "flowers-102" / "jpg").iterdir())) == 12
