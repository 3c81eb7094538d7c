"""Random operations on a scheduler whose steps are carried out: submissions, aborts, forks, preemptions, lost files.

python tests/storm.py [OPERATIONS SEEDS]     the long form: every kind of world, ``check()`` after each operation
"""

from __future__ import annotations

import random
import sys
from collections import deque

from infer.policy import PageGroup
from infer.request import Life, Request
from infer.scheduler import Scheduler, SchedulerConfig

if __name__ == "__main__":
    sys.path.insert(0, "tests")
from paged import VOCABULARY, Machine, Prepared, next_token, values_of

WORLDS: dict[str, tuple[dict, list[PageGroup]]] = {
    "plain": ({}, [PageGroup(None, 24)]),
    "roomy": ({"horizon": 40}, [PageGroup(None, 200)]),
    "no cache": ({"prefix_cache": False, "chunk": 3}, [PageGroup(None, 24, 12)]),
    "swap": ({"preemption": "swap"}, [PageGroup(None, 22, 60)]),
    "auto": ({"chunk": 5, "horizon": 1}, [PageGroup(None, 24, 8, 1.0)]),
    "disk": ({"disk_pages": 40, "loads": 3}, [PageGroup(None, 22, 10, 2.0)]),
    "window": ({"chunk": 8}, [PageGroup(6, 18, 8, 2.0)]),
    "both": ({"chunk": 7, "disk_pages": 30}, [PageGroup(None, 24, 12, 2.0), PageGroup(9, 22, 10, 2.0)]),
    "pages of one": ({"page_size": 1, "chunk": 4}, [PageGroup(None, 80, 20, 2.0), PageGroup(1, 20, 4, 2.0)]),
    "two rows": ({"requests": 2, "aging": 0}, [PageGroup(None, 24, 24, 1.0)]),
}


class World:
    """A scheduler, the device that carries out its steps, and what every request must become."""

    def __init__(self, seed: int, config: dict, groups: list[PageGroup], asynchronous: bool) -> None:
        self.random = random.Random(seed)
        self.config = SchedulerConfig(**({"page_size": 4, "budget": 16, "requests": 6, "horizon": 4} | config))
        self.groups, self.asynchronous = groups, asynchronous
        self.scheduler = Scheduler(self.config, groups)
        self.machine = Machine(groups, self.config.page_size)
        self.flights: deque[Prepared] = deque()
        self.born: dict[int, Request] = {}
        self.ended: list[Request] = []
        self.stems = [[self.random.randrange(VOCABULARY) for _ in range(30)] for _ in range(3)]
        self.given: dict[int, int] = {}

    def submit(self, external: bool = False) -> None:
        """A request whose prompt often begins as another's."""
        r = self.random
        if len(self.scheduler.queue) > r.choice((1, 3, 12)):
            return
        stem = r.choice(self.stems)[: r.randrange(30)] if r.random() < 0.7 else []
        tokens = stem + [r.randrange(VOCABULARY) for _ in range(r.randrange(1, 12))]
        salt = r.choice((b"", b"", b"other"))
        request = Request(
            len(self.born),
            tokens,
            len(tokens),
            None,
            priority=r.choice((0, 0, 0, 1, -1)),
            salt=salt,
            most=len(tokens) + r.randrange(1, 25),
            reuse=r.random() < 0.9,
            external=external,
        )
        if not self.scheduler.problems(request):
            self.scheduler.add(request)
            self._enter(request)

    def abort(self) -> None:
        """Any request, wherever it is."""
        if self.scheduler.requests:
            request = self.scheduler.requests[self.random.choice(list(self.scheduler.requests))]
            assert self.scheduler.abort(request.id)
            self.ended.append(request)

    def fork(self) -> None:
        """Any request, running ones mostly, from any point on."""
        running = [request for request in self.scheduler.requests.values() if request.life is Life.RUNNING]
        if self.scheduler.requests:
            some = running if running and self.random.random() < 0.8 else list(self.scheduler.requests.values())
            parent = self.random.choice(some)
            keep = self.random.choice((None, parent.prompt, self.random.randrange(1, len(parent.tokens) + 1)))
            kept = len(parent.tokens) if keep is None else keep
            then = [self.random.randrange(VOCABULARY)] if self.random.random() < 0.5 else []
            if kept + len(then) < parent.most:
                self._enter(self.scheduler.fork(parent, len(self.born), keep, then))

    def preempt(self) -> None:
        """Any running request."""
        running = [request for request in self.scheduler.requests.values() if request.life is Life.RUNNING]
        if running:
            self.scheduler.preempt(self.random.choice(running))

    def extend(self) -> None:
        """Some of the requests that wait for a token."""
        for request in list(self.scheduler.requests.values()):
            if request.paused and request.id not in self._flying() and self.random.random() < 0.7:
                if len(request.tokens) + 1 >= request.most:
                    self.scheduler.extend(request, 0)
                    self._finish(request, "length")
                else:
                    self.scheduler.extend(request, self.random.randrange(VOCABULARY))

    def spoil(self) -> None:
        """A file on disk is gone."""
        if self.machine.disk:
            place = self.random.choice(list(self.machine.disk))
            del self.machine.disk[place]

    def step(self) -> None:
        """Plan, and commit: this step, or the one before, or none for now."""
        if len(self.flights) == 2:
            self.commit()
        step = self.scheduler.plan()
        self.flights.append(self.machine.prepare(step, self.scheduler.tables))
        assert len(step.tokens_T) <= self.config.budget
        assert step.bounds[-1] == len(step.tokens_T) == len(step.positions_T)
        if not self.asynchronous or self.random.random() < 0.2 * len(self.flights):
            self.commit()

    def commit(self) -> None:
        """Execute and commit the oldest step; end what is to be ended."""
        if not self.flights:
            return
        prepared = self.flights.popleft()
        step = prepared.step
        tokens, lost = self.machine.execute(prepared)
        failed = {run for run in range(step.samples) if self.random.random() < 0.002}
        self.scheduler.commit(step, [-1 if run in failed else token for run, token in enumerate(tokens)], lost)
        for run, request in enumerate(step.requests[: step.samples]):
            if run in failed and request.life is Life.FINISHED and request not in self.ended:
                assert request.finish_reason == "error"
                self.ended.append(request)
            elif request.life is not Life.FINISHED and not request.external:
                assert request.tokens[-1] == tokens[run]
                if len(request.tokens) >= request.most:
                    self._finish(request, "length")
                elif tokens[run] == 0:
                    self._finish(request, "stop")

    def check(self) -> None:
        """Nothing is lost: the scheduler's own proof, and ours."""
        self.scheduler.check()
        living = set(self.scheduler.requests)
        assert living.isdisjoint(request.id for request in self.ended)
        assert len(living) + len(self.ended) == len(self.born), "a request is lost"

    def drain(self) -> None:
        """Every request ends; then no page is used."""
        for _ in range(20_000):
            if not self.scheduler.requests:
                break
            self.extend()
            self.step()
            self.check()
        assert not self.scheduler.requests, "a request never ends"
        while self.flights:
            self.commit()
            self.check()
        stats = self.scheduler.stats
        assert not any(stats.used) and not any(stats.host_used) and stats.running == stats.waiting == stats.swapped == 0
        for request in self.ended:
            self._judge(request)

    def _judge(self, request: Request) -> None:
        """The tokens are those that one request alone would have."""
        if request.finish_reason in ("stop", "length") and not request.external:
            values = values_of(request.tokens, request.salt)
            for place in range(self.given[request.id], len(request.tokens)):
                assert request.tokens[place] == next_token(values[place - 1]), "another token than alone"

    def _enter(self, request: Request) -> None:
        self.born[request.id] = request
        self.given[request.id] = len(request.tokens)

    def _finish(self, request: Request, reason: str) -> None:
        self.scheduler.finish(request, reason)  # type: ignore[arg-type]
        self.ended.append(request)

    def _flying(self) -> set[int]:
        return {request.id for prepared in self.flights for request in prepared.step.requests}


OPERATIONS = {"step": 40, "submit": 12, "extend": 8, "fork": 5, "abort": 3, "preempt": 2, "commit": 2, "spoil": 1}


def run_storm(made: World, operations: int) -> None:
    """That many random operations, a check after each; then everything is let to its end."""
    names, weights = list(OPERATIONS), list(OPERATIONS.values())
    for name in made.random.choices(names, weights, k=operations):
        if name == "submit":
            made.submit(external=made.random.random() < 0.2)
        else:
            getattr(made, name)()
        made.check()
    made.drain()


def storm(seed: int, world: str, asynchronous: bool, operations: int) -> World:
    """:func:`run_storm` in a new world."""
    config, groups = WORLDS[world]
    made = World(seed, config, groups, asynchronous)
    run_storm(made, operations)
    return made


def main(operations: int, seeds: int) -> None:
    """Every world, both ways of committing."""
    for world in WORLDS:
        for asynchronous in (False, True):
            for seed in range(seeds):
                made = storm(seed, world, asynchronous, operations)
                stats, way = made.scheduler.stats, "asynchronous" if asynchronous else "synchronous"
                print(
                    f"{world:13} {way:12} seed {seed}: {len(made.born)} requests, {stats.steps} steps, "
                    f"{stats.computed} tokens, {stats.hits} hits, {stats.recomputed} recomputed, {stats.swaps} swaps, "
                    f"moves {made.machine.moved}",
                    flush=True,
                )


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(*(given + [10_000, 1][len(given) :]))
