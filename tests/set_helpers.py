"""Data sets written by hand: idx files as MNIST has them, CIFAR-10's pickles, Flowers-102's photographs and tables."""

import gzip
import hashlib
import io
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
from image_helpers import encoded, plain
from import_helpers import torchvision

IDX_SETS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
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


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def write_cifar10(root: Path, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """A small CIFAR-10 that torchvision takes for whole: five batches of 4 images that train, one of 6 for testing.

    Images (26, 3, 32, 32) and labels in that order.
    """
    rng = np.random.default_rng(3)
    images, labels = rng.integers(0, 256, (26, 3, 32, 32)).astype(np.uint8), rng.integers(0, 10, 26)
    place = root / "cifar-10-batches-py"
    place.mkdir(parents=True)
    lists = []
    for number in range(6):
        part = slice(4 * number, 4 * number + (6 if number == 5 else 4))
        content = pickle.dumps({"data": images[part].reshape(-1, 3072), "labels": labels[part].tolist()})
        name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
        (place / name).write_bytes(content)
        lists.append([name, md5(content)])
    content = pickle.dumps({"label_names": ["a", "b"]})
    (place / "batches.meta").write_bytes(content)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", lists[:5])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", lists[5:])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(content)}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
    return images, labels


def pack_cifar10(root: Path, monkeypatch) -> Path:
    """The archive of what `write_cifar10` has written there, as it would be downloaded, in place of the folder."""
    path = root / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
    shutil.rmtree(root / "cifar-10-batches-py")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5(path.read_bytes()))
    return path


def write_flowers102(root: Path, monkeypatch) -> list[int]:
    """Twelve flowers as they are downloaded: an archive of photographs and two tables.  The label of each, from 0.

    Photograph i is of grey 10 i, and the splits have 2, 4 and 6 of them, in no order.
    """
    from scipy.io import savemat

    place = root / "flowers-102"
    place.mkdir(parents=True)
    labels = [101, 0, 5, 5, 7, 7, 7, 0, 101, 50, 50, 3]
    with tarfile.open(place / "102flowers.tgz", "w:gz") as archive:
        for number in range(1, 13):
            content = encoded(plain((10 * number,) * 3, 70, 100), "jpg")
            about = tarfile.TarInfo(f"jpg/image_{number:05d}.jpg")
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    savemat(place / "imagelabels.mat", {"labels": np.array([label + 1 for label in labels])})
    savemat(place / "setid.mat", {"trnid": [12, 3], "valid": [1, 9, 5, 2], "tstid": [4, 11, 10, 8, 7, 6]})
    names = {"image": "102flowers.tgz", "label": "imagelabels.mat", "setid": "setid.mat"}
    about = {key: (name, md5((place / name).read_bytes())) for key, name in names.items()}
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", about)
    return labels
