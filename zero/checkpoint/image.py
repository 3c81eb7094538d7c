"""The bytes of a safetensors file before there is a file: they are copied from the state a piece at a time."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zero.fragment import Fragment

__all__ = ["DTYPES", "Image", "divided"]

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of types in the format."""


class Image:
    """A file of fragments, as 1-D tensors named ``parameter|what|start``.

    Args:
        held: the fragments; their values are read when :meth:`copy` is called.

    Attributes:
        bytes: of the whole file.
    """

    def __init__(self, held: Sequence[Fragment]) -> None:
        table: dict[str, Any] = {}
        end = 0
        for fragment in held:
            begin, end = end, end + _size(fragment)
            table[fragment.key] = {
                "dtype": DTYPES[fragment.values.dtype],
                "shape": [fragment.values.numel()],
                "data_offsets": [begin, end],
            }
        header = json.dumps(table, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        header = len(header).to_bytes(8, "little") + header
        self._parts = [torch.frombuffer(bytearray(header), dtype=torch.uint8)]
        self._parts += [fragment.values.detach().contiguous().view(torch.uint8) for fragment in held]
        self._begins = [0]
        for part in self._parts:
            self._begins.append(self._begins[-1] + len(part))
        self.bytes = self._begins.pop()

    def copy(self, begin: int, target: Tensor) -> None:
        """Fill ``target``, bytes on the CPU, with those of the file from ``begin`` on; from CUDA that is only begun."""
        done, index = 0, bisect.bisect_right(self._begins, begin) - 1
        while done < len(target):
            part, first = self._parts[index], begin + done - self._begins[index]
            source = part[first : first + len(target) - done]
            into = target[done : done + len(source)]
            if source.is_cuda:
                into.copy_(source, non_blocking=True)
            else:
                into.numpy()[:] = source.numpy()  # by this thread alone, and other threads run meanwhile
            done, index = done + len(source), index + 1


def divided(held: Sequence[Fragment], files: int) -> Iterator[list[Fragment]]:
    """The same values as so many lists of about as many bytes; a fragment may end in one and go on in the next."""
    total = sum(map(_size, held))
    limits = [total * number // files for number in range(1, files + 1)]
    own: list[Fragment] = []
    done = 0
    for fragment in held:
        values, start = fragment.values, fragment.start
        while limits and done + values.numel() * values.element_size() >= limits[0]:
            room = -(-(limits.pop(0) - done) // values.element_size())
            own.append(fragment._replace(start=start, values=values[:room]))
            yield [one for one in own if one.values.numel()]
            done, start, values, own = done + _size(own[-1]), start + room, values[room:], []
        own.append(fragment._replace(start=start, values=values))
        done += _size(own[-1])


def _size(fragment: Fragment) -> int:
    return fragment.values.numel() * fragment.values.element_size()
