"""Random numbers that no layout changes: each is a function of a key and of a global index.

There is no state. The bits are those of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) taken at ``key + index``.
Everything up to the last scaling is integer arithmetic, so that a value has the same bits on any device, in any
position of any tensor, however many threads compute it.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

__all__ = ["bits", "keep_mask", "key", "normal", "uniform"]

_MASK = (1 << 64) - 1
_GAMMA, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LANE = 0xD1342543DE82EF95
_PAIR = 0x0000FFFF0000FFFF


def key(*parts: int | str) -> int:
    """A 64-bit key from any sequence of whole numbers and names."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def bits(draw: int, index: Tensor) -> Tensor:
    """64 random bits for each index, as int64. ``draw`` is a :func:`key`."""
    z = index * _signed(_GAMMA)
    z += _signed(draw)
    for shift, mix in ((30, _MIX1), (27, _MIX2)):
        z ^= (z >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        z *= _signed(mix)
    z ^= (z >> 31).bitwise_and_((1 << 33) - 1)
    return z


def uniform(draw: int, index: Tensor) -> Tensor:
    """Float64 in [0, 1), a multiple of 2**-53."""
    return (bits(draw, index) >> 11).bitwise_and_((1 << 53) - 1).to(torch.float64).mul_(2.0**-53)


def normal(draw: int, index: Tensor) -> Tensor:
    """Float64 with mean 0 and variance 1: the sum of twelve 16-bit uniforms, so never beyond 6."""
    total = torch.zeros_like(index)
    for lane in range(3):
        z = bits(draw + lane * _LANE, index)
        total += z & _PAIR
        total += (z >> 16).bitwise_and_(_PAIR)
    total = (total & 0xFFFFFFFF) + (total >> 32)
    return total.to(torch.float64).sub_(12 * 65535 / 2).mul_(1 / math.sqrt(65536**2 - 1))


def keep_mask(draw: int, row: Tensor, column: Tensor, drop: float) -> Tensor:
    """Which values survive dropout, a bool for each pair of a row and a column (the two are broadcast).

    Args:
        draw: key of the step and of the place in the model.
        row: global index of the token.
        column: global index of the feature, or of the token attended to; below 2**24.
        drop: probability of zero.
    """
    z = bits(draw, row * (1 << 24) + column)
    return z.bitwise_and_((1 << 32) - 1) >= round(drop * (1 << 32))
