"""The engine: requests in, tokens out; every rank of a replica makes the same steps."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from infer.beamjob import BeamJob
from infer.completion import Event
from infer.constrain.forms import Forms
from infer.embedder import Embedder
from infer.job import Job, Member
from infer.limits import Limits
from infer.params import SamplingParams
from infer.request import Request, RequestError
from infer.runner import Outcome, Prepared, Runner
from infer.sampling import TokenLogProb
from infer.scheduler import Scheduler, Stats
from infer.text import Detokenizer, encode_bad_words
from parallel.errors import Refusal, refuse

__all__ = ["Engine"]

_FORMLESS = "constraint: this engine keeps no forms"


class _Flight(NamedTuple):
    """A step that is under way."""

    prepared: Prepared
    members: list[Member]
    outcome: Future[Outcome]


class Engine:
    """Continues many prompts at once, step by step.

    Every rank of the replica makes one, and makes the same calls in the same order: each then comes to the same events.

    Args:
        scheduler: plans the steps.
        runner: carries them out.
        limits: what requests are held against.
        detokenizer: None: there is no text.
        overlap: plan the next step, and look at what the last one gave, while one is computed.
        embedder: of the same model; None: it does not embed.
        forms: of completions, those of the runner's sampler; None: a request with one is refused.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        limits: Limits,
        detokenizer: Detokenizer | None = None,
        *,
        overlap: bool = True,
        embedder: Embedder | None = None,
        forms: Forms | None = None,
    ) -> None:
        self.scheduler, self.runner, self.limits, self.embedder = scheduler, runner, limits, embedder
        self.detokenizer, self.overlap, self.forms = detokenizer, overlap, forms
        self._jobs: dict[int, Job] = {}
        self._members: dict[int, Member] = {}
        self._next = 0
        self._flight: _Flight | None = None
        self._worker = ThreadPoolExecutor(1, "engine")

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._jobs) or self._flight is not None

    @property
    def stats(self) -> Stats:
        """Of the scheduler."""
        return self.scheduler.stats

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        salt: bytes = b"",
        seed: int | None = None,
    ) -> int:
        """Queue a prompt; its number, by which its events are known.

        Args:
            prompt: token ids.
            params: how to continue it.
            priority: the lower, the sooner.
            salt: prompts with different salts share no cached pages.
            seed: where ``params`` has none; the same on every rank. None: drawn, which is for a single rank.

        Raises:
            RequestError: it cannot be continued, with every reason; nothing else is affected.
        """
        params = SamplingParams() if params is None else params
        refuse(RequestError, self.limits.problems(prompt, params))
        if params.constraint is not None:
            refuse(RequestError, self.forms.problems(params.constraint) if self.forms else [_FORMLESS])
        if params.bad_words:
            params = encode_bad_words(params, self.detokenizer.tokenizer if self.detokenizer else None)
        if seed is None:
            seed = secrets.randbits(63)
        seed = seed if params.seed is None else params.seed
        job = (BeamJob if params.beams > 1 else Job)(
            self._number(), prompt, params, seed=seed, detokenizer=self.detokenizer, ends=self.limits.ends
        )
        request = Request(
            job.id,
            list(prompt),
            len(prompt),
            params,
            priority=priority,
            salt=salt,
            most=len(prompt) + params.max_tokens,
            reuse=params.prompt_logprobs is None,
            external=params.beams > 1,
        )
        self.scheduler.add(request)
        self._jobs[job.id] = job
        self._members[request.id] = job.join(request)
        return job.id

    def embed(self, documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """One vector for each document, computed behind the step that is under way; every rank calls it.

        Args:
            documents: token ids of each.

        Raises:
            RequestError: this engine does not embed, or not these documents, with every reason.
        """
        embedder = self.embedder
        if embedder is None:
            raise RequestError("this engine does not embed")
        longest = max(map(len, documents), default=0)
        try:
            work = self._worker.submit(embedder, documents, budget=max(2048, longest))
            return work.result().float().tolist()
        except Refusal as error:
            raise RequestError(error.problems) from None

    def _number(self) -> int:
        self._next += 1
        return self._next

    def abort(self, id: int) -> bool:
        """End a prompt that is being continued, without an event; False: there is none with this number."""
        job = self._jobs.pop(id, None)
        if job is None:
            return False
        for member in job.members:
            self._leave(member)
            self.scheduler.abort(member.request.id)
        job.leave()
        return True

    def step(self) -> list[Event]:
        """Make one step, and tell what it gave; nothing if there is nothing to do."""
        flight = self._flight or self._launch()
        if flight is None:
            return []
        self._flight = self._launch() if self.overlap else None
        try:
            outcome = flight.outcome.result()
        except BaseException:
            self._flight = None
            raise
        return self._commit(flight, outcome)

    def close(self) -> None:
        """Wait for what is under way, and let go of the thread."""
        flight, self._flight = self._flight, None
        if flight is not None:
            self._commit(flight, flight.outcome.result())
        self._worker.shutdown()

    def _launch(self) -> _Flight | None:
        """Plan a step, and begin it as soon as the one before is done."""
        if not self.scheduler.requests:
            return None
        step = self.scheduler.plan()
        members = [self._members[request.id] for request in step.requests[: step.samples]]
        rows = [member.row(stop) for member, stop in zip(members, step.stops_R.tolist(), strict=False)]
        prepared = self.runner.prepare(step, self.scheduler.tables, rows)
        if self.overlap:
            return _Flight(prepared, members, self._worker.submit(self.runner.execute, prepared))
        done: Future[Outcome] = Future()
        done.set_result(self.runner.execute(prepared))
        return _Flight(prepared, members, done)

    def _commit(self, flight: _Flight, outcome: Outcome) -> list[Event]:
        """Give every request its token; end those that are done."""
        step = flight.prepared.step
        self.scheduler.commit(step, outcome.tokens, outcome.lost)
        for run, scores in outcome.prompts.items():
            member = self._members.get(step.requests[run].id)
            if member is not None:
                member.job.prompt_logprobs += scores
        changes: dict[int, list[tuple[Member, str, tuple[int, ...], tuple[TokenLogProb, ...]]]] = {}
        for run, (member, token) in enumerate(zip(flight.members, outcome.tokens, strict=True)):
            if member.end is not None or member.request.id not in self._members:
                continue  # it has ended since this step was planned
            if isinstance(member.job, BeamJob):
                self._search(member.job, member, token, outcome.candidates.get(run, ()), outcome.errors.get(run, ""))
                changes.setdefault(member.job.id, [])
                continue
            given = len(member.stream.tokens)
            if token < 0:
                member.end, member.job.error = "error", outcome.errors.get(run, "it failed on another rank")
                text = member.stream.close()
            else:
                text = self._taken(member, token, outcome.logprobs.get(run))
            tokens = tuple(member.stream.tokens[given:])
            logprobs = tuple(member.logprobs[given : given + len(tokens)])
            changes.setdefault(member.job.id, []).append((member, text, tokens, logprobs))
            if member.end is not None:
                self._leave(member)
                self.scheduler.finish(member.request, member.end, member.job.error)
        return self._events(changes)

    def _taken(self, member: Member, token: int, logprob: TokenLogProb | None) -> str:
        """A member has a token more; if no text can be made of it, that member alone has failed (on every rank)."""
        try:
            text = member.take(token, logprob)
        except Exception as error:  # noqa: BLE001 - others have no part in it
            member.end, member.job.error = "error", f"a token could not be made text: {type(error).__name__}"
            return ""
        self._fork(member.job)
        return text

    def _events(self, changes: dict[int, list]) -> list[Event]:
        events: list[Event] = []
        for id, own in changes.items():
            job = self._jobs[id]
            if isinstance(job, BeamJob):
                own = [(job.members[0], "", (), ())] if job.done else []
            events += job.events(own)
            if job.done:
                self._jobs.pop(id).leave()
        return events

    def _search(
        self, job: BeamJob, member: Member, token: int, candidates: Sequence[tuple[int, float]], error: str
    ) -> None:
        """A beam has its candidates: when all have, the next beams take their place."""
        if job.done:
            return
        if token < 0:
            job.error = error
        else:
            following = job.take(member, candidates, self.scheduler, self._number)
            if following is not None:
                gone = {parent.request.id for _, parent in following} | set(job.last)
                for beam, parent in following:
                    if beam.request.id not in self._members:
                        self.runner.fork(parent.request.id, beam.request.id)
                    self._members[beam.request.id] = beam
                for id in gone - {beam.request.id for beam, _ in following}:
                    self._members.pop(id, None)
                    self.runner.forget(id)
                job.last = [beam.request.id for beam, _ in following]
        if job.done:
            for beam in job.members:
                beam.end = "error" if job.error else "stop"
                self._leave(beam)
                self.scheduler.finish(beam.request, "error" if job.error else "stop", job.error)

    def _fork(self, job: Job) -> None:
        """The prompt is computed: let the other samples begin."""
        first = job.members[0]
        while len(job.members) < job.params.samples:
            request = self.scheduler.fork(first.request, self._number(), keep=len(job.prompt))
            self._members[request.id] = job.join(request)

    def _leave(self, member: Member) -> None:
        self._members.pop(member.request.id, None)
        self.runner.forget(member.request.id)
