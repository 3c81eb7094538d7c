"""Bodies that are large and wrong in as many places as fit: S1b."""

from __future__ import annotations

import json
from typing import Any

from serving_faults.bodies import CHAT, TEXT
from serving_faults.stage import Stage
from serving_faults.suite import Seen, case, must
from serving_faults.wire import error_of

MANY = {f"{i:x}": 1 for i in range(250_000)}
EMPTY = [{}] * 300_000
OBJECTS = [{f"{i:x}{j}": 1 for i in range(8000)} for j in range(16)]
NAMED = [(f"a{place}", own) for place, own in enumerate(OBJECTS)]


def _call(arguments: dict[str, Any]) -> dict[str, Any]:
    function = {"name": "f", "arguments": json.dumps(arguments)}
    return {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": function}]}


LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "fields": ("/v1/completions", {**TEXT, **MANY}),
    "biases": ("/v1/completions", {**TEXT, "logit_bias": dict.fromkeys(MANY, "a")}),
    "options": ("/v1/completions", {**TEXT, "stream": True, "stream_options": MANY}),
    "a schema": ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema", "json_schema": MANY}}),
    "fields of a message": ("/v1/chat/completions", {**CHAT, "messages": [{**CHAT["messages"][0], **MANY}]}),
    "parts": ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": EMPTY}]}),
    "tools": ("/v1/chat/completions", {**CHAT, "tools": EMPTY}),
    "lists of lists": ("/v1/completions", {**TEXT, "bad_words": [[]] * 1_000_000}),
    "tokens that are texts": ("/detokenize", {"tokens": ["a"] * 900_000}),
    "banned tokens": ("/v1/completions", {**TEXT, "banned_tokens": ["a"] * 900_000}),
    "words that are null": ("/v1/completions", {**TEXT, "bad_words": [[None] * 520_000]}),
    "allowed tokens": ("/v1/completions", {**TEXT, "allowed_tokens": [None] * 65_000}),
    "floats": ("/v1/completions", {**TEXT, "prompt": [1.5] * 520_000}),
    "token ids": ("/v1/completions", {**TEXT, "prompt": [7] * 2_000_000}),
    "messages of nothing known": ("/v1/chat/completions", {**CHAT, "messages": OBJECTS}),
    "input of nothing known": ("/v1/responses", {"model": "tiny", "input": OBJECTS}),
    "objects in a schema": (
        "/v1/chat/completions",
        {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": dict(NAMED)}}},
    ),
    "arguments of calls": ("/v1/chat/completions", {**CHAT, "messages": [_call(OBJECTS[0])] * 30}),
    "lists in arguments": ("/v1/chat/completions", {**CHAT, "messages": [_call({"a": [[]] * 60_000})] * 20}),
    "numbers in arguments": ("/v1/chat/completions", {**CHAT, "messages": [_call({"a": [7] * 60_000})] * 16}),
    "tools of nothing known": ("/v1/chat/completions", {**CHAT, "tools": OBJECTS}),
    "quotation marks": ("/v1/completions", {**TEXT, "unknown": '\\"' * 1_000_000}),
    "a text of commas": ("/v1/embeddings", {"model": "tiny", "input": ["," * 3_000_000] * 2}),
}


@case("S1b bodies that are large, and wrong in as many places as fit", short=False)
def costly(stage: Stage, seen: Seen) -> None:
    house = stage.plain()
    bodies = {name: (path, json.dumps(body, separators=(",", ":")).encode()) for name, (path, body) in LARGE.items()}
    for path, data in [*bodies.values()] * 2:  # allocators keep what the largest takes
        house.ask("POST", path, data)
    with stage.watched(house, seen):
        for name, (path, data) in bodies.items():
            answer = house.ask("POST", path, data)
            must(answer.status in (400, 413), f"{name}: {answer.status} {answer.body[:200]!r}")
            error_of(answer, (400, 413))
            must(len(answer.body) < 4096, f"{name}: an error of {len(answer.body)} bytes")
            must(answer.seconds < 2.0, f"{name}: refused after {answer.seconds:.1f} s")
            seen.inputs += 1
        seen.note(f"{len(LARGE)} of up to 4 MiB")
