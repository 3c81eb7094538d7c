"""Lives of requests: clients that leave or do not read, queues that are full, deadlines, draining, and dead engines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from served import Served, leftovers, load, wait_for, write_model

from infer.completion import Event
from infer.server.app import create_app, create_metrics_app
from infer.server.config import ServerConfig
from infer.server.engine import EngineGone
from infer.server.limits import Admission
from parallel.errors import ConfigError

LONG: dict[str, Any] = {"model": "tiny", "prompt": [7, 8, 9], "max_tokens": 250, "ignore_eos": True}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "tea"}], "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def slow(folder: Path) -> Iterator[Served]:
    """20 ms a step, and at most two sequences at a time."""
    with Served(load(folder, requests=2, chunk=16), delay_s=0.02) as found:
        yield found
        assert not found.errors


@contextlib.contextmanager
def posted(served: Served, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request that is sent, on a connection of its own."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(head.encode() + data)
        yield connection


def read(connection: socket.socket, until: bytes = b"") -> bytes:
    """What comes until something, or the end."""
    found = b""
    while not (until and until in found):
        part = connection.recv(1 << 16)
        if not part:
            break
        found += part
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["queued", "prompt", "decoding"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_ends_its_request_within_a_second(
    slow: Served, path: str, when: str, stream: bool
) -> None:
    engine = slow.llm.engine
    body = {**(LONG if path == "/v1/completions" else CHAT), "stream": stream}
    if when == "prompt":
        body |= {"prompt": [7] * 249, "max_tokens": 4} if "prompt" in body else {}
    with contextlib.ExitStack() as others:
        if when == "queued":
            for _ in range(2):
                others.enter_context(posted(slow, "/v1/completions", {**LONG, "stream": True}))
            wait_for(lambda: engine.stats.running == 2)
        with posted(slow, path, body):
            if when == "queued":
                wait_for(lambda: engine.stats.waiting == 1)
            else:
                wait_for(lambda: engine.stats.running == 1)
            if when == "decoding":
                wait_for(lambda: engine.stats.computed and slow.app.state.server.admission.requests == 0)
        if when == "queued":
            assert wait_for(lambda: engine.stats.waiting == 0) < 1
            assert engine.stats.running == 2
    assert wait_for(lambda: not engine.busy) < 1
    slow.check_empty()


def test_many_prompts_of_one_request_end_together(slow: Served) -> None:
    with posted(slow, "/v1/completions", {**LONG, "prompt": [[7, 8]] * 9, "n": 2}):
        wait_for(lambda: slow.llm.engine.stats.waiting > 3)
    assert wait_for(lambda: not slow.llm.engine.busy) < 1
    slow.check_empty()


def test_a_full_queue_is_a_429_at_once(folder: Path) -> None:
    config = ServerConfig(queue_requests=3, most_prompts=3, queue_tokens=300, retry_s=7)
    with Served(load(folder, requests=2), config, delay_s=0.02) as served, contextlib.ExitStack() as others:
        waiting = served.app.state.server.admission
        for count in range(2):
            others.enter_context(posted(served, "/v1/completions", LONG))
            wait_for(lambda count=count: served.llm.engine.stats.running == count + 1 and waiting.requests == 0)
        for _ in range(3):
            others.enter_context(posted(served, "/v1/completions", LONG))
        wait_for(lambda: waiting.requests == 3)
        for path, body in (("/v1/completions", LONG), ("/v1/chat/completions", CHAT)):
            began = time.monotonic()
            answer = httpx2.post(served.url + path, json=body)
            assert time.monotonic() - began < 0.5
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
            assert answer.json()["error"]["code"] == "queue_full"
        too_many = httpx2.post(served.url + "/v1/completions", json={**LONG, "prompt": [[7] * 6] * 3, "max_tokens": 1})
        assert too_many.status_code == 429


def test_the_queue_is_bounded_by_tokens_too() -> None:
    queue = Admission(5, 100, 1)
    with queue.seat([60], "prompt") as seat:
        with pytest.raises(Exception, match="too many requests"):
            queue.seat([41], "prompt")
        with queue.seat([20, 20], "prompt"):
            with pytest.raises(Exception, match="too many requests"):
                queue.check()
            seat.begun(0)
            queue.seat([60], "prompt").__exit__()
        assert (queue.requests, queue.tokens) == (0, 0)
    with pytest.raises(Exception, match="1 prompts of 101 tokens"):
        queue.seat([101], "prompt")


def test_deadlines(folder: Path) -> None:
    config = ServerConfig(queue_s=0.3, deadline_s=0.8)
    with Served(load(folder, requests=1), config, delay_s=0.02) as served:
        url = served.url + "/v1/completions"
        with posted(served, "/v1/completions", {**LONG, "stream": True}) as first:
            wait_for(lambda: served.llm.engine.stats.running == 1)
            began = time.monotonic()
            answer = httpx2.post(url, json=LONG)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_deadline")
            assert answer.headers["retry-after"] == "1"
            assert 0.25 < time.monotonic() - began < 0.75
            last = read(first, b"\r\n0\r\n")
        events = [json.loads(line[6:]) for line in last.split(b"\n") if line.startswith(b"data: {")]
        assert len(events) > 5 and not any("error" in event for event in events[:-1])
        assert events[-1]["error"]["code"] == "deadline"
        assert b"[DONE]" not in last
        wait_for(lambda: not served.llm.engine.busy)
        answer = httpx2.post(url, json=LONG)
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "server_error")
        served.check_empty()
        with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.APIError, match=r"no answer within 0\.8 s"):
                list(
                    client.completions.create(
                        **without(LONG, "ignore_eos"), stream=True, extra_body={"ignore_eos": True}
                    )
                )


def without(body: dict[str, Any], name: str) -> dict[str, Any]:
    return {own: value for own, value in body.items() if own != name}


def test_a_client_that_does_not_read_is_dropped(folder: Path) -> None:
    with Served(load(folder), ServerConfig(write_s=0.3), delay_s=0.001) as served:
        body = {**LONG, "n": 16, "logprobs": 20, "stream": True}
        data = json.dumps(body).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        with connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            for own in served._server.servers[0].sockets:
                own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
            wait_for(lambda: served.app.state.server.metrics.requests["completions", "gone"] == 1, 15)
            served.check_empty()


def test_draining_finishes_what_is_under_way(folder: Path) -> None:
    with Served(load(folder), delay_s=0.002) as served:
        with posted(served, "/v1/completions", {**LONG, "stream": True}) as connection:
            wait_for(lambda: served.llm.engine.stats.running == 1)
            assert httpx2.get(served.url + "/health/ready").status_code == 200
            served.app.state.drain()
            ready = httpx2.get(served.url + "/health/ready")
            assert (ready.status_code, ready.json()["error"]["code"]) == (503, "draining")
            assert httpx2.get(served.url + "/health").json() == ready.json()
            assert httpx2.get(served.url + "/health/live").status_code == 200
            for method, path in (("POST", "/v1/completions"), ("POST", "/tokenize"), ("GET", "/v1/models")):
                answer = httpx2.request(method, served.url + path, json=LONG if method == "POST" else None)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
            assert served.app.state.server.in_flight == 1
            found = read(connection, b"[DONE]")
        assert b'"finish_reason":"length"' in found and b"[DONE]" in found
        wait_for(lambda: served.app.state.server.in_flight == 0)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_abort_ends_everything_with_a_finish_reason(folder: Path, path: str) -> None:
    body = {**(LONG if path == "/v1/completions" else CHAT), "seed": 3}
    with Served(load(folder), delay_s=0.01) as served:
        with posted(served, path, {**body, "n": 2, "stream": True}) as stream, posted(served, path, body) as whole:
            wait_for(lambda: served.llm.engine.stats.running == 3 and served.llm.engine.stats.computed > 50)
            served._server.servers[0].get_loop().call_soon_threadsafe(served.app.state.abort)
            told, answer = read(stream, b"[DONE]"), read(whole, b"usage")
        assert told.count(b'"finish_reason":"abort"') == 2 and b"[DONE]" in told
        assert answer.count(b'"finish_reason":"abort"') == 1
        served.check_empty()
        cut, served.engine.delay_s = json.loads(answer[answer.index(b"{") :]), 0.0
        count = cut["usage"]["completion_tokens"]
        assert 2 < count < 250
        again = httpx2.post(served.url + path, json={**body, "max_tokens": count}).json()
        part, same = ((value["choices"][0].get("message") or value["choices"][0]) for value in (cut, again))
        text = "text" if "text" in part else "content"
        assert part[text] and same[text].startswith(part[text])


def test_an_engine_that_is_gone(folder: Path) -> None:
    with Served(load(folder)) as served:
        real, left = served.engine.stream, [3]

        async def dies(*given: Any, **options: Any) -> AsyncIterator[Event]:
            async with contextlib.aclosing(real(*given, **options)) as events:  # type: ignore[type-var]
                async for event in events:
                    if not left[0]:
                        raise EngineGone("of /secret/path")
                    left[0] -= 1
                    yield event

        served.engine.stream = dies  # type: ignore[method-assign]
        url = served.url + "/v1/completions"
        told = httpx2.post(url, json={**LONG, "logprobs": 0, "stream": True}).text.strip().split("\n\n")
        assert len(told) == 4
        assert json.loads(told[-1].removeprefix("data: "))["error"]["code"] == "engine_gone"
        answer = httpx2.post(url, json=LONG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_gone")
        assert "secret" not in answer.text + "".join(told)

        async def raises(*given: Any, **options: Any) -> AsyncIterator[Event]:
            raise ZeroDivisionError("a secret")
            yield

        served.engine.stream = raises  # type: ignore[method-assign]
        answer = httpx2.post(url, json=LONG)
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "an internal error")
        assert [type(error) for error in served.errors] == [ZeroDivisionError]
        served.check_empty()


def test_an_engine_that_stands_still_is_not_ready(folder: Path) -> None:
    with Served(load(folder), ServerConfig(ping_s=0.3)) as served:
        url = served.url + "/health/ready"
        assert httpx2.get(url).status_code == 200
        served.engine.alive = False
        answers: list[int] = []
        threads = [threading.Thread(target=lambda: answers.append(httpx2.get(url).status_code)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [503] * 5
        served.engine.alive = True
        wait_for(lambda: httpx2.get(url).status_code == 200)


def test_a_request_that_the_model_fails_on_fails_alone(folder: Path) -> None:
    with Served(load(folder)) as served:
        model = served.llm.engine.runner.model
        want = httpx2.post(served.url + "/v1/completions", json={**LONG, "temperature": 0}).json()["choices"]
        with torch.no_grad():
            assert model.embedding is not None
            model.embedding.weight[11] = torch.nan
        for stream in (False, True):
            answer = httpx2.post(served.url + "/v1/completions", json={**LONG, "prompt": [11], "stream": stream})
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")
        assert httpx2.post(served.url + "/v1/completions", json={**LONG, "temperature": 0}).json()["choices"] == want


def test_metrics_count_by_fixed_labels(folder: Path) -> None:
    with Served(load(folder, prefix_cache=True)) as served:
        for _ in range(2):
            body = {"model": "tiny", "prompt": [9] * 40, "max_tokens": 5, "ignore_eos": True, "n": 2}
            assert httpx2.post(served.url + "/v1/completions", json=body).status_code == 200
        httpx2.post(served.url + "/v1/completions", json={"canary-field": 1})
        httpx2.get(served.url + "/canary-path")
        page = httpx2.get(served.url + "/metrics")
        assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "canary" not in page.text
        values = {}
        for line in page.text.splitlines():
            assert re.fullmatch(
                r'# (HELP|TYPE) lockstep_\w+ .+|lockstep_\w+(\{(\w+="[\w.+]+",?)+\})? [\d.e+-]+', line
            ), line
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                assert name not in values
                values[name] = float(value)
        found = {name.removeprefix("lockstep_"): value for name, value in values.items()}
        assert found['requests_total{route="completions",outcome="ok"}'] == 2
        assert found['requests_total{route="completions",outcome="refused"}'] == 1
        assert found["prompt_tokens_total"] == 80 and found["generated_tokens_total"] == 20
        assert found["prompt_tokens_cached_total"] == found["prefix_hit_tokens_total"] > 0
        assert found["time_to_first_token_seconds_count"] == 4 and found["time_per_token_seconds_count"] == 16
        assert found['time_per_token_seconds_bucket{le="+Inf"}'] == 16
        assert (
            found["engine_running"] == found["prompts_waiting"] == found['kv_pages_device{group="0",state="used"}'] == 0
        )
        own = create_metrics_app(served.app.state.server)
        assert [route.path for route in own.routes] == ["/metrics"]


def first_token_s(served: Served, path: str, body: dict[str, Any], body_s: float = 0.0) -> float:
    """The time to the first token by /metrics, of a request whose body takes so long to come."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    before = served.app.state.server.metrics.first.sum
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode())
        time.sleep(body_s)
        connection.sendall(data)
        assert read(connection).startswith(b"HTTP/1.1 200 ")
    return served.app.state.server.metrics.first.sum - before


def test_the_time_to_the_first_token_begins_with_the_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Served(load(folder)) as served:
        server, small = served.app.state.server, {**CHAT, "max_tokens": 2}
        first_token_s(served, "/v1/chat/completions", small)
        assert first_token_s(served, "/v1/chat/completions", small, body_s=1.0) < 0.9
        converse, check = server.codec.converse, server.check_forms

        async def rendered(*given: Any, **named: Any) -> Any:
            await asyncio.sleep(0.6)
            return await converse(*given, **named)

        async def compiled(params: Any) -> None:
            await asyncio.sleep(0.6)
            await check(params)

        monkeypatch.setattr(server.codec, "converse", rendered)
        assert 0.6 <= first_token_s(served, "/v1/chat/completions", small) < 1.2
        monkeypatch.setattr(server, "check_forms", compiled)
        assert first_token_s(served, "/v1/completions", {**LONG, "max_tokens": 2}) >= 0.6
        assert first_token_s(served, "/v1/chat/completions", small) >= 1.2
        assert server.metrics.whole.sum >= server.metrics.first.sum


def test_limits_that_cannot_be_are_refused_together(folder: Path) -> None:
    config = ServerConfig(keys=("short", "short"), queue_s=9.0, deadline_s=1.0, body_bytes=0, queue_tokens=10)
    served = Served(load(folder))
    server = served.app.state.server
    with pytest.raises(ConfigError) as caught:
        create_app(served.engine, server.model, server.codec, config)
    assert len(caught.value.problems) == 6
    assert "short" not in str(caught.value)


def test_answers_do_not_wait_for_the_garbage_collector(folder: Path) -> None:
    with Served(load(folder)) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

        def work() -> None:
            for stream in (False, True):
                found = client.completions.create(model="tiny", prompt=[7, 8, 9], max_tokens=9, n=2, stream=stream)
                assert len(list(found)) > 1
            wait_for(lambda: not served.app.state.server.in_flight)
            time.sleep(0.2)  # until the loop has let go of the last one

        work()
        assert leftovers(work, "infer", "uvicorn", "h11") == set()
