"""GET /v1/stream: many requests on one WebSocket, each with one end."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from scripted import HERMES, Played
from served import wait_for
from test_server_tools import CALL, USER, WEATHER
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from infer.server.config import ServerConfig

KEY = "sk-first/key+0123456789"
SMALL = ServerConfig(
    body_bytes=1 << 16, socket_requests=3, socket_idle_s=0.5, write_s=0.4, origins=("https://ours.org",)
)
CHAT: dict[str, Any] = {"model": "tiny", "messages": USER, "stream": True}
LAST = ("answer", "done", "error", "cancelled")


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Played]:
    with Played(tmp_path, HERMES, SMALL, ws="websockets-sansio") as found:
        yield found


@contextlib.contextmanager
def opened(played: Played, **options: Any) -> Iterator[ClientConnection]:
    with connect(f"ws://127.0.0.1:{played.port}/v1/stream", **options) as found:
        yield found


def say(connection: ClientConnection, id: Any, type: str, body: Any = None, **more: Any) -> None:
    connection.send(json.dumps({"id": id, "type": type, **({} if body is None else {"body": body}), **more}))


def heard(connection: ClientConnection, *ids: str) -> dict[str, list[dict[str, Any]]]:
    """Messages by their ids, until each of these has ended."""
    found: dict[str, list[dict[str, Any]]] = {id: [] for id in ids}
    while not all(messages and messages[-1]["type"] in LAST for messages in found.values()):
        message = json.loads(connection.recv(timeout=5))
        assert not found[message["id"]] or found[message["id"]][-1]["type"] not in LAST, "nothing follows an end"
        found[message["id"]].append(message)
    return found


def test_requests_of_every_type_at_once_say_what_the_routes_say(played: Played) -> None:
    played.says(f"I look. {CALL}")
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "completions": ("/v1/completions", {"model": "tiny", "prompt": "x"}),
        "chat.completions": ("/v1/chat/completions", {"model": "tiny", "messages": USER, "tools": [WEATHER]}),
        "responses": ("/v1/responses", {"model": "tiny", "input": "x"}),
    }
    with opened(played) as connection:
        for stream in (False, True):
            for type, (_, body) in bodies.items():
                say(connection, type, type, {**body, "stream": stream})
            found = heard(connection, *bodies)
            for type, (path, body) in bodies.items():
                http = httpx2.post(played.url + path, json={**body, "stream": stream})
                if stream:
                    lines = [line[6:] for line in http.text.splitlines() if line.startswith("data: {")]
                    assert plain([m["data"] for m in found[type][:-1]]) == plain([json.loads(line) for line in lines])
                    assert found[type][-1] == {"id": type, "type": "done"}
                else:
                    assert [m["type"] for m in found[type]] == ["answer"]
                    assert plain(found[type][0]["data"]) == plain(http.json())


def plain(value: Any) -> Any:
    """Without what is another each time."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        fresh = ("id", "item_id", "call_id", "created", "created_at")
        return {name: plain(item) for name, item in value.items() if name not in fresh}
    return value


def test_a_request_that_is_cancelled_ends_within_a_second_and_others_go_on(played: Played) -> None:
    script = played.says("a long text")
    script.gate.clear()
    with opened(played) as connection:
        for id in ("one", "two"):
            say(connection, id, "chat.completions", CHAT)
        wait_for(lambda: script.running == 2)
        say(connection, "one", "cancel")
        assert wait_for(lambda: script.running == 1) < 1
        script.gate.set()
        found = heard(connection, "one", "two")
        assert found["one"][-1] == {"id": "one", "type": "cancelled"}
        assert found["two"][-1]["type"] == "done"
        assert "".join(m["data"]["choices"][0]["delta"].get("content", "") for m in found["two"][:-1]) == "a long text"
        say(connection, "one", "completions", {"model": "tiny", "prompt": "x"})  # an id that has ended is free again
        assert heard(connection, "one")["one"][-1]["type"] == "answer"


def test_ids_are_those_of_one_connection_and_one_request(played: Played) -> None:
    script = played.says("text")
    script.gate.clear()
    with opened(played) as first, opened(played) as second:
        say(first, "a", "chat.completions", CHAT)
        wait_for(lambda: script.running == 1)
        say(first, "a", "chat.completions", CHAT)
        say(second, "a", "cancel")
        say(first, "b", "cancel")
        refused, found = [json.loads(second.recv(timeout=5))], list[dict[str, Any]]()
        while len(refused) < 3:
            found.append(json.loads(first.recv(timeout=5)))
            refused += [found[-1]] if found[-1]["type"] == "refused" else []
        script.gate.set()
        while found[-1]["type"] != "done":
            found.append(json.loads(first.recv(timeout=5)))
        assert [(m["id"], m["status"], m["error"]["code"]) for m in refused] == [
            ("a", 404, "unknown_id"),
            ("a", 409, "duplicate_id"),
            ("b", 404, "unknown_id"),
        ]
        text = [m["data"]["choices"][0]["delta"].get("content", "") for m in found if m["type"] == "event"]
        assert "".join(text) == "text"


def test_messages_that_are_none(played: Played) -> None:
    played.says("x")
    with opened(played) as connection:
        for data, param in (
            ("{", None),
            ("[]", None),
            (b"\xff\xfe", None),
            ('{"a":' * 100 + "1" + "}" * 100, None),
            ("{}", "id"),
            ('{"id": 5, "type": "cancel"}', "id"),
            ('{"id": "", "type": "cancel"}', "id"),
            ('{"id": "a", "type": "embeddings", "body": {}}', "type"),
            ('{"id": "a", "type": "completions"}', "body"),
            ('{"id": "a", "type": "completions", "body": [], "key": 1}', "body"),
            ('{"id": "a", "type": "completions", "body": {}, "key": 1}', "key"),
        ):
            connection.send(data)
            answer = json.loads(connection.recv(timeout=5))
            assert (answer["type"], answer["status"], answer["error"]["param"]) == ("refused", 400, param), data
        for body, param in (({}, "model"), ({**CHAT, "n": 99}, "n"), ({**CHAT, "nonsense": 1}, "nonsense")):
            say(connection, "a", "chat.completions", body)
            (answer,) = heard(connection, "a")["a"]
            assert (answer["type"], answer["status"], answer["error"]["param"]) == ("error", 400, param)
        with pytest.raises(ConnectionClosed) as caught:
            connection.send(json.dumps({"id": "x" * (1 << 17)}))
            assert json.loads(connection.recv(timeout=5))["status"] == 413
            connection.recv(timeout=5)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009


def test_limits_of_a_connection(played: Played) -> None:
    script = played.says("text")
    script.gate.clear()
    with opened(played) as connection:
        for id in "abcd":
            say(connection, id, "chat.completions", CHAT)
        wait_for(lambda: script.running == 3)
        time.sleep(0.7)  # more than it may be idle, but something is under way
        script.gate.set()
        found = [json.loads(connection.recv(timeout=5))]
        while sum(message["type"] == "done" for message in found) < 3:
            found.append(json.loads(connection.recv(timeout=5)))
        (refused,) = [message for message in found if message["type"] == "refused"]
        assert (refused["id"], refused["status"], refused["error"]["code"]) == ("d", 429, "too_many_requests")
        began = time.monotonic()
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=5)
        assert 0.3 < time.monotonic() - began < 2


def test_a_client_that_leaves_ends_its_requests(played: Played) -> None:
    script = played.says("text")
    script.gate.clear()
    with opened(played) as connection:
        for id in "abc":
            say(connection, id, "chat.completions", {**CHAT, "stream": id != "c"})
        wait_for(lambda: script.running == 3)
        connection.socket.shutdown(socket.SHUT_RDWR)
    assert wait_for(lambda: script.running == 0) < 1
    wait_for(lambda: played.app.state.server.in_flight == 0)
    assert played.app.state.server.metrics.requests["chat", "gone"] == 3


def test_a_client_that_does_not_read_is_dropped(played: Played) -> None:
    script = played.says("text " * 20_000, step=2)
    for own in played._server.servers[0].sockets:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.create_connection(("127.0.0.1", played.port)) as raw:
        key = base64.b64encode(b"0" * 16).decode()
        head = "GET /v1/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        raw.sendall(f"{head}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        assert b"101" in raw.recv(4096)
        data = json.dumps({"id": "a", "type": "chat.completions", "body": CHAT}).encode()
        raw.sendall(bytes([0x81, 0x80 | 126]) + len(data).to_bytes(2, "big") + b"\0\0\0\0" + data)
        wait_for(lambda: script.running == 1)
        wait_for(lambda: script.running == 0, 10)
    wait_for(lambda: played.app.state.server.metrics.requests["chat", "gone"] == 1)


def test_draining(played: Played) -> None:
    script = played.says("text")
    script.gate.clear()
    with opened(played) as connection:
        say(connection, "a", "chat.completions", CHAT)
        wait_for(lambda: script.running == 1)
        played.app.state.drain()
        say(connection, "b", "chat.completions", CHAT)
        script.gate.set()
        found = heard(connection, "a", "b")
        assert found["a"][-1]["type"] == "done"
        assert (found["b"][0]["status"], found["b"][0]["error"]["code"], found["b"][0]["retry_after"]) == (
            503,
            "draining",
            1,
        )
    with pytest.raises(InvalidStatus) as caught, opened(played):
        pass
    assert caught.value.response.status_code == 503


def test_pages_of_other_sites_and_other_ways_to_ask(played: Played) -> None:
    for origin, fine in (
        (f"http://127.0.0.1:{played.port}", True),
        ("https://ours.org", True),
        ("https://theirs.org", False),
        (f"http://127.0.0.1:{played.port + 1}", False),
        ("null", False),
    ):
        with contextlib.ExitStack() as stack:
            if not fine:
                caught = stack.enter_context(pytest.raises(InvalidStatus))
            stack.enter_context(opened(played, origin=origin))
        assert fine or (caught.value.response.status_code, b"other_origin" in caught.value.response.body) == (403, True)
    answer = httpx2.get(played.url + "/v1/stream")
    assert (answer.status_code, answer.headers["upgrade"]) == (426, "websocket")


def test_keys(tmp_path: Path) -> None:
    with Played(tmp_path, HERMES, ServerConfig(keys=(KEY,)), ws="websockets-sansio") as played:
        played.says("x")
        coded = base64.urlsafe_b64encode(KEY.encode()).decode().rstrip("=")
        for options, fine in (
            ({"additional_headers": {"Authorization": f"Bearer {KEY}"}}, True),
            ({"subprotocols": ["lockstep", f"lockstep.key.{coded}"]}, True),
            ({}, False),
            ({"subprotocols": ["lockstep"]}, False),
            ({"subprotocols": ["lockstep", "lockstep.key.c2stb3RoZXI"]}, False),
            ({"subprotocols": ["lockstep", "lockstep.key.%%"]}, False),
            ({"subprotocols": ["lockstep", f"lockstep.key.{coded}", "lockstep.key.a"]}, False),
            (
                {"additional_headers": {"Authorization": "Bearer sk-other"}, "subprotocols": [f"lockstep.key.{coded}"]},
                False,
            ),
        ):
            with contextlib.ExitStack() as stack:
                if not fine:
                    caught = stack.enter_context(pytest.raises(InvalidStatus))
                connection = stack.enter_context(opened(played, **options))
                assert connection.subprotocol in (None, "lockstep")
                say(connection, "a", "completions", {"model": "tiny", "prompt": "x"})
                assert heard(connection, "a")["a"][-1]["type"] == "answer"
            assert fine or (caught.value.response.status_code, b"API key" in caught.value.response.body) == (401, True)
