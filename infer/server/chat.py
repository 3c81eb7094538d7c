"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from infer.server.answer import Form, Tally, Work, answer
from infer.server.bodies import ChatBody
from infer.server.codec import Codec
from infer.server.completions import check_counts, must_generate
from infer.server.errors import invalid
from infer.server.exchange import Exchange
from infer.server.logprobs import chat_logprobs
from infer.server.prompts import check_length, check_tokens
from infer.server.server import Server

if TYPE_CHECKING:
    from infer.completion import Event

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
    prompt = await server.codec.conversation(
        [message.plain() for message in body.messages],
        answer=body.add_generation_prompt is not False,
        variables=body.chat_template_kwargs,
    )
    if not prompt:
        raise invalid("messages: the conversation has no tokens", "messages")
    check_tokens(prompt, server.model, "messages", "messages")
    given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if given is not None and given < 1:
        raise invalid("max_completion_tokens: must be at least 1", "max_completion_tokens")
    most = max(1, server.model.context - len(prompt)) if given is None else given
    check_length(len(prompt), most, server.model, "messages")
    work = Work([prompt], [body.params(most, logprobs)], "messages")
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    form = _Chat(exchange.id, server.model.names[0], work, server.codec, usage=usage)
    await answer(server, exchange, work, form, stream=bool(body.stream))


class _Chat(Form):
    """Messages of the assistant."""

    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, id: str, model: str, work: Work, codec: Codec, *, usage: bool) -> None:
        super().__init__(f"chatcmpl-{id}", model, usage=usage)
        self.work, self.codec = work, codec
        self._scored = work.params[0].logprobs is not None

    def opening(self, place: int) -> Iterator[dict[str, Any]]:
        for choice in range(self.work.n):
            yield self._piece(choice, {"role": "assistant", "content": ""})

    def pieces(self, place: int, event: Event) -> Iterator[dict[str, Any]]:
        logprobs = chat_logprobs(self.codec, event.logprobs) if self._scored and event.tokens else None
        if event.text or logprobs:
            yield self._piece(event.choice, {"content": event.text}, logprobs)
        if event.finish_reason:
            yield self._piece(event.choice, {}, end=event.finish_reason)

    def cut(self, place: int, choice: int) -> dict[str, Any]:
        return self._piece(choice, {}, end="abort")

    def choices(self, tally: Tally) -> list[dict[str, Any]]:
        return [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": chat_logprobs(self.codec, choice.logprobs or ()) if self._scored else None,
                "finish_reason": choice.finish_reason,
            }
            for choice in tally.choices(0)
        ]

    def _piece(
        self, choice: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, end: str | None = None
    ) -> dict[str, Any]:
        return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": end}
