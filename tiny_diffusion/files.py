"""Files: written whole or not at all, and checked before the work rather than after it.

A file is written under a temporary name beside its target and then renamed, so a reader finds the old file or the new
one, never a part of one.
"""

import codecs
import json
import math
import os
import platform
import re
import shutil
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tiny_diffusion.errors import FileError

PARTIAL = re.compile(r"\..+\.([0-9a-f]{4})-(\d{1,9})-[0-9a-f]{8}\.part", re.DOTALL)  # computer, process, attempt


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`, whose file replaces that of `path` when the block ends without an error.

    The folder is made if it is missing.  What the block wrote is removed if it raises.
    """
    path = Path(path)
    make_folder(path.parent)
    partial = partial_path(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder beside `path` that gets its name when the block ends without an error, and is deleted otherwise.

    An empty folder of that name is replaced.
    """
    path = Path(path)
    make_folder(path.parent)
    partial = partial_path(path)
    partial.mkdir()
    try:
        yield partial
        if path.is_dir():
            path.rmdir()
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_write(path: str | os.PathLike, *, fsync: bool = False) -> Iterator[BinaryIO]:
    """An open binary file that replaces `path` when the block ends without an error.

    fsync: the contents are on the disk before the file gets its name, so that this holds for power cuts too.
    """
    with atomic_path(path) as partial, open(partial, "wb") as file:
        yield file
        if fsync:
            file.flush()
            os.fsync(file.fileno())


def copy_whole(source: Path, target: Path) -> None:
    """Writes the bytes of one file to another, whole or not at all."""
    with atomic_write(target) as file:
        file.write(source.read_bytes())


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes the text as UTF-8, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes plain values as indented JSON, whole or not at all, with null for NaN and infinity."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path, name: str = "") -> object:
    """The value in a JSON file, in UTF-8, or in UTF-16 as PowerShell's > writes it.

    name: what messages call the file; empty: its path.   Raises FileError.
    """
    try:
        content = path.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return json.loads(content.decode("utf-16" if is_utf16 else "utf-8-sig"))
    except OSError as error:
        raise FileError(f"{name or path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{name or path} is not a JSON file, it may be half-written: {error}.") from error


def finite(value: object) -> object:
    """Plain values with None in place of NaN and infinity, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_folder(path: Path) -> None:
    """Makes the folder and those that it lies in, however many; pathlib's own way calls itself for each of them."""
    for folder in reversed([path, *path.parents]):
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)


def partial_path(path: Path) -> Path:
    """A temporary name beside the file, used by this process for this one attempt to write it."""
    return path.with_name(f".{path.name}.{_computer()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.part")


def partials_of(folder: Path, pattern: str) -> list[Path]:
    """The temporary files that killed processes left while writing files whose names match the pattern."""
    return list(folder.glob(f".{pattern}.*.part"))


def clear_partials(folder: Path) -> None:
    """Deletes the temporary files in a folder whose writers were killed: processes of this computer that are gone."""
    for path in partials_of(folder, "*"):
        name = PARTIAL.fullmatch(path.name)
        if name and name[1] == _computer() and not _is_alive(int(name[2])):
            with suppress(OSError):
                path.unlink()


def _computer() -> str:
    """Four hexadecimal digits of this computer's name: another that shares its folders has other processes."""
    return f"{zlib.crc32(platform.node().encode()) & 0xFFFF:04x}"


def _is_alive(process: int) -> bool:
    """Whether a process of this number may be running."""
    if os.name == "nt":
        return True  # there os.kill would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def keep_earlier(path: Path) -> Path | None:
    """Renames a file that is about to be written again, from name.json to name-1.json, -2, ...; returns the new path.

    None if there is no such file.
    """
    if not path.is_file():
        return None
    number = 1
    while (kept := path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    os.replace(path, kept)
    return kept


def check_writable(option: str, path: Path, folder: bool = False) -> None:
    """Raises FileError now rather than after the work if the file cannot be written; clears up after killed writers.

    option: the option that named it.  folder: the path is a folder that files will be written into.
    """
    parent = path if folder else path.parent
    try:
        if not folder and path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        make_folder(parent)
        probe = partial_path(parent / (path.name or "probe"))
        probe.touch()
        probe.unlink()
        clear_partials(parent)
    except OSError as error:
        reason = f"{error.filename} is not a folder" if isinstance(error, FileExistsError) else error.strerror or error
        raise FileError(f"--{option} {path} cannot be written: {reason}. Name another path.") from error
