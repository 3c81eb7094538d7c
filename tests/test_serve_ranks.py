"""``lockstep serve`` where a starter has started its ranks: on one machine, and on two that are imitated."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from starter import LIMITS, Ranks, started
from test_serve import expected, folder  # noqa: F401

TP_PP = ("--layout.tp", "2", "--layout.pp", "2")


def command(folder: Path, *options: str) -> list[str]:  # noqa: F811
    return [str(folder), "--port", "0", *LIMITS, *options]


def text(address: str, prompt: str, tokens: int = 16) -> str:
    body = {"model": "bytes", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["text"]


def status(address: str, path: str) -> int:
    try:
        with urllib.request.urlopen(f"{address}{path}", timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Iterator[Ranks]:  # noqa: F811
    """Four ranks of one engine."""
    with started([command(folder, *TP_PP, "--stall-s", "4")] * 4) as running:
        yield running


def test_ranks_of_a_starter_serve_the_text_of_one_device(folder: Path, ranks: Ranks) -> None:  # noqa: F811
    address = ranks.awaited(r"(http://\S+) is ready")[1]
    for prompt in ("def f(", "class Ü:\n"):
        assert text(address, prompt) == expected(folder, prompt)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_rank_that_dies_or_stops_is_replaced_everywhere(
    folder: Path,  # noqa: F811
    ranks: Ranks,
    how: signal.Signals,
) -> None:
    address = ranks.awaited(r"(http://\S+) is ready")[1]
    (victim,) = ranks.below(3)
    before = {pid for rank in range(4) for pid in ranks.below(rank)}
    os.kill(victim, how)
    end = time.monotonic() + 5
    while status(address, "/health/ready") == 200:
        assert time.monotonic() < end + 10, "still ready"
    end = time.monotonic() + 60
    while status(address, "/health/ready") != 200:
        assert time.monotonic() < end, "".join(ranks.lines)
        time.sleep(0.2)
    assert text(address, "def f(") == expected(folder, "def f(")
    after = {pid for rank in range(4) for pid in ranks.below(rank)}
    assert len(after) == 4 and not before & after, "every rank begins anew"


def test_sigterm_to_any_rank_ends_all(ranks: Ranks) -> None:
    ranks.awaited(r"(http://\S+) is ready")
    assert ranks.stop(rank=2) == [0, 0, 0, 0]
    assert any("rank 2: requests in flight may finish" in line for line in ranks.lines)


def test_ranks_that_were_started_differently_are_refused(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    other = tmp_path / "bytes"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    options = [command(folder, "--layout.tp", "2"), command(other, "--layout.tp", "2", "--precision", "bf16")]
    with started(options) as running:
        assert running.codes() == [2, 2]
        told = "".join(running.lines)
        assert "precision differs: fp32 on rank 0; bf16 on rank 1" in told and "model differs" in told


def test_without_rank_0_nobody_stays(folder: Path) -> None:  # noqa: F811
    with started([command(folder, "--layout.tp", "2")] * 2) as running:
        running.awaited("is ready")
        processes = [*running.below(0), *running.below(1)]
        running.processes[0].kill()
        assert running.codes(25) == [-signal.SIGKILL, 1]
        end = time.monotonic() + 5
        while left := [pid for pid in processes if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < end, f"{left} live on"
            time.sleep(0.1)
        assert any("rank 1: the store" in line or "rank 1: rank 0 has been silent" in line for line in running.lines)


@pytest.fixture
def machines() -> Iterator[list[list[str]]]:
    """Two network namespaces with a cable between them; what to put before a command so that it runs there."""
    names = [f"ls{os.getpid()}{side}" for side in "ab"]
    run = lambda words: subprocess.run(words.split(), check=True, capture_output=True)  # noqa: E731
    try:
        for name in names:
            run(f"ip netns add {name}")
        run(f"ip link add {names[0]} type veth peer name {names[1]}")
        for number, name in enumerate(names):
            run(f"ip link set {name} netns {name}")
            run(f"ip -n {name} address add 10.213.7.{number + 1}/24 dev {name}")
            run(f"ip -n {name} link set {name} up")
            run(f"ip -n {name} link set lo up")
        run(f"ip netns exec {names[0]} unshare --uts true")
    except (OSError, subprocess.CalledProcessError) as error:
        _remove(names)
        pytest.skip(f"no network namespaces here: {error}")
    try:
        yield [
            ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', f"node{name}"]
            for name in names
        ]
    finally:
        _remove(names)


def _remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def asked(machine: list[str], address: str, prompt: str) -> str:
    """The text, asked for on the machine of rank 0, which alone reaches its loopback."""
    code = (
        "import json, sys, urllib.request as r; address, prompt = sys.argv[1:]; "
        "body = {'model': 'bytes', 'prompt': prompt, 'max_tokens': 16, 'temperature': 0}; "
        "q = r.Request(address + '/v1/completions', json.dumps(body).encode(), {'Content-Type': 'application/json'}); "
        "print(json.dumps(json.load(r.urlopen(q, timeout=60))['choices'][0]['text']))"
    )
    answer = subprocess.run([*machine, sys.executable, "-c", code, address, prompt], capture_output=True, check=True)
    return json.loads(answer.stdout)


def test_two_machines_serve_one_model(folder: Path, machines: list[list[str]]) -> None:  # noqa: F811
    where = [machines[0]] * 2 + [machines[1]] * 2
    with started([command(folder, *TP_PP)] * 4, prefixes=where, host="10.213.7.1", here=2) as running:
        address = running.awaited(r"(http://\S+) is ready")[1]
        for prompt in ("def f(", "class Ü:\n"):
            assert asked(machines[0], address, prompt) == expected(folder, prompt)
        assert running.stop() == [0] * 4


def test_engines_on_two_machines(folder: Path, machines: list[list[str]], tmp_path: Path) -> None:  # noqa: F811
    options = command(folder, "--layout.dp", "2", "--layout.tp", "2")
    where = [machines[0]] * 2 + [machines[1]] * 2
    with started([options] * 4, prefixes=where, host="10.213.7.1", here=2) as running:
        assert running.codes() == [2] * 4
        assert any("--channel-key-file" in line for line in running.lines)
    key = tmp_path / "key"
    key.write_text("0123456789abcdef" * 4)
    key.chmod(0o600)
    options += ["--channel-key-file", str(key)]
    with started([options] * 4, prefixes=where, host="10.213.7.1", here=2) as running:
        address = running.awaited(r"(http://\S+) is ready")[1]
        want = expected(folder, "def f(")
        assert [asked(machines[0], address, "def f(") for _ in range(4)] == [want] * 4
        for pid in running.below(2):  # the first rank of the second engine
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert [asked(machines[0], address, "def f(") for _ in range(4)] == [want] * 4, "the other engine goes on"
        running.awaited("it is started again")
        assert running.stop() == [0] * 4
