"""Requests and what a step does for them. Policy only: nothing here knows of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from parallel.config import option

__all__ = ["Completion", "Request", "SamplingParams", "Slice", "plan", "prompt_problems"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt."""

    max_tokens: int = option(128, "most tokens to generate")
    temperature: float = option(0.0, "0: the likeliest token, always")
    ignore_eos: bool = option(False, "go on after the end-of-text token")

    def problems(self) -> Iterator[str]:
        """Why these cannot be honoured."""
        if self.max_tokens < 1:
            yield f"max_tokens = {self.max_tokens}: must be at least 1"
        if self.temperature != 0:
            yield f"temperature = {self.temperature}: this version generates greedily (temperature = 0)"


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request.

    Attributes:
        prompt: its token ids.
        tokens: those that were generated, without the end-of-text token.
        text: the generated tokens as text; empty where there is no tokenizer.
        finish_reason: ``stop`` at end-of-text, ``length`` at the limit.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]


@dataclass(slots=True)
class Request:
    """A prompt that is being continued; each step closes the gap between ``computed`` and the number of tokens.

    Attributes:
        id: its place in the caller's list, and in the cache.
        tokens: prompt and what was generated so far.
        prompt: how many of them are the prompt.
        params: how to continue.
        computed: tokens whose keys and values are in the cache.
        finished: why it ended, once it has.
    """

    id: int
    tokens: list[int]
    prompt: int
    params: SamplingParams
    computed: int = 0
    finished: Literal["stop", "length"] | None = field(default=None)

    def commit(self, token: int, ends: Sequence[int]) -> None:
        """Take the token that was chosen after the last one."""
        if token in ends and not self.params.ignore_eos:
            self.finished = "stop"
            return
        self.tokens.append(token)
        if len(self.tokens) - self.prompt >= self.params.max_tokens:
            self.finished = "length"


class Slice(NamedTuple):
    """Tokens ``start`` to ``stop`` of a request, computed in one step; the last is sampled if nothing follows it."""

    request: Request
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """Whether this slice reaches the request's last token."""
        return self.stop == len(self.request.tokens)


def prompt_problems(
    prompts: Sequence[Sequence[int]], params: SamplingParams, *, vocabulary: int, longest: int | None
) -> list[str]:
    """Why these prompts cannot be continued.

    Args:
        prompts: token ids.
        params: the same for all.
        vocabulary: of the model.
        longest: most positions the model has; None: no limit.
    """
    problems: list[str] = []
    for index, ids in enumerate(prompts):
        if not ids:
            problems.append(f"prompt {index} is empty")
        bad = [token for token in ids if not 0 <= token < vocabulary]
        if bad:
            problems.append(f"prompt {index}: token id {bad[0]} is outside the vocabulary of {vocabulary}")
        if longest is not None and len(ids) + params.max_tokens > longest:
            problems.append(
                f"prompt {index}: {len(ids)} tokens and max_tokens = {params.max_tokens} exceed the model's "
                f"{longest} positions"
            )
    return problems


def plan(requests: Sequence[Request], budget: int, most: int) -> list[Slice]:
    """The next step: in order of arrival, at most ``most`` unfinished requests and ``budget`` tokens."""
    slices: list[Slice] = []
    for request in [request for request in requests if request.finished is None][:most]:
        take = min(len(request.tokens) - request.computed, budget)
        if take:
            slices.append(Slice(request, request.computed, request.computed + take))
            budget -= take
    return slices
