"""labels.csv: the class of each image in a folder of samples."""

import csv
from collections.abc import Sequence
from pathlib import Path

from tiny_diffusion.errors import FileError
from tiny_diffusion.files import atomic_path

NAME, HEADER = "labels.csv", ["file", "label", "class"]
TEXT = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}  # names of folders can be any bytes


def read_labels(folder: Path) -> dict[str, tuple[int, str]] | None:
    """The label and the class name of each file; None if the folder has no labels.csv, or one of another kind."""
    rows = _rows(folder / NAME)
    try:
        return rows and {file: (int(label), name) for file, label, name in rows}
    except ValueError:
        return None


def _rows(path: Path) -> list[list[str]] | None:
    """The rows below the header, empty if there is no such file; None if it is another program's."""
    if not path.is_file():
        return []
    try:
        with path.open(**TEXT) as file:
            rows = list(csv.reader(file))
    except csv.Error:
        return None
    return rows[1:] if rows[:1] == [HEADER] and all(len(row) == len(HEADER) for row in rows) else None


class FolderLabels:
    """The labels of the images in a folder, those of earlier images included.

    Raises FileError if the folder holds a labels.csv of another kind, which would be lost.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        rows = _rows(self.path)
        if rows is None:
            raise FileError(f"--output {folder}: {NAME} there is another program's. Move it, or name a new folder.")
        self.rows = {file: rest for file, *rest in rows}

    def add(self, files: Sequence[str], labels: Sequence[int] | None, names: Sequence[str]) -> None:
        """Sets the labels of these files; None if they have none.   names: of each label."""
        for file, label in zip(files, labels or [None] * len(files), strict=True):
            self.rows.pop(file, None)
            if label is not None:
                self.rows[file] = [str(label), names[label]]

    def save(self) -> None:
        """Writes the file, sorted by name; nothing where no image has or had a label."""
        if self.rows or self.path.exists():
            with atomic_path(self.path) as path, path.open("w", **TEXT) as file:
                csv.writer(file).writerows([HEADER, *([name, *self.rows[name]] for name in sorted(self.rows))])
