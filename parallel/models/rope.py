"""Angles of rotary positions, with the scalings of Llama 2 (linear, dynamic), Llama 3 and YaRN (arXiv 2309.00071)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from parallel.models.batch import Batch
from parallel.models.config import DecoderConfig, RopeConfig

__all__ = ["Angles", "KeptAngles", "angles", "frequencies"]

Angles = tuple[Tensor, Tensor]
"""cos and sin, (T, H / 2)."""


def angles(config: DecoderConfig, batch: Batch) -> Angles:
    """cos and sin of every token's position, float32 whatever the model's precision (as in ``transformers``)."""
    rope = config.rope
    if rope.scaling == "dynamic":
        inverse = torch.cat([_dynamic(config, batch, i) for i in range(len(batch.boundaries) - 1)])
    else:
        inverse = _on(config, batch.positions_T.device)
    turns = batch.positions_T.float()[:, None] * inverse
    if rope.scaling == "yarn" and (scale := _attention_factor(rope)) != 1.0:
        return turns.cos() * scale, turns.sin() * scale
    return turns.cos(), turns.sin()


class KeptAngles:
    """:func:`angles` for many batches: those of the first positions are computed once.

    Args:
        config: of the model.
        most: positions to keep them of.
    """

    def __init__(self, config: DecoderConfig, most: int = 1 << 15) -> None:
        self._config, self._kept = config, most if config.rope.scaling != "dynamic" else 0
        self._known: Angles = (torch.empty(0), torch.empty(0))

    def write(self, batch: Batch, longest: int, out: Angles) -> None:
        """Those of a batch, none of whose positions reaches ``longest``, into the first rows of ``out``."""
        rows = len(batch)
        if longest > self._kept:
            for place, turns in zip(out, angles(self._config, batch), strict=True):
                place[:rows] = turns
            return
        if longest > len(self._known[0]):
            count = min(1 << (longest - 1).bit_length(), self._kept)
            self._known = angles(self._config, Batch.pack([torch.zeros(count, dtype=torch.int64)]))
        for place, turns in zip(out, self._known, strict=True):
            torch.index_select(turns, 0, batch.positions_T, out=place[:rows])


@functools.lru_cache(maxsize=64)
def _on(config: DecoderConfig, device: torch.device) -> Tensor:
    """:func:`frequencies`, sent to a device once."""
    with torch.inference_mode(False):
        return frequencies(config).to(device)


def frequencies(config: DecoderConfig) -> Tensor:
    """Radians a position for each pair of dims, (H / 2), float32."""
    rope = config.rope
    plain = _plain(rope.theta, config.head_size)
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        return _llama3(plain, rope)
    if rope.scaling == "yarn":
        return _yarn(plain, config)
    return plain


def _plain(theta: float | Tensor, size: int, device: torch.device | None = None) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.int64, device=device).float() / size))


def _dynamic(config: DecoderConfig, batch: Batch, document: int) -> Tensor:
    """Frequencies of one document, which depend on its length beyond the original one; a row a token."""
    first, end = batch.boundaries[document : document + 2]
    rope, size = config.rope, config.head_size
    length = max(int(batch.positions_T[end - 1]) + 1, rope.original)
    theta: float | Tensor = rope.theta
    if length > rope.original:
        # In float32, as transformers computes it from the length.
        stretch = rope.factor * torch.tensor(length) / rope.original - (rope.factor - 1)
        theta = (rope.theta * stretch ** (size / (size - 2))).to(batch.positions_T.device)
    return _plain(theta, size, batch.positions_T.device).expand(end - first, -1)


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Long wavelengths are stretched, short ones left alone, those between interpolated (Llama 3.1)."""
    wavelength = 2 * math.pi / plain
    low, high = rope.original / rope.low_frequency, rope.original / rope.high_frequency
    scaled = torch.where(wavelength > low, plain / rope.factor, plain)
    smooth = (rope.original / wavelength - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
    between = (1 - smooth) * scaled / rope.factor + smooth * scaled
    return torch.where((wavelength >= high) & (wavelength <= low), between, scaled)


def _yarn(plain: Tensor, config: DecoderConfig) -> Tensor:
    rope, size = config.rope, config.head_size

    def dim_of(rotations: float) -> float:
        return size * math.log(rope.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 if low == high else 0.0
    keep = 1 - ((torch.arange(size // 2).float() - low) / (high - low)).clamp(0, 1)
    turns = rope.theta ** (torch.arange(0, size, 2).float() / size)
    return 1.0 / (rope.factor * turns) * (1 - keep) + plain * keep


def _attention_factor(rope: RopeConfig) -> float:
    return rope.attention or (0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0)
