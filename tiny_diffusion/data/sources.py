"""Opens data sets as uint8 tensors, whatever their format on disk.

Knows nothing of batches or training.  A set that is already there is never downloaded again, and its folder may be
read-only.  To add a format: a function of (dataset, heldout, data folder), a row in OPENERS.
"""

import gzip
import http.client
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.data.catalog import DATASETS, Dataset
from tiny_diffusion.errors import FileError

NETWORK_PATIENCE_S = 40.0  # without a byte arriving
SYSTEM_FOLDERS = {"FashionMNIST": Path("/usr/share/datasets/fashion-mnist")}  # Debian's package dataset-fashion-mnist


@dataclass(frozen=True, eq=False)
class ImageSet:
    """images: (N, C, H, W) uint8.  labels: (N,) int64.  class_names: one a label."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]


def open_dataset(name: str, *, heldout: bool = False, data_dir: str | None = None, size: int | None = None) -> ImageSet:
    """The named set: the part that trains, or the part that is held out.

    data_dir: then $TINY_DIFFUSION_DATA, then data.  size: resize to size x size pixels where it differs.
    Raises FileError, with what to do, if the set is neither there nor to be had.
    """
    dataset = DATASETS[name]
    images, labels = OPENERS[dataset.format](dataset, heldout, data_folder(data_dir))
    if size and images.shape[-2:] != (size, size):
        images = torch.cat([_resized(part, size) for part in images.split(500)])  # floats of a part at a time
    return ImageSet(images, labels, dataset.classes)


def _resized(images: Tensor, size: int) -> Tensor:
    resized = torch.nn.functional.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def data_folder(data_dir: str | None) -> Path:
    return Path(data_dir or os.environ.get("TINY_DIFFUSION_DATA") or "data")


def _sklearn_digits(dataset: Dataset, heldout: bool, folder: Path) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]  # (N, 1, 8, 8)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    chosen = (torch.arange(len(images)) % 6 == 5) == heldout
    return images[chosen], labels[chosen]


def _idx(dataset: Dataset, heldout: bool, folder: Path) -> tuple[Tensor, Tensor]:
    """MNIST and its likes: idx files, plain or gzipped, where torchvision puts them or where the system has them."""
    split = "t10k" if heldout else "train"
    raw = folder / dataset.source / "raw"
    for place in (raw, SYSTEM_FOLDERS.get(dataset.source, raw)):
        if (found := _idx_pair(place, split)) is not None:
            break
    else:
        _download(dataset.source, folder)
        found = _idx_pair(raw, split)
    images, labels = (_read_idx(path) for path in found)
    if images.shape != (labels.size, dataset.size, dataset.size) or labels.ndim != 1 or not labels.size:
        raise FileError(
            f"{found[0].parent} does not hold {dataset.source}: images {images.shape}, labels {labels.shape}."
        )
    if labels.max(initial=0) >= len(dataset.classes):
        raise FileError(
            f"{found[1]} has label {labels.max()}, but {dataset.source} has {len(dataset.classes)} classes."
        )
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64))


def _idx_pair(place: Path, split: str) -> tuple[Path, Path] | None:
    """The image and label files of a split in this folder, or None unless both are there."""
    found = []
    for part in ("images-idx3", "labels-idx1"):
        plain = place / f"{split}-{part}-ubyte"
        path = plain if plain.is_file() else plain.with_name(plain.name + ".gz")
        if not path.is_file():
            return None
        found.append(path)
    return found[0], found[1]


def _read_idx(path: Path) -> np.ndarray:
    """An idx file: two zero bytes, the type (8 is uint8), the number of axes, their sizes in big-endian, the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        axes = content[3]
        shape = tuple(int(size) for size in np.frombuffer(content, ">u4", axes, offset=4))
        if content[:3] != b"\x00\x00\x08" or len(content) != 4 + 4 * axes + np.prod(shape, dtype=object):
            raise ValueError("its size does not fit its header")
    except (ValueError, IndexError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FileError(f"{path} is not a whole idx file ({error}). Delete it to download it again.") from error
    return np.frombuffer(bytearray(content), np.uint8, offset=4 + 4 * axes).reshape(shape)


def _download(source: str, folder: Path) -> None:
    """By torchvision, checked by md5, beside the final place and moved in whole, so that half a set is never found."""
    import torchvision

    partial = folder / f".{source}-{os.getpid()}.part"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        fetch = getattr(torchvision.datasets, source)
        _run_while_bytes_arrive(lambda: fetch(str(partial), download=True), partial)
        if not (folder / source / "raw").is_dir():
            (folder / source).mkdir(exist_ok=True)
            os.replace(partial / source / "raw", folder / source / "raw")
        else:  # some files lie there: complete them, one by one
            for path in (partial / source / "raw").iterdir():
                os.replace(path, folder / source / "raw" / path.name)
    except (RuntimeError, OSError, http.client.HTTPException) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise FileError(
            f"{folder / source} is missing and the download failed ({lines[-1].strip()}). "
            f"Put train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the same two of t10k in "
            f"{folder / source / 'raw'}, name the folder that has {source} by --data_dir, "
            "or try --dataset digits, which needs no download."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run_while_bytes_arrive(work: Callable[[], object], folder: Path) -> None:
    """Runs work in a thread; gives up when nothing has been written to the folder for NETWORK_PATIENCE_S."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    arrived, since = -1, time.monotonic()
    while thread.is_alive():
        thread.join(0.2)
        now = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if now != arrived:
            arrived, since = now, time.monotonic()
        if time.monotonic() - since > NETWORK_PATIENCE_S:
            raise TimeoutError(f"no answer from the network for {NETWORK_PATIENCE_S:.0f} seconds")
    if failed:
        raise failed[0]


OPENERS = {"sklearn_digits": _sklearn_digits, "idx": _idx}
