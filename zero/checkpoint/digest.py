"""SHA-256 of two streams at once: where the processor has instructions for it, in little more than the time of one."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from parallel.native import CompileError, compiled

__all__ = ["Digests", "lanes"]

_SOURCE = Path(__file__).with_name("sha256.c")
_BLOCK = 64
_H = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)  # FIPS 180-4
_PACKED = (5, 4, 1, 0, 7, 6, 3, 2)  # the order of the state in sha256.c


def lanes() -> int:
    """How many streams one thread should hash: two where that is faster, else one."""
    return 2 if _kernel() is not None else 1


@functools.cache
def _kernel() -> ctypes._NamedFuncPointer | None:
    try:
        library = compiled(_SOURCE)
    except CompileError:
        return None
    if not library.sha256_can():
        return None
    function = library.sha256_two
    function.restype = None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t] * 2
    return function


class Digests:
    """SHA-256 of one stream or of two, of which pieces come together.

    Other threads run while a piece is hashed.

    Args:
        streams: 1, or as many as :func:`lanes` says.
    """

    def __init__(self, streams: int) -> None:
        self._streams = [_Stream() for _ in range(streams)] if streams == 2 else []
        self._alone = hashlib.sha256()

    def update(self, pieces: Sequence[memoryview]) -> None:
        """Take up the next bytes of each stream, of any lengths; as many pieces as streams."""
        if not self._streams:
            self._alone.update(pieces[0])
            return
        blocks = [block for stream, piece in zip(self._streams, pieces, strict=True) for block in stream.whole(piece)]
        first, second = blocks[:2], blocks[2:]
        for one, other in zip(first, second, strict=True):
            _take(self._streams, one, other)

    def hexdigests(self) -> list[str]:
        """Of all streams; the last call."""
        if not self._streams:
            return [self._alone.hexdigest()]
        _take(self._streams, *(stream.end() for stream in self._streams))
        return [stream.hexdigest() for stream in self._streams]


class _Stream:
    """State of one stream, and the bytes of it that do not fill a block yet."""

    def __init__(self) -> None:
        self.state = np.array([_H[index] for index in _PACKED], dtype=np.uint32)
        self._rest, self._length = b"", 0

    def whole(self, piece: memoryview) -> tuple[memoryview, memoryview]:
        """Whole blocks: first with what was left of the last piece, then the others; what is left now is kept."""
        self._length += len(piece)
        begin = min(-len(self._rest) % _BLOCK, len(piece))
        head = self._rest + bytes(piece[:begin])
        end = begin + (len(piece) - begin) // _BLOCK * _BLOCK
        if len(head) % _BLOCK:
            self._rest = head
            return memoryview(b""), memoryview(b"")
        self._rest = bytes(piece[end:])
        return memoryview(head), piece[begin:end]

    def end(self) -> memoryview:
        """The last blocks: what is left, and the length."""
        bits = (8 * self._length).to_bytes(8, "big")
        zeros = bytes(-(len(self._rest) + 1 + len(bits)) % _BLOCK)
        return memoryview(self._rest + b"\x80" + zeros + bits)

    def hexdigest(self) -> str:
        words = np.empty(8, dtype=np.uint32)
        words[list(_PACKED)] = self.state
        return words.astype(">u4").tobytes().hex()


def _take(streams: Sequence[_Stream], *blocks: memoryview) -> None:
    """Whole blocks of both streams."""
    kernel = _kernel()
    assert kernel is not None
    views = [np.frombuffer(data, dtype=np.uint8) for data in blocks]
    words: list[int] = []
    for stream, view in zip(streams, views, strict=True):
        words += (stream.state.ctypes.data, view.ctypes.data, len(view) // _BLOCK)
    kernel(*words)
