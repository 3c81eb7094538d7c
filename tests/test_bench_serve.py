"""``bench serve``: what it measures is what a server with known delays does, and no request is lost or told twice."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import write_model
from slow_server import SlowServer

from launch.bench.client import Answer
from launch.bench.config import BenchConfig, Objective, Shape
from launch.bench.measure import Record, outcome, spread, summary
from launch.bench.workload import arrivals, asks, draw_lengths, read_file
from launch.cli import main
from parallel.errors import ConfigError

SMALL = ("--shape.input", "3:6", "--warmup", "0")


def bench(server: SlowServer, tmp_path: Path, *options: str) -> dict[str, Any]:
    out = tmp_path / "numbers.json"
    assert main(["bench", "serve", server.url, *SMALL, "--out", str(out), "--details", *options]) in (0, 1)
    return json.loads(out.read_text())


def test_delays_are_measured_as_they_are(tmp_path: Path) -> None:
    with SlowServer(0.08, 0.02) as server:
        found = bench(server, tmp_path, "--requests", "12", "--concurrencies", "3", "--shape.output", "6")
    (load,) = found["loads"]
    assert load["outcomes"] == {"ok": 12} and load["output_tokens"] == 72 and load["prompt_tokens"] == 84
    assert load["cached_tokens"] == 36
    for name, low, slack in (("ttft_ms", 80, 25), ("tpot_ms", 20, 6), ("itl_ms", 20, 6), ("e2e_ms", 180, 30)):
        assert low - 1 <= load[name]["p50"] <= low + slack, (name, load[name])
    assert load["requests_per_s"] == pytest.approx(12 / load["duration_s"])
    assert load["output_tokens_per_s"] == pytest.approx(72 / load["duration_s"])
    lags = []
    for request, seen in zip(sorted(load["requests"], key=lambda r: r["sent"]), server.seen, strict=True):
        ours, theirs = np.array(request["chunks"]), np.array(seen.wrote)
        lags += list((ours - request["sent"]) - (theirs - seen.came))
    assert abs(statistics.median(lags)) < 0.005, "chunks are timed when they come"


def test_an_open_loop_counts_from_when_a_request_was_due(tmp_path: Path) -> None:
    """A server that takes 40 ms for each, one after another, and 50 arrivals a second: the n-th waits 40 + 20 n ms."""
    for limit in ((), ("--most-in-flight", "1")):
        with SlowServer(0.04, one_by_one=True) as server:
            options = ("--rates", "50", "--arrivals", "constant", "--requests", "15", "--shape.output", "1", *limit)
            (load,) = bench(server, tmp_path, *options)["loads"]
        waits = [request["chunks"][0] - request["due"] for request in load["requests"]]
        assert [request["due"] for request in load["requests"]] == pytest.approx([n / 50 for n in range(15)])
        assert all(wait > 0.039 + 0.02 * n for n, wait in enumerate(waits)), waits
        assert waits[-1] < 0.6
        assert all(request["sent"] >= request["due"] for request in load["requests"]), "none is sent early"
    late = [request["sent"] - request["due"] for request in load["requests"]]
    assert late[-1] > 0.25 and load["sent_late_ms"]["max"] == pytest.approx(1000 * max(late))


KINDS = ("ok", "429", "bytewise", "cut", "error", "leaves", "500", "hang")


def test_every_request_is_accounted_for_once(tmp_path: Path) -> None:
    with SlowServer(kinds=KINDS) as server:
        options = ("--requests", "48", "--concurrencies", "5", "--shape.output", "4", "--timeout-s", "1.5")
        (load,) = bench(server, tmp_path, *options)["loads"]
    assert load["outcomes"] == {"ok": 18, "429": 6, "500": 6, "stream": 12, "timeout": 6}
    assert sum(load["outcomes"].values()) == load["planned"] == 48
    assert load["errors"] == {
        "429": "a 429",
        "500": "a 500",
        "timeout": "timeout",
        "stream": load["errors"]["stream"],
    }
    prompts = Counter(json.dumps(seen.body["prompt"]) for seen in server.seen)
    config = BenchConfig(requests=48, shape=Shape(input="3:6", output="4"))
    assert prompts == Counter(json.dumps(ask.prompt) for ask in asks(config, 0, None))


def test_connections_that_were_closed_while_idle_are_not_used(tmp_path: Path) -> None:
    with SlowServer(0.02, kinds=("leaves",)) as server:
        options = (
            "--requests",
            "8",
            "--shape.output",
            "1",
            "--timeout-s",
            "3",
            "--arrivals",
            "constant",
            "--rates",
            "10",
        )
        (load,) = bench(server, tmp_path, *options)["loads"]
    assert load["outcomes"] == {"ok": 8} and len(server.seen) == 8


def test_a_load_that_nobody_answers_is_told(tmp_path: Path) -> None:
    with SlowServer(kinds=("500",)) as server:
        assert main(["bench", "serve", server.url, "--requests", "3", "--warmup", "0"]) == 1
        assert main(["bench", "serve", server.url, "--requests", "3", "--warmup", "2"]) == 2
    assert main(["bench", "serve", server.url]) == 2


def test_a_sweep_is_written_and_the_same_again(tmp_path: Path) -> None:
    png, options = tmp_path / "x.png", ("--requests", "9", "--rates", "100,200,400", "--shape.output", "2:5")
    with SlowServer(0.01, 0.002) as server:
        objective = ("--objective.ttft-ms", "9", "--objective.tpot-ms", "1000")
        found = bench(server, tmp_path, *options, *objective, "--png", str(png), "--shape.prefixes", "2")
        first = [seen.body for seen in server.seen]
        bench(server, tmp_path, *options, "--shape.prefixes", "2")
        again = [seen.body for seen in server.seen[27:]]
        bench(server, tmp_path, *options, "--shape.prefixes", "2", "--seed", "1")
        other = [seen.body for seen in server.seen[54:]]
    assert [load["load"] for load in found["loads"]] == [100, 200, 400]
    assert found["config"]["rates"] == [100, 200, 400] and found["model"] == "slow" and not found["interrupted"]
    key = lambda body: json.dumps(body, sort_keys=True)  # noqa: E731
    assert sorted(map(key, first)) == sorted(map(key, again)) != sorted(map(key, other))
    assert {body["stream_options"]["include_usage"] for body in first} == {True}
    assert not any("ignore_eos" in body for body in first), "it is sent only to servers that know it"
    for load in found["loads"]:
        assert load["goodput_per_s"] == 0 and load["good_share"] == 0 and load["outcomes"] == {"ok": 9}
    prefixes = [{" ".join(body["prompt"].split()[:128]) for body in first[at : at + 9]} for at in (0, 9, 18)]
    assert all(len(own) == 2 for own in prefixes) and not prefixes[0] & prefixes[1]
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000


def test_the_seconds_of_a_load_end_it(tmp_path: Path) -> None:
    for options in (("--rates", "50", "--arrivals", "constant"), ("--concurrencies", "2")):
        with SlowServer(0.02) as server:
            (load,) = bench(server, tmp_path, "--requests", "500", "--seconds", "0.3", *options)["loads"]
        assert load["outcomes"]["ok"] + load["outcomes"]["unsent"] == 500
        assert load["outcomes"]["ok"] == len(server.seen) and 0.25 < load["duration_s"] < 1.5


def test_chats_and_files_are_sent_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "é"}]
    lines: list[Any] = [{"prompt": "a b", "output": 3}, {"messages": messages}, {"prompt": [5, 6], "output": 2}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    options = ("--requests", "6", "--concurrencies", "1", "--shape.output", "9", "--ignore-eos", "true")
    with SlowServer() as server:
        (load,) = bench(server, tmp_path, *options, "--shape.file", str(path))["loads"]
        assert load["outcomes"] == {"ok": 6} and load["output_tokens"] == 2 * (3 + 9 + 2)
        sent = [(seen.path, seen.body.get("prompt"), seen.body.get("messages")) for seen in server.seen[:3]]
        assert sent == [
            ("/v1/completions", "a b", None),
            ("/v1/chat/completions", None, messages),
            ("/v1/completions", [5, 6], None),
        ]
        assert all(seen.body["ignore_eos"] is True for seen in server.seen)
        bench(server, tmp_path, "--requests", "2", "--endpoint", "chat", "--shape.output", "2")
        assert server.seen[-1].body["messages"][0]["role"] == "user"
        bench(server, tmp_path, "--requests", "2", "--shape.vocabulary", "11", "--shape.output", "2")
        assert all(0 <= token < 11 for token in server.seen[-1].body["prompt"])
    path.write_text('{"prompt": ""}\n{"output": 3}\nx\n{"prompt": "a", "output": -1}\n')
    with pytest.raises(ConfigError) as refused:
        read_file(path)
    assert [f"line {n}:" in problem for n, problem in enumerate(refused.value.problems, 1)] == [True] * 4


@pytest.mark.parametrize("kind,burstiness", [("poisson", 1.0), ("gamma", 0.4), ("gamma", 5.0)])
def test_arrivals_have_the_mean_and_the_variance_that_they_should(kind: Any, burstiness: float) -> None:
    count, rate = 40_000, 8.0
    config = BenchConfig(rates=(rate,), arrivals=kind, burstiness=burstiness, requests=count, seed=3)
    gaps = np.diff(arrivals(config, rate, 0), prepend=0.0)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.03)
    assert gaps.var() == pytest.approx(1 / (burstiness * rate**2), rel=0.1)
    if kind == "poisson":
        counts = np.histogram(np.cumsum(gaps), bins=np.arange(0, int(gaps.sum())))[0]
        assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.08)
    assert arrivals(config, rate, 0) == arrivals(config, rate, 0) != arrivals(config, rate, 1)
    assert arrivals(BenchConfig(arrivals="at_once", requests=3), math.inf, 0) == [0, 0, 0]


def test_lengths_are_within_their_ends() -> None:
    draw = np.random.default_rng(0)
    assert draw_lengths(draw, "7", "lognormal", 3) == [7, 7, 7]
    uniform, skewed = (np.array(draw_lengths(draw, "16:256", kind, 20_000)) for kind in ("uniform", "lognormal"))
    for lengths in (uniform, skewed):
        assert lengths.min() == 16 and lengths.max() == 256
    assert uniform.mean() == pytest.approx(136, rel=0.02) and np.median(skewed) == pytest.approx(64, rel=0.05)


def test_percentiles_are_those_of_the_values() -> None:
    """By another implementation than the one that is used."""
    draw = random.Random(1)
    for size in (2, 3, 10, 101, 999):
        values = [draw.expovariate(2.0) for _ in range(size)]
        found, cuts = spread(values), statistics.quantiles(values, n=100, method="inclusive")
        assert found is not None
        assert found == pytest.approx(
            {
                "mean": 1000 * statistics.fmean(values),
                "max": 1000 * max(values),
                **{f"p{p}": 1000 * cuts[p - 1] for p in (50, 90, 99)},
            }
        )
    assert spread([]) is None


def test_a_summary_counts_what_is_good() -> None:
    def record(first: float, *more: float) -> Record:
        chunks = [1.0 + first + gap for gap in (0.0, *more)]
        return Record(due=1.0, sent=1.1, chunks=chunks, ended=9.0, output_tokens=1 + len(more), outcome="ok")

    records = [record(0.1, 0.02, 0.04), record(0.3, 0.01), record(0.1, 0.5), record(0.1)]
    records += [Record(sent=0.0, outcome="429"), Record()]
    found = summary(records, Objective(ttft_ms=200, tpot_ms=50), 2.0, 0.5)
    assert found["outcomes"] == {"429": 1, "ok": 4, "unsent": 1} and found["planned"] == 6
    assert (found["requests_per_s"], found["goodput_per_s"], found["good_share"]) == (2.0, 1.0, 0.4)
    assert found["tpot_ms"]["max"] == pytest.approx(500) and found["ttft_ms"]["p50"] == pytest.approx(100)
    assert found["itl_ms"]["mean"] == pytest.approx(1000 * (0.02 + 0.02 + 0.01 + 0.5) / 4)
    assert found["output_tokens_per_s"] == 4.0 and found["client_cpu_share"] == 0.25
    assert outcome(Answer(status=200, chunks=[1.0], finished=False)) == "stream"


BAD = [
    (("--rates", "1", "--concurrencies", "2"), "rates, concurrencies"),
    (("--rates", "0"), "rates = 0"),
    (("--rates", "fast"), "rates = 'fast'"),
    (("--concurrencies", "0"), "concurrencies = 0"),
    (("--arrivals", "gamma"), "needs rates"),
    (("--burstiness", "2"), "burstiness = 2"),
    (("--requests", "0"), "requests = 0"),
    (("--shape.input", "9:3"), "input = '9:3'"),
    (("--shape.output", "0"), "output = '0'"),
    (("--shape.file", "/nowhere.jsonl"), "no such file"),
    (("--objective.ttft-ms", "-1"), "ttft_ms = -1"),
    (("--rate", "1"), "did you mean"),
    (("--png", "x.gif"), "png = 'x.gif'"),
    (("--out", "/nowhere/x.json"), "no folder"),
    (("--key-file", "/nowhere"), "key_file"),
    (("--server.port", "1"), "server: "),
    (("--shape.tokens", "ids", "--endpoint", "chat"), "conversations are texts"),
]


def test_bad_options_are_refused_by_name_all_at_once(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for options, text in BAD:
        assert main(["bench", "serve", "http://127.0.0.1:1", *options]) == 2, options
        assert text in capfd.readouterr().err, options
    assert main(["bench", "serve", "http://127.0.0.1:1", "--requests", "0", "--warmup", "-1"]) == 2
    told = capfd.readouterr().err
    assert "requests = 0" in told and "warmup = -1" in told
    for target, text in (("/nowhere/model", "neither an address"), ("ftp://x", "must be http://"), ("", "expected")):
        assert main(["bench", "serve", *([target] if target else [])]) == 2
        assert text in capfd.readouterr().err
    assert main(["bench", "serv"]) == 2 and "bench serv" in capfd.readouterr().err
    with SlowServer() as server:
        assert main(["bench", "serve", server.url, "--shape.input", "5000"]) == 2
        assert "the context of slow is 1000" in capfd.readouterr().err
        assert main(["bench", "serve", server.url, "--model", "other"]) == 2
        assert "the server has slow" in capfd.readouterr().err
    assert main(["bench", "--help"]) == 0 and "--objective.ttft-ms" in capfd.readouterr().out


def test_an_interrupt_tells_what_there_is(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    with SlowServer(0.05, 0.05) as server:
        options = ["--concurrencies", "2,4", "--requests", "400", "--shape.output", "4", "--out", str(out)]
        command = [sys.executable, "-m", "launch", "bench", "serve", server.url, *SMALL, *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while len(server.seen) < 9:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "TTFT" in told
    found = json.loads(out.read_text())
    (load,) = found["loads"]
    assert found["interrupted"] and load["outcomes"]["ok"] >= 4
    assert load["outcomes"].keys() == {"ok", "cut", "unsent"} and sum(load["outcomes"].values()) == 400
    assert 1 <= load["outcomes"]["cut"] <= 2
    assert len(server.seen) <= load["outcomes"]["ok"] + load["outcomes"]["cut"]
    head, _, row = told.splitlines()[:3]
    counts = {"429": "0", "fail": "0", "cut": str(load["outcomes"]["cut"]), "ok": str(load["outcomes"]["ok"])}
    assert dict(zip(head.split("at a time")[1].split(), row.split()[1:5], strict=False)) == counts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_wait_for_a_server(tmp_path: Path, number: int) -> None:
    """One that takes a connection and says nothing, and one that is being started."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for target in (address, write_model(tmp_path / "tiny")):
            command = [sys.executable, "-m", "launch", "bench", "serve", str(target), "--out", str(tmp_path / "x.json")]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            taken = silent.accept()[0] if target == address else None
            if taken is None:
                time.sleep(3.0)
            process.send_signal(number)
            with taken or contextlib.nullcontext():
                assert process.communicate(timeout=20) == ("", "")
            assert process.returncode == 128 + number


def test_a_server_is_started_for_a_folder_and_stopped(tmp_path: Path) -> None:
    folder, out = write_model(tmp_path / "tiny"), tmp_path / "x.json"
    options = ["--requests", "6", "--concurrencies", "3", "--shape.input", "8:32", "--shape.output", "4:8"]
    options += ["--server.engine.cache.memory-gib", "0.02", "--out", str(out)]
    command = [sys.executable, "-m", "launch", "bench", "serve", str(folder), *options]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    (load,) = json.loads(out.read_text())["loads"]
    assert load["outcomes"] == {"ok": 6} and 24 <= load["output_tokens"] <= 48
    config = BenchConfig(requests=6, shape=Shape(input="8:32", output="4:8"))
    assert load["prompt_tokens"] == sum(len(ask.prompt) for ask in asks(config, 0, range(3, 320)))
    assert load["output_tokens"] == sum(ask.output for ask in asks(config, 0, range(3, 320))), (
        "no end of a text ends it"
    )
    left = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False).stdout
    assert not left
    refused = subprocess.run([*command, "--server.port", "x"], capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2 and "port" in refused.stderr
