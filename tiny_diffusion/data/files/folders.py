"""Folders of images as they are in the world: which files there are, and which class each belongs to.

Lists by names alone; `data.scans` looks into the files.
"""

import hashlib
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tiny_diffusion.data.files.decode import ENDINGS
from tiny_diffusion.errors import FileError, OptionError

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "val", "valid": "val",
          "validation": "val"}  # fmt: skip
NO_STATS = (-1, 0, 0)  # of a link to nothing


@dataclass(frozen=True)
class ImageFiles:
    """The image files under root, in a fixed order.  labels: into class_names, all 0 where there are no classes.

    stats: (size, mtime_ns, ctime_ns) of each.  others: files that are no images.  note: what was noticed, or nothing.
    """

    root: Path
    names: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    stats: tuple[tuple[int, int, int], ...] = ()
    others: int = 0
    note: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return self.root / self.names[index]

    def signature(self) -> str:
        """A hash of names, sizes and times of change: the same as long as nobody touches a file."""
        about = repr((os.path.abspath(self.root), self.names, self.labels, self.class_names, self.stats))
        return hashlib.sha256(about.encode("utf-8", "surrogateescape")).hexdigest()

    def without(self, indices: Iterable[int]) -> "ImageFiles":
        """The same without these."""
        gone = set(indices)
        kept = [i for i in range(len(self)) if i not in gone]
        return self.only(kept) if gone else self

    def only(self, indices: Sequence[int]) -> "ImageFiles":
        return ImageFiles(
            self.root,
            tuple(self.names[i] for i in indices),
            tuple(self.labels[i] for i in indices),
            self.class_names,
            tuple(self.stats[i] for i in indices),
            self.others,
            self.note,
        )


def list_images(root: Path, splits: Sequence[str] = (), heldout: bool = False) -> ImageFiles:
    """The image files of a folder, links followed, hidden ones left out.  Sub-folders are classes if all images are in
    one; sub-folders named train, test or val are parts of the set.

    splits: the parts that train, train if none is named.  heldout: the files of the other parts instead.
    Raises FileError if there is no such folder, or no image in it; OptionError for a part that it does not have.
    """
    if not root.is_dir():
        if root.is_file():
            raise FileError(f"--data_dir {root} is a file, not a folder. Unpack it first if it is an archive.")
        raise FileError(f"--data_dir {root} does not exist. Name the folder that holds the images.")
    found, others = _walk(root)
    if not found:
        what = f"no image but {others:,} other file{'' if others == 1 else 's'}" if others else "nothing"
        raise FileError(
            f"--data_dir {root} holds {what}. Name a folder of images: {', '.join(ending[1:] for ending in ENDINGS)}."
        )
    folders = _folders([name for name, _ in found])
    parts = {top: SPLITS.get(top.lower()) for top in {path[0] for path in folders if path}}
    note = ""
    if all(folders) and "train" in parts.values() and None not in parts.values():
        chosen = set(splits or ("train",))
        if missing := sorted(chosen - set(parts.values())):
            raise OptionError(f"--splits {missing[0]}: {root} has the parts {', '.join(sorted(parts.values()))}.")
        taken = [i for i, path in enumerate(folders) if (parts[path[0]] in chosen) != heldout]
        rest = ", ".join(sorted(set(parts.values()) - chosen))
        note = f"sub-folders that train: {', '.join(sorted(chosen))}" + (f"; held out: {rest}" if rest else "")
        folders = [path[1:] for path in folders]
    elif splits:
        raise OptionError(
            f"--splits {','.join(splits)} would be ignored: {root} has no sub-folders train and test. Leave it out."
        )
    else:
        taken = [] if heldout else list(range(len(found)))
    class_names, about_classes = _classes(folders)
    numbers = {name: number for number, name in enumerate(class_names)}
    return ImageFiles(
        root,
        tuple(found[i][0] for i in taken),
        tuple(numbers[folders[i][0]] if class_names else 0 for i in taken),
        class_names,
        tuple(found[i][1] for i in taken),
        others,
        "; ".join(filter(None, (note, about_classes))),
    )


def _folders(names: Sequence[str]) -> list[list[str]]:
    """The folders that each file lies in, without those that all lie in, as an unpacked archive makes them."""
    folders = [readable(name).split("/")[:-1] for name in names]
    while all(folders) and len({path[0] for path in folders}) == 1:
        folders = [path[1:] for path in folders]
    return folders


def _classes(folders: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], str]:
    """The class names, in natural order, and what is to be said of them."""
    having = Counter(path[0] for path in folders if path)
    if len(having) < 2:
        return (), ""
    if beside := len(folders) - sum(having.values()):
        return (), f"no classes, because images lie beside the {len(having)} sub-folders: {beside:,}"
    return tuple(sorted(having, key=_natural)), ""


def _walk(root: Path) -> tuple[list[tuple[str, tuple[int, int, int]]], int]:
    """(name, stats) of each file with an image's ending, in natural order, and how many others there are."""
    found, others = [], 0
    try:
        waiting = [(str(root), "", frozenset(_identity(folder) for folder in root.resolve().parents))]
        while waiting:
            folder, prefix, above = waiting.pop()
            if (here := _identity(folder)) in above:  # a link that leads up again
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    about = status(entry)
                    if about is not None and stat.S_ISDIR(about.st_mode):
                        waiting.append((entry.path, f"{prefix}{entry.name}/", above | {here}))
                    elif not entry.name.lower().endswith(ENDINGS) or about and not stat.S_ISREG(about.st_mode):
                        others += 1
                    else:  # also a link to nothing: the scan will say so
                        found.append((prefix + entry.name, stats_of(about)))
    except OSError as error:
        raise FileError(f"--data_dir {root} cannot be read: {error.filename}: {error.strerror}.") from error
    return sorted(found, key=lambda file: [_natural(part) for part in file[0].split("/")]), others


def _identity(folder: str | Path) -> tuple[int, int]:
    about = os.stat(folder)
    return about.st_dev, about.st_ino


def stats_of(about: os.stat_result | None) -> tuple[int, int, int]:
    """(size, mtime_ns, ctime_ns): what changes when a file does."""
    return (about.st_size, about.st_mtime_ns, about.st_ctime_ns) if about else NO_STATS


def status(entry: os.DirEntry | Path) -> os.stat_result | None:
    """Of what the entry or the link leads to; None where that is nothing, or the link itself."""
    try:
        return entry.stat()
    except OSError:
        return None


def _natural(text: str) -> tuple[list, str]:
    """So that 10 comes after 9, and 01 and 1 always in the same order."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text)], text


def readable(name: str) -> str:
    """A file's name as one line of text in composed letters, whatever bytes it has."""
    text = unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "replace"))
    return "".join("\ufffd" if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)
