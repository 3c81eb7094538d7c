"""One flat vector of parameters, cut over the ranks of an axis: its values, master weights and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import Enum

import torch
from torch import Tensor

from parallel import comm
from parallel.mesh import Axis
from zero import compress
from zero.compress import Arrival, TopK
from zero.offload import Landing, hosted
from zero.plan import Group, Slot, decays, wide
from zero.sharing import Sharing

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
        sharing: the ranks that share the vector, the stage of ZeRO, and how its parts travel.

    Attributes:
        own: this rank's run of the vector.
        kept: the parameters are whole between their uses: below stage 3, and where no unit gathers them.
        values: the parameters, in the precision of the model; parameters are views of it.
        run: ``own`` of them.
        master: ``own`` in the precision of the optimizer.
        gradient: in the precision of the optimizer; all of it below stage 2, ``own`` from there on, and then in CPU
            memory if the optimizer's state is.
        reduced: this rank's run of the sum over the ranks, once all sums are settled.
        sums: that were begun in this step.
        second: the run of a secondary partition, from the first gathering after an update to the next update.
    """

    def __init__(self, group: Group, sharing: Sharing) -> None:
        self.slots, self.unit, self.shared = group.slots, group.unit, group.shared
        self.axis, self.stage, self.length = sharing.shard, sharing.stage, group.length
        self.sharing, self.exact, self._uncut = sharing, group.exact, group.whole
        self.kept = self.stage < 3 or not self.unit
        each = self.length // self.axis.size
        self.own = slice(self.axis.rank * each, (self.axis.rank + 1) * each)
        self.decayed = next((slot.start for slot in self.slots if not decays(slot.parameter)), self.length)
        edges = [0, *(edge for slot in self.slots for edge in (slot.start, slot.stop)), self.length]
        self._gaps = [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
        first = self.slots[0].parameter
        self.device = first.device
        self.values = torch.zeros(self.length, dtype=first.dtype, device=self.device)
        with torch.no_grad():
            for slot in self.slots:
                self.values[slot.start : slot.stop] = slot.parameter.detach().reshape(-1)
        self.views = [self.values[s.start : s.stop].view(s.parameter.shape) for s in self.slots]
        self.life = Life.WHOLE
        self._point(self.views)
        kind = wide(first.dtype)
        self._make_runs(self.values[self.own], kind)
        self.gradient = torch.zeros(each if self.stage > 1 else self.length, dtype=kind, device=self.device)
        self.landing: Landing | None = None
        if self.stage > 1 and sharing.offload != "none":
            self.gradient = hosted(self.gradient)
            self.landing = Landing(self.gradient, sharing.lane)
        self.reduced = self.gradient if self.stage > 1 else self.gradient[self.own]
        self.top = TopK(self.gradient, sharing.top_k) if sharing.top_k and not self.exact else None
        self.incoming: Tensor | None = None
        self.second: Tensor | None = None
        self.fresh = set(range(len(self.slots)))
        self.sums = 0
        self.pending: Arrival | None = None
        self.highest: list[Tensor] = []
        self._void = torch.full((1,), float("nan"), dtype=first.dtype, device=self.device)
        self._gathering: Arrival | None = None

    def _make_runs(self, own: Tensor, kind: torch.dtype) -> None:
        """``run``, ``master``, and ``_landed``: the new values in the precision of the model, where they are made."""
        offload, same = self.sharing.offload, own.dtype == kind
        away = self._away = offload == "parameters" and not self.kept
        self.run = hosted(own) if away else own if self.kept else own.clone()
        if same and (away or offload == "none"):
            self.master = self.run
        else:
            self.master = own.to(kind) if offload == "none" else hosted(own.to(kind))
        self._landed = self.run if away or offload == "none" else self.master if same else hosted(own)

    def _point(self, tensors: list[Tensor]) -> None:
        for slot, tensor in zip(self.slots, tensors, strict=True):
            slot.parameter.data = tensor

    def _move(self, life: Life) -> None:
        assert life in _MOVES[self.life], f"a bucket that is {self.life.value} cannot become {life.value}"
        self.life = life

    def gather(self) -> None:
        """Begin to gather the parameters from all ranks of the axis, or of the secondary one if its copy is there."""
        if self.life is not Life.SHARDED:
            return
        self._move(Life.GATHERING)
        self.values.untyped_storage().resize_(self.values.nbytes)
        axis, run = self.axis, self.run
        if self.second is not None and self.sharing.secondary is not None:
            axis, run = self.sharing.secondary, self.second
        away = self._away and run is self.run
        with self.sharing.lane.beside() if away else contextlib.nullcontext():
            run = self.sharing.lane.up(run) if away else run
            if axis.size == 1:
                self.values.copy_(run)
            elif self.sharing.quantize_weights and not self.exact and run is not self.second:
                self._gathering = compress.start_all_gather(run, axis, self.values)
            else:
                self._gathering = comm.start_all_gather(run, axis, out=self.values)

    def whole(self) -> None:
        """Return when the parameters can be read."""
        self.gather()
        if self.life is Life.GATHERING:
            if self._gathering is not None:
                self._gathering.wait()
                self._gathering = None
            if self._away:
                self.sharing.lane.join()
            self._move(Life.WHOLE)
            self._point(self.views)

    def release(self) -> None:
        """Keep this rank's run only. What is read afterwards is not a number."""
        if self.life is Life.GATHERING:
            self.whole()
        if self.life is Life.WHOLE and not self.kept:
            if self.sharing.secondary is not None and self.second is None:
                axis = self.sharing.secondary
                self.second = self.values.view(axis.size, -1)[axis.rank].clone()
            self._move(Life.SHARDED)
            self._point([self._void.expand(slot.parameter.shape) for slot in self.slots])
            self.values.untyped_storage().resize_(0)

    def there(self, seconds: float) -> bool:
        """Whether the parameters that are being gathered have come within so many seconds; on CUDA at once."""
        return self._gathering is None or self._gathering.there(seconds)

    def begin(self) -> None:
        """Forget the gradients of the last step, and a sum under way."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
        self.highest.clear()
        self.fresh = set(range(len(self.slots)))
        self.incoming, self.sums = None, 0
        if self.landing is not None:
            self.landing.begin()
        elif self.stage > 1:
            self.gradient.zero_()

    def arrive(self, position: int, gradient: Tensor) -> None:
        """Add a parameter's gradient of one backward pass."""
        target = self.gradient
        if self.stage > 1 or self.sums:
            if self.incoming is None:
                self.incoming = self._room()
            target = self.incoming
        slot = self.slots[position]
        view = target[slot.start : slot.stop].view(slot.parameter.shape)
        if position in self.fresh:
            view.copy_(gradient)
            self.fresh.discard(position)
        else:
            view.add_(gradient)

    def _room(self) -> Tensor:
        return torch.empty(self.length, dtype=self.gradient.dtype, device=self.device)

    def reduce(self, axis: Axis) -> None:
        """Begin to sum over the axis what has arrived; every rank of it does so."""
        self.settle()
        self.sums += 1
        first = self.stage < 2 and self.sums == 1
        source = self.gradient if first else self._room() if self.incoming is None else self.incoming
        for position in self.fresh:
            source[self.slots[position].start : self.slots[position].stop] = 0
        for gap in self._gaps:
            source[gap] = 0
        parts = [source[slot.start : slot.stop] for slot in self.slots]
        self.highest += torch._foreach_norm(parts, float("inf"))
        if first and self.top is not None and axis.size > 1:
            self.pending = self.top.start(source, axis, self.own)
        elif self.stage == 0:
            self.pending = comm.start_all_reduce(source, axis)
        elif self.sharing.gradient_bits and not self.exact and axis.size > 1:
            self.pending = compress.start_reduce_scatter(source, axis, self.sharing.gradient_bits)
        else:
            self.pending = comm.start_reduce_scatter(source, axis)
        self.incoming, self.fresh = None, set(range(len(self.slots)))

    def settle(self) -> None:
        """Wait for the sum under way, and add it to those before it in this step."""
        if self.pending is None:
            return
        result, self.pending = self.pending.wait(), None
        if self.landing is not None:
            self.landing.add(result)
        elif self.stage > 1 or self.sums > 1:
            self.reduced.add_(result)
        elif self.top is not None:
            self.reduced = result
        elif result.data_ptr() != self.reduced.data_ptr():
            self.reduced.copy_(result)

    def land(self) -> None:
        """Round the updated master weights to the precision of the model, where they are."""
        if self._landed is not self.master:
            self._landed.copy_(self.master)

    def publish(self) -> comm.Pending | None:
        """After :meth:`land`: give the model the new values; those kept whole to the other ranks as well."""
        if self._landed is not self.run:
            self.run.copy_(self._landed, non_blocking=True)
        if not self.kept:
            self.release()
            self.second = None
        if not self.kept or self.axis.size == 1:
            return None
        return comm.start_all_gather(self.run.clone(), self.axis, out=self.values)

    def accept(self) -> None:
        """The step was made."""
        if self.top is not None:
            self.top.keep(self.gradient)
            self.reduced = self.gradient[self.own]

    def runs(self) -> Iterator[tuple[int, int, bool, Slot | None]]:
        """What this rank updates: runs of ``master``, whether weight decay applies, and the parameter if it is one."""
        if self._uncut:
            for slot in self.slots:
                _, run = self.part(slot)
                if run.start < run.stop:
                    yield run.start, run.stop, decays(slot.parameter), slot
            return
        middle = min(max(self.decayed, self.own.start), self.own.stop) - self.own.start
        if middle:
            yield 0, middle, True, None
        if middle < self.own.stop - self.own.start:
            yield middle, self.own.stop - self.own.start, False, None

    def part(self, slot: Slot, start: int = 0, stop: int | None = None) -> tuple[int, slice]:
        """What of a parameter's flattened piece, from ``start`` to ``stop``, is ours: where it begins, and its run."""
        stop = slot.parameter.numel() if stop is None else stop
        first = max(slot.start + start, self.own.start)
        end = max(first, min(slot.start + stop, self.own.stop))
        return first - slot.start, slice(first - self.own.start, end - self.own.start)
