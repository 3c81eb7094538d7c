"""One flat vector of parameters, cut over the ranks of an axis: its values, master weights and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

import torch
from torch import Tensor

from parallel import comm
from parallel.mesh import Axis
from zero.plan import Group, Slot, decays, wide

__all__ = ["Bucket", "Life"]


class Life(Enum):
    """What of a bucket's parameters is in memory; each says what may follow.

    ==========  =======================================  ==============================
    state       memory of the parameters                 may become
    ==========  =======================================  ==============================
    SHARDED     this rank's run                          GATHERING
    GATHERING   all, not yet to be read                  WHOLE
    WHOLE       all                                      SHARDED (ZeRO 3 only)
    ==========  =======================================  ==============================
    """

    SHARDED = "sharded"
    GATHERING = "gathering"
    WHOLE = "whole"


_MOVES = {Life.SHARDED: (Life.GATHERING,), Life.GATHERING: (Life.WHOLE,), Life.WHOLE: (Life.SHARDED,)}


class Bucket:
    """Parameters that are gathered, reduced and updated together.

    Args:
        group: which, and in what order.
        axis: the ranks that share the vector; of size 1 each holds all.
        stage: of ZeRO: 1 cuts optimizer state, 2 gradients as well, 3 parameters as well.

    Attributes:
        own: this rank's run of the vector.
        values: the parameters, in the precision of the model; parameters are views of it.
        master: ``own`` in the precision of the optimizer.
        gradient: in the precision of the optimizer; all of it below stage 2, ``own`` from there on.
    """

    def __init__(self, group: Group, axis: Axis, stage: int) -> None:
        self.slots, self.unit, self.shared = group.slots, group.unit, group.shared
        self.axis, self.stage, self.length = axis, stage, group.length
        each = self.length // axis.size
        self.own = slice(axis.rank * each, (axis.rank + 1) * each)
        self.decayed = max((slot.stop for slot in self.slots if decays(slot.parameter)), default=0)
        first = self.slots[0].parameter
        self.values = torch.zeros(self.length, dtype=first.dtype, device=first.device)
        with torch.no_grad():
            for slot in self.slots:
                self.values[slot.start : slot.stop] = slot.parameter.detach().reshape(-1)
        self.views = [self.values[s.start : s.stop].view(s.parameter.shape) for s in self.slots]
        self.life = Life.WHOLE
        self._point(self.views)
        kind = wide(first.dtype)
        own = self.values[self.own]
        self.run = own.clone() if stage == 3 else own
        self.master = self.run if kind == first.dtype else own.to(kind)
        self.gradient = torch.zeros(each if stage > 1 else self.length, dtype=kind, device=first.device)
        self.reduced = self.gradient
        self.incoming: Tensor | None = None
        self.fresh = set(range(len(self.slots)))
        self.ready: set[int] = set()
        self.pending: comm.Pending | None = None
        self.highest: list[Tensor] = []
        self._void = torch.full((1,), float("nan"), dtype=first.dtype, device=first.device)
        self._gathering: comm.Pending | None = None

    def _point(self, tensors: list[Tensor]) -> None:
        for slot, tensor in zip(self.slots, tensors, strict=True):
            slot.parameter.data = tensor

    def _move(self, life: Life) -> None:
        assert life in _MOVES[self.life], f"a bucket that is {self.life.value} cannot become {life.value}"
        self.life = life

    def gather(self) -> None:
        """Begin to gather the parameters from all ranks of the axis."""
        if self.life is Life.SHARDED:
            self._move(Life.GATHERING)
            self.values.untyped_storage().resize_(self.values.nbytes)
            if self.axis.size == 1:
                self.values.copy_(self.run)
            else:
                self._gathering = comm.start_all_gather(self.run, self.axis, out=self.values)

    def whole(self) -> None:
        """Return when the parameters can be read."""
        self.gather()
        if self.life is Life.GATHERING:
            if self._gathering is not None:
                self._gathering.wait()
                self._gathering = None
            self._move(Life.WHOLE)
            self._point(self.views)

    def release(self) -> None:
        """Keep this rank's run only. What is read afterwards is not a number."""
        if self.life is Life.GATHERING:
            self.whole()
        if self.life is Life.WHOLE:
            self._move(Life.SHARDED)
            self._point([self._void.expand(slot.parameter.shape) for slot in self.slots])
            self.values.untyped_storage().resize_(0)

    def begin(self) -> None:
        """Forget the gradients of the last step."""
        self.ready.clear()
        self.highest.clear()
        self.fresh = set(range(len(self.slots)))
        if self.stage > 1:
            self.gradient.zero_()
            self.incoming = None

    def arrive(self, position: int, gradient: Tensor) -> None:
        """Add a parameter's gradient of one backward pass."""
        target = self.gradient
        if self.stage > 1:
            if self.incoming is None:
                self.incoming = torch.empty(self.length, dtype=self.gradient.dtype, device=self.gradient.device)
                self.fresh = set(range(len(self.slots)))
            target = self.incoming
        slot = self.slots[position]
        view = target[slot.start : slot.stop].view(slot.parameter.shape)
        if position in self.fresh:
            view.copy_(gradient)
            self.fresh.discard(position)
        else:
            view.add_(gradient)

    def reduce(self, everywhere: Axis) -> None:
        """Begin to sum what has arrived; below stage 1 over ``everywhere``, above over the ranks of the axis."""
        self.settle()
        source = self.gradient if self.stage < 2 else self.incoming
        if source is None:
            return
        for position in self.fresh:
            source[self.slots[position].start : self.slots[position].stop] = 0
        source[self.slots[-1].stop :] = 0
        parts = [source[slot.start : slot.stop] for slot in self.slots]
        self.highest += torch._foreach_norm(parts, float("inf"))
        if self.stage == 0:
            self.pending = comm.start_all_reduce(source, everywhere)
        else:
            self.pending = comm.start_reduce_scatter(source, self.axis)
        self.incoming = None

    def settle(self) -> None:
        """Wait for the sum under way; afterwards ``reduced`` is this rank's run of it."""
        if self.pending is None:
            return
        result = self.pending.wait()
        self.pending = None
        if self.stage > 1:
            self.gradient.add_(result)
        else:
            self.reduced = result

    def publish(self) -> comm.Pending | None:
        """Give the model the values of the master weights; below stage 3 the other ranks as well, above when asked."""
        if self.master is not self.run:
            self.run.copy_(self.master)
        if self.stage == 3:
            self.release()
        if self.stage == 3 or self.axis.size == 1:
            return None
        return comm.start_all_gather(self.run.clone(), self.axis, out=self.values)

    def runs(self) -> Iterator[tuple[int, int, bool]]:
        """What this rank updates, as runs of ``master``, and whether weight decay applies."""
        middle = min(max(self.decayed, self.own.start), self.own.stop) - self.own.start
        if middle:
            yield 0, middle, True
        if middle < self.own.stop - self.own.start:
            yield middle, self.own.stop - self.own.start, False

    def part(self, slot: Slot, start: int = 0, stop: int | None = None) -> tuple[int, slice]:
        """What of a parameter's flattened piece, from ``start`` to ``stop``, is ours: where it begins, and its run."""
        stop = slot.parameter.numel() if stop is None else stop
        first = max(slot.start + start, self.own.start)
        end = max(first, min(slot.start + stop, self.own.stop))
        return first - slot.start, slice(first - self.own.start, end - self.own.start)
