"""Memory between the state and the disk: chunks that the disk can take as they are, kept for the next time."""

from __future__ import annotations

import mmap
import threading

import torch
from torch import Tensor

__all__ = ["CHUNK", "Buffers"]

CHUNK = 8 << 20
"""Bytes of a chunk; a multiple of every page and of every sector."""


class Buffers:
    """Chunks of memory that begin at a page; any thread takes and gives them.

    Args:
        pinned: copies from a GPU go into them.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self) -> Tensor:
        """A chunk of bytes that nobody else has."""
        with self._lock:
            if self._free:
                return self._free.pop()
        if self.pinned:
            return torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)
        if not hasattr(mmap, "MAP_ANONYMOUS"):
            return torch.empty(CHUNK, dtype=torch.uint8)
        memory = mmap.mmap(-1, CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # the first touch of small pages takes longer than the copy
        return torch.frombuffer(memory, dtype=torch.uint8)

    def give(self, chunk: Tensor) -> None:
        """Give one back."""
        with self._lock:
            self._free.append(chunk)
