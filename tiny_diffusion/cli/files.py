"""What the commands ask of files before they work with them."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from tiny_diffusion.errors import FileError


def check_writable(option: str, path: Path, folder: bool = False) -> None:
    """Raises FileError now rather than after the work if this file (or folder of files) cannot be written."""
    parent = path if folder else path.parent
    try:
        if not folder and path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        parent.mkdir(parents=True, exist_ok=True)
        probe = parent / f".{path.name}.{os.getpid()}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = f"{error.filename} is not a folder" if isinstance(error, FileExistsError) else error.strerror or error
        raise FileError(f"--{option} {path} cannot be written: {reason}. Name another place.") from error


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint lies in."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def show_progress(items: Iterable, count: int, doing: str) -> Iterable:
    """The items, with a bar on a terminal while they are gone through."""
    from tqdm import tqdm

    return tqdm(items, doing, count, unit="image", leave=False, disable=not sys.stderr.isatty(), dynamic_ncols=True)
