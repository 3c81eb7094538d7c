"""A client that can misbehave: raw sockets, and answers as they came."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from serving_faults.suite import must

__all__ = ["TOLD", "Answer", "Client", "error_of", "head"]

TOLD: set[str] = set()
"""Every error that any server has answered with so far."""
JSON = {"Content-Type": "application/json"}


@dataclass
class Answer:
    """What came back; ``status`` 0: the connection was closed without an answer."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    seconds: float
    whole: bool = True
    events: list[dict[str, Any]] = field(default_factory=list)

    def header(self, name: str) -> str:
        return next((value for own, value in self.headers if own == name), "")

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def done(self) -> bool:
        """A stream ended as it should."""
        return self.body.rstrip().endswith(b"data: [DONE]")

    def terminals(self) -> int:
        """How often it says that it is over; must be once."""
        if self.status != 200:
            return int(self.status > 0)
        if not self.header("content-type").startswith("text/event-stream"):
            return int(self.whole)
        failed = sum("error" in event for event in self.events)
        return failed + self.body.count(b"data: [DONE]")


def head(method: str, path: str, headers: dict[str, str] | None = None, *, host: str | None = "localhost") -> bytes:
    """The first lines of a request, exactly so."""
    lines = [f"{method} {path} HTTP/1.1"] + ([f"Host: {host}"] if host is not None else [])
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def error_of(answer: Answer, status: int | tuple[int, ...]) -> dict[str, Any]:
    """The error of an answer, which must have OpenAI's shape."""
    allowed = status if isinstance(status, tuple) else (status,)
    must(answer.status in allowed, f"{answer.status} instead of {status}: {answer.body[:300]!r}")
    must(answer.header("content-type") == "application/json", f"an error that is {answer.header('content-type')}")
    try:
        value = json.loads(answer.body)
    except ValueError:
        value = None
    error = value.get("error") if isinstance(value, dict) and len(value) == 1 else None
    shaped = isinstance(error, dict) and set(error) == {"message", "type", "param", "code"}
    must(shaped, f"no error: {answer.body[:300]!r}")
    return error or {}


class Client:
    """One connection."""

    def __init__(self, port: int, timeout: float = 30.0, source: str = "") -> None:
        self.port = port
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.close()

    def send(self, data: bytes) -> None:
        """All of it, or as much as the other end takes."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> None:
        """Send a request, and read nothing."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send(head("POST", path, {**JSON, "Content-Length": str(len(data)), **(headers or {})}) + data)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """A request and its answer."""
        if body is not None:
            self.post(path, body, headers)
        else:
            self.send(head(method, path, headers))
        return self.answer(without_body=method == "HEAD")

    def closed(self, seconds: float) -> float | None:
        """After how long the other end closes the connection; None: it does not. What comes is thrown away."""
        began = time.monotonic()
        while (left := seconds - (time.monotonic() - began)) > 0:
            self.socket.settimeout(left)
            try:
                if not self.socket.recv(1 << 16):
                    return time.monotonic() - began
            except TimeoutError:
                return None
            except OSError:
                return time.monotonic() - began
        return None

    def answer(self, *, without_body: bool = False, until: bytes = b"") -> Answer:
        """The next answer, as far as it comes; ``until`` something is in its body."""
        began = time.monotonic()
        while b"\r\n\r\n" not in self._rest:
            if not self._more():
                return Answer(0, [], self._rest, time.monotonic() - began, whole=False)
        top, _, self._rest = self._rest.partition(b"\r\n\r\n")
        first, *lines = top.decode("latin-1").split("\r\n")
        pairs = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        found = Answer(int(first.split()[1]), pairs, b"", 0.0)
        if not without_body:
            found.whole = self._body(found, until)
        found.seconds = time.monotonic() - began
        for line in found.body.split(b"\n"):
            if line.startswith(b"data: {"):
                with contextlib.suppress(ValueError):
                    found.events.append(json.loads(line[6:]))
        if found.status >= 400:
            TOLD.add(found.body.decode("latin-1"))
        TOLD.update(json.dumps(event) for event in found.events if "error" in event)
        return found

    def _body(self, found: Answer, until: bytes) -> bool:
        if found.header("transfer-encoding") == "chunked":
            while True:
                while b"\r\n" not in self._rest:
                    if not self._more():
                        return False
                size, _, rest = self._rest.partition(b"\r\n")
                length = int(size, 16)
                self._rest = rest
                while len(self._rest) < length + 2:
                    if not self._more():
                        return False
                found.body += self._rest[:length]
                self._rest = self._rest[length + 2 :]
                if length == 0:
                    return True
                if until and until in found.body:
                    return False
        length = int(found.header("content-length") or 0)
        while len(self._rest) < length:
            if not self._more():
                found.body, self._rest = self._rest, b""
                return False
        found.body, self._rest = self._rest[:length], self._rest[length:]
        return True

    def _more(self) -> bool:
        try:
            data = self.socket.recv(1 << 16)
        except (TimeoutError, OSError):
            return False
        self._rest += data
        return bool(data)
