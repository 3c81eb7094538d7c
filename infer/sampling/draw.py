"""Stages 5 to 9 of :mod:`infer.params`, and the draw: exact, without sorting the vocabulary.

A token is drawn in proportion to its weight ``exp((x - max x) / temperature)`` by inverting the cumulative sum in two
levels. Top-p is met by rejection: a token stands if the tokens that are likelier weigh less than top-p of everything;
otherwise the draw is repeated among those likelier tokens, of which the nucleus is a part. Each repetition has its own
random number; most draws need none.

Nothing depends on the other rows: maxima are exact, float sums are taken in a tree that the vocabulary alone fixes,
and the rest is summed as whole numbers. Comparisons are arithmetic, because torch vectorizes that on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.rng import bits, key

__all__ = [
    "OPEN",
    "Draw",
    "Drawn",
    "draw",
    "first_largest",
    "flat",
    "least_kept",
    "log_total",
    "scaled",
    "truncated",
    "weights",
]

LANES = 512
UNIT = 2.0**40
HUGE = 3.4e38
FINITE = torch.finfo(torch.float32).max
STREAM = key("sampling")
STRIDE = 1 << 20
BLOCK = 128
WIDTHS = (128, 2048)
OPEN = 1 << 62
SMALLEST = 1e-38
LOWEST = -200.0  # below this a float32 weight is zero


def first_largest(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row, NaN if there is one, and the first place where it stands."""
    vocabulary = x_RV.shape[1]
    blocks = vocabulary // BLOCK
    if blocks < 4:
        value, place = x_RV.max(1)
        return value, place
    whole = x_RV[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    largest, block = whole.amax(2).max(1)
    inside = whole.gather(1, block[:, None, None].expand(-1, 1, BLOCK))[:, 0]
    place = block * BLOCK + inside.argmax(1)
    if vocabulary % BLOCK:
        rest, spot = x_RV[:, blocks * BLOCK :].max(1)
        later = (rest > largest) | (rest.isnan() & ~largest.isnan())
        largest, place = torch.where(later, rest, largest), torch.where(later, spot + blocks * BLOCK, place)
    return largest, place


def scaled(x_RV: Tensor, temperature_R: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits less the largest one of their row, over the temperature; and that largest one.

    Infinite logits count as the largest finite number, so that they share all probability.
    """
    largest = x_RV.amax(1)
    s_RV = x_RV.clamp(max=FINITE).sub_(largest.clamp(min=-FINITE, max=FINITE)[:, None])
    return (s_RV if temperature_R is None else s_RV.div_(temperature_R[:, None])), largest


def weights(s_RV: Tensor) -> Tensor:
    """``exp(s)`` in columns of lanes (R, B, LANES), zero beyond the vocabulary."""
    rows, vocabulary = s_RV.shape
    blocks = -(-vocabulary // LANES)
    w_RBL = s_RV.new_empty(rows, blocks, LANES)
    torch.exp(s_RV, out=flat(w_RBL)[:, :vocabulary])
    flat(w_RBL)[:, vocabulary:] = 0
    return w_RBL


def flat(w_RBL: Tensor) -> Tensor:
    """Weights in the order of the vocabulary, with zeros at the end: a view (R, B * LANES)."""
    return w_RBL.view(len(w_RBL), -1)


def fold(w_RBL: Tensor) -> Tensor:
    """The sum over B, (R, L), halving B again and again: the order does not depend on R."""
    blocks = w_RBL.shape[1]
    while blocks > 1:
        half = (blocks + 1) // 2
        if blocks % 2:
            sums = w_RBL[:, :half].clone()
            sums[:, : half - 1] += w_RBL[:, half:]
        else:
            sums = w_RBL[:, :half] + w_RBL[:, half:]
        w_RBL, blocks = sums, half
    return w_RBL[:, 0]


def units(w: Tensor) -> Tensor:
    """Weights as whole numbers, whose sums are exact."""
    return (w.to(torch.float64) * UNIT).to(torch.int64)


def log_total(w_RBL: Tensor) -> Tensor:
    """The logarithm of the sum of all weights of each row, float64."""
    return (units(fold(w_RBL)).sum(1).to(torch.float64) / UNIT).log()


def above(w_RBL: Tensor, pivot_R: Tensor) -> Tensor:
    """The weights that are greater than the pivot of their row, and zero for the others."""
    return (w_RBL - pivot_R[:, None, None]).mul_(HUGE).clamp_(0, 1).mul_(w_RBL)


def keep(w_RBL: Tensor, measure: Tensor, least_R: Tensor) -> None:
    """Set to zero, in place, the weights whose measure, (R, B, L) or (R, V), is less than the least of their row."""
    mask = (measure - least_R.view(-1, *[1] * (measure.dim() - 1))).mul_(HUGE).add_(1).clamp_(0, 1)
    target = w_RBL if mask.dim() == 3 else w_RBL.view(len(w_RBL), -1)[:, : mask.shape[1]]
    target.mul_(mask)


def least_kept(score_RV: Tensor, w_RV: Tensor, limit_R: Tensor) -> Tensor:
    """The lowest score of the fewest tokens, highest scores first, that weigh at least the limit; -inf if all must.

    Args:
        score_RV: what the tokens are ordered by.
        w_RV: their weights; limit_R: int64, in units; ``OPEN``: no limit.
    """
    least = score_RV.new_full(limit_R.shape, -torch.inf)
    rows = (limit_R < OPEN).nonzero()[:, 0]
    for width in (*WIDTHS, score_RV.shape[1]):
        if not rows.numel():
            break
        top = score_RV[rows].topk(min(width, score_RV.shape[1]), 1)
        mass = units(w_RV[rows].gather(1, top.indices))
        total = mass.cumsum(1)
        last = (((total - mass) < limit_R[rows, None]).sum(1) - 1).clamp_(min=0)
        least[rows] = top.values.gather(1, last[:, None])[:, 0]
        rows = rows[total[:, -1] < limit_R[rows]]
    return least


@dataclass(slots=True, kw_only=True)
class Draw:
    """The parameters of some rows as tensors (R,), float32 where not said otherwise; None: no row has that stage.

    Attributes:
        seed, index: int64, of the request and of the token.
        top_k: int64; 0: all.
        most: the largest of ``top_k``.
        typical_p: less than 1 in every row.
    """

    seed: Tensor
    index: Tensor
    temperature: Tensor
    top_k: Tensor | None = None
    most: int = 0
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    typical_p: Tensor | None = None


class Drawn(NamedTuple):
    """Tokens that were drawn, and what they were drawn from.

    Attributes:
        tokens: int64 (R,).
        largest: the largest logit of each row.
        s_RV: scaled logits.
        w_RBL: weights; zero where top-k, min-p or typical left the token out.
        limit: what the tokens likelier than one in the nucleus weigh less than, in units; ``OPEN``: anything.
    """

    tokens: Tensor
    largest: Tensor
    s_RV: Tensor
    w_RBL: Tensor
    limit: Tensor


def draw(x_RV: Tensor, how: Draw) -> Drawn:
    """Draw one token a row. Rows without a finite logit, or with NaN, get some token."""
    s_RV, largest = scaled(x_RV, how.temperature)
    w_RBL = weights(s_RV)
    limit = torch.full_like(how.seed, OPEN)
    if how.top_k is not None:
        keep(w_RBL, x_RV.clamp(max=FINITE), _kth(x_RV, how.top_k, how.most))
    lanes = units(fold(w_RBL))
    if how.top_p is not None:
        share = (how.top_p.to(torch.float64) * lanes.sum(1).to(torch.float64)).to(torch.int64).clamp_(min=1)
        sound = (largest > -torch.inf) & (how.top_p < 1)  # false of NaN
        limit = torch.where(sound, share, limit)
    if how.min_p is not None:
        keep(w_RBL, w_RBL, how.min_p)
    if how.typical_p is not None:
        keep(w_RBL, w_RBL, least_kept(flat(w_RBL), flat(w_RBL), limit))
        _keep_typical(w_RBL, s_RV, how.typical_p)
        limit.fill_(OPEN)
    if how.min_p is not None or how.typical_p is not None:
        lanes = units(fold(w_RBL))
    tokens = _choose(w_RBL, lanes, limit if how.top_p is not None and how.typical_p is None else None, how)
    return Drawn(tokens.clamp_(max=x_RV.shape[1] - 1), largest, s_RV, w_RBL, limit)


def truncated(drawn: Drawn, some: Sequence[int], cut_R: Tensor) -> tuple[Tensor, Tensor]:
    """The distribution that some rows were drawn from.

    Args:
        cut_R: whether the row has any of top-k, top-p, min-p and typical.

    Returns:
        scaled logits, -inf where a token was left out; float64 logarithm of the sum of their exponentials.
    """
    s_RV, w_RBL, tokens = drawn.s_RV[some], drawn.w_RBL[some], drawn.tokens[some]
    least = least_kept(flat(w_RBL), flat(w_RBL), drawn.limit[some]).clamp_(min=SMALLEST)
    least = torch.minimum(least, flat(w_RBL).gather(1, tokens[:, None])[:, 0])
    out = (flat(w_RBL)[:, : s_RV.shape[1]] < least[:, None]) & cut_R[:, None]
    keep(w_RBL, w_RBL, torch.where(cut_R, least, 0))
    return s_RV.masked_fill_(out, -torch.inf), log_total(w_RBL)


def _kth(x_RV: Tensor, top_k: Tensor, most: int) -> Tensor:
    """The least of the k largest values of each row; the least finite number where k = 0."""
    place = (top_k - 1).clamp_(min=0)[:, None]
    values = x_RV.topk(most, 1).values.gather(1, place)[:, 0].clamp_(min=-FINITE, max=FINITE)
    return torch.where(top_k > 0, values, -FINITE)


def _keep_typical(w_RBL: Tensor, s_RV: Tensor, typical_p: Tensor) -> None:
    """Meister et al., 2202.00666: surprise less entropy is the mean of ``s`` less ``s``."""
    w_RV = flat(w_RBL)[:, : s_RV.shape[1]]
    terms = w_RBL.clone()
    flat(terms)[:, : s_RV.shape[1]].mul_(s_RV.clamp(min=LOWEST))
    total = units(fold(w_RBL)).sum(1).to(torch.float64)
    mean = (units(fold(terms)).sum(1).to(torch.float64) / total).to(s_RV.dtype)
    score = (s_RV - mean[:, None]).abs_().neg_().masked_fill_(w_RV == 0, -torch.inf)
    limit = (typical_p.to(torch.float64) * total).to(torch.int64).clamp_(min=1)
    keep(w_RBL, score, least_kept(score, w_RV, limit).clamp_(min=-FINITE))


def _choose(w_RBL: Tensor, lanes_RL: Tensor, limit: Tensor | None, how: Draw) -> Tensor:
    """Tokens in proportion to their weights, drawn again until all likelier ones weigh less than the limit."""
    tokens = _pick(w_RBL, lanes_RL, bits(STREAM, how.seed + how.index * STRIDE))
    if limit is None:
        return tokens
    rows, chosen, trial = torch.arange(len(tokens), device=tokens.device), tokens, 0
    while True:
        w_RBL = above(w_RBL, flat(w_RBL).gather(1, chosen[:, None])[:, 0])
        lanes_RL = units(fold(w_RBL))
        again = (lanes_RL.sum(1) >= limit).nonzero()[:, 0]
        if not again.numel():
            return tokens
        trial += 1
        rows, w_RBL, lanes_RL, limit = rows[again], w_RBL[again], lanes_RL[again], limit[again]
        chosen = _pick(w_RBL, lanes_RL, bits(STREAM, how.seed[rows] + how.index[rows] * STRIDE + trial))
        tokens[rows] = chosen


def _pick(w_RBL: Tensor, lanes_RL: Tensor, random_R: Tensor) -> Tensor:
    """A token in proportion to its weight: first its lane, then its place there, each by half of the random bits."""
    blocks = w_RBL.shape[1]
    lane = _invert(lanes_RL, random_R >> 32)
    inside = w_RBL.gather(2, lane[:, None, None].expand(-1, blocks, 1))[:, :, 0]
    block = _invert(units(inside / inside.amax(1, keepdim=True)), random_R)
    return block * LANES + lane


def _invert(units_RN: Tensor, random_R: Tensor) -> Tensor:
    """The place where the cumulative sum first exceeds a random part, of 32 bits, of the whole."""
    total = units_RN.cumsum(1)
    whole = total[:, -1:]
    part = (random_R & 0xFFFFFFFF).to(torch.float64).mul_(2.0**-32)[:, None]
    target = torch.minimum((part * whole.to(torch.float64)).to(torch.int64), whole - 1)
    return torch.searchsorted(total, target, right=True)[:, 0].clamp_(max=units_RN.shape[1] - 1)
