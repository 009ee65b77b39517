"""Downloads: by torchvision, checked by md5, beside the final place and moved in whole, so that half a set is never
found, and two processes at once do not disturb each other.
"""

import contextlib
import http.client
import os
import shutil
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from tiny_diffusion.data.catalog import Dataset
from tiny_diffusion.errors import FileError

NETWORK_TIMEOUT_S = 40.0  # without a byte arriving


def download(dataset: Dataset, folder: Path, place: str) -> None:
    """Fetches a set into folder / place, where torchvision puts it.

    Of the files that lie there already, those with the right md5 are taken instead of being fetched.  Raises FileError,
    naming the files to put there by hand.
    """
    import torchvision

    partial, borrowed = None, []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{dataset.source}-", suffix=".part", dir=folder))
        borrowed = _borrow(folder, partial, dataset)
        fetch = getattr(torchvision.datasets, dataset.source)
        _run_while_bytes_arrive(lambda: fetch(str(partial), download=True), partial)
        _move_in(partial / place, folder / place)
    except (RuntimeError, OSError, EOFError, tarfile.TarError, zlib.error, http.client.HTTPException) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        there = f" ({', '.join(borrowed)} alone will not do: some are missing, or an md5 differs)" if borrowed else ""
        raise FileError(
            f"{folder / place} is missing and the download failed ({lines[-1].strip()}). "
            f"Put {dataset.download} in {folder / dataset.download_to}{there}, name the folder that has "
            f"{dataset.source} by --data_dir, or try --dataset digits, which needs no download."
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _borrow(folder: Path, partial: Path, dataset: Dataset) -> list[str]:
    """Gives torchvision copies of the files that somebody has put there by hand: it overwrites those it dislikes."""
    borrowed = []
    for path in sorted((folder / dataset.download_to).glob("*")):
        if path.is_file() and (dataset.download_to or path.name == dataset.download):
            target = partial / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            borrowed.append(path.name)
    return borrowed


def _move_in(fetched: Path, place: Path) -> None:
    """The whole folder in one move, or, where some of it lies there already, what is missing file by file."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fetched, place)
    except OSError:
        if not place.is_dir():
            raise
        for path in sorted(fetched.iterdir()):
            if path.is_dir() and (place / path.name).is_dir():
                _move_in(path, place / path.name)
            else:
                os.replace(path, place / path.name)


def _run_while_bytes_arrive(work: Callable[[], object], folder: Path) -> None:
    """Runs work in a thread; gives up when nothing has been written to the folder for NETWORK_TIMEOUT_S."""
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
        now = _bytes_in(folder)
        if now != arrived:
            arrived, since = now, time.monotonic()
        if time.monotonic() - since > NETWORK_TIMEOUT_S:
            raise TimeoutError(f"no answer from the network for {NETWORK_TIMEOUT_S:.0f} seconds")
    if failed:
        raise failed[0]


def _bytes_in(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # removed in the meantime
                total += os.path.getsize(os.path.join(place, name))
    return total
