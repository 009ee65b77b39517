"""Sets of images to score or to compare with: an .npz file with arr_0, or a folder.

Each becomes one uint8 tensor.  Nothing in an .npz file is executed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.data.image_set import OpenRequest
from tiny_diffusion.diffusion.request import labels_in_shares
from tiny_diffusion.errors import FileError, OptionError
from tiny_diffusion.randomness import stream

CLASSES = ("labels", "class_names")  # arrays of an .npz file beside arr_0, as `sample` writes them
MAX_CLASSES = 100_000


@dataclass(frozen=True, eq=False)
class NamedImages:
    """A set of images under a name.

    name: as it is printed.  images: (N, C, H, W) uint8.  labels: (N,) int64, if they are known.
    class_names: of each label; "" for a class whose name is not known.   of: how many images they are a random subset
    of; None if they are all.
    """

    name: str
    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    of: int | None = None

    @property
    def total(self) -> int:
        """How many images the set has in all."""
        return self.of or len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.images.shape[1:])

    @property
    def class_counts(self) -> list[int]:
        """The number of images of each class; empty if the classes are not known."""
        if self.labels is None or not self.class_names:
            return []
        return torch.bincount(self.labels, minlength=len(self.class_names)).tolist()

    def with_classes_of(self, real: "NamedImages") -> "NamedImages":
        """These images with the class names of the real ones, if each label of theirs can mean that class there."""
        names = real.class_names
        if self.labels is None or len(self.class_names) > len(names):
            return self
        if any(own not in ("", name) for own, name in zip(self.class_names, names, strict=False)):
            return self
        return replace(self, class_names=names)

    def in_channels(self, channels: int) -> "NamedImages":
        """Grey images if one channel is wanted and all three are equal, as where grey images were saved as RGB."""
        if channels != 1 or len(self.images) == 0 or self.shape[0] != 3 or (self.images != self.images[:, :1]).any():
            return self
        name = f"{self.name} (as grey, since all three channels are equal)"
        return replace(self, name=name, images=self.images[:, :1].contiguous())

    def describe(self) -> str:
        """How many images these are, and of which set."""
        count, of = len(self.images), f" of {self.total:,}" if self.of else ""
        return f"{'a random ' if of else ''}{count:,}{of}, {self.name}"

    def subset(self, count: int, class_counts: Sequence[int] = ()) -> "NamedImages":
        """At most `count` of the images: see `random_indices`, and with class counts `indices_in_shares`."""
        if class_counts:
            chosen = indices_in_shares(self.labels, class_counts, count)
        else:
            chosen = random_indices(len(self.images), count)
        if len(chosen) == len(self.images):
            return self
        labels = None if self.labels is None else self.labels[chosen]
        return NamedImages(self.name, self.images[chosen], labels, self.class_names, self.total)

    def sha256(self) -> str:
        """The hash of the shape and of every pixel."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy())
        return digest.hexdigest()


def random_indices(length: int, count: int) -> Tensor:
    """At most `count` of `length` indices, ascending: always the same random subset.

    Evenly spaced indices would distort the shares of classes that take turns.
    """
    if length <= count:
        return torch.arange(length)
    return torch.from_numpy(np.sort(stream(0, "subset").permutation(length)[:count]))


def indices_in_shares(labels: Tensor, class_counts: Sequence[int], count: int) -> Tensor:
    """At most `count` indices of these labels, ascending and always the same, whose classes have the counts' shares.

    There are fewer if a class would run out.  Classes that no label names are left out.
    """
    held = np.bincount(labels.numpy(), minlength=len(class_counts))
    wanted = np.where(held > 0, class_counts, 0)
    if not (having := wanted > 0).any():
        return random_indices(len(labels), count)
    count = min(count, int((held[having] * wanted.sum() // wanted[having]).min()))
    quota = np.bincount(labels_in_shares(wanted, count, seed=0), minlength=len(held))
    order = stream(0, "subset").permutation(len(labels))
    by_class = (order[labels.numpy()[order] == label][:number] for label, number in enumerate(quota))
    return torch.from_numpy(np.sort(np.concatenate(list(by_class))))


def read_images(option: str, text: str) -> NamedImages:
    """The images of an .npz file or a folder.  option: the option that named it.  Raises FileError or OptionError."""
    path = Path(text)
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return NamedImages(path.name, *_npz(option, path))
    if path.is_dir():
        return NamedImages(path.name or text, *_folder(option, path))
    if not path.exists():
        raise FileError(f"--{option} {text} does not exist. Name an .npz file or a folder of images.")
    raise OptionError(f"--{option} {text} is neither an .npz file nor a folder of images. Name one of these.")


def _npz(option: str, path: Path) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """The images of arr_0 as (N, C, H, W), their labels and the names of these, if the file has them.

    arr_0 is (N, H, W, C) or (N, H, W) uint8 as in guided-diffusion's evaluations.
    """
    try:
        with open(path, "rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            if "arr_0" not in archive.files:
                names = " ".join(", ".join(archive.files).split())[:100] or "nothing"
                raise FileError(f"--{option} {path} has no array arr_0, but {names}. Save the images under that name.")
            array, labels, names = (archive[key] if key in archive else None for key in ("arr_0", *CLASSES))
            if any(isinstance(member, bytes) for member in (array, labels, names)):
                raise ValueError("a member without the header of an array, which numpy returns as bytes")
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"--{option} {path} cannot be read: {error.strerror or error}. Name another file.") from error
    except Exception as error:  # zipfile, zlib and numpy raise their own errors for a damaged file
        reason = "it holds Python objects, which are not executed" if "allow_pickle" in str(error) else "it is damaged"
        raise FileError(f"--{option} {path} is not an .npz file of images: {reason}. Save them by np.savez.") from error
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3)):
        bad = " with NaN" if array.dtype.kind == "f" and np.isnan(array).any() else ""
        raise FileError(
            f"--{option} {path}: arr_0 is {array.dtype} {array.shape}{bad}; images are uint8 (N, H, W, 1 or 3). "
            "Save them as such."
        )
    if array.max(initial=0) == 1:
        raise FileError(f"--{option} {path}: the largest value of arr_0 is 1; images are 0 to 255. Multiply it by 255.")
    if not array.size:
        raise FileError(f"--{option} {path} holds no images: arr_0 is {array.shape}. Name another file.")
    array = array[..., None] if array.ndim == 3 else array
    images = torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))
    return images, *_classes(f"--{option} {path}", len(images), labels, names)


def _classes(file: str, count: int, labels, names) -> tuple[Tensor | None, tuple[str, ...]]:
    """The labels and the class names of an .npz file.  Raises FileError for arrays that are neither."""
    if labels is None:
        return None, ()
    if labels.dtype.kind not in "iu" or labels.shape != (count,) or labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise FileError(
            f"{file}: labels is {labels.dtype} {labels.shape}; it must hold a whole number of 0 to {MAX_CLASSES - 1} "
            f"for each of the {count:,} images. Save it so, or leave it out."
        )
    top = int(labels.max()) + 1
    if names is None:
        return torch.from_numpy(labels.astype(np.int64)), ("",) * top
    if names.dtype.kind != "U" or names.ndim != 1 or len(names) < top:
        raise FileError(
            f"{file}: class_names is {names.dtype} {names.shape}; it must hold a name for each label, of which the "
            f"largest is {top - 1}. Save it so, or leave it out."
        )
    return torch.from_numpy(labels.astype(np.int64)), tuple(names.tolist())


def _folder(option: str, path: Path) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """The images of a folder, which have one size, their labels and class names, by labels.csv or by sub-folder.

    Nothing is scaled, because that would change the score.
    """
    from tiny_diffusion.data.files.folders import list_images
    from tiny_diffusion.data.files.labels import read_labels
    from tiny_diffusion.data.files.open import open_files
    from tiny_diffusion.data.files.scan import named_files, scan

    try:
        files = list_images(path)
        found = scan(files, 0, whole=False, background=(255, 255, 255), progress=lambda items, count, doing: items)
    except FileError as error:
        raise FileError(str(error).replace("--data_dir", f"--{option}")) from error
    if found.unreadable:  # the score would be that of another set
        raise FileError(
            f"--{option} {path}: {named_files(files, found.unreadable)} cannot be read. Repair or remove such files."
        )
    if len(found.sizes) > 1:
        some = ", ".join(f"{h}x{w}" for h, w in list(found.sizes)[:3])
        raise OptionError(
            f"--{option} {path} holds images of several sizes ({some}): scaling them would change the score. "
            "Scale them yourself, all in one way."
        )
    opening = OpenRequest(DATASETS["folder"], (), heldout=False, folder=path, size=next(iter(found.sizes)))
    data = open_files(opening, files, found)
    known = read_labels(path) or {}
    if all(name in known and 0 <= known[name][0] < MAX_CLASSES for name in files.names):
        names = dict(known[name] for name in files.names)
        labels = torch.tensor([known[name][0] for name in files.names])
        return data.images[:], labels, tuple(names.get(label, "") for label in range(max(names) + 1))
    return data.images[:], data.labels if data.class_names else None, data.class_names
