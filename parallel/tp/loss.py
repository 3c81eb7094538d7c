"""Cross-entropy over a vocabulary that is cut over the tensor-parallel axis.

For logits ``x`` of one token with label ``y``, vocabulary V, smoothing ``e`` and z-loss weight ``z``::

    lse  = log sum_j exp(x_j)
    loss = lse - (1 - e) x_y - e/V sum_j x_j + z lse^2
    d loss / d x_j = (1 + 2 z lse) softmax_j - (1 - e) [j = y] - e/V

Label smoothing is torch's (arXiv 1512.00567), the z-loss PaLM's (arXiv 2204.02311, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel import comm
from parallel.deferral import Deferral
from parallel.errors import DataError
from parallel.ledger import caller
from parallel.mesh import Axis
from parallel.tp.method import Dense, LinearMethod

__all__ = ["IGNORE", "LossSum", "vocab_parallel_cross_entropy", "vocab_parallel_linear_cross_entropy"]

IGNORE = -100
"""The label of a token whose prediction does not count."""


@dataclass(frozen=True, slots=True)
class _Terms:
    """What the loss of a block of tokens needs to know beside its logits."""

    axis: Axis
    vocabulary: int
    smoothing: float
    z_loss: float
    method: LinearMethod = field(default_factory=Dense)


def _loss_and_softmax(logits_TV: Tensor, labels_T: Tensor, terms: _Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token loss, log-sum-exp, and the softmax written over ``logits_TV`` (float, this rank's columns)."""
    axis, columns = terms.axis, logits_TV.shape[1]
    first = axis.rank * columns
    valid = max(0, min(columns, terms.vocabulary - first))
    if valid < columns:
        logits_TV[:, valid:] = float("-inf")
    high_T = comm.sum_(logits_TV.amax(1), axis, "max")
    logits_TV.sub_(high_T[:, None])
    local_T = labels_T - first
    own_T = (local_T >= 0) & (local_T < columns)
    picked_T = logits_TV.gather(1, (local_T * own_T)[:, None])[:, 0].masked_fill(~own_T, 0.0)
    parts = [picked_T]
    if terms.smoothing:
        parts.append(logits_TV[:, :valid].sum(1))
    logits_TV.exp_()
    parts.append(logits_TV.sum(1))
    sums = comm.sum_(torch.stack(parts), axis)
    total_T = sums[-1]
    lse_T = total_T.log() + high_T
    logits_TV.div_(total_T[:, None])
    loss_T = lse_T - high_T - (1 - terms.smoothing) * sums[0]
    if terms.smoothing:
        loss_T -= terms.smoothing / terms.vocabulary * sums[1]
    if terms.z_loss:
        loss_T += terms.z_loss * lse_T.square()
    return loss_T.masked_fill_(labels_T == IGNORE, 0.0), lse_T, logits_TV


def _gradient_(softmax_TV: Tensor, lse_T: Tensor, labels_T: Tensor, weight_T: Tensor, terms: _Terms) -> Tensor:
    """Turn the softmax into the gradient of ``sum(weight * loss)`` by the logits, in place."""
    columns = softmax_TV.shape[1]
    first = terms.axis.rank * columns
    valid = max(0, min(columns, terms.vocabulary - first))
    weight_T = weight_T.masked_fill(labels_T == IGNORE, 0.0)
    scale_T = weight_T * (1 + 2 * terms.z_loss * lse_T) if terms.z_loss else weight_T
    softmax_TV.mul_(scale_T[:, None])
    local_T = labels_T - first
    own_T = (local_T >= 0) & (local_T < columns)
    hit_T = (weight_T * (terms.smoothing - 1)).masked_fill(~own_T, 0.0)
    softmax_TV.scatter_add_(1, (local_T * own_T)[:, None], hit_T[:, None])
    if terms.smoothing:
        softmax_TV[:, :valid].sub_((weight_T * (terms.smoothing / terms.vocabulary))[:, None])
    return softmax_TV


def _check(labels_T: Tensor, vocabulary: int) -> None:
    if labels_T.device.type == "cpu":
        bad_T = labels_T[((labels_T < 0) & (labels_T != IGNORE)) | (labels_T >= vocabulary)]
        if bad_T.numel():
            raise DataError(f"label {int(bad_T[0])} is outside the vocabulary of {vocabulary}")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, terms: _Terms) -> Tensor:
        wide = logits_TV.to(_wide(logits_TV.dtype), copy=True)
        loss_T, lse_T, softmax_TV = _loss_and_softmax(wide, labels_T, terms)
        ctx.terms, ctx.dtype = terms, logits_TV.dtype
        ctx.save_for_backward(softmax_TV, lse_T, labels_T)
        return loss_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        softmax_TV, lse_T, labels_T = ctx.saved_tensors
        return _gradient_(softmax_TV.clone(), lse_T, labels_T, grads[0], ctx.terms).to(ctx.dtype), None, None


def vocab_parallel_cross_entropy(
    logits_TV: Tensor,
    labels_T: Tensor,
    axis: Axis,
    *,
    vocabulary: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The loss of each token, float32 or wider, the same on every rank; 0 where the label is -100.

    Args:
        logits_TV: this rank's columns (T, V / size) of the logits, padding included.
        labels_T: labels in the whole vocabulary.
        axis: the tensor-parallel axis.
        vocabulary: columns of all ranks without padding; default: all.
        label_smoothing: weight of the uniform distribution.
        z_loss: weight of the squared log-sum-exp.

    Raises:
        DataError: a label outside the vocabulary (checked where the labels are on the CPU).
    """
    terms = _Terms(axis, vocabulary or logits_TV.shape[1] * axis.size, label_smoothing, z_loss)
    _check(labels_T, terms.vocabulary)
    return comm.apply(_CrossEntropy, logits_TV, labels_T, terms)


class LossSum(NamedTuple):
    """The scaled sum of the losses, which can be differentiated, and the loss of each token, which cannot."""

    total: Tensor
    losses_T: Tensor


@dataclass(frozen=True, slots=True)
class _Head:
    """How head and loss are one."""

    terms: _Terms
    scale: float
    block: int
    sequence: bool
    deferral: Deferral

    def gathered(self, x: Tensor, tokens: int, place: str) -> Tensor:
        """The input of all tokens."""
        return comm.start_all_gather(x, self.terms.axis, tokens, place).wait() if self.sequence else x

    def blocks(
        self, x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, losses_T: Tensor
    ) -> Iterator[tuple[slice, Callable[[], Tensor]]]:
        """Write the losses block by block; what forms the gradient by the logits of the block just done."""
        for start in range(0, x_TD.shape[0], self.block):
            rows = slice(start, start + self.block)
            labels = labels_T[rows]
            logits = self.terms.method.product(x_TD[rows], weight_VD, None).to(losses_T.dtype)
            losses_T[rows], lse, softmax = _loss_and_softmax(logits, labels, self.terms)
            weight = torch.full_like(lse, self.scale)
            yield rows, lambda s=softmax, at=(lse, labels, weight): _gradient_(s, *at, self.terms).to(x_TD.dtype)

    def start_sum(self, gx_TD: Tensor, place: str) -> comm.Pending:
        """Sum the gradient by the input over the axis; of it only this rank's tokens are kept."""
        start = comm.start_reduce_scatter if self.sequence else comm.start_all_reduce
        return start(gx_TD, self.terms.axis, place=place)


class _LinearCrossEntropy(torch.autograd.Function):
    """Head and loss; input's and weight's gradients are formed on the way, so that no logits are kept or made twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_VD: Tensor, labels_T: Tensor, head: _Head) -> tuple[Tensor, Tensor]:
        place, method, wide = caller(__file__, comm.__file__), head.terms.method, _wide(x.dtype)
        x_TD = head.gathered(x, labels_T.shape[0], place)
        losses_T = torch.empty(x_TD.shape[0], dtype=wide, device=x_TD.device)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        gx_TD = torch.empty_like(x_TD) if needs_x else None
        gw_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        for rows, form in head.blocks(x_TD, weight_VD, labels_T, losses_T):
            if gx_TD is None and gw_VD is None:
                continue
            gradient = form()
            if gx_TD is not None:
                gx_TD[rows] = method.input_gradient(gradient, weight_VD)
            if gw_VD is not None:
                gw_VD += method.weight_gradient(gradient, x_TD[rows])
        if gx_TD is not None:
            gx_TD = head.start_sum(gx_TD, place).wait()
        ctx.grads = gx_TD, None if gw_VD is None else gw_VD.to(weight_VD.dtype)
        ctx.mark_non_differentiable(losses_T)
        return losses_T.sum() * head.scale, losses_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gx, gw = (None if grad is None else _scaled(grad, grads[0]) for grad in ctx.grads)
        ctx.grads = None
        return gx, gw, None, None


class _ShortLinearCrossEntropy(torch.autograd.Function):
    """The same for fewer tokens than hidden values: the gradient by the logits, which is smaller than the weight's, is
    kept instead, and the products are done in backward, where a pipeline expects them and may put the weight's off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_VD: Tensor, labels_T: Tensor, head: _Head) -> tuple[Tensor, Tensor]:
        place = caller(__file__, comm.__file__)
        x_TD = head.gathered(x, labels_T.shape[0], place)
        losses_T = torch.empty(x_TD.shape[0], dtype=_wide(x.dtype), device=x_TD.device)
        formed = [form() for _, form in head.blocks(x_TD, weight_VD, labels_T, losses_T)]
        ctx.save_for_backward(x_TD, weight_VD, *formed)
        ctx.head, ctx.place, ctx.parameter = head, place + " (backward)", weight_VD
        ctx.mark_non_differentiable(losses_T)
        return losses_T.sum() * head.scale, losses_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_TD, weight_VD, *formed = ctx.saved_tensors
        head, method = ctx.head, ctx.head.terms.method
        gradient_TV = _scaled(formed[0] if len(formed) == 1 else torch.cat(formed), grads[0])
        pending = gw = None
        if ctx.needs_input_grad[0]:
            pending = head.start_sum(method.input_gradient(gradient_TV, weight_VD), ctx.place)
        if ctx.needs_input_grad[1]:
            gw = head.deferral(ctx.parameter, lambda: method.weight_gradient(gradient_TV, x_TD))
        return pending.wait() if pending else None, gw, None, None


def _scaled(gradient: Tensor, by: Tensor) -> Tensor:
    return gradient if by.device.type == "cpu" and by.item() == 1.0 else gradient * by.to(gradient.dtype)


def vocab_parallel_linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    axis: Axis,
    *,
    vocabulary: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    sequence_parallel: bool = False,
    block: int = 512,
    method: LinearMethod | None = None,
    deferral: Deferral | None = None,
) -> LossSum:
    """The head and the loss as one, ``block`` tokens at a time: the T x V logits never exist whole in float32.

    With more tokens than hidden values the gradients are formed in forward; else in backward (docs/decisions/005).

    Args:
        x_TD: what the head is applied to; under sequence parallelism this rank's piece of the tokens.
        weight_VD: this rank's rows (V / size, D) of the head.
        labels_T: labels of all tokens, -100 where none counts.
        axis: the tensor-parallel axis.
        vocabulary, label_smoothing, z_loss: as in :func:`vocab_parallel_cross_entropy`.
        scale: factor of every token's loss in ``total`` (one over the number of tokens that count).
        sequence_parallel: gather the tokens first.
        block: tokens whose logits exist at a time.
        method: how the head multiplies.
        deferral: asked in backward whether the gradient of the weight is wanted at once; default: it is.

    Raises:
        DataError: a label outside the vocabulary (checked where the labels are on the CPU).
    """
    method = Dense() if method is None else method
    terms = _Terms(axis, vocabulary or weight_VD.shape[0] * axis.size, label_smoothing, z_loss, method)
    _check(labels_T, terms.vocabulary)
    head = _Head(terms, scale, block, sequence_parallel, Deferral() if deferral is None else deferral)
    trains = torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad)
    short = trains and labels_T.shape[0] <= x_TD.shape[1]
    function = _ShortLinearCrossEntropy if short else _LinearCrossEntropy
    return LossSum(*comm.apply(function, x_TD, weight_VD, labels_T, head))
