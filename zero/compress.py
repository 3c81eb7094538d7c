"""Fewer bytes for weights and gradients: integers with a scale a block (ZeRO++), and the largest values alone.

A block of 256 values x is sent as integers q and one float32 scale s = max |x| / m, with m = 127 for 8 bits and 7 for
4: what arrives is s q, and |s q - x| <= s / 2 for every value, once for every time that it is quantized. A block with
a value that is not finite arrives as nothing finite, so that a step is skipped as it would be without compression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from parallel import comm
from parallel.mesh import Axis

__all__ = [
    "BLOCK",
    "Arrival",
    "TopK",
    "all_reduce",
    "pack",
    "packed_bytes",
    "start_all_gather",
    "start_reduce_scatter",
    "unpack",
]

BLOCK = 256
_LARGEST = {8: 127, 4: 7}


class Arrival(Protocol):
    """A message under way."""

    def there(self, seconds: float) -> bool:
        """Whether it has arrived within so many seconds; on CUDA at once."""
        ...

    def wait(self) -> Tensor:
        """What arrived."""
        ...


def packed_bytes(count: int, bits: int) -> int:
    """The size of ``count`` values as integers of ``bits`` bits, scales included."""
    return -(-count * bits // 8) + 4 * -(-count // BLOCK)


def _blocks(x_RN: Tensor) -> Tensor:
    """(R, N) -> (R, blocks, 256), the last block filled up with zeros."""
    rows, count = x_RN.shape
    blocks = -(-count // BLOCK)
    padded = x_RN.new_zeros(rows, blocks * BLOCK)
    padded[:, :count] = x_RN
    return padded.view(rows, blocks, BLOCK)


@torch.no_grad()
def pack(x_RN: Tensor, bits: int) -> Tensor:
    """Rows of values as rows of bytes: integers, then one float32 scale for each block of 256 values of the row.

    Args:
        bits: 8, or 4, of which two share a byte.
    """
    rows, count = x_RN.shape
    blocks = _blocks(x_RN)
    scale = (blocks.abs().amax(-1, keepdim=True) / _LARGEST[bits]).float()
    code = (blocks / torch.where(scale == 0, 1.0, scale)).round_().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    code = code.to(torch.int8).view(rows, -1)
    if bits == 8:
        integers = code[:, :count].contiguous().view(torch.uint8)
    else:
        nibbles = (code + 8).view(torch.uint8)[:, : count + count % 2]
        integers = nibbles[:, ::2] | (nibbles[:, 1::2] << 4)
    return torch.cat([integers, scale.view(rows, -1).contiguous().view(torch.uint8)], 1)


@torch.no_grad()
def unpack(message_RB: Tensor, count: int, bits: int, dtype: torch.dtype) -> Tensor:
    """What :func:`pack` made of rows of ``count`` values: (R, count)."""
    rows, length = len(message_RB), -(-count * bits // 8)
    scale = message_RB[:, length:].clone(memory_format=torch.contiguous_format).view(torch.float32)[..., None]
    integers = message_RB[:, :length]
    if bits == 8:
        code = integers.contiguous().view(torch.int8)
    else:
        code = torch.stack([integers & 15, integers >> 4], -1).view(rows, -1)[:, :count].to(torch.int8) - 8
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (_blocks(code.to(wide)) * scale).view(rows, -1)[:, :count].to(dtype)


@dataclass(slots=True)
class _Gathering:
    pending: comm.Pending
    out: Tensor
    ranks: int
    bits: int

    def there(self, seconds: float) -> bool:
        return self.pending.there(seconds)

    def wait(self) -> Tensor:
        rows = self.pending.wait().view(self.ranks, -1)
        self.out.view(self.ranks, -1).copy_(unpack(rows, self.out.numel() // self.ranks, self.bits, self.out.dtype))
        return self.out


def start_all_gather(x: Tensor, axis: Axis, out: Tensor, bits: int = 8) -> Arrival:
    """Gather the runs of a flat vector as integers; every rank has the same values, our own run's rounded as well.

    Arrived: x + e with |e| <= s / 2, and what rounding to the type of ``out`` adds.
    """
    return _Gathering(comm.start_all_gather(pack(x[None], bits)[0], axis), out, axis.size, bits)


@dataclass(slots=True)
class _Scattering:
    pending: comm.Pending
    own: Tensor
    axis: Axis
    bits: int

    def there(self, seconds: float) -> bool:
        return self.pending.there(seconds)

    def wait(self) -> Tensor:
        with torch.no_grad():
            parts = unpack(self.pending.wait(), self.own.numel(), self.bits, self.own.dtype)
            parts[self.axis.rank] = self.own
            return parts.sum(0)


@torch.no_grad()
def start_reduce_scatter(x: Tensor, axis: Axis, bits: int) -> Arrival:
    """Begin to sum a flat vector over the axis, of which our run is wanted: quantized once, summed there in full.

    The error of a value is at most the sum over the other ranks of half the scale of its block there. Of ``x`` nothing
    is needed any more when this returns.
    """
    rows, each = x.view(axis.size, -1), [1] * axis.size
    pending = comm.start_all_to_all(pack(rows, bits), axis, each, each)
    return _Scattering(pending, rows[axis.rank].clone(), axis, bits)


@torch.no_grad()
def all_reduce(values: Sequence[Tensor], axis: Axis, bits: int) -> None:
    """Sum flat vectors over the axis, in place, to the same values on every rank: quantized on the way out and back.

    The error of a value is at most the sum over the other ranks of half the scale of its block there, and half the
    scale of its block of the sum. All are on their way at a time.
    """
    padded = [torch.cat([x, x.new_zeros(-len(x) % axis.size)]) if len(x) % axis.size else x for x in values]
    out = [start_reduce_scatter(x, axis, bits) for x in padded]
    back = [start_all_gather(run.wait(), axis, x, bits) for run, x in zip(out, padded, strict=True)]
    for target, arrival in zip(values, back, strict=True):
        arrived = arrival.wait()
        if arrived is not target:
            target.copy_(arrived[: len(target)])


@dataclass(slots=True)
class _Largest:
    pending: comm.Pending
    ranks: int
    count: int
    index: torch.dtype
    own: slice
    kind: torch.dtype

    def there(self, seconds: float) -> bool:
        return self.pending.there(seconds)

    def wait(self) -> Tensor:
        message = self.pending.wait().view(self.ranks, -1)
        total = torch.zeros(self.own.stop - self.own.start, dtype=self.kind, device=message.device)
        indices = self.count * self.index.itemsize
        for row in message:  # one rank after the other: an index is there once a rank, and every sum has one order
            index = row[:indices].clone().view(self.index).long()
            value = row[indices:].clone().view(self.kind)
            ours = (index >= self.own.start) & (index < self.own.stop)
            total[index[ours] - self.own.start] += value[ours]
        return total


class TopK:
    """The largest values of a gradient are sent; the rest is kept, and added to the next one (arXiv 1809.07599).

    Args:
        gradient: a flat vector like those to come.
        share: of the values that are sent.

    Attributes:
        kept: what was not sent in any step so far.
    """

    def __init__(self, gradient: Tensor, share: float) -> None:
        self.kept = torch.zeros_like(gradient)
        self.count = max(1, round(share * gradient.numel()))

    @torch.no_grad()
    def start(self, gradient: Tensor, axis: Axis, own: slice) -> Arrival:
        """Begin to sum over the axis what is sent; ``own``: the run of the sum that is wanted.

        ``gradient`` becomes what is not sent, for :meth:`keep`: sent and not sent are the gradient and what was kept,
        to the bit.
        """
        gradient.add_(self.kept)
        size = torch.nan_to_num(gradient.abs(), nan=torch.inf, posinf=torch.inf)
        index = size.topk(self.count, sorted=False).indices
        kind = torch.int32 if gradient.numel() < 1 << 31 else torch.int64
        message = torch.cat([index.to(kind).view(torch.uint8), gradient[index].view(torch.uint8)])
        gradient[index] = 0
        pending = comm.start_all_gather(message, axis)
        return _Largest(pending, axis.size, self.count, kind, own, gradient.dtype)

    def keep(self, rest: Tensor) -> None:
        """The step was made: what was not sent waits for the next. Without it, all is as before the step."""
        self.kept.copy_(rest)
