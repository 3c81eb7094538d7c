"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from infer.server.answer import Form, Tally, Written
from infer.server.bodies import ChatBody
from infer.server.calls.piece import Piece
from infer.server.codec import Codec
from infer.server.completions import check_counts, must_generate
from infer.server.errors import invalid
from infer.server.exchange import Exchange
from infer.server.logprobs import chat_logprobs
from infer.server.reading import Reading
from infer.server.server import Server
from infer.server.talk import Conversation, Talk, prepare

if TYPE_CHECKING:
    from infer.completion import Choice, Event

__all__ = ["chat"]


async def chat(server: Server, exchange: Exchange) -> None:
    """Answer a conversation."""
    server.refuse_new()
    must_generate(server)
    body = await server.read(exchange, ChatBody)
    check_counts(body, server.config)
    logprobs = None
    if body.logprobs:
        logprobs, most = body.top_logprobs or 0, server.config.most_logprobs
        if not 0 <= logprobs <= most:
            raise invalid(f"top_logprobs: must be at least 0 and at most {most}", "top_logprobs")
    given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if given is not None and given < 1:
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        raise invalid(f"{name}: must be at least 1", name)
    conversation = Conversation(
        messages=[message.plain() for message in body.messages],
        tools=body.tools or (),
        choice=body.tool_choice,
        parallel=body.parallel_tool_calls is not False,
        begin=body.add_generation_prompt is not False,
        variables=body.chat_template_kwargs,
        form_field=body.form_field,
    )
    talk = await prepare(server, conversation, given, lambda most: body.params(most, logprobs))
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    form = _Chat(exchange.id, server.model.names[0], talk, server.codec, usage=usage)
    await talk.answer(server, exchange, form, stream=bool(body.stream))


class _Chat(Form):
    """Messages of the assistant."""

    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, id: str, model: str, talk: Talk, codec: Codec, *, usage: bool) -> None:
        super().__init__(f"chatcmpl-{id}", model, usage=usage)
        self.talk, self.codec = talk, codec
        params = talk.work.params[0]
        self._scored = params.logprobs is not None
        self._ranked = params.beams > 1 or params.best_of not in (None, params.n)
        self._readings = [talk.reading() for _ in range(params.n)]
        self._new: dict[int, list[Piece]] = {}

    def opening(self, place: int) -> Iterator[dict[str, Any]]:
        content = None if self.talk.names else ""
        for choice in range(self.talk.work.n):
            yield self._piece(choice, {"role": "assistant", "content": content})

    def take(self, place: int, event: Event) -> None:
        reading = self._readings[event.choice]
        self._new[event.choice] = reading.take(event.text)
        if event.finish_reason:
            self._new[event.choice] += reading.end()

    def pieces(self, place: int, event: Event) -> Iterator[dict[str, Any]]:
        logprobs = chat_logprobs(self.codec, event.logprobs) if self._scored and event.tokens else None
        yield from self._told(event.choice, self._new.pop(event.choice, []), logprobs)
        if event.finish_reason:
            yield self._piece(event.choice, {}, end=self._end(event.finish_reason, self._readings[event.choice]))

    def cut(self, place: int, choice: int) -> Iterator[dict[str, Any]]:
        yield from self._told(choice, self._readings[choice].end(), None)
        yield self._piece(choice, {}, end="abort")

    def choices(self, tally: Tally) -> list[dict[str, Any]]:
        return [
            {
                "index": choice.index,
                "message": self._message(reading),
                "logprobs": chat_logprobs(self.codec, choice.logprobs or ()) if self._scored else None,
                "finish_reason": self._end(choice.finish_reason, reading),
            }
            for choice, reading in self._read(tally)
        ]

    def usage(self, tally: Tally) -> dict[str, Any]:
        usage = tally.usage()
        if self.talk.thought != "none":
            count = sum(self.talk.reasoned(self.codec, choice.tokens, own) for choice, own in self._read(tally))
            usage["completion_tokens_details"] = {"reasoning_tokens": count}
        return usage

    def _read(self, tally: Tally) -> list[tuple[Choice | Written, Reading]]:
        """The choices with what they say; those that are ranked in the end are not the ones that were heard of."""
        choices = tally.choices(0)
        if self._ranked:
            self._readings = [self.talk.reading() for _ in choices]
            for choice, reading in zip(choices, self._readings, strict=True):
                reading.take(choice.text)
        for reading in self._readings:
            reading.end()
        return list(zip(choices, self._readings, strict=True))

    def _message(self, reading: Reading) -> dict[str, Any]:
        calls: dict[str, Any] = {}
        if reading.calls:
            calls["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in reading.calls
            ]
        thought = {"reasoning_content": reading.reasoning} if reading.reasoning else {}
        content = reading.content or (None if reading.calls else "")
        return {"role": "assistant", "content": content, "refusal": None, **thought, **calls}

    def _told(self, choice: int, pieces: Sequence[Piece], logprobs: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        deltas = [self._delta(choice, piece) for piece in pieces]
        if not deltas and logprobs:
            deltas = [{"content": ""}]
        for place, delta in enumerate(deltas):
            yield self._piece(choice, delta, logprobs if place == 0 else None)

    def _delta(self, choice: int, piece: Piece) -> dict[str, Any]:
        if piece.kind == "content":
            return {"content": piece.text}
        if piece.kind == "reasoning":
            return {"reasoning_content": piece.text}
        if piece.kind == "arguments":
            return {"tool_calls": [{"index": piece.call, "function": {"arguments": piece.text}}]}
        id = self._readings[choice].calls[piece.call].id
        function = {"name": piece.text, "arguments": ""}
        return {"tool_calls": [{"index": piece.call, "id": id, "type": "function", "function": function}]}

    def _end(self, reason: str, reading: Reading) -> str:
        return "tool_calls" if reason == "stop" and reading.calls else reason

    def _piece(
        self, choice: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, end: str | None = None
    ) -> dict[str, Any]:
        return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": end}
