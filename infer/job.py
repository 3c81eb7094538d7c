"""A prompt as its caller gave it, and the sequences that continue it: several samples, or the beams of a search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from infer.completion import Choice, Completion, Event
from infer.params import SamplingParams
from infer.request import FinishReason, Request
from infer.sampling import Row, TokenLogProb, request_seed
from infer.text import Detokenizer, TextStream

__all__ = ["Job", "Member"]


@dataclass(slots=True, eq=False)
class Member:
    """One sequence of a job.

    Attributes:
        job: that it belongs to.
        index: among its members.
        request: as the scheduler knows it.
        stream: its text.
        seed: of its random numbers.
        logprobs: of its tokens, where they are reported.
        score: their sum.
        end: why it ended, once it has.
    """

    job: Job
    index: int
    request: Request
    stream: TextStream
    seed: int
    logprobs: list[TokenLogProb] = field(default_factory=list)
    score: float = 0.0
    end: FinishReason | None = None

    def row(self, stop: int) -> Row:
        """What the sampler is told, when ``stop`` tokens are in the cache."""
        request = self.request
        return Row(request.id, request.params, request.tokens, request.prompt, stop - request.prompt, self.seed)

    def take(self, token: int, logprob: TokenLogProb | None) -> str:
        """One token more; the text that is certain now. Its stream says whether it was the last."""
        if logprob is not None:
            self.logprobs.append(logprob)
            self.score += logprob.value
        text = self.stream.push((token,))
        self.end = self.stream.finish_reason
        return text

    def choice(self) -> Choice:
        """As its caller gets it."""
        asked = self.job.params.logprobs is not None
        assert self.end is not None
        return Choice(
            self.index,
            tuple(self.stream.tokens),
            self.stream.text,
            self.end,
            self.stream.stop_reason,
            tuple(self.logprobs[: len(self.stream.tokens)]) if asked else None,
            self.score,
        )


class Job:
    """One prompt. Its first member computes the prompt; the others fork from it.

    Args:
        id: of the prompt.
        prompt: its tokens.
        params: how it is continued, bad words as tokens.
        seed: of all its members.
        detokenizer: None: there is no text.
        ends: the model's end-of-text tokens.
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
        self.id, self.prompt, self.params, self.seed = id, tuple(prompt), params, seed
        self.members: list[Member] = []
        self.prompt_logprobs: list[TokenLogProb] = []
        self.error = ""
        self._first: Request | None = None
        self._detokenizer, self._ends = detokenizer, ends

    def join(self, request: Request) -> Member:
        """One member more."""
        index = len(self.members)
        self._first = self._first or request
        stream = TextStream(self.params, self._detokenizer, ends=self._ends, context=self.prompt)
        member = Member(self, index, request, stream, request_seed(self.seed, index))
        self.members.append(member)
        return member

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were found in the prefix cache."""
        return min(len(self.prompt), self._first.cached) if self._first is not None else 0

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return len(self.members) == self.params.samples and all(member.end is not None for member in self.members)

    @property
    def ranked(self) -> bool:
        """Whether only the best samples are returned, so that none can be told before all have ended."""
        return self.params.samples > self.params.n

    def leave(self) -> None:
        """Nobody asks again: its members, who know it as it knows them, need not wait for the garbage collector."""
        self.members = []

    def completion(self) -> Completion:
        """The whole, once all is done."""
        choices = [member.choice() for member in self.members]
        if self.ranked:
            choices.sort(key=lambda choice: -choice.score)
            choices = [_renumbered(choice, place) for place, choice in enumerate(choices[: self.params.n])]
        scored = tuple(self.prompt_logprobs) if self.params.prompt_logprobs is not None else None
        return Completion(self.prompt, tuple(choices), scored, self.error, self.cached)

    def events(
        self, changes: Sequence[tuple[Member, str, tuple[int, ...], tuple[TokenLogProb, ...]]]
    ) -> Iterator[Event]:
        """What its caller is told of a step."""
        done = self.done
        for place, (member, text, tokens, logprobs) in enumerate(changes):
            last = done and place == len(changes) - 1
            if self.ranked and not last:
                continue
            yield Event(self.id, member.index, text, tokens, logprobs, member.end, self.completion() if last else None)


def _renumbered(choice: Choice, index: int) -> Choice:
    return Choice(
        index,
        choice.tokens,
        choice.text,
        choice.finish_reason,
        choice.stop_reason,
        choice.logprobs,
        choice.score,
    )
