"""When a bucket is reduced: in an order that all data ranks have, whatever parameters each of them used."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import nn

from parallel import comm
from zero.bucket import Bucket
from zero.sharing import Sharing

__all__ = ["Turns"]

_UNDER_WAY = 2  # sums of stages 2 and 3 whose summands are in memory, apart from the bucket that is filling
_TABLES = 64
_STRAGGLED, _LATE = 1, 2


@dataclass(slots=True)
class _Turn:
    """What is known of a bucket.

    Attributes:
        covered: places that were announced since it was reduced last.
        ready: those of them that have their gradient.
        halved: they were announced with gradients that are put off.
        straggled: in this step it was not complete on this rank when a pass was over.
        last: on some rank, in some step; then it waits behind those that are complete.
        late: on some rank a gradient came after it was reduced; since then it is reduced when the pass is over.
    """

    covered: set[int] = field(default_factory=set)
    ready: set[int] = field(default_factory=set)
    halved: bool = False
    straggled: bool = False
    last: bool = False
    late: bool = False


class Turns:
    """Reduces buckets, in the same order on every rank.

    A backward pass is announced with the parameters that may get a gradient in it: by that all ranks know which buckets
    are due in it. Of these each is reduced when all its gradients are there, and those before it have been; what is
    left is reduced when the pass is over, which it is when the next is announced. At stage 3 a bucket is due when
    backward leaves its unit, which all ranks do in the same order. What arrives where nobody expected it (a
    gradient in parts, a pass that was not announced) the ranks find out together at the end of the step.

    Args:
        buckets: in the order in which backward reaches them.
        where: parameter -> its bucket, and its place in it.
        sharing: over which ranks, at which stage.
    """

    def __init__(
        self, buckets: Sequence[Bucket], where: Mapping[nn.Parameter, tuple[Bucket, int]], sharing: Sharing
    ) -> None:
        self.sharing, self._where = sharing, where
        self._turns = {bucket: _Turn() for bucket in buckets}
        self._order = [*buckets]
        self._due: dict[Bucket, None] = {}
        self._expected: Mapping[Bucket, Set[int]] = {}
        self._tables: dict[int, tuple[Set[nn.Parameter], Mapping[Bucket, Set[int]]]] = {}
        self._under_way: deque[Bucket] = deque()

    def begin(self) -> None:
        """A step begins. Of one that was broken off, what some ranks have begun to reduce all do."""
        self.close()
        self._under_way.clear()
        for turn in self._turns.values():
            turn.covered.clear()
            turn.ready.clear()
            turn.halved = turn.straggled = False

    def expect(self, last: bool, of: Set[nn.Parameter], whole: bool) -> None:
        """A pass begins, and the one before it is over.

        Args:
            last: no parameter that gets a gradient in it gets another in this step.
            of: those that may get one.
            whole: each of them has its gradient of one microbatch when the pass is over, if it gets one at all.
        """
        self.close()
        if self.sharing.stage < 2 and not last:
            return
        self._expected = self._table(of)
        for bucket in self._order:
            turn, positions = self._turns[bucket], self._expected.get(bucket)
            if positions is None or (self.sharing.stage < 2 and bucket.sums):
                continue
            if not whole:
                turn.halved = True
                continue
            if not turn.halved:
                turn.ready -= positions
            turn.covered |= positions
            if len(turn.covered) == len(bucket.slots):
                self._due[bucket] = None

    def _table(self, of: Set[nn.Parameter]) -> Mapping[Bucket, Set[int]]:
        known = self._tables.get(id(of))
        if known is None or known[0] is not of:
            if len(self._tables) > _TABLES:
                self._tables.clear()
            table: dict[Bucket, set[int]] = {}
            for bucket, position in (self._where[parameter] for parameter in of if parameter in self._where):
                table.setdefault(bucket, set()).add(position)
            known = self._tables[id(of)] = of, table
        return known[1]

    def arrived(self, bucket: Bucket, position: int) -> None:
        """A gradient is in its bucket."""
        if position in self._expected.get(bucket, ()):
            self._turns[bucket].ready.add(position)
        while self._due and self.sharing.stage < 3:
            following = next(iter(self._due))
            turn = self._turns[following]
            if turn.late or len(turn.ready) < len(following.slots):
                return
            self._reduce(following)

    def passed(self, bucket: Bucket) -> None:
        """Stage 3: backward has left the unit of a bucket."""
        if bucket in self._due and not self._turns[bucket].late:
            self._reduce(bucket)

    def close(self) -> None:
        """The pass is over: reduce what is due and was not complete on this rank."""
        for bucket in [*self._due]:
            turn = self._turns[bucket]
            turn.straggled |= len(turn.ready) < len(bucket.slots)
            self._reduce(bucket)
        self._expected = {}

    def finish(self) -> None:
        """The step is over: reduce the rest."""
        self.close()
        for bucket in self._order:
            turn = self._turns[bucket]
            if not bucket.sums or (self.sharing.stage > 1 and turn.covered):
                self._reduce(bucket)
        for bucket, note in zip(self._turns, self._notes(), strict=True):
            turn = self._turns[bucket]
            turn.last |= note > 0
            if note == _LATE:
                turn.late = True
                self._reduce(bucket)
        self._order.sort(key=lambda bucket: self._turns[bucket].last)

    def _notes(self) -> list[int]:
        """What some rank has seen in this step, by bucket; the same on all."""
        own = [
            _LATE if bucket.incoming is not None else _STRAGGLED if turn.straggled else 0
            for bucket, turn in self._turns.items()
        ]
        if not own:
            return own
        notes = torch.tensor(own, dtype=torch.uint8, device=next(iter(self._turns)).device)
        return comm.sum_(notes, self.sharing.reduction, "max").tolist()

    def _reduce(self, bucket: Bucket) -> None:
        turn = self._turns[bucket]
        self._due.pop(bucket, None)
        turn.covered.clear()
        turn.ready.clear()
        turn.halved = False
        bucket.reduce(self.sharing.reduction)
        if self.sharing.stage > 1:
            self._under_way.append(bucket)
            while len(self._under_way) > _UNDER_WAY:
                self._under_way.popleft().settle()
