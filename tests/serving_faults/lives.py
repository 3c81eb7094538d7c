"""Requests and their ends: S8, S9, S11 to S14."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from typing import Any

from serving_faults.house import GREEDY, LONG, House, wait_for
from serving_faults.stage import Stage, tally, together
from serving_faults.suite import Seen, case, must
from serving_faults.wire import Answer, Client, error_of

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "tea"}], "ignore_eos": True}
PATHS = {"/v1/completions": LONG, "/v1/chat/completions": CHAT}


@case("S8 a reader that never reads its stream", short=False)
def never_reads(stage: Stage, seen: Seen) -> None:
    body = {**LONG, "n": 16, "logprobs": 20, "stream": True}
    with contextlib.ExitStack() as own:
        house = own.enter_context(stage.own("--http.write-s", "2"))
        for _ in range(2):  # so much takes memory that is kept: read, and all at once as no reader is waited for
            tally(together([lambda: house.ask("POST", "/v1/completions", body)] * 4))
            _unread(house, body)
        own.enter_context(stage.watched(house, seen))
        before = house.rss()
        took, most = _unread(house, body)
        seen.detected(took, 8.0, "streams that nobody reads ended")
        seen.note(f"ended after {took:.1f} s (write_s 2), memory +{(most - before) / 2**20:.1f} MiB at most")
        entries = 4 * 16 * 250 * 21  # streams, choices, tokens, log-probabilities of each
        must(most - before < 160 * entries, "more waits for them than their own tokens")


def _unread(house: House, body: dict[str, Any]) -> tuple[float, int]:
    """Four streams that nobody reads: how long until they are ended, and the most memory meanwhile."""
    ended = 'requests_total{route="completions",outcome="gone"}'
    before, most = house.metrics().get(ended, 0), 0
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", house.port))
            client = Client.__new__(Client)
            client.socket, client.port, client._rest = one, house.port, b""
            stack.enter_context(client)
            client.post("/v1/completions", body)
        wait_for(lambda: house.metrics()["requests_in_flight"] >= 4, 5, "the streams begin")

        def over() -> bool:
            nonlocal most
            most = max(most, house.rss())
            return house.metrics().get(ended, 0) >= before + 4

        return wait_for(over, 12, "readers that do not read are still served"), most


@case("S9 clients that leave: queued, in the prompt, decoding, streamed or not", short=False)
def leaves(stage: Stage, seen: Seen) -> None:
    options = ("--engine.scheduler.requests", "2", "--engine.scheduler.chunk", "16")
    with stage.own(*options) as house, stage.watched(house, seen, quiet=True):
        for path in PATHS:
            for stream in (False, True):
                with house.slowly(0.03):
                    for when in ("prompt", "decoding"):
                        _gone(house, path, stream, when, seen)
                    with contextlib.ExitStack() as others:
                        for _ in range(2):
                            other = others.enter_context(house.client())
                            other.post("/v1/completions", {**LONG, "stream": True})
                        wait_for(lambda: house.metrics()["engine_running"] == 2, 5, "two are running")
                        _gone(house, path, stream, "queued", seen, rest=2)
                    wait_for(lambda: house.metrics()["engine_running"] == 0, 5, "the others ended")
        with house.slowly(0.03):
            for extra in (b"\r\n", b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", b"G" * 5000):
                _gone(house, "/v1/completions", False, "decoding", seen, extra=extra)
        seen.note(f"15 ways of leaving, pages free within {seen.detect_s:.2f} s")


def _gone(house: House, path: str, stream: bool, when: str, seen: Seen, *, rest: int = 0, extra: bytes = b"") -> None:
    body = {**PATHS[path], "stream": stream, "seed": 5}
    if when == "prompt" and "prompt" in body:
        body |= {"prompt": [7] * 249, "max_tokens": 4}
    elif when == "prompt":
        body |= {"messages": [{"role": "user", "content": "x " * 100}]}
    before = house.metrics()[_gone_of(path)]
    with house.client() as client:
        client.post(path, body)
        client.send(extra)
        name, least = ("engine_waiting", 1) if when == "queued" else ("engine_running", 1)
        wait_for(lambda: house.metrics()[name] >= least, 5, f"{path} {when}: it does not begin")
        if when == "decoding":
            wait_for(lambda: house.metrics()["prompts_waiting"] == 0, 5, "it has no first token")
    began = time.monotonic()

    def over() -> bool:
        values = house.metrics()
        gone = values[_gone_of(path)] > before
        return gone and values["engine_waiting"] == 0 and values["engine_running"] == rest

    wait_for(over, 5, f"{path} stream={stream} {when} {extra[:20]!r}: it goes on without its client")
    seen.detected(time.monotonic() - began, 1.6, f"{path} stream={stream} {when}: it ended")  # told every 0.25 s


def _gone_of(path: str) -> str:
    return f'requests_total{{route="{"chat" if "chat" in path else "completions"}",outcome="gone"}}'


@case("S11 three times as much as can be served", short=False)
def overload(stage: Stage, seen: Seen) -> None:
    seconds = 8.0 if stage.short else 60.0
    options = ("--http.queue-requests", "24", "--http.most-prompts", "8", "--http.queue-tokens", "4000")
    with stage.own(*options, "--engine.scheduler.requests", "8") as house:
        with stage.watched(house, seen, quiet=True), house.slowly(0.004):
            body = {**GREEDY, "max_tokens": 40, "ignore_eos": True, "logprobs": None}
            began = time.monotonic()
            answers = together([lambda: house.ask("POST", "/v1/completions", body)] * 8)
            rate = 8 / (time.monotonic() - began) * 3
            must(tally(answers) == {200: 8}, f"{tally(answers)}")
            want = answers[0].json()["choices"][0]["text"]
            found = _arrivals(house, body, rate, seconds)
            counts = tally(found)
            must(set(counts) == {200, 429}, f"{counts}")
            must(all(a.json()["choices"][0]["text"] == want for a in found if a.status == 200), "other tokens")
            refused = [answer for answer in found if answer.status == 429]
            for answer in refused:
                error_of(answer, 429)
                must(answer.header("retry-after") == "1", "no Retry-After")
            waits = sorted(answer.seconds for answer in refused)
            typical, late = waits[len(waits) // 2], waits[int(0.99 * len(waits))]
            seen.note(
                f"{rate:.0f}/s for {seconds:g} s: {counts}; 429 after p50 {1e3 * typical:.0f} p99 {1e3 * late:.0f} ms"
            )
            must(late < 0.1, f"a 429 came after {late:.3f} s")
            must(counts[200] > rate / 3 * seconds * 0.5, f"only {counts[200]} were served")
        with stage.watched(house, seen, quiet=True), house.slowly(0.05):
            big = {**LONG, "prompt": [7] * 240, "max_tokens": 8}
            statuses = tally(together([lambda: house.ask("POST", "/v1/completions", big)] * 40))
            must(set(statuses) == {200, 429}, f"by tokens: {statuses}")
            seen.note(f"by tokens {statuses}")


def _arrivals(house: House, body: dict[str, Any], rate: float, seconds: float) -> list[Answer]:
    """Requests that come by themselves, whatever becomes of the others."""
    found: list[Any] = []
    threads: list[threading.Thread] = []
    draw, end, at = random.Random(3), time.monotonic() + seconds, time.monotonic()

    def one() -> None:
        try:
            found.append(house.ask("POST", "/v1/completions", body))
        except OSError as error:
            found.append(error)

    while at < end:
        at += draw.expovariate(rate)
        time.sleep(max(0.0, at - time.monotonic()))
        threads.append(threading.Thread(target=one, daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    return found


@case("S12 the deadline of the queue, and of the whole", short=False)
def deadlines(stage: Stage, seen: Seen) -> None:
    options = ("--engine.scheduler.requests", "1", "--http.queue-s", "1", "--http.deadline-s", "4")
    with stage.own(*options) as house, stage.watched(house, seen, quiet=True), house.slowly(0.05):
        with house.client() as first:
            first.post("/v1/completions", {**LONG, "stream": True})
            wait_for(lambda: house.metrics()["engine_running"] == 1, 5, "one is running")
            answers = together(
                [lambda: house.ask("POST", "/v1/completions", {**LONG, "stream": s}) for s in (True, False)]
            )
            for answer in answers:
                error = error_of(answer, 503)
                must(error["code"] == "queue_deadline" and answer.header("retry-after") == "1", f"{error}")
                must(0.8 < answer.seconds < 2.0, f"503 after {answer.seconds:.2f} s")
            cut = first.answer()
        must(cut.terminals() == 1 and cut.events[-1]["error"]["code"] == "deadline", f"{cut.body[-200:]!r}")
        error_of(house.ask("POST", "/v1/completions", LONG), 504)
        seen.note("503 after 1 s in the queue, 504 and an error event after 4 s")


@case("S13 too few pages for all: preemption", short=False)
def preemption(stage: Stage, seen: Seen) -> None:
    pages = (
        "--engine.cache.memory-gib",
        "0.0002",
        "--engine.scheduler.horizon",
        "1",
        "--engine.scheduler.watermark",
        "0",
    )
    with stage.own(*pages, "--engine.scheduler.comeback", "0") as house:
        prompts = [[7 + number, 30 + number, 5] for number in range(12)]
        bodies = [{**LONG, "prompt": prompt, "temperature": 0} for prompt in prompts]
        want = [house.ask("POST", "/v1/completions", body).json()["choices"][0]["text"] for body in bodies]
        with stage.watched(house, seen):
            before = house.metrics()
            began = time.monotonic()
            for _ in range(1 if stage.short else 6):
                answers = together([lambda body=body: house.ask("POST", "/v1/completions", body) for body in bodies])
                must(tally(answers) == {200: 12}, f"{tally(answers)}")
                got = [answer.json()["choices"][0]["text"] for answer in answers]
                must(got == want, "tokens differ after a preemption")
            after = house.metrics()
        count = sum(
            after[name] - before[name] for name in ("preemptions_recomputed_total", "preemptions_swapped_total")
        )
        must(count > 5, f"only {count:.0f} preemptions")
        seen.note(f"{count:.0f} preemptions, the same tokens, {time.monotonic() - began:.1f} s")


@case("S14 random requests, aborts and ends", short=False)
def storm(stage: Stage, seen: Seen) -> None:
    count, workers = (400 if stage.short else 10_000), 16
    pages = ("--engine.cache.memory-gib", "0.0004", "--engine.scheduler.requests", "8")
    with stage.own(*pages) as house, stage.watched(house, seen, disturbed=False):
        left, lock, outcomes = count, threading.Lock(), dict[str, int]()

        def work(seed: int) -> None:
            nonlocal left
            draw = random.Random(seed)
            while True:
                with lock:
                    if left <= 0:
                        return
                    left -= 1
                what = _random(house, draw)
                with lock:
                    outcomes[what] = outcomes.get(what, 0) + 1

        results = together([lambda seed=seed: work(seed) for seed in range(workers)])
        wrong = [result for result in results if isinstance(result, BaseException)]
        must(not wrong, f"{wrong[:2]!r}")
        must(sum(outcomes.values()) == count, f"{count - sum(outcomes.values())} were lost")
        seen.note(f"{count} requests: {outcomes}")


def _random(house: House, draw: random.Random) -> str:
    """One request with a life of its own; how it ended."""
    body = {
        "model": "tiny",
        "prompt": [draw.randint(3, 319) for _ in range(draw.randint(1, 120))],
        "max_tokens": draw.randint(1, 60),
        "temperature": draw.choice([0, 1]),
        "stream": draw.random() < 0.5,
        "n": 1,
    }
    if body["temperature"]:
        body["n"] = draw.choice([1, 1, 2, 3])
    with house.client() as client:
        client.post("/v1/completions", body)
        pick = draw.random()
        if pick < 0.4:
            time.sleep(draw.random() * 0.15)
            return "left"
        answer = client.answer()
        must(answer.status in (200, 429), f"{answer.status}: {answer.body[:200]!r}")
        must(answer.terminals() == 1, f"ended {answer.terminals()} times")
        return str(answer.status)
