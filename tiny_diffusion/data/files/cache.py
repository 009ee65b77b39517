"""The cache folder: decoded sets, keyed by their content, so that the next run starts at once.

`KEY.safetensors` is a decoded set under the hash of its bytes, `KEY.json` what a scan of it has found, and
`SIGNATURE.json` the same for files of these names, sizes and times of change.  Any may be deleted at any time; one that
is damaged is as good as none.
"""

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tiny_diffusion.files import atomic_path, check_writable

FORMAT = 1  # raise it when decoding changes
MAX_BYTES = 20e9  # of all decoded sets together; the ones not used for longest go first
LEFT_BEHIND_S = 86_400  # since when a half-written file has no writer any more


class Cache:
    """A folder of decoded sets, or None for no cache.  Failing to write is no error: it is decoded again next time."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def key(self, *about: object) -> str:
        return hashlib.sha256(repr((FORMAT, *about)).encode("utf-8", "surrogateescape")).hexdigest()[:40]

    def note(self, key: str) -> dict | None:
        """What was remembered under this key, or None."""
        if self.folder is None:
            return None
        try:
            checksum, text = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            return json.loads(text) if checksum == zlib.crc32(text.encode()) else None
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def remember(self, key: str, about: dict) -> None:
        text = json.dumps(about)
        content = json.dumps([zlib.crc32(text.encode()), text])
        self._write(f"{key}.json", lambda partial: partial.write_text(content, encoding="utf-8"))

    def tensors(self, key: str) -> dict[str, Tensor] | None:
        """The set that was kept under this key, or None."""
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
        """Under this key, and older sets removed if all together grow too large.  False if it could not be written."""
        from safetensors.torch import save_file

        done = self._write(f"{key}.safetensors", lambda partial: save_file(tensors, partial, _checksums(tensors)))
        with contextlib.suppress(OSError):  # another process makes room too
            self._make_room()
        return done

    def _make_room(self) -> None:
        for path in self.folder.glob(".*.part") if self.folder else ():
            if time.time() - path.stat().st_mtime > LEFT_BEHIND_S:
                path.unlink()
        kept = sorted(self.folder.glob("*.safetensors") if self.folder else (), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in kept)
        for path in kept[:-1]:
            if total > MAX_BYTES:
                total -= path.stat().st_size
                path.unlink()
                path.with_suffix(".json").unlink(missing_ok=True)

    def _write(self, name: str, write) -> bool:
        """write(path), in whole or not at all."""
        if self.folder is None:
            return False
        from safetensors import SafetensorError

        try:
            with atomic_path(self.folder / name) as partial:
                write(partial)
            return True
        except (OSError, SafetensorError):  # safetensors' own for a full disk
            return False


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of each tensor its shape and a sum over its bytes."""
    return {name: f"{list(tensor.shape)} {zlib.crc32(tensor.numpy()):08x}" for name, tensor in tensors.items()}


def cache_folder(fallback: Path) -> Path:
    """$XDG_CACHE_HOME/tiny_diffusion, or ~/.cache/tiny_diffusion; fallback/cache where neither can be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tiny_diffusion"
        check_writable("cache", folder, folder=True)
        return folder
    except (OSError, RuntimeError):  # FileError is an OSError; RuntimeError: there is no home
        return fallback / "cache"
