"""Logits as weights, and sums of them that do not depend on the batch.

A weight is ``exp((x - max x) / temperature)``. Nothing here depends on the other rows: maxima are exact, float sums are
taken in a tree that the vocabulary alone fixes, and the rest is summed as whole numbers. Comparisons are arithmetic,
because torch vectorizes that on a CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parallel.kernels import inference

__all__ = [
    "FINITE",
    "LANES",
    "Space",
    "above",
    "first_largest",
    "flat",
    "fold",
    "keep",
    "largest",
    "log_total",
    "scaled",
    "units",
    "weights",
]

LANES = 512
UNIT = 2.0**40
HUGE = 3.4e38
FINITE = torch.finfo(torch.float32).max
BLOCK = 128


class Space:
    """Buffers that every step uses again: to touch fresh memory costs more than to compute in it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """The buffer of that name, float32, in this shape; what it held is lost."""
        size = 1
        for length in shape:
            size *= length
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            self._buffers[name] = buffer = torch.empty(size, dtype=torch.float32, device=self.device)
        return buffer[:size].view(shape)


def first_largest(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row, NaN if there is one, and the first place where it stands."""
    done = inference.first_largest(x_RV)
    if done is not None:
        return done
    vocabulary = x_RV.shape[1]
    blocks = vocabulary // BLOCK
    if blocks < 4:
        value, place = x_RV.max(1)
        return value, place
    whole = x_RV[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    value, block = whole.amax(2).max(1)
    inside = whole.gather(1, block[:, None, None].expand(-1, 1, BLOCK))[:, 0]
    place = block * BLOCK + inside.argmax(1)
    if vocabulary % BLOCK:
        rest, spot = x_RV[:, blocks * BLOCK :].max(1)
        later = (rest > value) | (rest.isnan() & ~value.isnan())
        value, place = torch.where(later, rest, value), torch.where(later, spot + blocks * BLOCK, place)
    return value, place


def largest(x_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values of each row, descending, and their places: ``topk`` of the few columns that can hold them."""
    slices = math.isqrt(x_RV.shape[1] // count)
    if slices < 3:
        values, places = x_RV.topk(count, 1)
        return values, places
    width = x_RV.shape[1] // slices
    whole = x_RV[:, : slices * width].unflatten(1, (slices, width))
    column = whole.amax(1).topk(count, 1).indices
    found = whole.gather(2, column[:, None].expand(-1, slices, -1)).flatten(1)
    places = (column[:, None] + width * torch.arange(slices, device=x_RV.device)[:, None]).flatten(1)
    if rest := x_RV.shape[1] - slices * width:
        found = torch.cat([found, x_RV[:, slices * width :]], 1)
        last = torch.arange(x_RV.shape[1] - rest, x_RV.shape[1], device=x_RV.device)
        places = torch.cat([places, last.expand(len(places), -1)], 1)
    values, spots = found.topk(count, 1)
    return values, places.gather(1, spots)


def scaled(x_RV: Tensor, temperature_R: Tensor | None, space: Space) -> tuple[Tensor, Tensor]:
    """Logits less the largest one of their row, over the temperature; and that largest one.

    Infinite logits count as the largest finite number, so that they share all probability.
    """
    most = x_RV.amax(1)
    s_RV = torch.clamp(x_RV, max=FINITE, out=space.take("scaled", *x_RV.shape))
    s_RV.sub_(most.clamp(min=-FINITE, max=FINITE)[:, None])
    return (s_RV if temperature_R is None else s_RV.div_(temperature_R[:, None])), most


def weights(s_RV: Tensor, space: Space) -> Tensor:
    """``exp(s)`` in columns of lanes (R, B, LANES), zero beyond the vocabulary."""
    rows, vocabulary = s_RV.shape
    w_RBL = space.take("weights", rows, -(-vocabulary // LANES), LANES)
    torch.exp(s_RV, out=flat(w_RBL)[:, :vocabulary])
    flat(w_RBL)[:, vocabulary:] = 0
    return w_RBL


def flat(w_RBL: Tensor) -> Tensor:
    """Weights in the order of the vocabulary, with zeros at the end: a view (R, B * LANES)."""
    return w_RBL.view(len(w_RBL), -1)


def fold(w_RBL: Tensor, space: Space) -> Tensor:
    """The sum over B, (R, L), halving B again and again: the order does not depend on R."""
    rows, blocks, lanes = w_RBL.shape
    if blocks == 1:
        return w_RBL[:, 0]
    half = blocks // 2
    sums = torch.add(w_RBL[:, :half], w_RBL[:, half : 2 * half], out=space.take("sums", rows, half, lanes))
    if blocks % 2:
        sums[:, 0] += w_RBL[:, -1]
    while half > 1:
        half, odd = half // 2, half % 2
        if odd:
            sums[:, 0] += sums[:, 2 * half]
        sums[:, :half] += sums[:, half : 2 * half]
    return sums[:, 0]


def units(w: Tensor) -> Tensor:
    """Weights as whole numbers, whose sums are exact."""
    return (w.to(torch.float64) * UNIT).to(torch.int64)


def log_total(w_RBL: Tensor, space: Space) -> Tensor:
    """The logarithm of the sum of all weights of each row, float64."""
    return (units(fold(w_RBL, space)).sum(1).to(torch.float64) / UNIT).log()


def above(w_RBL: Tensor, pivot_R: Tensor, space: Space) -> Tensor:
    """The weights that are greater than the pivot of their row, and zero for the others."""
    mask = torch.sub(w_RBL, pivot_R[:, None, None], out=space.take("mask", *w_RBL.shape))
    return mask.mul_(HUGE).clamp_(0, 1).mul_(w_RBL)


def keep(w_RBL: Tensor, measure: Tensor, least_R: Tensor, space: Space) -> None:
    """Set to zero, in place, the weights whose measure, (R, B, L) or (R, V), is less than the least of their row."""
    least = least_R.view(-1, *[1] * (measure.dim() - 1))
    mask = torch.sub(measure, least, out=space.take("mask", *measure.shape)).mul_(HUGE).add_(1).clamp_(0, 1)
    target = w_RBL if mask.dim() == 3 else flat(w_RBL)[:, : mask.shape[1]]
    target.mul_(mask)
