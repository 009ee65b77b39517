"""The cache folder: decoded sets under a hash of their content, so that the next run does not decode them again.

`KEY.safetensors` holds the tensors of a decoded set, `KEY.json` the scan of it, where KEY hashes the bytes of its
files.  `SIGNATURE.json` holds the scan too, where SIGNATURE hashes names, sizes and times of change.  Any file may be
deleted at any time.  A damaged file counts as missing.
"""

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from tiny_diffusion.files import atomic_path, check_writable

FORMAT = 3  # raised whenever decoding or the contents of the files change
MAX_BYTES = 20e9  # of all decoded sets together: those that were not used for longest are deleted first
MAX_WRITE_S = 86_400  # a temporary file older than this has no writer any more


class Cache:
    """A folder of decoded sets; folder None: no cache.  A failed write is no error: the set is decoded again."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def key(self, *about: object) -> str:
        """A hash of these values, to keep something under."""
        return hashlib.sha256(repr((FORMAT, *about)).encode("utf-8", "surrogateescape")).hexdigest()[:40]

    def note(self, key: str) -> dict | None:
        """The values that were remembered under this key, or None."""
        if self.folder is None:
            return None
        try:
            checksum, text = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            return json.loads(text) if checksum == zlib.crc32(text.encode()) else None
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def remember(self, key: str, about: dict) -> None:
        """Writes plain JSON values under this key."""
        text = json.dumps(about)
        content = json.dumps([zlib.crc32(text.encode()), text])
        self._write(f"{key}.json", lambda partial: partial.write_text(content, encoding="utf-8"))

    def tensors(self, key: str) -> dict[str, Tensor] | None:
        """The tensors that were kept under this key, or None."""
        if self.folder is None:
            return None
        from safetensors import SafetensorError, safe_open

        path = self.folder / f"{key}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                if file.metadata() != _checksums(tensors):
                    return None
        except (OSError, SafetensorError, ValueError, RuntimeError, KeyError):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return tensors

    def keep(self, key: str, tensors: dict[str, Tensor]) -> bool:
        """Writes tensors under this key, and deletes old sets if the cache is too large.  False if writing failed."""
        from safetensors.torch import save_file

        done = self._write(f"{key}.safetensors", lambda partial: save_file(tensors, partial, _checksums(tensors)))
        with contextlib.suppress(OSError):  # another process may delete the same files
            self._make_room()
        return done

    def _make_room(self) -> None:
        for path in self.folder.glob(".*.part") if self.folder else ():
            if time.time() - path.stat().st_mtime > MAX_WRITE_S:
                path.unlink()
        kept = sorted(self.folder.glob("*.safetensors") if self.folder else (), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in kept)
        for path in kept[:-1]:
            if total > MAX_BYTES:
                total -= path.stat().st_size
                path.unlink()
                path.with_suffix(".json").unlink(missing_ok=True)

    def _write(self, name: str, write: Callable[[Path], object]) -> bool:
        """Calls write(path) and gives the file its name if that succeeds.  False if it could not be written."""
        if self.folder is None:
            return False
        from safetensors import SafetensorError

        try:
            with atomic_path(self.folder / name) as partial:
                partial.touch()
                mode = partial.stat().st_mode  # as the umask has it; safetensors makes every file 0600
                write(partial)
                partial.chmod(mode)
            return True
        except (OSError, SafetensorError):  # safetensors has its own error for a full disk
            return False


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The shape of each tensor and the CRC-32 of its bytes."""
    return {name: f"{list(tensor.shape)} {zlib.crc32(tensor.numpy()):08x}" for name, tensor in tensors.items()}


def cache_folder(fallback: Path) -> Path:
    """$XDG_CACHE_HOME/tiny_diffusion or ~/.cache/tiny_diffusion; fallback/cache if it cannot be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tiny_diffusion"
        check_writable("cache", folder, folder=True)
        return folder
    except (OSError, RuntimeError):  # FileError is an OSError; RuntimeError: there is no home
        return fallback / "cache"
