"""Engines that fail, die or stand still: S16 to S20."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from serving_faults.house import LONG, House, alive, wait_for
from serving_faults.stage import Stage, tally
from serving_faults.suite import Failed, Seen, case, must
from serving_faults.wire import Answer, error_of

STREAM: dict[str, Any] = {**LONG, "stream": True}


@case("S16 making text of a token raises for one request", short=False)
def one_fails(stage: Stage, seen: Seen) -> None:
    with stage.own() as house, stage.watched(house, seen):
        house.write("poison", "300")
        poisoned = {**LONG, "allowed_tokens": [300], "max_tokens": 20, "ignore_eos": True}
        for stream in (False, True):
            for n in (1, 2):
                answer = house.ask("POST", "/v1/completions", {**poisoned, "stream": stream, "n": n})
                must(answer.terminals() == 1, f"ended {answer.terminals()} times: {answer.body[-300:]!r}")
                must("canary" not in answer.body.decode(), "an error tells of the inside")
                if answer.status == 200:
                    must(answer.events[-1]["error"]["code"] == "generation_failed", f"{answer.events[-1]}")
                else:
                    must(error_of(answer, 500)["code"] == "generation_failed", f"{answer.body!r}")
                seen.bodies.add(answer.body.decode())
        (house.place / "poison").unlink()
        must(house.ask("POST", "/v1/completions", {**poisoned}).status == 200, "the token fails for ever")
        seen.note("each such request failed alone")


def _streams(house: House, count: int, pause: float = 0.0) -> tuple[list[Any], list[float], list[threading.Thread]]:
    """Streams that are under way; their answers, and when they ended, come later."""
    found: list[Any] = [None] * count
    ends = [0.0] * count

    def run(place: int) -> None:
        try:
            with house.client(60.0) as client:
                client.post("/v1/completions", {**STREAM, "seed": place})
                found[place] = client.answer()
                ends[place] = time.monotonic()
        except OSError as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(count)]
    for thread in threads:
        thread.start()
        time.sleep(pause)
    wait_for(lambda: house.metrics()["engine_running"] >= count, 20, "the streams begin")
    return found, ends, threads


def _broken(house: House, seen: Seen, strike: Callable[[], None], within: float, back: float = 30.0) -> list[Answer]:
    """Streams whose engine is struck: each ends with one error event in time, and the engine comes back."""
    with house.slowly(0.02):
        found, ends, threads = _streams(house, 4)
        waiting: list[Any] = []
        asking = threading.Thread(
            target=lambda: waiting.append(house.ask("POST", "/v1/completions", LONG)), daemon=True
        )
        asking.start()
        before = house.engines()
        began = time.monotonic()
        strike()
        for thread in threads:
            thread.join(60)
        asking.join(60)
    for answer in found:
        must(isinstance(answer, Answer), f"a stream had no end: {answer!r}")
        must(
            answer.status == 200 and answer.terminals() == 1,
            f"ended {answer.terminals()} times: {answer.body[-300:]!r}",
        )
        must("error" in answer.events[-1] and not answer.done, f"no error event: {answer.body[-300:]!r}")
        seen.bodies.add(str(answer.events[-1]))
    must(waiting and waiting[0].terminals() == 1, "a request that is not streamed had no end")
    error_of(waiting[0], (500, 503))
    seen.detected(max(ends) - began, within, "error events came")
    _back(house, seen, began, back)
    gone = [pid for pid in before if alive(pid)]
    must(not gone, f"processes of the engine that failed are left: {gone}")
    return found


def _back(house: House, seen: Seen, began: float, back: float) -> None:
    """The engine is there again; until then every request was refused with 503."""
    statuses: list[Any] = []

    def served() -> bool:
        answer = house.complete()
        statuses.append(answer.status)
        must(answer.status in (200, 503), f"while the engine was away: {answer.status}")
        return answer.status == 200 and house.ready() == 200

    wait_for(served, back + 5.0, "the engine comes back")
    seen.recovered(time.monotonic() - began, back, "the engine was back")


@case("S17 a step raises", short=False)
def step_raises(stage: Stage, seen: Seen) -> None:
    with stage.own() as house, stage.watched(house, seen, disturbed=True):
        red: list[int] = []

        def strike() -> None:
            house.fault("raise@0,3,forward")
            end = time.monotonic() + 5
            while time.monotonic() < end and 503 not in red:
                red.append(house.ready())

        _broken(house, seen, strike, 6.0)
        must(503 in red, f"/health/ready was {set(red)}")
        seen.note("error events, 503, and back")


@case("S17b a step raises on one of two ranks", short=False)
def rank_raises(stage: Stage, seen: Seen) -> None:
    with stage.own("--layout.tp", "2") as house, stage.watched(house, seen, disturbed=True):
        _broken(house, seen, lambda: house.fault("raise@1,3,forward"), 8.0)


@case("S18 SIGKILL to the engine in the middle of streams")
def killed(stage: Stage, seen: Seen) -> None:
    house = stage.plain()
    with stage.watched(house, seen, disturbed=True):

        def strike() -> None:
            for pid in house.engines():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

        _broken(house, seen, strike, 2.0)


@case("S19 SIGSTOP to the engine", short=False)
def stopped(stage: Stage, seen: Seen) -> None:
    with stage.own() as house:
        with stage.watched(house, seen, disturbed=True):
            with house.slowly(0.02):
                found, _, threads = _streams(house, 2)
                began = time.monotonic()
                for pid in house.engines():
                    os.kill(pid, signal.SIGSTOP)
                wait_for(lambda: house.ready() == 503, 12, "/health/ready is red")
                seen.detected(time.monotonic() - began, 10.0, "/health/ready was red")
                must(house.ask("GET", "/health/live").status == 200, "/health/live fails")
                for thread in threads:
                    thread.join(60)
            ended = [answer for answer in found if isinstance(answer, Answer)]
            must(len(ended) == 2 and tally(ended) == {200: 2}, "a stream of a stopped engine never ends")
            must(all("error" in answer.events[-1] for answer in ended), "no error event")
            seen.note(
                f"red after {seen.detect_s:.1f} s, killed and streams ended after {time.monotonic() - began:.1f} s"
            )
            _back(house, seen, time.monotonic(), 30.0)


@case("S20 SIGKILL to one of two ranks", short=False)
def rank_killed(stage: Stage, seen: Seen) -> None:
    with stage.own("--layout.tp", "2") as house, stage.watched(house, seen, disturbed=True):

        def strike() -> None:
            os.kill(_leaf(house), signal.SIGKILL)

        _broken(house, seen, strike, 2.0)


def _leaf(house: House) -> int:
    """A rank of the engine that is not the first."""
    for pid in house.engines():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            if b"LOCKSTEP_RANK=1" in file.read().split(b"\0"):
                return pid
    raise Failed("there is no second rank")


@case("S20b a rank that loops, and one that stands still", short=False)
def rank_loops(stage: Stage, seen: Seen) -> None:
    for kind in ("loop", "stop"):
        with stage.own("--layout.tp", "2") as house, stage.watched(house, seen, disturbed=True):
            _broken(house, seen, lambda kind=kind: house.fault(f"{kind}@1,3,forward"), 40.0, 70.0)


@case("S21 the router: an engine dead, standing still, dying again and again", short=False)
def router(stage: Stage, seen: Seen) -> None:
    with stage.own("--layout.dp", "2") as house, stage.watched(house, seen, disturbed=True):
        want = house.ask("POST", "/v1/completions", {**LONG, "temperature": 0}).json()["choices"][0]["text"]
        with house.slowly(0.01):
            found, _, threads = _streams(house, 6, pause=0.15)  # short prompts that come at once may all go to one
            first = _children(house)[0]
            began = time.monotonic()
            os.kill(first, signal.SIGKILL)
            for _ in range(12):  # no token was sent of these: the other engine takes them
                answer = house.ask("POST", "/v1/completions", {**LONG, "temperature": 0, "max_tokens": 5})
                must(answer.status == 200, f"while one of two engines is dead: {answer.status} {answer.body[:200]!r}")
                must(want.startswith(answer.json()["choices"][0]["text"]), "other tokens")
            for thread in threads:
                thread.join(60)
        must(tally(found) == {200: 6}, f"{tally(found)}")
        cut = sum("error" in answer.events[-1] for answer in found)
        must(0 < cut < 6, f"{cut} of 6 streams were cut, those of one engine should be")
        seen.note(f"{cut} of 6 streams ended with an error event, the others went on, new requests 200")
        wait_for(lambda: len(_children(house)) == 2 and house.ready() == 200, 30, "the dead engine is back")
        seen.recovered(time.monotonic() - began, 30.0, "both engines were there")
        for _ in range(3):  # flapping
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(_children(house)[-1], signal.SIGKILL)
            for _ in range(5):
                answer = house.ask("POST", "/v1/completions", {**LONG, "temperature": 0, "max_tokens": 5})
                must(answer.status in (200, 503), f"while an engine flaps: {answer.status}")
            time.sleep(1.0)
        wait_for(lambda: len(_children(house)) == 2 and house.ready() == 200, 40, "the flapping engine is back")


def _children(house: House) -> list[int]:
    """The processes that the server itself has started."""
    found: list[int] = []
    for task in os.listdir(f"/proc/{house.process.pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{house.process.pid}/task/{task}/children") as file:
            found += [int(word) for word in file.read().split()]
    return [pid for pid in sorted(set(found) & set(house.engines())) if alive(pid)]
