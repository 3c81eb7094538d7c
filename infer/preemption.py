"""Who loses its pages to whom, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from infer.policy import SchedulerConfig
from infer.prefix import Prefixes
from infer.queue import Queue
from infer.request import Life, Request
from infer.running import Held, Running
from infer.tiers import Memory

__all__ = ["Preemption"]


class Preemption:
    """Takes pages from running requests.

    There are three occasions. A request beyond its goal needs a page that nobody has left: of those beyond their goals
    the last in rank gives up its own, be it the same. A waiting request is more urgent, by priority and by rank, than
    running ones that stand in its way: these give up theirs, if that is enough. Nothing can go on, because all running
    requests wait to be extended: the last in rank gives up its own. Ranks never change, so no two requests take turns.
    """

    def __init__(
        self, config: SchedulerConfig, memory: Memory, prefixes: Prefixes, running: Running, queue: Queue
    ) -> None:
        self.config, self.memory, self.prefixes = config, memory, prefixes
        self.running, self.queue = running, queue
        self.recomputed = 0
        self.swapped = 0

    def beyond_goal(self) -> Request:
        """The last in rank of those that have had what they were admitted for; there is one."""
        rows = self.running.rows
        beyond = (rows.computed >= rows.goal) & (rows.computed < rows.final)
        return max((request for request in self._unfinished() if beyond[request.row]), key=_rank)

    def paused(self) -> Request | None:
        """The last in rank of those that wait to be extended."""
        return max((request for request in self._unfinished() if request.paused), key=_rank, default=None)

    def displace(self, request: Request, quotas: Sequence[int], fits: Callable[[], bool], number: int) -> bool:
        """Preempt requests that are less urgent until this one fits; none of them if that would not be enough.

        Args:
            request: it waits, first in the queue.
            quotas: pages that it needs, for each group.
            fits: whether there is a row and room for it now.
            number: of the step that is being planned.
        """
        victims = sorted(
            (other for other in self._unfinished() if other.priority > request.priority and other.rank > request.rank),
            key=_rank,
        )
        gains = [sum(column) for column in zip(*map(self._gain, victims), strict=True)]
        if not victims or any(
            self.running.slack(group) + gain < quota
            for group, (gain, quota) in enumerate(zip(gains, quotas, strict=True))
        ):
            return False
        while victims and not fits():
            self.preempt(victims.pop(), number)
        return fits()

    def preempt(self, request: Request, number: int) -> None:
        """Take the row and the device pages of a running request, and queue it again."""
        running = self.running
        running.trim(request.row)
        held, computed = running.held(request.row), int(running.rows.computed[request.row])
        full = min(computed, len(request.tokens)) // self.config.page_size
        self.prefixes.keep(request, held, full)
        request.left_at = number
        request.preemptions += 1
        if self._swaps(held, computed):
            request.stored = [self.memory.store(group, first, pages) for group, (first, pages) in enumerate(held)]
            running.unseat(request, keep=True)
            request.move(Life.SWAPPED)
            self.swapped += 1
        else:
            running.unseat(request, keep=True)
            request.move(Life.WAITING)
            request.computed = 0
            self.recomputed += 1
        if not request.paused:
            self.queue.add(request)

    def _swaps(self, held: Sequence[Held], computed: int) -> bool:
        """Whether to move the pages to CPU memory: if there is room, and it costs less than to compute them again."""
        if self.config.preemption == "recompute" or not computed:
            return False
        cost = 0.0
        for group, (_first, pages) in enumerate(held):
            moved, room = self.memory.storing(group, pages)
            if room > self.memory.host[group].available or not self.memory.movable(group, pages):
                return False
            cost += moved * self.memory.groups[group].cost
        return self.config.preemption == "swap" or cost < computed - self._shared(held)

    def _shared(self, held: Sequence[Held]) -> int:
        """Tokens at the beginning whose pages others use as well: they need not be computed again."""
        if not self.config.prefix_cache:
            return 0
        least = min(
            next((index for index, page in enumerate(pages) if pool.users[page] == 1), len(pages))
            for (_first, pages), pool in zip(held, self.memory.device, strict=True)
        )
        return least * self.config.page_size

    def may_lose(self, request: Request) -> bool:
        """Whether a running request may lose its pages; not if it has computed all that it ever will."""
        rows = self.running.rows
        return request.paused or bool(rows.computed[request.row] < rows.final[request.row])

    def _unfinished(self) -> Iterator[Request]:
        for request in self.running.rows.request:
            if request is not None and self.may_lose(request):
                yield request

    def _gain(self, request: Request) -> list[int]:
        """Pages of each group that become available at least when the request is preempted."""
        gains, running = [], self.running
        for group, (_first, pages) in enumerate(running.held(request.row)):
            users = self.memory.device[group].users
            alone = sum(1 for page in pages if users[page] == 1)
            if self.memory.groups[group].window is not None:
                alone = len(pages)
            gains.append(alone + int(running.rows.left[group][request.row]))
        return gains


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
