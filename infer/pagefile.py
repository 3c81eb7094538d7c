"""Pages in a folder, by key: the slowest tier of the prefix cache. A file that is not what was stored is a miss."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["PageFolder"]

_MAGIC = b"lockstep page 1\n"
_DIGEST = 32


class PageFolder:
    """Contents of pages by group and key, one file each.

    A file begins with a checksum of its contents, its key and ``identity``, so that a page of another model, layout or
    rank, a torn file or a flipped bit is never taken for a hit. Several processes may share a folder.

    Args:
        folder: made if it is not there.
        identity: what distinguishes these pages from others with the same keys (:meth:`infer.cache.KVCache.identity`).
    """

    def __init__(self, folder: Path | str, identity: str) -> None:
        self._identity = hashlib.blake2b(identity.encode(), digest_size=16).digest()
        self.folder = Path(folder) / self._identity.hex()
        self.folder.mkdir(parents=True, exist_ok=True)

    def keys(self) -> list[tuple[int, bytes]]:
        """(group, key) of all pages, the one written longest ago first; whether they are good, :meth:`load` tells."""
        found = []
        for path in self.folder.glob("*/*.page"):
            group, _, key = path.stem.partition("-")
            with contextlib.suppress(OSError, ValueError):
                found.append((path.stat().st_mtime_ns, int(group), bytes.fromhex(key)))
        return [(group, key) for _, group, key in sorted(found)]

    def store(self, group: int, key: bytes, page_B: Tensor) -> bool:
        """Keep the bytes of a page (uint8, on the CPU); False: it could not be written, and nothing was."""
        data, path = page_B.numpy().tobytes(), self._path(group, key)
        draft: str | None = None
        try:
            path.parent.mkdir(exist_ok=True)
            handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".draft")
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + self._checksum(group, key, data) + data)
            os.replace(draft, path)
            return True
        except OSError:
            with contextlib.suppress(OSError):
                if draft is not None:
                    os.unlink(draft)
            return False

    def load(self, group: int, key: bytes, into_B: Tensor) -> bool:
        """Read a page into ``into_B`` (uint8, on the CPU); False, and nothing is touched: it is not there.

        A broken file is deleted.
        """
        path, head = self._path(group, key), len(_MAGIC) + _DIGEST
        with contextlib.suppress(OSError):
            found = path.read_bytes()
            start, data = found[:head], found[head:]
            if len(data) == into_B.numel() and start == _MAGIC + self._checksum(group, key, data):
                into_B.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
                return True
            path.unlink(missing_ok=True)
        return False

    def drop(self, group: int, key: bytes) -> bool:
        """Forget a page."""
        with contextlib.suppress(OSError):
            self._path(group, key).unlink(missing_ok=True)
        return True

    def _path(self, group: int, key: bytes) -> Path:
        return self.folder / key.hex()[:2] / f"{group}-{key.hex()}.page"

    def _checksum(self, group: int, key: bytes, data: bytes) -> bytes:
        digest = hashlib.blake2b(data, digest_size=_DIGEST, key=self._identity)
        digest.update(b"%d-" % group + key)
        return digest.digest()
