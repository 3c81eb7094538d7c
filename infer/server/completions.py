"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from infer.server.answer import Form, Tally, Work, Written, answer
from infer.server.bodies import CompletionBody, SamplingBody
from infer.server.codec import Codec, Reader
from infer.server.config import ServerConfig
from infer.server.errors import ApiError, invalid
from infer.server.exchange import Exchange
from infer.server.logprobs import completion_logprobs
from infer.server.prompts import check_length, read_prompts
from infer.server.server import Server

if TYPE_CHECKING:
    from infer.completion import Choice, Event

__all__ = ["check_counts", "completions", "must_generate"]

USUAL = 16
"""Tokens to generate where nothing is said, as with OpenAI."""


async def completions(server: Server, exchange: Exchange) -> None:
    """Continue prompts."""
    server.refuse_new()
    must_generate(server)
    body = await server.read(exchange, CompletionBody)
    check_counts(body, server.config)
    _check(body, server.config)
    silent = body.max_tokens == 0
    most = 1 if silent else USUAL if body.max_tokens is None else body.max_tokens
    prompts, texts = await read_prompts(
        body.prompt,
        server.codec,
        model=server.model,
        most=server.config.most_prompts,
        special=body.add_special_tokens is not False,
    )
    for prompt in prompts:
        check_length(len(prompt), max(most, 1), server.model, "prompt")
    scored = body.logprobs if body.echo else None
    params = body.params(most, body.logprobs, scored)
    work = Work(prompts, [params] * len(prompts), "prompt", silent)
    skip = params.skip_special_tokens
    echoes = None
    if body.echo:
        echoes = [
            await server.codec.decode(prompt, skip=skip) if text is None else text
            for prompt, text in zip(prompts, texts, strict=True)
        ]
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    form = _Completions(exchange.id, server.model.names[0], work, server.codec, echoes, usage=usage)
    await answer(server, exchange, work, form, stream=bool(body.stream))


def must_generate(server: Server) -> None:
    """Refuse to continue texts with a model that cannot (404)."""
    if not server.model.generates:
        raise ApiError(404, "model: this model makes vectors and cannot continue texts", param="model")


def check_counts(body: SamplingBody, config: ServerConfig) -> None:
    """Refuse what would be too much, or cannot be streamed (400)."""
    for name in ("n", "best_of", "beams"):
        value = getattr(body, name)
        if value is not None and not 1 <= value <= config.most_n:
            raise invalid(f"{name}: must be at least 1 and at most {config.most_n}", name)
    if body.max_tokens is not None and body.max_tokens < 0:
        raise invalid("max_tokens: must not be negative", "max_tokens")
    for name in ("n", "best_of"):
        if body.temperature == 0 and (body.beams or 1) == 1 and (getattr(body, name) or 1) > 1:
            why = "at temperature 0 every choice would be the same; ask for one, or give a higher temperature"
            raise invalid(f"{name}: {why}", name)
    if body.stream:
        if (body.beams or 1) > 1:
            raise invalid("beams: a beam search cannot be streamed", "beams")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise invalid("best_of: what is best is known only in the end, so it cannot be streamed", "best_of")


def _check(body: CompletionBody, config: ServerConfig) -> None:
    if body.logprobs is not None and not 0 <= body.logprobs <= config.most_logprobs:
        raise invalid(f"logprobs: must be at least 0 and at most {config.most_logprobs}", "logprobs")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens: 0 leaves nothing to answer but with echo", "max_tokens")
    if body.stream and body.echo and (body.logprobs is not None or body.max_tokens == 0):
        raise invalid("echo: log-probabilities of a prompt cannot be streamed", "echo")


class _Completions(Form):
    """Texts; the choices of the second prompt are counted on from those of the first."""

    whole_kind = chunk_kind = "text_completion"

    def __init__(
        self, id: str, model: str, work: Work, codec: Codec, echoes: Sequence[str] | None, *, usage: bool
    ) -> None:
        super().__init__(f"cmpl-{id}", model, usage=usage)
        self.work, self.codec, self.echoes = work, codec, echoes
        self._readers: dict[int, Reader | None] = {}

    def opening(self, place: int) -> Iterator[dict[str, Any]]:
        if self.echoes is not None:
            for choice in range(self.work.n):
                yield self._choice(place, choice, self.echoes[place], None, None)

    def pieces(self, place: int, event: Event) -> Iterator[dict[str, Any]]:
        logprobs = None
        if self.work.params[place].logprobs is not None and event.tokens:
            index = place * self.work.n + event.choice
            if index not in self._readers:
                self._readers[index] = self._reader(place)
            top = bool(self.work.params[place].logprobs)
            logprobs = completion_logprobs(self.codec, event.logprobs, self._readers[index], top=top)
        if event.text or logprobs or event.finish_reason:
            yield self._choice(place, event.choice, event.text, logprobs, event.finish_reason)

    def cut(self, place: int, choice: int) -> Iterator[dict[str, Any]]:
        yield self._choice(place, choice, "", None, "abort")

    def choices(self, tally: Tally) -> list[dict[str, Any]]:
        return [
            self._whole(place, choice, tally)
            for place in range(len(self.work.prompts))
            for choice in tally.choices(place)
        ]

    def _whole(self, place: int, choice: Choice | Written, tally: Tally) -> dict[str, Any]:
        text = "" if self.work.silent else choice.text
        if self.echoes is not None:
            text = self.echoes[place] + text
        asked = self.work.params[place].logprobs
        logprobs = None
        if asked is not None:
            own = [] if self.work.silent else list(choice.logprobs or ())
            first = None
            if self.echoes is not None and (whole := tally.completions.get(place)) is not None:
                first, own = self.work.prompts[place][0], [*(whole.prompt_logprobs or ()), *own]
            reader = self._reader(place, whole=self.echoes is not None)
            logprobs = completion_logprobs(self.codec, own, reader, top=asked > 0, first=first)
        end = "length" if self.work.silent else choice.finish_reason
        return self._choice(place, choice.index, text, logprobs, end)

    def _reader(self, place: int, *, whole: bool = False) -> Reader | None:
        skip = self.work.params[place].skip_special_tokens
        return self.codec.reader(() if whole else self.work.prompts[place], skip=skip)

    def _choice(
        self, place: int, choice: int, text: str, logprobs: dict[str, Any] | None, end: str | None
    ) -> dict[str, Any]:
        index = place * self.work.n + choice
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": end}
