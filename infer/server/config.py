"""The limits of a server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from infer.server.calls.formats import FORMATS
from parallel.config import option

__all__ = ["ServerConfig"]

SHORTEST_KEY = 8


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ServerConfig:
    """How much a server takes on, and from whom."""

    keys: tuple[str, ...] = option((), "API keys; with any, every route but /health/live asks for one")
    queue_requests: int = option(512, "prompts that may wait for their first token; more are answered 429")
    queue_tokens: int = option(1 << 20, "tokens of prompts that may wait; more are answered 429")
    retry_s: int = option(1, "seconds after which who was answered 429 or 503 is told to come back")
    queue_s: float = option(60.0, "longest wait for a first token; after it 503")
    deadline_s: float = option(600.0, "longest time for a whole answer; after it 504, or an error event")
    write_s: float = option(30.0, "longest wait for a client to read what it was sent")
    body_s: float = option(10.0, "longest time in which a body may arrive")
    body_bytes: int = option(4 << 20, "largest body")
    ping_s: float = option(5.0, "longest time for the step that /health/ready asks for")
    most_n: int = option(16, "most completions or beams of a prompt")
    most_prompts: int = option(128, "most prompts of a request")
    most_logprobs: int = option(20, "most log-probabilities a token")
    tool_parser: str = option(
        "auto",
        "how the model writes calls of functions: hermes, llama, mistral, pythonic, none; auto: its template says",
    )
    reasoning_parser: Literal["auto", "none", "think"] = option(
        "auto", "think: what is between <think> and </think> is no content; auto: if the template has them"
    )
    origins: tuple[str, ...] = option((), "web pages of other sites that may open WebSockets here; *: all of them")
    hosts: tuple[str, ...] = option(
        (), "names under which a server without keys answers, besides addresses and localhost; *: every name"
    )
    socket_requests: int = option(16, "requests that may be under way on one WebSocket")
    socket_idle_s: float = option(300.0, "longest time that a WebSocket may be open with nothing under way")
    form_s: float = option(
        1.0, "longest time to compile a form (JSON schema, grammar ...) that a completion is to keep"
    )
    form_mib: int = option(512, "memory that compiling it may take")
    metrics: bool = option(True, "/metrics among the other routes; else only the application of its own has it")
    page: Literal["auto", "open", "off"] = option("auto", "the page at /; open: shown without a key (it asks for one)")

    def __repr__(self) -> str:
        return f"ServerConfig({len(self.keys)} keys)"

    def problems(self) -> Iterator[str]:
        """Why there can be no such server; no key is in any of them."""
        for place, key in enumerate(self.keys):
            if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                yield f"keys[{place}]: must be at least {SHORTEST_KEY} printable ASCII characters without spaces"
        if len(set(self.keys)) < len(self.keys):
            yield "keys: one is given twice"
        wholes = (
            "queue_requests",
            "queue_tokens",
            "body_bytes",
            "most_n",
            "most_prompts",
            "socket_requests",
            "form_mib",
        )
        seconds = ("retry_s", "queue_s", "deadline_s", "write_s", "body_s", "ping_s", "socket_idle_s", "form_s")
        for name in (*wholes, *seconds):
            if not getattr(self, name) > 0:
                yield f"{name} = {getattr(self, name)}: must be more than 0"
        if self.tool_parser not in ("auto", "none", *FORMATS):
            yield f"tool_parser = {self.tool_parser!r}: there is none; known are auto, none, {', '.join(FORMATS)}"
        if self.most_logprobs < 0:
            yield f"most_logprobs = {self.most_logprobs}: must not be negative"
        if self.queue_s > self.deadline_s:
            yield f"queue_s = {self.queue_s:g}: more than deadline_s = {self.deadline_s:g}"
        if self.most_prompts > self.queue_requests:
            yield f"most_prompts = {self.most_prompts}: more than queue_requests = {self.queue_requests}"
