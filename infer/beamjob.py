"""A prompt that is continued by beam search: its members are the beams, of which the scheduler knows as requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from infer.beams import BeamSearch, branch
from infer.completion import Choice, Completion
from infer.job import Job, Member
from infer.params import SamplingParams
from infer.scheduler import Scheduler
from infer.text import Detokenizer, TextStream

__all__ = ["BeamJob"]


class BeamJob(Job):
    """Arguments as of :class:`~infer.job.Job`; its requests are ``external``.

    Attributes:
        search: which beams go on.
        last: ids of the requests of the beams.
    """

    def __init__(
        self,
        id: int,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        seed: int,
        detokenizer: Detokenizer | None,
        ends: Sequence[int],
    ) -> None:
        super().__init__(id, prompt, params, seed=seed, detokenizer=detokenizer, ends=ends)
        self.search = BeamSearch(
            params.beams,
            longest=params.max_tokens,
            ends=params.stops(ends),
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            stopped=partial(_stopped, detokenizer, params) if params.stop and detokenizer is not None else None,
        )
        self.last: list[int] = [id]
        self._found: dict[int, Any] = {}

    @property
    def done(self) -> bool:
        """Whether the search is over."""
        return self.search.done or bool(self.error)

    def take(
        self,
        member: Member,
        candidates: Sequence[tuple[int, float]],
        scheduler: Scheduler,
        number: Callable[[], int],
    ) -> list[tuple[Member, Member]] | None:
        """What a beam may go on with. When all have said so, the search makes its step.

        Returns:
            (beam, the beam that it goes on from) of the next step; None while others are still to come, or at the end.
        """
        self._found[member.request.id] = candidates
        if len(self._found) < len(self.members):
            return None
        found = [self._found[beam.request.id] for beam in self.members]
        self._found.clear()
        branches = self.search.advance(found)
        if self.search.done:
            return None
        before = self.members
        following = branch(scheduler, [beam.request for beam in before], branches, number)
        self.members = []
        return [(self.join(request), before[way.parent]) for request, way in zip(following, branches, strict=True)]

    def completion(self) -> Completion:
        """The best sequences."""
        choices = []
        for index, best in enumerate(self.search.hypotheses[: self.params.n]):
            stream = TextStream(self.params, self._detokenizer, ends=self._ends, context=self.prompt)
            stream.push(best.tokens)
            reason = stream.finish_reason or "length"
            choices.append(
                Choice(index, tuple(stream.tokens), stream.text, reason, stream.stop_reason, score=best.score)
            )
        if self.error:
            choices = [Choice(0, (), "", "error")]
        return Completion(self.prompt, tuple(choices), error=self.error, cached=self.cached)


def _stopped(detokenizer: Detokenizer, params: SamplingParams, tokens: Sequence[int]) -> bool:
    text = detokenizer.tokenizer.decode(list(tokens), skip_special_tokens=params.skip_special_tokens)
    return any(stop in text for stop in params.stop)
