"""Folders of images as people have them: which image files there are, and which class each one belongs to.

Reads the names of files only; `files.scan` reads what is in them.
"""

import hashlib
import heapq
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tiny_diffusion.data.files.decode import ENDINGS
from tiny_diffusion.errors import FileError, OptionError

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "val", "valid": "val",
          "validation": "val", "eval": "val", "evaluation": "val", "dev": "val"}  # fmt: skip
SYSTEM_FOLDERS = {  # of macOS, Windows, Linux, Synology and QNAP: bins, thumbnails and fragments of files
    "__macosx", "$recycle.bin", "recycler", "system volume information", "lost+found", "@eadir", "@tmp", "#recycle",
    "#snapshot", "@recycle", "@recently-snapshot",
}  # fmt: skip
NO_STATS = (-1, 0, 0)  # of a link to nothing

Stats = tuple[int, int, int]  # (size, mtime_ns, ctime_ns): what changes when a file does


@dataclass(frozen=True)
class ImageFiles:
    """The image files under root, in a fixed order.

    names: relative to root.  labels: indices into class_names, all 0 if there are no classes.  stats: of each file.
    others: how many files are not images.  note: a line for the report, or "".
    """

    root: Path
    names: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    stats: tuple[Stats, ...] = ()
    others: int = 0
    note: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return self.root / self.names[index]

    def signature(self) -> str:
        """A hash of names, sizes and times of change: the same as long as nobody changes a file."""
        about = repr((os.path.abspath(self.root), self.names, self.labels, self.class_names, self.stats))
        return hashlib.sha256(about.encode("utf-8", "surrogateescape")).hexdigest()

    def fingerprint(self) -> str:
        """A hash of names, sizes and classes: the same in a copy of the folder elsewhere."""
        about = repr((self.names, self.labels, self.class_names, [size for size, *_ in self.stats]))
        return hashlib.sha256(about.encode("utf-8", "surrogateescape")).hexdigest()

    def without(self, indices: Iterable[int]) -> "ImageFiles":
        """The same files except those of these indices."""
        removed = set(indices)
        kept = [i for i in range(len(self)) if i not in removed]
        names, labels, stats = (tuple(row[i] for i in kept) for row in (self.names, self.labels, self.stats))
        return replace(self, names=names, labels=labels, stats=stats)


def list_images(root: Path, splits: Sequence[str] = (), heldout: bool = False) -> ImageFiles:
    """The image files of a folder.  Links are followed, but no folder is read twice.

    Hidden files and system folders are left out.

    Sub-folders named train, test or val are splits; images outside of them are left out, and the note says so.  Other
    sub-folders are classes, if every image is in one of them.
    splits: the splits to train on; () stands for train.  heldout: list the files of the other splits instead.
    Raises FileError if there is no such folder or no image in it, OptionError for a split that it does not have.
    """
    _check_folder(root)
    found, others, repeated = _walk(root)
    if not found:
        raise _no_images(root, others)
    folders = _folders([name for name, _ in found])
    split_of = _split_of_folder(folders)
    if split_of:
        chosen = _chosen_splits(root, splits, set(split_of.values()))
        inside = [i for i, path in enumerate(folders) if path and path[0] in split_of]
        kept = [i for i in inside if (split_of[folders[i][0]] in chosen) != heldout]
        notes = [_splits_note(chosen, set(split_of.values()) - chosen, len(folders) - len(inside))]
        folders = {i: folders[i][1:] for i in inside}
    else:
        _refuse_splits(root, splits)
        kept, notes = [] if heldout else list(range(len(found))), []
        folders = dict(enumerate(folders))
    class_names, class_note = _classes(folders.values())
    links_note = f"links to folders that are read by another path, not followed: {repeated:,}" if repeated else ""
    label_of = {name: label for label, name in enumerate(class_names)}
    return ImageFiles(
        root,
        names=tuple(found[i][0] for i in kept),
        labels=tuple(label_of[folders[i][0]] if class_names else 0 for i in kept),
        class_names=class_names,
        stats=tuple(found[i][1] for i in kept),
        others=others,
        note="; ".join(filter(None, [*notes, class_note, links_note])),
    )


def _check_folder(root: Path) -> None:
    if root.is_dir():
        return
    if root.is_file():
        raise FileError(f"--data_dir {root} is a file, not a folder. If it is an archive, unpack it first.")
    raise FileError(f"--data_dir {root} does not exist. Name the folder that holds the images.")


def _no_images(root: Path, others: int) -> FileError:
    content = f"no image but {others:,} other file{'' if others == 1 else 's'}" if others else "nothing"
    endings = ", ".join(ending[1:] for ending in ENDINGS)
    return FileError(f"--data_dir {root} holds {content}. Name a folder of images: {endings}.")


def _folders(names: Sequence[str]) -> list[list[str]]:
    """The folders that lead to each file, without those that lead to all files, as an unpacked archive has them."""
    folders = [readable(name).split("/")[:-1] for name in names]
    while all(folders) and len({path[0] for path in folders}) == 1:
        folders = [path[1:] for path in folders]
    return folders


def _split_of_folder(folders: Sequence[Sequence[str]]) -> dict[str, str]:
    """The split of each top folder that is one, or {} if the images are not sorted into splits.

    They are if there is train and another split, or nothing but folders that are called train.
    """
    tops = {path[0] if path else "" for path in folders}
    split_of = {top: SPLITS[top.lower()] for top in tops if top.lower() in SPLITS}
    splits = set(split_of.values())
    return split_of if "train" in splits and (len(splits) > 1 or len(split_of) == len(tops)) else {}


def _chosen_splits(root: Path, splits: Sequence[str], existing: set[str]) -> set[str]:
    chosen = set(splits or ("train",))
    if missing := sorted(chosen - existing):
        raise OptionError(f"--splits {missing[0]}: {root} has the splits {', '.join(sorted(existing))}.")
    return chosen


def _splits_note(chosen: set[str], heldout: set[str], outside: int) -> str:
    note = f"splits that train: {', '.join(sorted(chosen))}"
    note += f"; held out: {', '.join(sorted(heldout))}" if heldout else ""
    return note + (f"; left out, because in none of these splits: {outside:,}" if outside else "")


def _refuse_splits(root: Path, splits: Sequence[str]) -> None:
    if splits:
        raise OptionError(
            f"--splits {','.join(splits)} would be ignored: {root} has no sub-folders train and test. Leave it out."
        )


def _classes(folders: Collection[Sequence[str]]) -> tuple[tuple[str, ...], str]:
    """The class names in natural order, and a note if sub-folders are not taken for classes."""
    images_in = Counter(path[0] for path in folders if path)
    if len(images_in) < 2:
        return (), ""
    if beside := len(folders) - sum(images_in.values()):
        return (), f"no classes, because {beside:,} images lie beside the {len(images_in)} sub-folders"
    return tuple(sorted(images_in, key=_natural)), ""


def _walk(root: Path) -> tuple[list[tuple[str, Stats]], int, int]:
    """The name and stats of each file with the ending of an image, in natural order.

    Then the number of other files, and of links to folders that have been read by another path.  A real folder is read
    once, and one that is there itself before those that links lead to.
    """
    found, others, repeated, seen = [], 0, 0, set()
    try:
        waiting, links = [(str(root), "", frozenset(_identity(folder) for folder in root.resolve().parents))], []
        while waiting or links:
            folder, prefix, above = waiting.pop() if waiting else heapq.heappop(links)[1:]
            here = _identity(folder)
            if here in above or here in seen:
                repeated += here not in above  # a link to a folder that it lies in repeats nothing
                continue
            seen.add(here)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FOLDERS:
                        continue
                    about = status(entry)
                    if about is not None and stat.S_ISDIR(about.st_mode):
                        inside = entry.path, f"{prefix}{entry.name}/", above | {here}
                        if entry.is_symlink():
                            heapq.heappush(links, (_path_order(inside[1]), *inside))
                        else:
                            waiting.append(inside)
                    elif not entry.name.lower().endswith(ENDINGS) or about and not stat.S_ISREG(about.st_mode):
                        others += 1
                    else:  # a link to nothing counts too: the scan reports it
                        found.append((prefix + entry.name, stats_of(about)))
    except OSError as error:
        raise FileError(f"--data_dir {root} cannot be read: {error.filename}: {error.strerror}.") from error
    return sorted(found, key=lambda file: _path_order(file[0])), others, repeated


def _path_order(name: str) -> list:
    return [_natural(part) for part in name.split("/")]


def _identity(folder: str | Path) -> tuple[int, int]:
    """The same for every path to a folder."""
    about = os.stat(folder)
    return about.st_dev, about.st_ino


def stats_of(about: os.stat_result | None) -> Stats:
    return (about.st_size, about.st_mtime_ns, about.st_ctime_ns) if about else NO_STATS


def status(entry: os.DirEntry | Path) -> os.stat_result | None:
    """The status of a file, or of what a link leads to; None if it leads nowhere or to itself."""
    try:
        return entry.stat()
    except OSError:
        return None


def _natural(text: str) -> tuple[list, str]:
    """A sort key that puts 10 after 9, and 01 and 1 always in the same order."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text)], text


def readable(name: str) -> str:
    """A file name as one line of composed text (NFC), whatever bytes it has.

    Bytes that are not UTF-8, control characters and line breaks are written as escapes such as \\xe9, and a backslash
    as two, so that different names stay different.
    """
    text = os.fsencode(name).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return "".join(
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter
        for letter in unicodedata.normalize("NFC", text)
    )
