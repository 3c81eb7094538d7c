"""Requests that are none, too large or too slow, and connections that are too many: S6, S7, S26."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from typing import Any

from serving_faults.house import House
from serving_faults.stage import Stage
from serving_faults.suite import Seen, case, must
from serving_faults.wire import Client, error_of, head

MIB = 1 << 20


@case("S6 a body of 100 MB, heads of 200 KB, 20,000 headers", secure=True)
def large(stage: Stage, seen: Seen) -> None:
    house = stage.plain()
    with stage.watched(house, seen):
        before, most = house.rss(), 0
        over = threading.Event()

        def look() -> None:
            nonlocal most
            while not over.is_set():
                most = max(most, house.rss())
                time.sleep(0.005)

        looking = threading.Thread(target=look)
        looking.start()
        with contextlib.ExitStack() as stack:
            stack.callback(looking.join)
            stack.callback(over.set)
            for size, chunked in ((100 * MIB, False), (100 * MIB, True), (5 * MIB, False), (5 * MIB, True)):
                with house.client() as client:
                    how = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(size)}
                    client.send(head("POST", "/v1/completions", {"Content-Type": "application/json", **how}))
                    block = b'{"prompt": "' + b"a" * (MIB - 12)
                    for _ in range(size // MIB):
                        client.send(b"%x\r\n%b\r\n" % (len(block), block) if chunked else block)
                    error = error_of(client.answer(), 413)
                    must(error["code"] == "body_too_large", f"{error}")
                    must(client.closed(5.0) is not None, "the connection stays open after a 413")
                seen.inputs += 1
            for lines in (
                b"X: " + b"a" * 200_000 + b"\r\n",
                b"".join(b"X%d: a\r\n" % i for i in range(20_000)),
                b"".join(b"X%d: a\r\n" % i for i in range(120)),
                b"Cookie: " + b"a" * 40_000 + b"\r\n",
            ):
                for half in (False, True):
                    with house.client() as client:
                        client.send(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n" * (not half))
                        error_of(client.answer(), 431)
                        must(client.closed(5.0) is not None, "the connection stays open after a 431")
                    seen.inputs += 1
            with house.client() as client:
                client.send(b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
                error_of(client.answer(), 431)
            with house.client() as client:
                client.send(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nCookie: " + b"a" * 20_000 + b"\r\n\r\n")
                must(client.answer().status == 200, "20 KB of headers are refused")
        grown = most - before
        seen.note(f"413 and 431; memory +{grown / MIB:.1f} MiB at most")
        must(grown < 32 * MIB, f"the server grew by {grown / MIB:.1f} MiB")


class _Loris:
    """Connections that send something now and then; when each is closed."""

    def __init__(self, port: int, count: int, first: bytes, drip: bytes, every_s: float = 0.7) -> None:
        self.born: dict[socket.socket, float] = {}
        self.lives: list[float] = []
        self._drip, self._every = drip, every_s
        self._selector = selectors.DefaultSelector()
        for _ in range(count):
            one = socket.create_connection(("127.0.0.1", port), timeout=10)
            self.born[one] = time.monotonic()
            if first:
                with contextlib.suppress(OSError):
                    one.sendall(first)
            one.setblocking(False)
            self._selector.register(one, selectors.EVENT_READ)

    def run(self, seconds: float) -> None:
        """Until all are closed, or so long."""
        end, drip = time.monotonic() + seconds, time.monotonic() + self._every
        while self.born and time.monotonic() < end:
            for key, _ in self._selector.select(0.05):
                one: Any = key.fileobj
                try:
                    gone = not one.recv(4096)
                except BlockingIOError:
                    continue
                except OSError:
                    gone = True
                if gone:
                    self.lives.append(time.monotonic() - self.born.pop(one))
                    self._selector.unregister(one)
                    one.close()
            if self._drip and time.monotonic() > drip:
                drip = time.monotonic() + self._every
                for one in self.born:
                    with contextlib.suppress(OSError):
                        one.send(self._drip)

    def close(self) -> None:
        for one in self.born:
            one.close()
        self._selector.close()


BODY = head("POST", "/v1/completions", {"Content-Type": "application/json", "Content-Length": "100000"}) + b"{"
UNWANTED = head("GET", "/v1/models", {"Content-Length": "100000"})
SLOW: dict[str, tuple[bytes, bytes]] = {
    "silent": (b"", b""),
    "head drip": (b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X: a\r\n"),
    "body drip": (BODY, b" "),
    "unwanted body drip": (UNWANTED, b" "),
    "after an answer": (head("GET", "/health/live"), b""),
    "drip after an answer": (head("GET", "/health/live"), b"G"),
    "half a line": (b"G", b"E"),
}


@case("S7 slow clients: silent, head drip, body drip, 1,000 of them", short=False, secure=True)
def slow_loris(stage: Stage, seen: Seen) -> None:
    house = stage.plain()
    with stage.watched(house, seen):
        worst = 0.0
        lorises = {name: _Loris(house.port, 5, first, drip) for name, (first, drip) in SLOW.items()}
        threads = [threading.Thread(target=one.run, args=(14.0,)) for one in lorises.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, one in lorises.items():
            one.close()
            must(len(one.lives) == 5, f"{name}: {5 - len(one.lives)} of 5 are still open after 14 s")
            worst = max(worst, *one.lives)
        seen.note(f"each closed within {worst:.1f} s")
        must(worst < 11.5, f"a slow client was closed after {worst:.1f} s")
        kinds = ["silent", "head drip", "body drip", "unwanted body drip"]
        crowd = [_Loris(house.port, 250, *SLOW[kind]) for kind in kinds]
        threads = [threading.Thread(target=one.run, args=(14.0,)) for one in crowd]
        for thread in threads:
            thread.start()
        began, asked = time.monotonic(), 0
        while time.monotonic() - began < 8.0:
            must(house.tokens() == house.bystander, "a normal user got other tokens")
            asked += 1
        for thread in threads:
            thread.join()
        for one in crowd:
            one.close()
        left = sum(len(one.born) for one in crowd)
        must(not left, f"{left} of 1,000 slow clients are still open after 14 s")
        lives = max(max(one.lives) for one in crowd)
        seen.detected(lives, 12.0, "the last of 1,000 slow clients was closed")
        seen.note(f"1,000 closed within {lives:.1f} s, {asked} normal requests meanwhile")


@case("S7b more connections than allowed", short=False)
def crowded(stage: Stage, seen: Seen) -> None:
    with stage.own("--edge.connections", "50") as house:
        with stage.watched(house, seen):
            crowd = _Loris(house.port, 400, b"", b"")
            try:
                for _ in range(20):
                    must(house.tokens() == house.bystander, "a normal user got other tokens")
                crowd.run(1.0)
                must(len(crowd.born) <= 50, f"{len(crowd.born)} connections are open, 50 are allowed")
            finally:
                crowd.close()
        with stage.watched(house, seen, quiet=True), contextlib.ExitStack() as stack, house.slowly(0.02):
            busy = [stack.enter_context(house.client()) for _ in range(45)]
            for one in busy:
                one.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 60, "ignore_eos": True})
            time.sleep(0.5)
            more = [stack.enter_context(house.client()) for _ in range(20)]
            refused = 0
            for one in more:
                one.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 1})
                answer = one.answer()
                must(answer.status in (0, 200, 503), f"{answer.status}")
                refused += answer.status != 200
            statuses = [one.answer().status for one in busy]
            must(statuses == [200] * 45, f"requests in flight were answered {statuses}")
        seen.note(f"of 400 idle ones 50 stay; with 45 busy, {refused} of 20 new ones refused")


POST, GET = b"POST /tokenize HTTP/1.1\r\nHost: x\r\n", b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"
SMUGGLED: list[tuple[str, bytes]] = [
    (
        "CL and TE",
        POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG",
    ),
    (
        "TE and CL",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n5c\r\nGPOST / HTTP/1.1",
    ),
    ("two CL that differ", POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}X"),
    ("two CL alike", POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}"),
    ("CL list", POST + b"Content-Length: 2, 2\r\n\r\n{}"),
    ("CL signed", POST + b"Content-Length: +2\r\n\r\n{}"),
    ("CL negative", POST + b"Content-Length: -2\r\n\r\n{}"),
    ("CL hexadecimal", POST + b"Content-Length: 0x2\r\n\r\n{}"),
    ("CL of underscores", POST + b"Content-Length: 1_0\r\n\r\n{}"),
    ("CL empty", POST + b"Content-Length: \r\n\r\n{}"),
    ("CL of 40 digits", POST + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n{}"),
    ("bare LF", b"GET /v1/models HTTP/1.1\nHost: x\n\n"),
    ("bare LF among CR LF", b"GET /v1/models HTTP/1.1\r\nHost: x\nContent-Length: 0\r\n\r\n"),
    ("bare LF at the end", GET + b"\n"),
    ("bare CR", b"GET /v1/models HTTP/1.1\r\nHost: x\rContent-Length: 3\r\n\r\n"),
    ("folded", GET + b"X: a\r\n b\r\n\r\n"),
    ("folded by a tab", GET + b"X: a\r\n\tb\r\n\r\n"),
    ("folded first", b"GET /v1/models HTTP/1.1\r\n Host: x\r\n\r\n"),
    ("space before the colon", POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
    ("TE unknown", POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    ("TE list", POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    (
        "TE twice",
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    ),
    ("TE in HTTP/1.0", b"POST /tokenize HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    (
        "TE with a vertical tab",
        POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    ),
    ("two Hosts", GET + b"Host: y\r\n\r\n"),
    ("no Host", b"GET /v1/models HTTP/1.1\r\n\r\n"),
    ("NUL", GET + b"X: a\0b\r\n\r\n"),
    ("two spaces", b"GET  /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ("HTTP/1.10", b"GET / HTTP/1.10\r\nHost: x\r\n\r\n"),
    ("HTTP/0.9", b"GET /v1/models\r\n\r\n"),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200),
    ("nonsense", b"\xff" * 300 + b"\r\n\r\n"),
]
CHUNKED = head("POST", "/tokenize", {"Content-Type": "application/json", "Transfer-Encoding": "chunked"})
CHUNKS: list[tuple[str, bytes]] = [
    ("chunk size with 0x", b"0x2\r\n{}\r\n0\r\n\r\n"),
    ("chunk size signed", b"+2\r\n{}\r\n0\r\n\r\n"),
    ("chunk size negative", b"-2\r\n{}\r\n0\r\n\r\n"),
    ("chunk size of 40 digits", b"f" * 40 + b"\r\n{}\r\n0\r\n\r\n"),
    ("chunk too short", b"1\r\n{}\r\n0\r\n\r\n"),
    ("chunk ends with LF", b"2\r\n{}\n0\r\n\r\n"),
    ("last chunk ends with LF", b"2\r\n{}\r\n0\r\n\nGET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    ("trailer folded", b"2\r\n{}\r\n0\r\nX: a\r\n b\r\n\r\n"),
    ("trailer with LF", b"2\r\n{}\r\n0\r\nX: a\nY: b\r\n\r\n"),
]
HIDDEN = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


@case("S26 requests that two servers would read differently", secure=True)
def smuggling(stage: Stage, seen: Seen) -> None:
    house = stage.plain()
    with stage.watched(house, seen):
        for name, data in [*SMUGGLED, *((name, CHUNKED + data) for name, data in CHUNKS)]:
            for own in (data, data + HIDDEN):
                with house.client(timeout=5.0) as client:
                    client.send(own)
                    first = client.answer()
                    allowed = (400, 501) if name.startswith("TE ") else 400
                    seen.bodies.add(first.body.decode("latin-1"))
                    must(first.status in (400, 501), f"{name}: {first.status}")
                    error_of(first, allowed)
                    second = client.answer()
                    must(second.status == 0, f"{name}: what was hidden in it was answered {second.status}")
                    must(client.closed(4.0) is not None, f"{name}: the connection stays open")
                seen.inputs += 1
            _in_pieces(house, name, data)
        with house.client() as client:
            client.send(HIDDEN * 3)
            statuses = [client.answer().status for _ in range(3)]
            must(statuses == [200] * 3, f"three honest requests at once were answered {statuses}")
            client.send(CHUNKED + b'd\r\n{"prompt":"a"\r\n1;x=y\r\n}\r\n0\r\nX: a\r\n\r\n' + HIDDEN)
            statuses = [client.answer().status for _ in range(2)]
            must(statuses == [200] * 2, f"an honest chunked request was answered {statuses}")
        seen.note(f"{seen.inputs} tried, each refused and its connection closed")


def _in_pieces(house: House, name: str, data: bytes) -> None:
    """The same verdict, however the bytes come."""
    with Client(house.port, timeout=5.0) as client:
        for place in range(0, min(len(data), 400), 7):
            client.send(data[place : place + 7])
            time.sleep(0.0005)
        client.send(data[min(len(data), 400) :])
        status = client.answer().status
        must(status in (400, 501), f"{name}, in pieces: {status}")
