"""Every collective of the project, over an :class:`~parallel.mesh.Axis`.

At size 1 each is the identity and records nothing. On a fake axis each gives a result of the right shape.

Differentiable collectives come in conjugate pairs. What a gradient means on each rank must be said: a tensor is
*replicated* (the same value on every rank), *partial* (the value is the sum over the ranks) or *split* (each rank holds
its piece).

======================  ======================  ==============================
forward                 values                  backward
======================  ======================  ==============================
:func:`all_reduce`      partial -> replicated   identity
:func:`replicate`       replicated -> partial   all-reduce
:func:`all_gather`      split -> replicated     reduce-scatter (or own piece)
:func:`reduce_scatter`  partial -> split        all-gather
:func:`split`           replicated -> split     all-gather
:func:`all_to_all`      split -> split          all-to-all, counts swapped
:func:`broadcast`       one rank -> replicated  reduce to that rank
:func:`shift`           split -> split          shift back
======================  ======================  ==============================

A dim that the axis does not divide is cut as by :func:`torch.chunk`: pieces of ``ceil(total / size)`` rows, the last
ones shorter or empty. What is not differentiable, such as the functions named ``start_``, is in
:mod:`parallel.transport` and can be had from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.ledger import Timed, caller
from parallel.mesh import Axis
from parallel.transport import (
    Pending,
    barrier,
    chunk,
    gather_json,
    receive_,
    record,
    send,
    size_of,
    start_all_gather,
    start_all_reduce,
    start_all_to_all,
    start_receive,
    start_reduce_scatter,
    start_send,
    store,
    sum_,
)

__all__ = [
    "Pending",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "apply",
    "barrier",
    "broadcast",
    "chunk",
    "gather_json",
    "receive_",
    "reduce_scatter",
    "replicate",
    "send",
    "shift",
    "split",
    "start_all_gather",
    "start_all_reduce",
    "start_all_to_all",
    "start_receive",
    "start_reduce_scatter",
    "start_send",
    "store",
    "sum_",
]


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return start_all_reduce(x.clone(memory_format=torch.contiguous_format), axis).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.place = axis, caller(__file__)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        summed = grads[0].clone(memory_format=torch.contiguous_format)
        return start_all_reduce(summed, ctx.axis, place=ctx.place + " (backward)").wait(), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, total: int | None, grad: str) -> Tensor:
        ctx.axis, ctx.place, ctx.grad = axis, caller(__file__), grad
        return start_all_gather(x, axis, total, ctx.place).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        g = grads[0]
        if ctx.grad == "replicated":
            return g[chunk(g.shape[0], ctx.axis)], None, None, None
        return start_reduce_scatter(g, ctx.axis, ctx.place + " (backward)").wait(), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.place, ctx.total = axis, caller(__file__), x.shape[0]
        return start_reduce_scatter(x, axis, ctx.place).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return start_all_gather(grads[0], ctx.axis, ctx.total, ctx.place + " (backward)").wait(), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.place, ctx.total = axis, caller(__file__), x.shape[0]
        return x[chunk(x.shape[0], axis)].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return start_all_gather(grads[0], ctx.axis, ctx.total, ctx.place + " (backward)").wait(), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        ctx.axis, ctx.place, ctx.send, ctx.receive = axis, caller(__file__), send, receive
        return start_all_to_all(x, axis, send, receive, ctx.place).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        place = ctx.place + " (backward)"
        return start_all_to_all(grads[0], ctx.axis, ctx.receive, ctx.send, place).wait(), None, None, None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, source: int) -> Tensor:
        ctx.axis, ctx.place, ctx.source = axis, caller(__file__), source
        out = x.clone(memory_format=torch.contiguous_format)
        share = 1.0 if axis.rank == source else 0.0
        record("broadcast", axis, size_of(x), share, ctx.place)
        if axis.group is not None:
            Timed(dist.broadcast(out, axis.ranks[source], axis.group, async_op=True), axis.ledger).wait()
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        summed = grads[0].clone(memory_format=torch.contiguous_format)
        start_all_reduce(summed, ctx.axis, place=ctx.place + " (backward)").wait()
        return summed if ctx.axis.rank == ctx.source else torch.zeros_like(summed), None, None


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, by: int) -> Tensor:
        ctx.axis, ctx.place, ctx.by = axis, caller(__file__), by
        return _shifted(x, axis, by, ctx.place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _shifted(grads[0], ctx.axis, -ctx.by, ctx.place + " (backward)"), None, None


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis; the gradient passes unchanged (Megatron-LM's ``g``)."""
    return x if axis.size == 1 else apply(_AllReduce, x, axis)


def replicate(x: Tensor, axis: Axis) -> Tensor:
    """``x`` itself; its gradient is summed over the axis (Megatron-LM's ``f``)."""
    return x if axis.size == 1 else apply(_Replicate, x, axis)


def all_gather(
    x: Tensor,
    axis: Axis,
    dim: int = 0,
    total: int | None = None,
    grad: Literal["partial", "replicated"] = "partial",
) -> Tensor:
    """The pieces of ``dim`` from every rank.

    Args:
        x: this rank's piece.
        total: size of ``dim`` of the result, where the axis does not divide it.
        grad: ``partial``: each rank's gradient of the result is one summand of the true one. ``replicated``: each
            rank has the true one.
    """
    if axis.size == 1:
        return x
    return apply(_AllGather, x.movedim(dim, 0), axis, total, grad).movedim(0, dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """This rank's piece of the sum over the axis, cut along ``dim``."""
    return x if axis.size == 1 else apply(_ReduceScatter, x.movedim(dim, 0), axis).movedim(0, dim)


def split(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """This rank's piece of a replicated tensor, cut along ``dim``."""
    return x if axis.size == 1 else apply(_Split, x.movedim(dim, 0), axis).movedim(0, dim)


def all_to_all(x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Exchange rows: ``send[i]`` rows of ``x`` go to rank i, ``receive[i]`` rows come from it, in rank order."""
    return x if axis.size == 1 else apply(_AllToAll, x, axis, send, receive)


def broadcast(x: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """The value that rank ``source`` of the axis has; its gradient is the sum of everybody's."""
    return x if axis.size == 1 else apply(_Broadcast, x, axis, source)


def shift(x: Tensor, axis: Axis, by: int = 1) -> Tensor:
    """The value of the rank ``by`` places before this one, around the ring; all of the same shape."""
    return x if axis.size == 1 or by % axis.size == 0 else apply(_Shift, x, axis, by)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, which torch leaves untyped; without gradients its forward alone, which costs much less."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    forward: Any = function.forward
    return forward(_NoContext(), *arguments)


class _NoContext:
    """Takes what a forward keeps for a backward that never comes."""

    needs_input_grad = (False,) * 16

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def mark_dirty(self, *tensors: Tensor) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


def _shifted(x: Tensor, axis: Axis, by: int, place: str) -> Tensor:
    record("shift", axis, size_of(x), 1.0, place)
    x = x.contiguous()
    out = torch.empty_like(x)
    if axis.group is None:
        return out.copy_(x)
    to, source = (axis.ranks[(axis.rank + step) % axis.size] for step in (by, -by))
    transfers = [dist.P2POp(dist.isend, x, to, axis.group), dist.P2POp(dist.irecv, out, source, axis.group)]
    for work in dist.batch_isend_irecv(transfers):
        Timed(work, axis.ledger).wait()
    return out
