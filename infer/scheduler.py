"""The scheduler: which tokens of which requests the next step computes, and where their keys and values go."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infer.admission import Admission
from infer.audit import Stats, audit
from infer.forking import extend, fork
from infer.packing import Chunk, pack
from infer.policy import PageGroup, SchedulerConfig, group_problems
from infer.preemption import Preemption
from infer.prefix import Prefixes
from infer.queue import Queue
from infer.request import FinishReason, Life, Request, RequestError
from infer.running import Running, columns
from infer.step import Step
from infer.tiers import Memory
from parallel.errors import ConfigError, refuse

__all__ = ["PageGroup", "Scheduler", "SchedulerConfig", "Stats"]


@dataclass(slots=True)
class _Flight:
    """A step that is planned and not committed."""

    step: Step
    serials: NDArray[np.int64]
    tokens: list[list[int]]
    plain: bool


class Scheduler:
    """Plans steps and takes note of what they gave.

    Every rank runs the same scheduler over the same calls in the same order and comes to the same steps: nothing here
    depends on a clock, on chance, on addresses or on the order of sets.

    Args:
        config: limits.
        groups: of pages.
        disk: (group, key) of pages that an earlier run left on disk, the one used longest ago first.

    Attributes:
        config: as given.
        groups: as given.
        requests: all that have not ended, by id.

    Raises:
        ConfigError: limits or groups that cannot be.
    """

    def __init__(
        self, config: SchedulerConfig, groups: Sequence[PageGroup], disk: Iterable[tuple[int, bytes]] = ()
    ) -> None:
        refuse(ConfigError, [*config.problems(), *group_problems(groups)])
        self.config, self.groups = config, tuple(groups)
        self.memory = Memory(config, groups, disk)
        self.prefixes = Prefixes(
            self.groups, self.memory.device, self.memory.host, config.page_size, config.prefix_cache
        )
        self.running = Running(config, self.memory, self.prefixes)
        self.queue = Queue()
        self.preemption = Preemption(config, self.memory, self.prefixes, self.running, self.queue)
        self.admission = Admission(config, self.memory, self.prefixes, self.running, self.queue, self.preemption)
        self.requests: dict[int, Request] = {}
        self._number = 0
        self._arrivals = 0
        self._computed = 0
        self._flights: deque[_Flight] = deque()

    @property
    def tables(self) -> list[NDArray[np.int32]]:
        """For each page group (rows, pages): which page holds which part of each row; see :attr:`Step.rows_R`.

        Read them after :meth:`plan` and before anything else is called, and keep no reference.
        """
        return self.running.rows.tables

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it has no prompt, nothing to generate, an id that is taken, or could never run.
        """
        refuse(RequestError, self.problems(request))
        self._enter(request)
        self.queue.add(request)

    def problems(self, request: Request) -> list[str]:
        """Why a request cannot be taken, with the numbers."""
        found, config = [], self.config
        if request.id in self.requests:
            found.append(f"request {request.id}: there is one with this id already")
        if request.life is not Life.WAITING:
            found.append(f"request {request.id} is {request.life.value}")
        if not request.tokens:
            return [*found, f"request {request.id}: the prompt is empty"]
        if request.most <= len(request.tokens):
            short = f"{len(request.tokens)} tokens leave none to generate, of {request.most} at most"
            return [*found, f"request {request.id}: {short}"]
        quotas = self.running.quotas(len(request.tokens), 0, request.most)
        for index, (group, quota) in enumerate(zip(self.groups, quotas, strict=True)):
            need = columns(request.most - 1, config.page_size) if group.window is None else quota
            if need > group.pages:
                within = "" if group.window is None else f" within its window of {group.window} and a chunk"
                found.append(
                    f"request {request.id}: up to {request.most} tokens need {need} pages of {config.page_size} tokens"
                    f"{within}; the whole cache of page group {index} has {group.pages}"
                )
        return found

    def plan(self) -> Step:
        """The next step; it may be empty.

        One step may be uncommitted meanwhile: each of its sampling runs is taken to give a token.
        """
        assert len(self._flights) < 2, "commit a step first"
        self._number += 1
        running = self.running
        running.trim_all()
        self.admission.make_way(self._number)
        if running.decoding.count:
            self._cross()
        chunks = self._chunks(self.config.budget - running.decoding.count)
        idle = not chunks and not running.decoding.count and all(flight.step.empty for flight in self._flights)
        if idle and self.queue:
            chunks = self._unblock()
        self.admission.prefetch()
        moves = self.memory.finish_plan()
        running.departures += bool(moves.copies)
        before = self._flights[-1].step.number if self._flights else 0
        step, tokens = pack(self._number, running, chunks, before, moves)
        plain = self._advance(step)
        self._flights.append(_Flight(step, running.rows.serial[step.rows_R], tokens, plain))
        self._computed += len(step.tokens_T)
        return step

    def commit(
        self, step: Step, sampled: Sequence[int] | NDArray[np.int64], lost: Sequence[tuple[int, bytes]] = ()
    ) -> None:
        """A step was executed. Steps are committed in the order in which they were planned.

        Appends to each sampling request its token; whether it ends thereby is the caller's to say (:meth:`finish`).
        Tokens of requests that ended since are ignored, as are those of external ones.

        Args:
            step: the one uncommitted longest.
            sampled: one token for each of the first ``step.samples`` runs; :data:`NO_TOKEN` where the row failed: the
                request then ends with ``error``, if it has not ended already.
            lost: (group, key) of pages that could not be read from disk, or not be written.
        """
        assert self._flights and self._flights[0].step is step, "steps are committed in order"
        flight = self._flights[0]
        tokens = np.asarray(sampled, dtype=np.int64).reshape(-1)
        assert len(tokens) == step.samples, f"{len(tokens)} tokens for {step.samples} sampling runs"
        self._flights.popleft()
        rows, serials = step.rows_R[: step.samples], flight.serials[: step.samples]
        same = self.running.rows.serial[rows] == serials
        if flight.plain and (not len(tokens) or tokens.min() >= 0):
            deque(map(list.append, flight.tokens, tokens.tolist()), maxlen=0)
            if same.all():
                self.running.rows.last[rows] = tokens
            else:
                self.running.rows.last[rows[same]] = tokens[same]
                for run in np.flatnonzero(~same).tolist():
                    if step.requests[run].life is Life.FINISHED:
                        step.requests[run].tokens.pop()
        else:
            self._commit_each(step, tokens, same)
        for run in range(step.decoding, len(step.requests)):
            request = step.requests[run]
            if request.row == step.rows_R[run] and self.running.rows.serial[request.row] == flight.serials[run]:
                self.running.keep(request, int(step.stops_R[run]))
        self.memory.committed(step.moves, lost)

    def finish(self, request: Request, reason: FinishReason, error: str = "") -> None:
        """A request ends: its pages are released; what it computed stays cached if it ended well."""
        if request.life is Life.FINISHED:
            return
        well = reason in ("stop", "length")
        if request.life is Life.RUNNING:
            self.running.unseat(request, keep=well)
        elif request.life is Life.SWAPPED:
            assert request.stored is not None
            for pool, stored in zip(self.memory.host, request.stored, strict=True):
                pool.release(reversed(stored.pages))
            request.stored = None
        self.queue.remove(request)
        self.admission.forget(request)
        del self.requests[request.id]
        request.move(Life.FINISHED)
        request.finish_reason, request.error, request.computed, request.paused = reason, error, 0, False

    def abort(self, identity: int) -> bool:
        """End the request with this id; False: there is none."""
        request = self.requests.get(identity)
        if request is None:
            return False
        self.finish(request, "abort")
        return True

    def fork(self, request: Request, identity: int, keep: int | None = None, then: Sequence[int] = ()) -> Request:
        """A new request that begins with the first ``keep`` tokens of this one and goes on with ``then``.

        It shares the pages of what is computed, of all its tokens but the last; the page that both would write next is
        copied. If there is no row or no room for it now, it is queued, and finds what is cached then.

        Args:
            request: not finished.
            identity: id of the new one.
            keep: at least 1; None: all its tokens.
            then: tokens of the new request only.

        Raises:
            RequestError: the id is taken, or there is nothing left to generate.
        """
        kept = request.tokens[: len(request.tokens) if keep is None else keep]
        child = Request(
            identity,
            [*kept, *then],
            min(request.prompt, len(kept)),
            request.params,
            priority=request.priority,
            salt=request.salt,
            most=request.most,
            reuse=request.reuse,
            external=request.external,
        )
        refuse(RequestError, self.problems(child))
        self._enter(child, request.rank[0])
        if not fork(self.running, request, child, len(kept)):
            self.queue.add(child)
        return child

    def extend(self, request: Request, token: int) -> None:
        """The next token of an external request, which goes on with it."""
        assert request.paused, f"request {request.id} does not wait for a token"
        extend(self.running, request, token)
        if request.life is not Life.RUNNING and len(request.tokens) < request.most:
            self.queue.add(request)

    def preempt(self, request: Request) -> None:
        """Take the pages of a running request and queue it again, as if another needed them; otherwise do nothing."""
        if request.life is Life.RUNNING and self.preemption.may_lose(request):
            self.preemption.preempt(request, self._number + 1)

    def check(self) -> None:
        """Prove that no page and no request is lost; raises AssertionError otherwise.

        In every pool, free + cached + used = total, and every page has as many users as there are requests and pending
        moves that hold it. Reservations are what they should be, and can be kept.
        """
        audit(self.requests, self.running, self.queue, self.memory)

    @property
    def stats(self) -> Stats:
        """What there is, and what was done."""
        device, host = self.memory.device, self.memory.host
        swapped = sum(1 for request in self.requests.values() if request.life is Life.SWAPPED)
        running = len(self.running.rows.request) - len(self.running.rows.free)
        return Stats(
            running=running,
            waiting=len(self.requests) - running - swapped,
            swapped=swapped,
            free=tuple(pool.free for pool in device),
            cached=tuple(pool.cached for pool in device),
            used=tuple(pool.total - pool.available for pool in device),
            host_free=tuple(pool.free for pool in host),
            host_cached=tuple(pool.cached for pool in host),
            host_used=tuple(pool.total - pool.available for pool in host),
            disk=len(self.memory.disk),
            steps=self._number,
            computed=self._computed,
            hits=self.admission.hits,
            recomputed=self.preemption.recomputed,
            swaps=self.preemption.swapped,
            evictions=tuple(pool.evictions for pool in device),
        )

    def _enter(self, request: Request, arrival: int | None = None) -> None:
        if arrival is None:
            aging = self.config.aging
            arrival = request.priority * aging + self._number if aging else request.priority
        self._arrivals += 1
        request.rank = (arrival, self._arrivals)
        self.requests[request.id] = request

    def _cross(self) -> None:
        """Pages for the decoding requests that need one more; those beyond their goals may lose theirs."""
        running = self.running
        crossing = running.crossing()
        while len(crossing) and running.short_of(crossing) is not None:
            self.preemption.preempt(self.preemption.beyond_goal(), self._number)
            crossing = running.crossing()
        if len(crossing):
            running.cross(crossing)

    def _chunks(self, budget: int) -> list[Chunk]:
        """Tokens of filling requests, then of those that are admitted, until the budget is used."""
        chunks: list[Chunk] = []
        for request in self.running.filling:
            if budget <= 0:
                return chunks
            budget -= self._chunk(request, budget, chunks)
        while budget > 0 and self.queue and (request := self.admission.next(self._number)) is not None:
            budget -= self._chunk(request, budget, chunks)
        return chunks

    def _chunk(self, request: Request, budget: int, chunks: list[Chunk]) -> int:
        row, start = request.row, int(self.running.rows.computed[request.row])
        stop = min(len(request.tokens), start + min(budget, self.config.longest_chunk))
        self.running.make_room(row, stop)
        chunks.append(Chunk(request, start, stop))
        return stop - start

    def _unblock(self) -> list[Chunk]:
        """Every running request waits to be extended, and the first in the queue finds no room: make some."""
        chunks: list[Chunk] = []
        while not chunks and not self.memory.loading and (request := self.preemption.paused()) is not None:
            self.preemption.preempt(request, self._number)
            chunks = self._chunks(self.config.budget)
        return chunks

    def _advance(self, step: Step) -> bool:
        """The rows as they are once the step is done; whether it is a plain one, every token of which is appended."""
        running, rows = self.running, self.running.rows
        rows.computed[step.rows_R] = step.stops_R
        sampling = step.rows_R[: step.samples]
        rows.given_by[sampling] = step.number
        rows.given_at[sampling] = rows.counting[: step.samples]
        for request in step.requests[step.decoding : step.samples]:
            running.settle(request)
            running.decode(request)
        done = step.stops_R[: step.samples] >= rows.final[sampling]
        for run in done.nonzero()[0].tolist():
            running.leave_step(step.requests[run])
        if not running.externals:
            return True
        externals = [request for request in step.requests[: step.samples] if request.external]
        for request in externals:
            running.leave_step(request)
            request.paused = True
        return not externals

    def _commit_each(self, step: Step, tokens: NDArray[np.int64], same: NDArray[np.bool_]) -> None:
        """Commit a step some of whose rows have failed, or whose requests are told their tokens otherwise."""
        for run, (request, token) in enumerate(zip(step.requests, tokens.tolist(), strict=False)):
            if request.life is Life.FINISHED:
                continue
            if token < 0:
                self.finish(request, "error", request.error)
            elif not request.external:
                request.tokens.append(token)
                if same[run]:
                    self.running.rows.last[request.row] = token
