"""One run per folder: a lock that the operating system releases when the process ends, however it ends.

The locked file names the process that holds it, for people to read.  Only the system knows whether it is held, so a
file that a killed process left behind locks nothing.
"""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tiny_diffusion.errors import FileError, OptionError
from tiny_diffusion.files import make_folder

NAME = ".lock"
HELD = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # by this file system
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
LOCKED_BYTE = 1 << 30  # Windows makes a locked part of a file unreadable, so it lies far behind the text
MAX_TRIES = 100


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps every other run out of the folder during the block.  Raises OptionError if another run is in it.

    A missing folder is made, and removed again if the block leaves it empty.  A folder that cannot be written is not
    locked, since writing there fails anyway.  Where the file system has no locks, a message says so.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]  # False for impossible names, too
    path, number = folder / NAME, None
    try:
        number = _acquire(folder)
        yield
    finally:
        if number is not None:
            _release(path, number)
        for empty in made:
            with suppress(OSError):
                empty.rmdir()


def _acquire(folder: Path) -> int | None:
    """The file descriptor of the locked file, or None where there can be no lock."""
    path = folder / NAME
    try:
        for _ in range(MAX_TRIES):  # the run that has just ended may have removed the file, or the folder
            with suppress(FileNotFoundError):
                make_folder(folder)
                return _take(path)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    except BlockingIOError as error:
        raise OptionError(
            f"--output_dir {folder} is being written by another run{_holder(path)}. "
            "Wait until it ends, stop it, or name another folder."
        ) from error
    except OSError as error:
        if error.errno in UNWRITABLE:
            return None
        if error.errno in UNSUPPORTED:
            print(
                f"{folder}: this file system has no locks; start no second run there",
                file=sys.stderr,
            )
            path.unlink(missing_ok=True)
            return None
        raise FileError(
            f"--output_dir {folder} cannot be written: {error.strerror or error}. Name another folder."
        ) from error


def _take(path: Path) -> int:
    """Raises BlockingIOError if another process holds the lock, FileNotFoundError if one removes the file meanwhile."""
    number = open_lock_file(path)
    try:
        acquire(number)
        if not _is_at(path, number):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        with suppress(OSError):  # a full disk, or another user's file: the lock is held all the same
            os.ftruncate(number, 0)
            os.lseek(number, 0, os.SEEK_SET)
            os.write(number, f"{os.getpid()} {socket.gethostname()}\n".encode())
        return number
    except BaseException:
        os.close(number)
        raise


def _release(path: Path, number: int) -> None:
    """Removes the file before it is unlocked, so that no other process locks a file that is about to be removed.

    Windows deletes no open file, so there the order is reversed.
    """
    if os.name == "nt":
        os.close(number)
    with suppress(OSError):
        if os.name == "nt" or _is_at(path, number):
            path.unlink()
    if os.name != "nt":
        os.close(number)


def open_lock_file(path: Path) -> int:
    how = getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | how, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY | how)  # another user's, in a shared folder


def acquire(number: int) -> None:
    """Raises BlockingIOError if another process holds it, and OSError (see UNSUPPORTED) where there are no locks."""
    try:
        try:
            import fcntl
        except ImportError:
            import msvcrt

            os.lseek(number, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
        raise


def _is_at(path: Path, number: int) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(number))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """The process that a locked file names, in brackets; empty if it names none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            process, _, host = file.read(300).strip().partition(" ")
    except OSError:
        return ""
    elsewhere = f" on {host}" if host.isprintable() and host not in ("", socket.gethostname()) else ""
    return f" (process {process}{elsewhere})" if process.isdecimal() and len(process) < 20 else ""
