"""What a caller gets: completions, and the pieces in which they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from infer.request import FinishReason
from infer.sampling import TokenLogProb

__all__ = ["Choice", "Completion", "Event"]


@dataclass(frozen=True, slots=True)
class Choice:
    """One continuation of a prompt.

    Attributes:
        index: its place among those of its prompt.
        tokens: that were generated; without the one that ended it, unless that was asked for.
        text: of the tokens; empty where there is no tokenizer.
        finish_reason: ``stop`` at a token or text that ends it, ``length`` at the limit, ``abort``, ``error``.
        stop_reason: the token or text that ended it; None: end-of-text or no stop.
        logprobs: one for each token, if that was asked for.
        score: sum of the tokens' log-probabilities, where they are known (beam search: as it is ranked); else 0.
    """

    index: int
    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogProb, ...] | None = None
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its continuations, best first where they are ranked.

    Attributes:
        prompt: its token ids.
        choices: ``n`` of them.
        prompt_logprobs: of each token but the first, if that was asked for.
        error: what went wrong, where a choice ended with ``error``.
        cached: tokens of the prompt that were not computed but found in the prefix cache.
    """

    prompt: tuple[int, ...]
    choices: tuple[Choice, ...]
    prompt_logprobs: tuple[TokenLogProb, ...] | None = None
    error: str = ""
    cached: int = 0

    @staticmethod
    def refused(prompt: Sequence[int], problems: Sequence[str]) -> Completion:
        """Of a prompt of which nothing was computed, and why."""
        return Completion(tuple(prompt), (Choice(0, (), "", "error"),), error="; ".join(problems))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of the first choice."""
        return self.choices[0].tokens

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason:
        """Of the first choice."""
        return self.choices[0].finish_reason

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Completion:
        """What :meth:`to_json` gave, which may have become lists on the way."""
        choices = [
            Choice(**{**choice, "tokens": tuple(choice["tokens"]), "logprobs": _logprobs(choice["logprobs"])})
            for choice in values["choices"]
        ]
        scored = _logprobs(values["prompt_logprobs"])
        more = {**values, "prompt": tuple(values["prompt"]), "choices": tuple(choices), "prompt_logprobs": scored}
        return Completion(**more)


def _logprobs(values: Any) -> tuple[TokenLogProb, ...] | None:
    if values is None:
        return None
    return tuple(TokenLogProb(token, own, tuple((t, v) for t, v in top)) for token, own, top in values)


class Event(NamedTuple):
    """What a step added to one choice.

    Attributes:
        id: of the prompt, as :meth:`Engine.add` returned it.
        choice: which one of the prompt.
        text: that is certain now.
        tokens: that are new.
        logprobs: of the new tokens, if that was asked for.
        finish_reason: why the choice has ended, once it has.
        completion: the whole, once all choices have ended.
    """

    id: int
    choice: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogProb, ...] = ()
    finish_reason: FinishReason | None = None
    completion: Completion | None = None

    @staticmethod
    def joined(events: Sequence[Event]) -> Event:
        """Events of one choice, of which only the last may have ended it, as one."""
        first, last = events[0], events[-1]
        return Event(
            first.id,
            first.choice,
            "".join(event.text for event in events),
            tuple(token for event in events for token in event.tokens),
            tuple(logprob for event in events for logprob in event.logprobs),
            last.finish_reason,
            last.completion,
        )
