"""Stages 6 to 10 of :mod:`infer.params`, and the draw: exact, without sorting the vocabulary.

A token is drawn in proportion to its weight by inverting the cumulative sum in two levels. Top-p is met by rejection: a
token stands if the tokens that are likelier weigh less than top-p of everything; otherwise the draw is repeated among
those likelier tokens, of which the nucleus is a part. Each repetition has its own random number; most draws need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from infer.sampling.weights import (
    FINITE,
    LANES,
    Space,
    above,
    flat,
    fold,
    keep,
    largest,
    log_total,
    scaled,
    units,
    weights,
)
from parallel.rng import bits, key

__all__ = ["Draw", "Drawn", "draw", "least_kept", "truncated", "width_of"]

STREAM = key("sampling")
STRIDE = 1 << 20
WIDTHS = (128, 1024)
OPEN = 1 << 62
SMALLEST = 1e-38
LOWEST = -200.0  # below this a float32 weight is zero


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
        values, places = largest(score_RV[rows], min(width, score_RV.shape[1]))
        mass = units(w_RV[rows].gather(1, places))
        total = mass.cumsum(1)
        last = (((total - mass) < limit_R[rows, None]).sum(1) - 1).clamp_(min=0)
        least[rows] = values.gather(1, last[:, None])[:, 0]
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
    """Tokens that were drawn, and what they were drawn from: N columns, which are the vocabulary or some of it.

    Attributes:
        tokens: int64 (R,).
        largest: the largest logit of each row.
        chosen: the columns of the tokens (R,).
        s_RN: scaled logits.
        w_RBL: weights; zero where top-k, min-p or typical left the token out.
        limit: what the tokens likelier than one in the nucleus weigh less than, in units; ``OPEN``: anything.
        places_RN: the token of each column; None: its number.
    """

    tokens: Tensor
    largest: Tensor
    chosen: Tensor
    s_RN: Tensor
    w_RBL: Tensor
    limit: Tensor
    places_RN: Tensor | None


def width_of(top_k: int, vocabulary: int) -> int:
    """How many of the largest logits are enough for top-k, with room for 32 equals at the end; 0: take all."""
    for width in WIDTHS[:2]:
        if 0 < top_k <= width - 32 and 8 * width <= vocabulary:
            return width
    return 0


def draw(x_RV: Tensor, how: Draw, space: Space, width: int = 0) -> Drawn:
    """Draw one token a row, from all columns or from the ``width`` largest, which :func:`width_of` must give each row.

    Rows without a finite logit, or with NaN, get some token.
    """
    places = None
    if width:
        places = largest(x_RV, width)[1].sort(1).values  # in the order of the vocabulary, which rounding cannot change
        x_RV = x_RV.gather(1, places)
    s_RN, most = scaled(x_RV, how.temperature, space)
    w_RBL = weights(s_RN, space)
    limit = torch.full_like(how.seed, OPEN)
    if how.top_k is not None:
        kth = _kth(x_RV, how.top_k, how.most)
        keep(w_RBL, torch.clamp(x_RV, max=FINITE, out=space.take("mask", *x_RV.shape)), kth, space)
    lanes = units(fold(w_RBL, space))
    if how.top_p is not None:
        share = (how.top_p.to(torch.float64) * lanes.sum(1).to(torch.float64)).to(torch.int64).clamp_(min=1)
        sound = (most > -torch.inf) & (how.top_p < 1)  # false of NaN
        limit = torch.where(sound, share, limit)
    if how.min_p is not None:
        keep(w_RBL, w_RBL, how.min_p, space)
    if how.typical_p is not None:
        keep(w_RBL, w_RBL, least_kept(flat(w_RBL), flat(w_RBL), limit), space)
        _keep_typical(w_RBL, s_RN, how.typical_p, space)
        limit.fill_(OPEN)
    if how.min_p is not None or how.typical_p is not None:
        lanes = units(fold(w_RBL, space))
    bounded = how.top_p is not None and how.typical_p is None
    chosen = _choose(w_RBL, lanes, limit if bounded else None, how, space).clamp_(max=x_RV.shape[1] - 1)
    tokens = chosen if places is None else places.gather(1, chosen[:, None])[:, 0]
    return Drawn(tokens, most, chosen, s_RN, w_RBL, limit, places)


def truncated(drawn: Drawn, some: Sequence[int], cut_R: Tensor, space: Space) -> tuple[Tensor, Tensor]:
    """The distribution that some rows were drawn from.

    Args:
        cut_R: whether the row has any of top-k, top-p, min-p and typical.

    Returns:
        scaled logits, -inf where a token was left out; float64 logarithm of the sum of their exponentials.
    """
    s_RN, w_RBL, chosen = drawn.s_RN[some], drawn.w_RBL[some], drawn.chosen[some]
    least = least_kept(flat(w_RBL), flat(w_RBL), drawn.limit[some]).clamp_(min=SMALLEST)
    least = torch.minimum(least, flat(w_RBL).gather(1, chosen[:, None])[:, 0])
    out = (flat(w_RBL)[:, : s_RN.shape[1]] < least[:, None]) & cut_R[:, None]
    keep(w_RBL, w_RBL, torch.where(cut_R, least, 0), space)
    return s_RN.masked_fill_(out, -torch.inf), log_total(w_RBL, space)


def _kth(x_RV: Tensor, top_k: Tensor, most: int) -> Tensor:
    """The least of the k largest values of each row; the least finite number where k = 0."""
    place = (top_k - 1).clamp_(min=0)[:, None]
    values = largest(x_RV, most)[0].gather(1, place)[:, 0].clamp_(min=-FINITE, max=FINITE)
    return torch.where(top_k > 0, values, -FINITE)


def _keep_typical(w_RBL: Tensor, s_RV: Tensor, typical_p: Tensor, space: Space) -> None:
    """Meister et al., 2202.00666: surprise less entropy is the mean of ``s`` less ``s``."""
    w_RV = flat(w_RBL)[:, : s_RV.shape[1]]
    terms = w_RBL.clone()
    flat(terms)[:, : s_RV.shape[1]].mul_(s_RV.clamp(min=LOWEST))
    total = units(fold(w_RBL, space)).sum(1).to(torch.float64)
    mean = (units(fold(terms, space)).sum(1).to(torch.float64) / total).to(s_RV.dtype)
    score = (s_RV - mean[:, None]).abs_().neg_().masked_fill_(w_RV == 0, -torch.inf)
    limit = (typical_p.to(torch.float64) * total).to(torch.int64).clamp_(min=1)
    keep(w_RBL, score, least_kept(score, w_RV, limit).clamp_(min=-FINITE), space)


def _choose(w_RBL: Tensor, lanes_RL: Tensor, limit: Tensor | None, how: Draw, space: Space) -> Tensor:
    """Tokens in proportion to their weights, drawn again until all likelier ones weigh less than the limit."""
    tokens = _pick(w_RBL, lanes_RL, bits(STREAM, how.seed + how.index * STRIDE))
    if limit is None:
        return tokens
    rows, chosen, trial = torch.arange(len(tokens), device=tokens.device), tokens, 0
    while True:
        w_RBL = above(w_RBL, flat(w_RBL).gather(1, chosen[:, None])[:, 0], space)
        lanes_RL = units(fold(w_RBL, space))
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
