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
ones shorter or empty. The functions named ``start_`` return at once with a :class:`Pending`; what they are given must
not be touched until :meth:`Pending.wait`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store as _default_store

from parallel.ledger import Entry, caller
from parallel.mesh import Axis

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
    "start_receive",
    "start_reduce_scatter",
    "start_send",
    "store",
    "sum_",
]

# torch 2.13 names these *_single and deprecates the names that torch 2.11 has.
_gather_into: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass(slots=True)
class Pending:
    """A collective under way; :meth:`wait` gives its result."""

    result: Tensor
    work: Any = None
    rows: int | None = None

    def is_done(self) -> bool:
        """Whether it is complete, where the backend can tell without waiting (NCCL)."""
        return self.work is None or self.work.is_completed()

    def wait(self) -> Tensor:
        """Block until the collective is complete (on CUDA: until the current stream may use it)."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.result if self.rows is None else self.result[: self.rows]


def chunk(total: int, axis: Axis, rank: int | None = None) -> slice:
    """The rows of ``total`` that ``rank`` (default: this one) holds when a dim is cut over the axis."""
    rank = axis.rank if rank is None else rank
    rows = -(-total // axis.size)
    return slice(min(rank * rows, total), min((rank + 1) * rows, total))


def _record(operation: str, axis: Axis, payload: int, share: float, place: str | None) -> None:
    axis.ledger.record(Entry(operation, axis.name, payload, round(payload * share), place or caller(__file__)))


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def start_all_reduce(
    x: Tensor, axis: Axis, op: Literal["sum", "max", "min"] = "sum", place: str | None = None
) -> Pending:
    """Reduce ``x`` over the axis, in place (contiguous)."""
    if axis.size == 1:
        return Pending(x)
    _record("all_reduce", axis, _bytes(x), 2 * (axis.size - 1) / axis.size, place)
    if axis.group is None:
        return Pending(x)
    return Pending(x, dist.all_reduce(x, _OPERATIONS[op], axis.group, async_op=True))


def start_all_gather(
    x: Tensor, axis: Axis, total: int | None = None, place: str | None = None, out: Tensor | None = None
) -> Pending:
    """Gather the pieces of dim 0, into ``out`` if given; ``total``: rows of the result (default: size times ours)."""
    if axis.size == 1:
        return Pending(x)
    total = x.shape[0] * axis.size if total is None else total
    rows = -(-total // axis.size)
    x = _padded(x, rows)
    out = x.new_empty((rows * axis.size, *x.shape[1:])) if out is None else out
    _record("all_gather", axis, _bytes(out), (axis.size - 1) / axis.size, place)
    cut = None if total == out.shape[0] else total
    if axis.group is None:
        return Pending(out.view(axis.size, -1).copy_(x.view(1, -1).expand(axis.size, -1)).view_as(out), rows=cut)
    return Pending(out, _gather_into(out, x, group=axis.group, async_op=True), cut)


def start_reduce_scatter(x: Tensor, axis: Axis, place: str | None = None) -> Pending:
    """Sum over the axis and keep our piece of dim 0."""
    if axis.size == 1:
        return Pending(x)
    total = x.shape[0]
    rows = -(-total // axis.size)
    x = _padded(x, rows * axis.size)
    out = x.new_empty((rows, *x.shape[1:]))
    _record("reduce_scatter", axis, _bytes(x), (axis.size - 1) / axis.size, place)
    own = chunk(total, axis)
    cut = None if own.stop - own.start == rows else own.stop - own.start
    if axis.group is None:
        return Pending(out.copy_(x[axis.rank * rows : (axis.rank + 1) * rows]), rows=cut)
    return Pending(out, _reduce_scatter_into(out, x, group=axis.group, async_op=True), cut)


def _padded(x: Tensor, rows: int) -> Tensor:
    if x.shape[0] == rows:
        return x.contiguous()
    out = x.new_zeros((rows, *x.shape[1:]))
    out[: x.shape[0]] = x
    return out


def sum_(x: Tensor, axis: Axis, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
    """Reduce ``x`` in place; outside autograd."""
    return start_all_reduce(x, axis, op).wait()


def start_send(x: Tensor, axis: Axis, to: int, tag: int = 0) -> Pending:
    """Send ``x`` to rank ``to`` of the axis, any dtype, outside autograd; not to be changed until it has left.

    With gloo, messages with different tags may overtake one another; NCCL keeps the order and ignores the tag.
    """
    _record("send", axis, _bytes(x), 1.0, None)
    if axis.group is None or not x.numel():
        return Pending(x)
    message = x.contiguous().view(-1).view(torch.uint8)
    return Pending(message, dist.isend(message, axis.ranks[to], axis.group, tag))


def start_receive(x: Tensor, axis: Axis, source: int, tag: int = 0) -> Pending:
    """Fill ``x`` (contiguous) with what rank ``source`` of the axis sends with the same tag."""
    if axis.group is None or not x.numel():
        return Pending(x)
    return Pending(x, dist.irecv(x.view(-1).view(torch.uint8), axis.ranks[source], axis.group, tag))


def send(x: Tensor, axis: Axis, to: int) -> None:
    """:func:`start_send`, and return when ``x`` may be changed."""
    start_send(x, axis, to).wait()


def receive_(x: Tensor, axis: Axis, source: int) -> Tensor:
    """:func:`start_receive`, and return when ``x`` is there."""
    return start_receive(x, axis, source).wait()


def barrier(axis: Axis) -> None:
    """Return when every rank of the axis has called it."""
    if axis.group is not None:
        sum_(torch.zeros(1, device=_device(axis)), axis)


def gather_json(value: Any, axis: Axis) -> list[Any]:
    """A small JSON value of every rank, in the order of the axis."""
    if axis.group is None:
        return [value] * axis.size
    device = _device(axis)
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = start_all_gather(torch.tensor([text.numel()], device=device), axis).wait().tolist()
    texts = start_all_gather(_padded(text, max(lengths)), axis).wait().view(axis.size, -1).cpu()
    return [json.loads(bytes(row[:n].tolist())) for row, n in zip(texts, lengths, strict=True)]


def store(axis: Axis, name: str) -> dist.Store | None:
    """A part of the rendezvous store under a name, for what must be said when collectives fail; None alone."""
    return None if axis.group is None else dist.PrefixStore(f"lockstep/{name}", _default_store())


def _device(axis: Axis) -> torch.device:
    """Where small tensors of our own live: the current CUDA device for NCCL, the CPU otherwise."""
    if axis.group is not None and dist.get_backend(axis.group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


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
        return _exchange(x, axis, send, receive, ctx.place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        back = _exchange(grads[0], ctx.axis, ctx.receive, ctx.send, ctx.place + " (backward)")
        return back, None, None, None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, source: int) -> Tensor:
        ctx.axis, ctx.place, ctx.source = axis, caller(__file__), source
        out = x.clone(memory_format=torch.contiguous_format)
        share = 1.0 if axis.rank == source else 0.0
        _record("broadcast", axis, _bytes(x), share, ctx.place)
        if axis.group is not None:
            dist.broadcast(out, axis.ranks[source], axis.group)
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
    """``function.apply``, which torch leaves untyped."""
    return function.apply(*arguments)


def _exchange(x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int], place: str) -> Tensor:
    out = x.new_empty((sum(receive), *x.shape[1:]))
    away = 1 - send[axis.rank] / max(sum(send), 1)
    _record("all_to_all", axis, _bytes(x), away, place)
    if axis.group is None:
        return out.zero_()
    dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), axis.group)
    return out


def _shifted(x: Tensor, axis: Axis, by: int, place: str) -> Tensor:
    _record("shift", axis, _bytes(x), 1.0, place)
    x = x.contiguous()
    out = torch.empty_like(x)
    if axis.group is None:
        return out.copy_(x)
    to, source = (axis.ranks[(axis.rank + step) % axis.size] for step in (by, -by))
    transfers = [dist.P2POp(dist.isend, x, to, axis.group), dist.P2POp(dist.irecv, out, source, axis.group)]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()
    return out
