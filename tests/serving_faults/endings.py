"""Beginnings and ends of the server: S22, S23, L1, L2, L5, L7, L10, L13."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from serving_faults.house import LONG, ROOT, House, alive, wait_for
from serving_faults.stage import Stage, together
from serving_faults.suite import Seen, case, must
from serving_faults.wire import Answer, error_of

STREAM: dict[str, Any] = {**LONG, "temperature": 0, "stream": True, "max_tokens": 120}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "tea"}], "max_tokens": 2}
OF_STARTERS = re.compile(r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_.*|(SLURM|OMPI|PMI|MPI|LOCKSTEP)_.*)")


def _text(answer: Answer) -> str:
    return "".join(event["choices"][0]["text"] for event in answer.events if event.get("choices"))


def _told(house: House, numbers: tuple[int, ...], seconds: float) -> tuple[list[Any], list[Any], float, int]:
    """Signals while four streams are under way: their answers, those of later requests, how long, and the exit code."""
    late: list[Any] = []
    with house.slowly(0.02):
        streams = [house.client(60.0) for _ in range(4)]
        for client in streams:
            client.post("/v1/completions", STREAM)
        wait_for(lambda: house.metrics()["engine_running"] == 4, 10, "four streams run")
        own, began = house.processes(), time.monotonic()
        for place, number in enumerate(numbers):
            time.sleep(0.3 * (place > 0))  # two at a time would be one
            house.process.send_signal(number)
        if len(numbers) == 1:
            with contextlib.suppress(OSError):
                wait_for(lambda: house.ready() == 503, 2, "/health/ready is red")
                late.append(house.ask("POST", "/v1/completions", LONG))
                late.append(house.ask("GET", "/health/live"))
        answers = together([client.answer for client in streams])
        for client in streams:
            client.close()
        try:
            code = house.process.wait(seconds)
        except subprocess.TimeoutExpired:
            must(False, f"it did not end within {seconds:g} s of the signal: {house.lines[-800:]}")
            raise
    took = time.monotonic() - began
    house.check_gone(own)
    return answers, late, took, code


@case("S22 SIGTERM under load")
def drained(stage: Stage, seen: Seen) -> None:
    house = stage.retired()
    with stage.ending(house):
        want = _text(house.ask("POST", "/v1/completions", STREAM))
        answers, late, took, code = _told(house, (signal.SIGTERM,), 30.0)
        must(code == 0, f"exit code {code}")
        must([answer.terminals() for answer in answers] == [1] * 4, "a stream did not end once")
        must(all(_text(answer) == want and answer.done for answer in answers), "a stream was cut or had other tokens")
        must(len(late) == 2, "the server was gone before its requests had ended")
        must(error_of(late[0], 503)["code"] == "draining", f"{late[0].body!r}")
        must(late[1].status == 200, "/health/live fails while the server drains")
        seen.note(f"four streams finished, new ones 503, exit 0 after {took:.1f} s")


@case("S23 no time to drain; a second SIGTERM; SIGINT", short=False)
def hurried(stage: Stage, seen: Seen) -> None:
    ways = {"drain 0": (("--drain-s", "0"), (signal.SIGTERM,)), "twice": ((), (signal.SIGTERM, signal.SIGTERM))}
    ways["ctrl-c twice"] = ((), (signal.SIGINT, signal.SIGINT))
    for name, (options, numbers) in list(ways.items())[: 2 if stage.short else 3]:
        with stage.own(*options) as house:
            answers, _, took, code = _told(house, numbers, 20.0)
            must(code == 0, f"{name}: exit code {code}")
            for answer in answers:
                must(answer.terminals() == 1 and answer.done, f"{name}: {answer.body[-200:]!r}")
                ends = [event["choices"][0]["finish_reason"] for event in answer.events if event.get("choices")]
                must(ends[-1] == "abort", f"{name}: ended with {ends[-1]}")
            seen.detected(took, 5.0, f"{name}: it ended")
            seen.note(f"{name}: abort, exit 0 after {took:.1f} s")


def _bare(stage: Stage, *options: str, environ: dict[str, str] | None = None, seconds: float = 40.0) -> Any:
    """The command by itself, which is to end: its code, what it said, and how long it took."""
    own = {name: value for name, value in os.environ.items() if not OF_STARTERS.fullmatch(name)}
    command = [sys.executable, "-m", "launch", "serve", str(stage.model), "--engine.cache.memory-gib", "0.02", *options]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env={**own, **(environ or {})}, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        must(False, f"{options} {environ}: it did not end within {seconds:g} s")
        raise
    return done.returncode, done.stderr, time.monotonic() - began


@case("L1 the port is taken", short=False)
def taken(stage: Stage, seen: Seen) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, said, took = _bare(stage, "--port", str(port))
        must(code == 2 and str(port) in said and "in use" in said, f"{code}: {said}")
        must(f"process {os.getpid()}" in said, f"who has it is not named: {said}")
        must("Traceback" not in said, said)
        seen.note(f"refused after {took:.1f} s: {said.strip()[-90:]}")


@case("L2 a master that cannot be reached", short=False)
def unreachable(stage: Stage, seen: Seen) -> None:
    base = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29555"}
    works = [
        lambda host=host: (host, _bare(stage, "--layout.tp", "2", environ={**base, "MASTER_ADDR": host}, seconds=60))
        for host in ("127.0.0.1", "192.0.2.1", "no-such-host.invalid")[: 1 if stage.short else 3]
    ]
    for host, (code, said, took) in together(works):
        must(code != 0 and f"{host}:29555" in said, f"{code}: {said}")
        must("Traceback" not in said, said)
        must(took <= 30.0, f"{host}: given up after {took:.1f} s")
        seen.note(f"{host}: exit {code} after {took:.1f} s")


@case("L5 SIGKILL to the server", short=False)
def orphans(stage: Stage, seen: Seen) -> None:
    for layout in (("--layout.tp", "2"),) if stage.short else ((), ("--layout.tp", "2"), ("--layout.dp", "2")):
        house = House(stage.place(), stage.model, *layout)
        house.ask("POST", "/v1/chat/completions", CHAT)
        own = house.processes()
        must(own, "it has no processes")
        began = time.monotonic()
        os.kill(house.process.pid, signal.SIGKILL)
        house.process.wait()
        try:
            wait_for(lambda own=own: not [pid for pid in own if alive(pid)], 5.0, f"{layout}: orphans")
            left = lambda house=house: sorted(path.name for path in house.temporary.iterdir())  # noqa: E731
            wait_for(lambda left=left: not left(), 1.0, f"{layout}: {left()} is left on disk")
        finally:
            house.end()
            for pid in own:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        seen.detected(time.monotonic() - began, 5.0, "no orphan was left")
        seen.note(f"{' '.join(layout) or 'one rank'}: {len(own)} and all files gone after {seen.detect_s:.2f} s")


@case("L7 an engine that does not end at SIGTERM", short=False)
def stubborn(stage: Stage, seen: Seen) -> None:
    house = House(stage.place(), stage.model)
    try:
        own = house.engines()
        for pid in own:
            os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        house.process.send_signal(signal.SIGTERM)
        code = house.process.wait(20)
        house.check_gone(own)
        must("killed" in house.lines, f"not said: {house.lines[-300:]}")
        must(code == 128 + signal.SIGKILL, f"exit code {code} does not tell that it was killed")
        seen.note(f"killed, exit code {code} after {time.monotonic() - began:.1f} s")
    finally:
        house.end()


HALF: list[tuple[dict[str, str], str]] = [
    ({"RANK": "0"}, "RANK"),
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "WORLD_SIZE"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR"),
    ({"SLURM_PROCID": "1"}, "SLURM"),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "SLURM_LOCALID"),
    ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE"),
    ({"PMI_RANK": "0"}, "PMI_SIZE"),
    ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK='x'"),
    (
        {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "h",
            "MASTER_PORT": "29500",
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
        },
        "Open MPI says rank 1 of 4",
    ),
]


@case("L10 variables of starters that are half set or contradict", short=False)
def half_set(stage: Stage, seen: Seen) -> None:
    for environ, wanted in HALF[:3] if stage.short else HALF:
        code, said, _ = _bare(stage, "--port", "0", environ=environ)
        must(code == 2 and wanted in said and "Traceback" not in said, f"{environ}: {code}: {said}")
        seen.inputs += 1
    seen.note(f"{seen.inputs} refused, each named")


@case("L13 Ctrl-C while the model loads, and under load", short=False)
def interrupted(stage: Stage, seen: Seen) -> None:
    for delay in (0.3, 0.6, 1.0, 1.5, 2.0, 2.5, 3.5):
        house = House(stage.place(), stage.model, "--layout.tp", "2", wait=False)
        try:
            time.sleep(delay)
            own, began = house.processes(), time.monotonic()
            house.process.send_signal(signal.SIGINT)
            code = house.process.wait(20)
            took = time.monotonic() - began
            house.check_gone(own, 2.0)
            left = list(house.temporary.rglob("*"))
            must(not left, f"Ctrl-C after {delay} s leaves {left}")
            must(code in (0, 130, -signal.SIGINT), f"Ctrl-C after {delay} s: exit code {code}: {house.lines[-500:]}")
            seen.detected(took, 5.0, f"Ctrl-C after {delay} s: it ended")
        finally:
            house.end()
    with stage.own() as house:
        answers, _, took, code = _told(house, (signal.SIGINT,), 30.0)
        must(code == 0 and all(answer.terminals() == 1 for answer in answers), f"under load: {code}")
        seen.note(f"at 7 moments of loading gone within {seen.detect_s:.1f} s; under load drained in {took:.1f} s")
