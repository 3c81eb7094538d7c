"""What goes over an :class:`~parallel.mesh.Axis`: collectives and messages outside autograd, each in the ledger.

The functions named ``start_`` return at once with a :class:`Pending`; what they are given must not be touched until
:meth:`Pending.wait`. :mod:`parallel.comm` offers all of them, and the differentiable ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store as _default_store

from parallel.ledger import Entry, Timed, caller
from parallel.mesh import Axis

__all__ = [
    "Pending",
    "barrier",
    "chunk",
    "gather_json",
    "receive_",
    "record",
    "send",
    "size_of",
    "start_all_gather",
    "start_all_reduce",
    "start_all_to_all",
    "start_receive",
    "start_reduce_scatter",
    "start_send",
    "store",
    "sum_",
]

# torch 2.13 names these *_single and deprecates the names that torch 2.11 has.
_gather_into: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_OURS = (__file__, str(Path(__file__).with_name("comm.py")))
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

    def there(self, seconds: float) -> bool:
        """Whether it is complete within so many seconds; on CUDA, where :meth:`wait` does not block, at once."""
        if self.work is None or self.result.is_cuda:
            return True
        try:
            self.work.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            return False
        self.work = None
        return True

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


def record(operation: str, axis: Axis, payload: int, share: float, place: str | None) -> None:
    """Enter a collective in the ledger of the axis; ``place``: by default, the caller outside these modules."""
    axis.ledger.record(Entry(operation, axis.name, payload, round(payload * share), place or caller(*_OURS)))


def size_of(x: Tensor) -> int:
    """Bytes."""
    return x.numel() * x.element_size()


def start_all_reduce(
    x: Tensor, axis: Axis, op: Literal["sum", "max", "min"] = "sum", place: str | None = None
) -> Pending:
    """Reduce ``x`` over the axis, in place (contiguous)."""
    if axis.size == 1:
        return Pending(x)
    record("all_reduce", axis, size_of(x), 2 * (axis.size - 1) / axis.size, place)
    if axis.group is None:
        return Pending(x)
    return Pending(x, Timed(dist.all_reduce(x, _OPERATIONS[op], axis.group, async_op=True), axis.ledger))


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
    record("all_gather", axis, size_of(out), (axis.size - 1) / axis.size, place)
    cut = None if total == out.shape[0] else total
    if axis.group is None:
        return Pending(out.view(axis.size, -1).copy_(x.view(1, -1).expand(axis.size, -1)).view_as(out), rows=cut)
    return Pending(out, Timed(_gather_into(out, x, group=axis.group, async_op=True), axis.ledger), cut)


def start_reduce_scatter(x: Tensor, axis: Axis, place: str | None = None) -> Pending:
    """Sum over the axis and keep our piece of dim 0."""
    if axis.size == 1:
        return Pending(x)
    total = x.shape[0]
    rows = -(-total // axis.size)
    x = _padded(x, rows * axis.size)
    out = x.new_empty((rows, *x.shape[1:]))
    record("reduce_scatter", axis, size_of(x), (axis.size - 1) / axis.size, place)
    own = chunk(total, axis)
    cut = None if own.stop - own.start == rows else own.stop - own.start
    if axis.group is None:
        return Pending(out.copy_(x[axis.rank * rows : (axis.rank + 1) * rows]), rows=cut)
    return Pending(out, Timed(_reduce_scatter_into(out, x, group=axis.group, async_op=True), axis.ledger), cut)


def start_all_to_all(
    x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int], place: str | None = None
) -> Pending:
    """Exchange rows: ``send[i]`` rows of ``x`` go to rank i, ``receive[i]`` rows come from it, in rank order."""
    if axis.size == 1:
        return Pending(x)
    out = x.new_empty((sum(receive), *x.shape[1:]))
    away = 1 - send[axis.rank] / max(sum(send), 1)
    record("all_to_all", axis, size_of(x), away, place)
    if axis.group is None:
        return Pending(out.zero_())
    work = dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), axis.group, async_op=True)
    return Pending(out, Timed(work, axis.ledger))


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
    record("send", axis, size_of(x), 1.0, None)
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
