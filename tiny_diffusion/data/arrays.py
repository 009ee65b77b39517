"""Sets that come as arrays in files of their own: scikit-learn's digits, MNIST and its likes, CIFAR-10."""

import gzip
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


def sklearn_digits(opening: OpenRequest) -> ImageSet:
    """Each sixth image is the test split, the others train."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]  # (N, 1, 8, 8)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    each_sixth = torch.arange(len(images)) % 6 == 5
    chosen = [each_sixth == (split == "test") for split in opening.parts]
    return _in_memory(opening, [(images[part], labels[part]) for part in chosen])


def idx(opening: OpenRequest) -> ImageSet:
    """MNIST and its likes: idx files, plain or gzipped, where torchvision puts them or where the system has them."""
    return _in_memory(opening, [_idx_split(opening, split) for split in opening.parts])


def _idx_split(opening: OpenRequest, part: str) -> tuple[Tensor, Tensor]:
    dataset, folder = opening.dataset, opening.folder
    split = "t10k" if part == "test" else "train"
    raw = folder / dataset.source / "raw"
    for place in (raw, SYSTEM_FOLDERS.get(dataset.source, raw)):
        if (found := _idx_pair(place, split)) is not None:
            break
    else:
        download(dataset, folder, f"{dataset.source}/raw")
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
    except (ValueError, IndexError, EOFError, OSError, zlib.error) as error:
        raise FileError(f"{path} is not a whole idx file ({error}). Delete it to download it again.") from error
    return np.frombuffer(bytearray(content), np.uint8, offset=4 + 4 * axes).reshape(shape)


def cifar10(opening: OpenRequest) -> ImageSet:
    """torchvision's CIFAR-10, whose files it checks by md5 before it reads them."""
    place, folder = "cifar-10-batches-py", opening.folder
    if not (folder / place).is_dir():
        download(opening.dataset, folder, place)
    from torchvision.datasets import CIFAR10

    parts = []
    for split in opening.parts:
        try:
            data = CIFAR10(str(folder), train=split == "train")
        except RuntimeError as error:
            raise FileError(
                f"{folder / place} is not the CIFAR-10 of torchvision: a file is missing or its md5 differs. "
                "Delete the folder to download it again, or train on a folder of images by --dataset folder."
            ) from error
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # (N, H, W, C) -> (N, C, H, W)
        parts.append((images, torch.tensor(data.targets)))
    return _in_memory(opening, parts)


def _in_memory(opening: OpenRequest, parts: Sequence[tuple[Tensor, Tensor]]) -> ImageSet:
    """Images and labels of each split, together and of the wanted size."""
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if images.shape[-2:] != opening.size:
        images = torch.cat([_covering(part, opening.size) for part in images.split(500)])  # floats of a part at a time
    return ImageSet(images, labels, opening.dataset.classes)


def _covering(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Scaled to cover height and width, and cropped to them from the centre."""
    scale = max(wanted / side for wanted, side in zip(size, images.shape[-2:], strict=True))
    to = [max(wanted, round(side * scale)) for wanted, side in zip(size, images.shape[-2:], strict=True)]
    scaled = torch.nn.functional.interpolate(images.float(), to, mode="bicubic", antialias=True)
    top, left = ((side - wanted) // 2 for side, wanted in zip(to, size, strict=True))
    return scaled[..., top : top + size[0], left : left + size[1]].round().clamp(0, 255).to(torch.uint8)
