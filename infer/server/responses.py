"""POST /v1/responses: an answer as a list of items; nothing of it is stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from infer.server.answer import Form, Tally
from infer.server.body import Body
from infer.server.codec import Codec
from infer.server.completions import must_generate
from infer.server.errors import ApiError
from infer.server.exchange import Exchange
from infer.server.response_body import ResponsesBody
from infer.server.response_items import Items
from infer.server.server import Server
from infer.server.talk import Conversation, Talk, prepare

if TYPE_CHECKING:
    from infer.completion import Event

__all__ = ["responses"]

_STATUS = {"length": "incomplete", "abort": "failed"}


async def responses(server: Server, exchange: Exchange) -> None:
    """Answer a conversation."""
    server.refuse_new()
    must_generate(server)
    body = await server.read(exchange, ResponsesBody)
    conversation = Conversation(
        messages=body.messages(),
        tools=body.functions(),
        choice=body.choice(),
        parallel=body.parallel_tool_calls is not False,
        param="input",
        form_field="text.format",
    )
    talk = await prepare(server, conversation, body.max_output_tokens, body.params)
    form = _Response(exchange.id, server.model.names[0], talk, server.codec, body)
    await talk.answer(server, exchange, form, stream=bool(body.stream))


class _Response(Form):
    """Items, and the events in which they come."""

    whole_kind = chunk_kind = "response"
    named = True

    def __init__(self, id: str, model: str, talk: Talk, codec: Codec, body: ResponsesBody) -> None:
        super().__init__(f"resp_{id}", model, usage=True)
        self.talk, self.codec, self.body = talk, codec, body
        self._reading, self._items = talk.reading(), Items(id)
        self._new: list[dict[str, Any]] = []
        self._number = -1

    def opening(self, place: int) -> Iterator[dict[str, Any]]:
        for name in ("created", "in_progress"):
            yield {"type": f"response.{name}", "response": self._value("in_progress")}

    def take(self, place: int, event: Event) -> None:
        pieces = self._reading.take(event.text)
        if event.finish_reason:
            pieces += self._reading.end()
        self._new = [told for piece in pieces for told in self._items.take(piece, self._reading)]
        if event.finish_reason:
            self._new += self._items.close(whole=event.finish_reason == "stop")

    def pieces(self, place: int, event: Event) -> Iterator[dict[str, Any]]:
        yield from self._new

    def cut(self, place: int, choice: int) -> Iterator[dict[str, Any]]:
        for piece in self._reading.end():
            yield from self._items.take(piece, self._reading)
        yield from self._items.close(whole=False)

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        return {**choice, "sequence_number": self._number}

    def closing(self, tally: Tally) -> Iterator[dict[str, Any]]:
        value = self.whole(tally)
        yield self.chunk({"type": f"response.{value['status']}", "response": value})

    def failing(self, error: ApiError) -> Iterator[dict[str, Any]]:
        list(self._items.close(whole=False))
        value = self._value("failed", error={"code": "server_error", "message": error.message})
        yield self.chunk({"type": "response.failed", "response": value})

    def choices(self, tally: Tally) -> list[dict[str, Any]]:
        return []

    def whole(self, tally: Tally) -> dict[str, Any]:
        (choice,) = tally.choices(0)
        if not self._reading.ended:
            list(self.cut(0, 0))
        status = _STATUS.get(choice.finish_reason, "completed")
        more: dict[str, Any] = {}
        if status == "incomplete":
            more["incomplete_details"] = {"reason": "max_output_tokens"}
        if status == "failed":
            more["error"] = {"code": "server_error", "message": "aborted, as the server shuts down"}
        usage = {
            "input_tokens": tally.prompt_tokens,
            "input_tokens_details": {"cached_tokens": tally.cached, "cache_write_tokens": 0},
            "output_tokens": tally.generated,
            "output_tokens_details": {"reasoning_tokens": self.talk.reasoned(self.codec, choice.tokens, self._reading)},
            "total_tokens": tally.prompt_tokens + tally.generated,
        }
        return self._value(status, usage=usage, **more)

    def _value(self, status: str, **more: Any) -> dict[str, Any]:
        body = self.body
        text = (
            {"format": {"type": "text"}}
            if body.text is None
            else body.text.model_dump(by_alias=True, exclude_none=True)
        )
        choice = body.tool_choice
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": [dict(item) for item in self._items.items] if status != "in_progress" else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.talk.work.params[0].temperature,
            "text": text,
            "tool_choice": choice.model_dump() if isinstance(choice, Body) else choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": self.talk.work.params[0].top_p,
            "truncation": "disabled",
            "usage": None,
            **more,
        }
