"""Opens data sets that are stored as arrays: scikit-learn's digits, the idx files of MNIST, CIFAR-10."""

import gzip
import importlib.util
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.data.downloads import download
from tiny_diffusion.data.image_set import ImageSet, OpenRequest
from tiny_diffusion.errors import FileError

SYSTEM_FOLDERS = {"FashionMNIST": Path("/usr/share/datasets/fashion-mnist")}  # Debian's package dataset-fashion-mnist


def sklearn_digits(request: OpenRequest) -> ImageSet:
    """scikit-learn's digits.  Every sixth image is in the test split, the others are in the train split."""
    pixels, labels = read_digits()
    images = torch.from_numpy((pixels * (255 / 16)).round().astype(np.uint8))[:, None]  # (N, 1, 8, 8)
    labels = torch.from_numpy(labels.astype(np.int64))
    is_test = torch.arange(len(images)) % 6 == 5
    rows = {"train": ~is_test, "test": is_test}
    return _image_set(request, [(images[rows[split]], labels[rows[split]]) for split in request.opened_splits])


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels from 0 to 16 (N, 8, 8) and labels (N,), as sklearn.datasets.load_digits returns them.

    From the file that it reads: importing sklearn.datasets takes longer, because it loads scipy.stats.
    """
    package = importlib.util.find_spec("sklearn")
    path = package and Path(package.origin).with_name("datasets") / "data" / "digits.csv.gz"
    if not path or not path.is_file():
        from sklearn.datasets import load_digits

        digits = load_digits()
        return digits.images, digits.target
    rows = np.loadtxt(path, delimiter=",")  # 64 pixels and the label
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]


def idx(request: OpenRequest) -> ImageSet:
    """MNIST and Fashion-MNIST: idx files, plain or gzipped, from torchvision's folder or the system's."""
    return _image_set(request, [_idx_split(request, split) for split in request.opened_splits])


def _idx_split(request: OpenRequest, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, H, W) uint8 and labels (N,) int64 of a split.  Raises FileError if they are not of this set."""
    dataset = request.dataset
    image_path, label_path = _find_or_download(request, "t10k" if split == "test" else "train")
    images, labels = _read_idx(image_path), _read_idx(label_path)
    if images.shape != (labels.size, dataset.size, dataset.size) or labels.ndim != 1 or not labels.size:
        raise FileError(
            f"{image_path.parent} does not hold {dataset.source}: images {images.shape}, labels {labels.shape}."
        )
    if labels.max(initial=0) >= len(dataset.classes):
        raise FileError(
            f"{label_path} has label {labels.max()}, but {dataset.source} has {len(dataset.classes)} classes."
        )
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64))


def _find_or_download(request: OpenRequest, prefix: str) -> tuple[Path, Path]:
    """The image and label files of a split: the user's own, else the system's, else downloaded."""
    source, raw = request.dataset.source, request.folder / request.dataset.source / "raw"
    for folder in (raw, SYSTEM_FOLDERS.get(source, raw)):
        if (found := _idx_pair(folder, prefix)) is not None:
            return found
    download(request.dataset, request.folder, f"{source}/raw")
    return _idx_pair(raw, prefix)


def _idx_pair(folder: Path, prefix: str) -> tuple[Path, Path] | None:
    """The image and label files of a split in this folder, or None unless both are there.

    Kaggle writes train-images.idx3-ubyte, and puts train-images-idx3-ubyte into a folder of that name.
    """
    found = []
    for part in ("images-idx3", "labels-idx1"):
        plain, dotted = f"{prefix}-{part}-ubyte", f"{prefix}-{part.replace('-', '.')}-ubyte"
        names = (plain, f"{plain}.gz", dotted, f"{dotted}.gz", f"{plain}/{plain}")
        if not (path := next((folder / name for name in names if (folder / name).is_file()), None)):
            return None
        found.append(path)
    return found[0], found[1]


def _read_idx(path: Path) -> np.ndarray:
    """The array in an idx file: two zero bytes, the type (8: uint8), the number of axes, big-endian sizes, values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        axes = content[3]
        shape = tuple(int(size) for size in np.frombuffer(content, ">u4", axes, offset=4))
        if content[:3] != b"\x00\x00\x08" or len(content) != 4 + 4 * axes + np.prod(shape, dtype=object):
            raise ValueError("its size does not match its header")
    except (ValueError, IndexError, EOFError, OSError, zlib.error) as error:
        raise FileError(f"{path} is not a complete idx file ({error}). Delete it to download it again.") from error
    return np.frombuffer(bytearray(content), np.uint8, offset=4 + 4 * axes).reshape(shape)


def cifar10(request: OpenRequest) -> ImageSet:
    """torchvision's CIFAR-10, which checks the md5 of its files before it reads them."""
    name, root = "cifar-10-batches-py", request.folder
    if not (root / name).is_dir():
        download(request.dataset, root, name)
    from torchvision.datasets import CIFAR10

    parts = []
    for split in request.opened_splits:
        try:
            data = CIFAR10(str(root), train=split == "train")
        except RuntimeError as error:
            raise FileError(
                f"{root / name} is not torchvision's CIFAR-10: a file is missing or its md5 differs. "
                "Delete the folder to download it again, or train on a folder of images with --dataset folder."
            ) from error
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # (N, H, W, C) -> (N, C, H, W)
        parts.append((images, torch.tensor(data.targets)))
    return _image_set(request, parts)


def _image_set(request: OpenRequest, parts: Sequence[tuple[Tensor, Tensor]]) -> ImageSet:
    """One set of the images and labels of several splits, scaled to the wanted size."""
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if images.shape[-2:] != request.size:
        images = torch.cat([_cover(part, request.size) for part in images.split(500)])  # floats take 4 times the memory
    return ImageSet(images, labels, request.dataset.classes)


def _cover(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (N, C, H, W) uint8 scaled to cover (height, width), and cropped to it from the centre."""
    scale = max(wanted / side for wanted, side in zip(size, images.shape[-2:], strict=True))
    to = [max(wanted, round(side * scale)) for wanted, side in zip(size, images.shape[-2:], strict=True)]
    scaled = torch.nn.functional.interpolate(images.float(), to, mode="bicubic", antialias=True)
    top, left = ((side - wanted) // 2 for side, wanted in zip(to, size, strict=True))
    return scaled[..., top : top + size[0], left : left + size[1]].round().clamp(0, 255).to(torch.uint8)
