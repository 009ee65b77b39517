"""Downloads by torchvision, which checks md5 sums.

A set is downloaded to a temporary folder beside its target and then renamed, so that nobody finds half a set and two
processes can download at once.
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

NETWORK_TIMEOUT_S = 40.0  # since the last byte arrived


def download(dataset: Dataset, folder: Path, name: str) -> None:
    """Downloads a set into folder / name, where torchvision puts it.

    Files that are there already and have the right md5 are not downloaded.  Raises FileError, which names the files to
    put there by hand.
    """
    import torchvision

    partial, copied = None, []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{dataset.source}-", suffix=".part", dir=folder))
        copied = _copy_existing(folder, partial, dataset)
        torchvision_set = getattr(torchvision.datasets, dataset.source)
        _run_while_bytes_arrive(lambda: torchvision_set(str(partial), download=True), partial)
        _move_in(partial / name, folder / name)
    except (RuntimeError, OSError, EOFError, tarfile.TarError, zlib.error, http.client.HTTPException) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        existing = f" ({', '.join(copied)} is not enough: files are missing, or an md5 differs)" if copied else ""
        raise FileError(
            f"{folder / name} is missing and the download failed ({lines[-1].strip()}). "
            f"Put {dataset.download} in {folder / dataset.download_to}{existing}, name the folder that has "
            f"{dataset.source} with --data_dir, or try --dataset digits, which needs no download."
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _copy_existing(folder: Path, partial: Path, dataset: Dataset) -> list[str]:
    """Copies the files that the user has put there, because torchvision overwrites those whose md5 differs."""
    copied = []
    for path in sorted((folder / dataset.download_to).glob("*")):
        if path.is_file() and (dataset.download_to or path.name == dataset.download):
            target = partial / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            copied.append(path.name)
    return copied


def _move_in(downloaded: Path, target: Path) -> None:
    """Renames the folder, or moves its files one by one if the target exists already."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(downloaded, target)
    except OSError:
        if not target.is_dir():
            raise
        for path in sorted(downloaded.iterdir()):
            if path.is_dir() and (target / path.name).is_dir():
                _move_in(path, target / path.name)
            else:
                os.replace(path, target / path.name)


def _run_while_bytes_arrive(work: Callable[[], object], folder: Path) -> None:
    """Runs work() in a thread.  Raises TimeoutError if nothing is written to the folder for NETWORK_TIMEOUT_S."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    arrived, last_arrival = -1, time.monotonic()
    while thread.is_alive():
        thread.join(0.2)
        now = _bytes_in(folder)
        if now != arrived:
            arrived, last_arrival = now, time.monotonic()
        if time.monotonic() - last_arrival > NETWORK_TIMEOUT_S:
            raise TimeoutError(f"no answer from the network for {NETWORK_TIMEOUT_S:.0f} seconds")
    if failed:
        raise failed[0]


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # removed in the meantime
                total += os.path.getsize(os.path.join(parent, name))
    return total
