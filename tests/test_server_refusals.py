"""What the server refuses: each by its name, none with a 5xx, nothing of the inside told."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from served import CONTEXT, VOCABULARY, Served, load, write_model

from infer.server.config import ServerConfig
from infer.server.errors import ApiError

KEY, OTHER = "sk-first-key-0123456789", "sk-other-key-0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with Served(load(folder), ServerConfig(body_bytes=1 << 20, body_s=0.5)) as found:
        yield found
        assert not found.errors


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=served.url, timeout=20) as found:
        yield found


TEXT = {"model": "tiny", "prompt": "tea", "max_tokens": 4}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "tea"}], "max_tokens": 4}
LONG = [7] * (CONTEXT * 4)

REFUSED: list[tuple[str, dict[str, Any], str | None]] = [
    *[("/v1/completions", {**TEXT, "prompt": prompt}, "prompt") for prompt in ("", [], [[]], [""], ["a", ""], None, 7)],
    *[
        ("/v1/completions", {**TEXT, "prompt": prompt}, "prompt")
        for prompt in ({}, [True], [1.5], [1, "a"], ["a", [1]])
    ],
    *[
        ("/v1/completions", {**TEXT, "prompt": prompt}, "prompt")
        for prompt in ([-1], [VOCABULARY], [10**400], [[1], 2])
    ],
    *[("/v1/completions", {**TEXT, "prompt": prompt}, "prompt") for prompt in (LONG, [LONG] * 3, "a b " * 999)],
    ("/v1/completions", {**TEXT, "prompt": ["a"] * 1000}, "prompt"),
    ("/v1/completions", {"model": "tiny"}, "prompt"),
    ("/v1/completions", {"prompt": "tea"}, "model"),
    *[("/v1/completions", {**TEXT, "n": n}, "n") for n in (0, -1, 17, 10**9, 10**30, 1.5, "2", True)],
    *[("/v1/completions", {**TEXT, "max_tokens": m}, "max_tokens") for m in (-1, 0, 10**30, 1.0, "4", [4])],
    ("/v1/completions", {**TEXT, "max_tokens": 10**9}, "prompt"),
    *[("/v1/completions", {**TEXT, "temperature": t}, "temperature") for t in (-1, 101, 1e308, "1", True, 10**400)],
    *[("/v1/completions", {**TEXT, "top_p": p}, "top_p") for p in (0, -0.1, 1.1, [])],
    *[("/v1/completions", {**TEXT, "logprobs": k}, "logprobs") for k in (-1, 21, 10**12, True)],
    *[("/v1/completions", {**TEXT, "stop": s}, "stop") for s in ("", [""], ["a"] * 17, "a" * 2000, 5, [5])],
    *[
        ("/v1/completions", {**TEXT, "logit_bias": b}, "logit_bias")
        for b in ({"a": 1}, {"-1": 1}, {"999": 1}, {"5": 999})
    ],
    ("/v1/completions", {**TEXT, "logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
    ("/v1/completions", {**TEXT, "logit_bias": {"5": "much"}}, "logit_bias"),
    *[("/v1/completions", {**TEXT, "seed": s}, "seed") for s in (-2, 2**65, 1.5)],
    *[("/v1/completions", {**TEXT, "best_of": b}, "best_of") for b in (0, 99)],
    ("/v1/completions", {**TEXT, "n": 3, "best_of": 2}, "best_of"),
    ("/v1/completions", {**TEXT, "n": 2, "temperature": 0}, "n"),
    ("/v1/completions", {**TEXT, "min_tokens": 5}, "min_tokens"),
    ("/v1/completions", {**TEXT, "beams": 2, "temperature": 0.5}, "temperature"),
    ("/v1/completions", {**TEXT, "beams": 2, "stream": True}, "beams"),
    ("/v1/completions", {**TEXT, "echo": True, "logprobs": 1, "stream": True}, "echo"),
    ("/v1/completions", {**TEXT, "stream_options": {"include_usage": True}}, "stream_options"),
    ("/v1/completions", {**TEXT, "stream": True, "stream_options": {"sometimes": True}}, "stream_options.sometimes"),
    ("/v1/completions", {**TEXT, "banned_tokens": list(range(VOCABULARY))}, None),
    *[("/v1/completions", {**TEXT, name: value}, name) for name, value in (("suffix", "x"), ("user", 7), ("tempo", 1))],
    *[
        ("/v1/chat/completions", {**CHAT, name: value}, name)
        for name, value in (
            ("tools", [{"type": "function", "function": {"name": "f"}}]),
            ("tool_choice", "required"),
            ("functions", [{"name": "f"}]),
            ("response_format", {"type": "json_schema"}),
            ("modalities", ["text", "audio"]),
            ("audio", {"voice": "x"}),
            ("store", True),
            ("metadata", {"a": 1}),
            ("service_tier", "flex"),
            ("prediction", {"type": "content", "content": "x"}),
            ("reasoning_effort", "low"),
            ("web_search_options", {}),
            ("echo", True),
            ("top_logprobs", 2),
            ("chat_template", "{{ x }}"),
            ("max_completion_tokens", 3),
        )
    ],
    *[("/v1/chat/completions", {**CHAT, "messages": m}, "messages") for m in ([], "tea", None, [5])],
    ("/v1/chat/completions", {"model": "tiny"}, "messages"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "god", "content": "x"}]}, "messages.role"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user"}]}, "messages.content"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "developer", "content": "x"}]}, "messages"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "a b " * 500}]}, "messages"),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
    ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs"),
    *[("/v1/embeddings", {"model": "tiny", "input": i}, "input") for i in ("", [], [VOCABULARY], LONG, 5, None)],
    ("/v1/embeddings", {"model": "tiny", "input": "a", "dimensions": 8}, "dimensions"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}, "prompt"),
    *[("/detokenize", {"tokens": t}, "tokens") for t in ([VOCABULARY], [-1], [2**40], "a")],
]


def checked(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of a response, in OpenAI's shape, with nothing of the inside."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and len(error["message"]) < 1100
    assert not [
        word for word in ("Traceback", "/work", "/tmp", "site-packages", ".py", " at 0x") if word in response.text
    ]
    return error


@pytest.mark.parametrize("place", range(len(REFUSED)))
def test_what_cannot_be_honoured_is_a_400_that_names_it(http: httpx2.Client, place: int) -> None:
    path, body, param = REFUSED[place]
    error = checked(http.post(path, content=json.dumps(body), headers={"content-type": "application/json"}), 400)
    found = error["param"]
    assert found == param, error
    assert param is None or param.split(".")[-1] in error["message"]


def test_an_over_long_prompt_is_told_the_numbers(http: httpx2.Client) -> None:
    for _ in range(100):
        error = checked(http.post("/v1/completions", json={**TEXT, "prompt": [7] * 250, "max_tokens": 9}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "n_prompt = 250, max_tokens = 9, n_ctx = 256" in error["message"]
    assert http.post("/v1/completions", json={**TEXT, "prompt": [7] * 247, "max_tokens": 9}).status_code == 200


def test_neutral_values_of_fields_that_we_do_not_have_ask_for_nothing(http: httpx2.Client) -> None:
    more: dict[str, Any] = {
        "tools": [],
        "response_format": {"type": "text"},
        "store": False,
        "user": "me",
        "metadata": {"a": "b"},
    }
    assert http.post("/v1/chat/completions", json={**CHAT, **more, "modalities": ["text"]}).status_code == 200
    assert http.post("/v1/completions", json={**TEXT, "suffix": None, "best_of": 1}).status_code == 200
    checked(http.post("/v1/chat/completions", json={**CHAT, "store": 0}), 400)


def test_other_models_routes_and_methods(http: httpx2.Client) -> None:
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        error = checked(http.post(path, json={**body, "model": "gpt-9"}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    for path in ("/v1", "/v1/models/", "/V1/models", "/docs", "/v1/models/x/y"):
        checked(http.get(path), 404)
    assert raw(http.base_url.port or 0, "//v1/models", "GET", None) == 404
    assert checked(http.get("/v1/completions"), 405)["code"] == "method_not_allowed"
    checked(http.delete("/v1/models"), 405)


WRONG = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"a"',
    b"5",
    b"{}x",
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b'{"model": "\\ud800"}',
    b"\xff\xfe",
]


@pytest.mark.parametrize("body", [*WRONG, b"[" * 10_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000])
def test_a_body_that_is_no_json_object(http: httpx2.Client, body: bytes) -> None:
    checked(http.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 400)


def test_bodies_of_another_type_too_large_or_too_slow(http: httpx2.Client, served: Served) -> None:
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=a",
        "application/jsonp",
    ):
        checked(http.post("/v1/completions", content=json.dumps(TEXT), headers={"content-type": kind}), 400)
    large = b'{"prompt": "' + b"a" * (1 << 20) + b'"}'
    for content in (large, iter([large[: 1 << 19]] * 3)):  # with its length, and in chunks
        answer = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert checked(answer, 413)["code"] == "body_too_large"
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        slow.sendall(b'Content-Length: 100\r\n\r\n{"model"')
        answer = slow.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"body_timeout" in answer + slow.recv(4096)
    assert time.monotonic() - began < 2


JUNK: list[Any] = [None, True, -1, 0, 2**63, 10**30, 1e300, "", "é😀", "\x00", [], [[]], [None], {}, {"a": []}, -0.5]
LIKELY: dict[str, list[Any]] = {
    "model": ["tiny", "also", "other"],
    "prompt": ["a b", ["a", "b"], [7, 8], [[7], [8]], [7] * 255],
    "messages": [[{"role": "user", "content": ""}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}] * 3],
    "input": ["a", ["a", "b"], [7, 8]],
    "tokens": [[], [7], [319]],
    "max_tokens": [1, 3, 250, 256],
    "n": [1, 2, 3],
    "best_of": [1, 3],
    "beams": [1, 3],
    "temperature": [0, 0.5, 2],
    "stream": [True, False],
    "stop": ["e", ["a", "b"]],
    "seed": [0, 5, 2**64 - 1],
    "logprobs": [0, 1, 20, True],
    "logit_bias": [{"5": 1.5}, {"319": -100}],
    "min_tokens": [1, 3],
    "top_k": [0, 1, 400],
    "min_p": [0.5],
    "bad_words": [["a", [7]]],
    "allowed_tokens": [[7], [7, 8, 2]],
    "stop_tokens": [[7, 8]],
    "stream_options": [{"include_usage": True}],
    "include_stop": [True],
    "echo": [True],
    "zzz": [None],
}


def broken(draw: random.Random, body: dict[str, Any]) -> bytes:
    """A body with something wrong in it, or not."""
    value = dict(body)
    for _ in range(draw.randint(1, 4)):
        name = draw.choice([*body, *LIKELY]) if draw.random() < 0.8 else draw.choice(list(body))
        wild = [draw.choice(JUNK), [draw.choice(JUNK)], {"5": draw.choice(JUNK)}]
        value[name] = draw.choice(wild if draw.random() < 0.3 else LIKELY[name])
    data = bytearray(json.dumps(value).encode())
    if draw.random() < 0.1:
        for _ in range(draw.randint(1, 5)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data[: draw.randrange(len(data))] if draw.random() < 0.05 else data)


def test_no_malformed_body_is_a_5xx(http: httpx2.Client, served: Served) -> None:
    draw = random.Random(5)
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": TEXT,
        "/v1/chat/completions": CHAT,
        "/v1/embeddings": {"model": "tiny", "input": "tea"},
        "/tokenize": {"prompt": "tea"},
        "/detokenize": {"tokens": [7, 8]},
    }
    found = dict.fromkeys((200, 400, 404), 0)
    for _ in range(800):
        path = draw.choice(list(bodies))
        answer = http.post(path, content=broken(draw, bodies[path]), headers={"content-type": "application/json"})
        if answer.status_code != 200:
            checked(answer, answer.status_code)
        found[answer.status_code] += 1
    assert all(found.values()), found
    served.check_empty()


def test_errors_tell_nothing_of_the_inside() -> None:
    error = ApiError(400, "a <X object at 0x7f00deadbeef> of /home/me/model/a.py, not 3/4 nor /v1")
    assert error.message == "a <X object at ...> of ..., not 3/4 nor /v1"
    assert len(ApiError(400, "a" * 10**6).message) < 1100


@pytest.fixture(scope="module")
def keyed(folder: Path) -> Iterator[Served]:
    with Served(load(folder, prefix_cache=True), ServerConfig(keys=(KEY, OTHER))) as found:
        yield found


def test_every_route_but_liveness_asks_for_a_key(keyed: Served) -> None:
    paths = [route.path for route in keyed.app.routes]  # pyright: ignore[reportAttributeAccessIssue]
    paths += [
        "/",
        "/nothing",
        "//v1/models",
        "/v1%2fmodels",
        "/V1/Models",
        "/health/live/",
        "//health/live",
        "/HEALTH/live",
    ]
    paths += ["/health%2flive", "/health/live%2f..%2fready", "/health/live/../../v1/models", "/health/live;/v1/models"]
    wrong: list[str | None] = [
        None,
        "",
        "Bearer",
        "Bearer ",
        KEY,
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Basic {KEY}",
    ]
    wrong += [f"Bearer {KEY} {KEY}", "Bearer " + "a" * 5000]
    for path in paths:
        for method in ("GET", "POST", "HEAD", "OPTIONS"):
            for value in wrong if method == "GET" else wrong[:1]:
                status = raw(keyed.port, path, method, value)
                assert status == 401 or (path == "/health/live" and status in (200, 405)), (path, method, value)
    assert raw(keyed.port, f"http://127.0.0.1:{keyed.port}/health/live", "GET", None) == 401
    assert raw(keyed.port, "/v1/models", "GET", f"Bearer {KEY}") == 200
    assert raw(keyed.port, "/v1/models", "GET", f"bearer {OTHER}") == 200
    assert raw(keyed.port, "/health/live", "GET", None) == 200
    assert raw(keyed.port, "/health/ready", "GET", None) == raw(keyed.port, "/health", "GET", None) == 401
    assert raw(keyed.port, "/health", "GET", f"Bearer {KEY}") == 200
    assert raw(keyed.port, "/v1/models", "GET", f"Bearer {KEY}", again=f"Bearer {OTHER}") == 401


def raw(port: int, path: str, method: str, key: str | None, again: str | None = None) -> int:
    """The status of a request whose path nobody normalizes."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"Authorization: {value}" for value in (key, again) if value is not None]
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        return int(connection.recv(64).split()[1])


def test_keys_share_no_pages(keyed: Served) -> None:
    def hits(key: str) -> int:
        body = {**TEXT, "prompt": [9] * 100}
        answer = httpx2.post(keyed.url + "/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [hits(KEY), hits(KEY) >= 80, hits(OTHER), hits(OTHER) >= 80, hits(KEY) >= 80] == [0, True, 0, True, True]
    first, other = set(keyed.engine.salts[:2]), set(keyed.engine.salts[2:4])
    assert len(first) == len(other) == 1 and first != other and b"" not in first | other
    assert not any(key.encode() in salt for key in (KEY, OTHER) for salt in first | other)
    page = httpx2.get(keyed.url + "/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    assert "lockstep_prefix_hit_tokens_total 2" in page
    assert KEY not in page + repr(keyed.config) + "".join(ServerConfig(keys=(KEY, KEY)).problems())


def test_the_application_needs_no_torch() -> None:
    """In a process in which the package around it, which offers the engine, imports nothing."""
    program = """
import sys, types
package = types.ModuleType("infer")
package.__path__ = [sys.argv[1]]
sys.modules["infer"] = package
import infer.server.app
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    infer = Path(__file__).parent.parent / "infer"
    subprocess.run([sys.executable, "-c", program, str(infer)], check=True, cwd=infer.parent)
