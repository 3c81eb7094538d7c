"""How the pieces of a stream go out, byte by byte."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from scripted import HERMES, Played

from infer.server.edge import _Edge


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_pieces_that_go_out_at_once_are_those_that_would_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """Chunks that are written without the layers in between; of HTTP/1.0, which has none, there are not any."""
    chunks: list[bytes] = []
    chunk = _Edge.chunk
    monkeypatch.setattr(_Edge, "chunk", lambda self, data: (chunks.append(data), chunk(self, data))[1])
    data = json.dumps({"model": "tiny", "prompt": "x", "stream": True, "max_tokens": 99}).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sent = f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data

    def texts(played: Played) -> list[str]:
        with socket.create_connection(("127.0.0.1", played.port), timeout=10) as connection:
            connection.sendall(sent)
            got = b""
            while part := connection.recv(1 << 16):
                got += part
        head, _, body = got.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head.lower():
            whole, rest = b"", body
            while (size := int(rest.partition(b"\r\n")[0], 16)) > 0:
                begin = rest.index(b"\r\n") + 2
                assert rest[begin + size : begin + size + 2] == b"\r\n"
                whole, rest = whole + rest[begin : begin + size], rest[begin + size + 2 :]
            assert rest == b"0\r\n\r\n"
            body = whole
        events = [line[6:] for line in body.decode().split("\n\n") if line]
        assert events.pop() == "[DONE]"
        return [choice["text"] for event in events for choice in json.loads(event)["choices"]]

    with Played(tmp_path, HERMES) as played:
        played.says("some text that has no end, nearly")
        at_once = texts(played)
        assert "".join(at_once) == "some text that has no end, nearly"
        assert len(chunks) == (len(at_once) - 2 if version == "1.1" else 0)  # neither the first nor the last
        monkeypatch.setattr(_Edge, "flows", False)
        chunks.clear()
        assert texts(played) == at_once and not chunks
