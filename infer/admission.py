"""Which waiting request may run, and with what it begins."""

from __future__ import annotations

from collections.abc import Sequence

from infer.policy import SchedulerConfig
from infer.preemption import Preemption
from infer.prefix import Match, Prefixes
from infer.queue import Queue
from infer.request import Life, Request
from infer.running import Running
from infer.tiers import Memory

__all__ = ["Admission"]

_LOOKED_AT = 64
"""Most waiting requests that are passed over, in one search for one that may run, because of pages on their way."""


class Admission:
    """Seats waiting requests in the order of their ranks.

    A request is admitted only if pages for all its tokens and ``horizon`` more are available beside what is reserved
    for those that run: it cannot take from them what they were promised, nor lose its own before it has used it. Nobody
    overtakes a request for which there is no room. Passed over, for a few steps, are only those whose beginning another
    request is computing just now, or is being read from disk.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        memory: Memory,
        prefixes: Prefixes,
        running: Running,
        queue: Queue,
        preemption: Preemption,
    ) -> None:
        self.config, self.memory, self.prefixes = config, memory, prefixes
        self.running, self.queue, self.preemption = running, queue, preemption
        self.hits = 0
        self._fetching: dict[int, list[tuple[int, bytes]]] = {}
        self._stuck: tuple[int, int] | None = None

    def make_way(self, number: int) -> None:
        """Preempt requests that are less urgent than the first in the queue, if that lets it run."""
        request = next(iter(self.queue), None)
        urgent = request is not None and request.priority < max(+self.running.priorities, default=request.priority)
        if request is None or not urgent or self._waits(request):
            return
        if request.life is Life.SWAPPED:
            self._room(request, request.computed, self._names(request), number)
        else:
            match = self.prefixes.match(request)
            self._room(request, match.pages * self.config.page_size, self._found(request, match), number)

    def next(self, number: int) -> Request | None:
        """Seat the first request that may run; None: there is none."""
        for place, request in enumerate(self.queue):
            if place == _LOOKED_AT or request.left_at == number or not self.running.rows.free:
                return None
            if self._waits(request):
                continue
            if self._stuck == (request.id, self._changes()):
                return None
            if request.life is Life.SWAPPED:
                return request if self._resume(request) else None
            match = self.prefixes.match(request)
            if self._prefers_to_wait(request, match):
                continue
            return request if self._start(request, match) else None
        return None

    def prefetch(self) -> None:
        """Have pages of those that wait first read from disk."""
        if self.memory.disk:
            for place, request in enumerate(self.queue):
                if place >= self.config.prefetch:
                    break
                if request.life is Life.WAITING and request.id not in self._fetching:
                    self._fetch(request, self.prefixes.match(request))

    def forget(self, request: Request) -> None:
        """The request is gone."""
        self._fetching.pop(request.id, None)

    def _changes(self) -> int:
        """Grows with everything that may make room, or make a request need less."""
        return self.running.departures + self.prefixes.kept

    def _waits(self, request: Request) -> bool:
        if request.waits_for is not None:
            if request.waits_for in self.prefixes.promised:
                return True
            request.waits_for = None
        if request.id in self._fetching:
            if any(place in self.memory.loading for place in self._fetching[request.id]):
                return True
            del self._fetching[request.id]
        return False

    def _prefers_to_wait(self, request: Request, match: Match) -> bool:
        """Whether more of its beginning will be there soon than is now."""
        if self.memory.disk and self._fetch(request, match):
            return True
        if match.pages < len(request.keys):
            key = request.keys[match.pages]
            owner = self.prefixes.promised.get(key)
            if owner is not None and owner.rank < request.rank and request.reuse:
                request.waits_for = key
                return True
        return False

    def _fetch(self, request: Request, match: Match) -> bool:
        """Begin to read what is on disk of the request's beginning; False: nothing is, or there is no room for it."""
        limit = (len(request.tokens) - 1) // self.config.page_size
        if request.fetches > limit // self.config.loads:
            return False
        further = self.prefixes.match(request, self.memory.disk)
        places = []
        for group, first in enumerate(further.first if further.pages > match.pages else ()):
            for key in request.keys[first : further.pages]:
                if not self.prefixes.found(group, key):
                    if not self.memory.load(group, key):
                        break
                    places.append((group, key))
        if places:
            request.fetches += 1
            self._fetching[request.id] = places
        return bool(places)

    def _found(self, request: Request, match: Match) -> list[list[bytes]]:
        """For each group, the keys of the pages that a waiting request would begin with."""
        return [request.keys[first : match.pages] for first in match.first]

    def _names(self, request: Request) -> list[list[bytes]]:
        """For each group, the keys of the full pages that a swapped request comes back with."""
        assert request.stored is not None
        full = request.computed // self.config.page_size if self.prefixes.enabled else 0
        return [request.keys[part.first : full] for part in request.stored]

    def _start(self, request: Request, match: Match) -> bool:
        """Seat a request that holds nothing yet."""
        computed, found = match.pages * self.config.page_size, self._found(request, match)
        if not self._room(request, computed, found):
            return False
        held = [
            (first, self.memory.bring(group, names))
            for group, (first, names) in enumerate(zip(match.first, found, strict=True))
        ]
        self._seat(request, computed)
        self.running.seat(request, computed, held)
        request.cached = computed
        self.hits += computed
        return True

    def _resume(self, request: Request) -> bool:
        """Seat a request whose pages are in CPU memory."""
        stored, names = request.stored, self._names(request)
        assert stored is not None
        if not self._room(request, request.computed, names):
            return False
        held = [
            (part.first, self.memory.restore(group, part, own))
            for group, (part, own) in enumerate(zip(stored, names, strict=True))
        ]
        request.stored = None
        self._seat(request, request.computed)
        self.running.seat(request, request.computed, held)
        return True

    def _seat(self, request: Request, computed: int) -> None:
        self.queue.remove(request)
        request.named = computed // self.config.page_size
        self.prefixes.promise(request, request.named)

    def _room(
        self, request: Request, computed: int, found: Sequence[Sequence[bytes]], number: int | None = None
    ) -> bool:
        """Whether there is a row and room for a request that begins with pages of these keys.

        With the ``number`` of a step, others that are less urgent have to give way.
        """
        running = self.running
        quotas = running.quotas(len(request.tokens), computed, request.most)
        margin = self.config.comeback if request.left_at else self.config.watermark

        def fits() -> bool:
            rows = running.rows
            if not rows.free:
                return False
            used = [self._in_use(group, names) for group, names in enumerate(found)]
            return running.fits(quotas, used, margin if len(rows.free) < len(rows.request) else 0.0)

        if fits() or (number is not None and self.preemption.displace(request, quotas, fits, number)):
            return True
        self._stuck = (request.id, self._changes())
        return False

    def _in_use(self, group: int, keys: Sequence[bytes]) -> int:
        """How many of these pages are on the device and used."""
        device = self.memory.device[group]
        return sum(1 for key in keys if (page := device.find(key)) is not None and device.users[page])
