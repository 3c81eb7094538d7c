"""The items of a response, and the events in which they grow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from infer.server.calls.piece import Piece
from infer.server.reading import Reading

__all__ = ["Items"]

_TEXTS = {"content": ("message", "output_text", "msg"), "reasoning": ("reasoning", "reasoning_text", "rs")}


class Items:
    """Made of pieces, one after the other.

    Args:
        id: of the response; those of its items are made of it.

    Attributes:
        items: so far; the texts of the last one are there once it is closed.
    """

    def __init__(self, id: str) -> None:
        self.id = id
        self.items: list[dict[str, Any]] = []
        self._kind = ""
        self._texts: list[str] = []

    def take(self, piece: Piece, reading: Reading) -> Iterator[dict[str, Any]]:
        """The events that tell a piece."""
        if piece.kind == "arguments":
            self._texts.append(piece.text)
            yield self._event("function_call_arguments.delta", delta=piece.text)
            return
        if piece.kind == "call":
            yield from self.close()
            yield from self._begin_call(reading, piece.call)
            return
        if piece.kind != self._kind:
            yield from self.close()
            yield from self._begin_text(piece.kind)
        self._texts.append(piece.text)
        more = {"logprobs": []} if piece.kind == "content" else {}
        yield self._event(f"{_TEXTS[piece.kind][1]}.delta", content_index=0, delta=piece.text, **more)

    def close(self, *, whole: bool = True) -> Iterator[dict[str, Any]]:
        """The events that end the last item, which is ``whole`` or was cut off."""
        kind, self._kind = self._kind, ""
        if not kind:
            return
        text, item = "".join(self._texts), self.items[-1]
        self._texts = []
        item["status"] = "completed" if whole else "incomplete"
        if kind == "call":
            item["arguments"] = text
            yield self._event("function_call_arguments.done", name=item["name"], arguments=text)
        else:
            part = _part(kind, text)
            item["content"] = [part]
            more = {"logprobs": []} if kind == "content" else {}
            yield self._event(f"{_TEXTS[kind][1]}.done", content_index=0, text=text, **more)
            yield self._event("content_part.done", content_index=0, part=part)
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": dict(item)}

    def _begin_call(self, reading: Reading, call: int) -> Iterator[dict[str, Any]]:
        own = reading.calls[call]
        self._kind = "call"
        yield self._added("fc", {"type": "function_call", "call_id": own.id, "name": own.name, "arguments": ""})

    def _begin_text(self, kind: str) -> Iterator[dict[str, Any]]:
        self._kind = kind
        type, _, prefix = _TEXTS[kind]
        more: dict[str, Any] = {"role": "assistant"} if kind == "content" else {"summary": []}
        yield self._added(prefix, {"type": type, **more, "content": []})
        yield self._event("content_part.added", content_index=0, part=_part(kind, ""))

    def _added(self, prefix: str, item: dict[str, Any]) -> dict[str, Any]:
        place = len(self.items)
        self.items.append({"id": f"{prefix}_{self.id}{place}", **item, "status": "in_progress"})
        return {"type": "response.output_item.added", "output_index": place, "item": dict(self.items[-1])}

    def _event(self, type: str, /, **more: Any) -> dict[str, Any]:
        place = len(self.items) - 1
        return {"type": f"response.{type}", "item_id": self.items[-1]["id"], "output_index": place, **more}


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "content":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": text}
