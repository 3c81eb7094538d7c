"""``lockstep serve`` as it is started by people: texts, layouts, killed and stopped engines, signals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from starter import children, serves
from test_llm import LLAMA
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from infer import LLM, SamplingParams
from launch.cli import main
from launch.priority import NICE
from launch.serve import ServeConfig, _with_keys
from parallel.hf import save_model
from parallel.mesh import Layout, Mesh
from parallel.models.build import Build
from parallel.models.decoder import build_model

LIMITS = ("--engine.cache.memory-gib", "0.02")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads and writes bytes."""
    place = tmp_path_factory.mktemp("served") / "bytes"
    config = dataclasses.replace(LLAMA, vocabulary=257, max_positions=512)
    save_model(build_model(config, Build(mesh=Mesh.single()), seed=3), Mesh.single(), place)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(place / "tokenizer.json"))
    return place


class Server:
    """One that is running."""

    limits = LIMITS

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "launch", "serve", str(folder), "--port", "0", *self.limits, *options]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.address = self.awaited(r"(http://\S+) is ready")[1]
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=60)
        self.model = next(iter(self.client.models.list())).id

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def awaited(self, pattern: str, seconds: float = 60.0, after: int = 0) -> re.Match[str]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in self.lines[after:]:
                if found := re.search(pattern, line):
                    return found
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} did not come: {''.join(self.lines)}")

    def text(self, prompt: str, tokens: int = 16) -> str:
        options = {"max_tokens": tokens, "temperature": 0}
        return self.client.completions.create(model=self.model, prompt=prompt, **options).choices[0].text

    def engines(self) -> list[int]:
        """Processes of engines."""
        return [pid for pid in children(self.process.pid) if serves(pid)]

    def stop(self) -> int:
        everyone = children(self.process.pid)
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        assert not [pid for pid in everyone if Path(f"/proc/{pid}").exists()], "a process is left"
        return code


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    server = Server(folder, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def expected(folder: Path, prompt: str, tokens: int = 16) -> str:
    return LLM(folder).generate([prompt], SamplingParams(max_tokens=tokens))[0].text


@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_texts_are_those_of_the_library_at_every_layout(folder: Path, axis: str) -> None:
    with serving(folder, f"--layout.{axis}", "2") as server:
        for prompt in ("def f(", "class Ü:\n"):
            want = expected(folder, prompt)
            assert server.text(prompt) == want
            options = {"max_tokens": 16, "temperature": 0, "stream": True}
            stream = server.client.completions.create(model=server.model, prompt=prompt, **options)
            assert "".join(piece.choices[0].text for piece in stream if piece.choices) == want
        with pytest.raises(openai.BadRequestError, match="512"):
            server.text("x" * 600)
        assert server.stop() == 0


def ready(server: Server) -> int:
    try:
        with urllib.request.urlopen(f"{server.address}/health/ready", timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_an_engine_that_stands_still_is_not_ready(folder: Path) -> None:
    with serving(folder, "--http.ping-s", "0.5") as server:
        assert ready(server) == 200
        for pid in server.engines():
            os.kill(pid, signal.SIGSTOP)
        assert ready(server) == 503
        for pid in server.engines():
            os.kill(pid, signal.SIGCONT)
        end = time.monotonic() + 10
        while ready(server) != 200:
            assert time.monotonic() < end
        assert server.stop() == 0


def test_a_killed_engine_is_told_and_started_again(folder: Path) -> None:
    with serving(folder) as server:
        stream = server.client.completions.create(
            model=server.model, prompt="a", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        said = len(server.lines)
        began = time.monotonic()
        for pid in server.engines():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(openai.APIError):
            for _ in stream:
                pass
        assert time.monotonic() - began < 2.0
        server.awaited("started again", after=said)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with contextlib.suppress(openai.InternalServerError):
                assert server.text("def f(") == expected(folder, "def f(")
                break
            time.sleep(0.1)
        else:
            raise AssertionError("the engine did not come back")
        assert server.stop() == 0


def test_sigterm_lets_requests_in_flight_finish(folder: Path) -> None:
    with serving(folder) as server:
        (engine,) = server.engines()
        assert os.getpriority(os.PRIO_PROCESS, engine) == os.getpriority(os.PRIO_PROCESS, server.process.pid) + NICE
        got: list[str] = []
        options = {"max_tokens": 400, "temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}
        stream = server.client.completions.create(model=server.model, prompt="a", **options)
        got.append(next(iter(stream)).choices[0].text)
        waiting = threading.Thread(target=lambda: got.extend(p.choices[0].text for p in stream if p.choices))
        waiting.start()
        assert server.stop() == 0
        waiting.join(10)
        assert "".join(got) == LLM(folder).generate(["a"], SamplingParams(max_tokens=400, ignore_eos=True))[0].text


def test_what_cannot_be_served_is_refused_before_anything_starts(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(given: tuple[tuple[str, ...], str]) -> None:
        command = [sys.executable, "-m", "launch", "serve", *given[0]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2, done.stderr
        assert given[1] in done.stderr
        lines = done.stderr.splitlines()
        assert len(set(lines)) == len(lines), "by each engine, and told once"

    little = (str(folder), "--port", "0", "--engine.cache.memory-gib", "0.0001")
    for given, expected in (
        ((str(tmp_path),), str(tmp_path)),
        ((str(folder), "--layout.tp", "3"), "tp"),
        ((str(folder), "--port", "70000"), "port = 70000"),
    ):
        assert main(["serve", *given]) == 2
        assert expected in capfd.readouterr().err
    cases = (
        (little, "not enough memory for one sequence"),
        ((*little, "--layout.dp", "2"), "not enough memory for one sequence"),
    )
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(refuse, cases))


def refused(folder: Path, keys: Path, capfd: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["serve", str(folder), "--keys-file", str(keys)]) == 2
    err = capfd.readouterr().err
    assert "secret" not in err, "no part of a key is told"
    return [line.removeprefix(f"keys_file = {str(keys)!r}: ") for line in err.splitlines()]


def test_a_file_of_keys_may_have_comments_and_what_is_wrong_is_named_by_its_line(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the team\n\nsecret-one-1\n  \n  # old\nsecret-two-2  \r\nsecret#three\n")
    found = _with_keys(ServeConfig(keys_file=str(keys))).keys
    assert found == ("secret-one-1", "secret-two-2", "secret#three")
    keys.write_text("# few\nsecret\n\nsecret-one-1\nsecret two three\nsecret-one-1\nsecret-\u00fc-long\n")
    wrong = "must be at least 8 printable ASCII characters without spaces"
    assert refused(folder, keys, capfd) == [
        f"line 2: {wrong}",
        f"line 5: {wrong}",
        "line 6: the key of line 4 once more",
        f"line 7: {wrong}",
    ]
    keys.write_text("# none\n\n")
    assert refused(folder, keys, capfd) == ["no key in it"]
    keys.write_bytes(b"secret-\xff-one")
    assert refused(folder, keys, capfd) == ["is no text"]


def test_an_option_of_the_layout_is_not_ignored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Layout] = []

    def on_ranks(command: Any, layout: Layout, *rest: Any) -> int:
        seen.append(layout)
        return 0

    flags = ("--layout.tp", "2", "--layout.sequence-parallel", "true")
    for module, words in (("serve", ("--channel", "x")), ("generate", ("--prompt", "a"))):
        monkeypatch.setattr(f"launch.{module}.on_ranks", on_ranks)
        assert main([module, str(folder), *words]) == 0 and main([module, str(folder), *words, *flags]) == 0
    assert seen == [Layout(sequence_parallel=False), Layout(tp=2, sequence_parallel=True)] * 2


def test_several_engines_behind_one_address(folder: Path) -> None:
    with serving(folder, "--layout.dp", "2") as server:
        want = expected(folder, "def f(")
        engines = server.engines()
        assert len(engines) == 2
        assert [server.text("def f(") for _ in range(4)] == [want] * 4
        os.kill(engines[0], signal.SIGKILL)
        assert [server.text("def f(") for _ in range(4)] == [want] * 4, "the other one goes on"
        server.awaited("it is started again")
        end = time.monotonic() + 30
        while len(server.engines()) < 2:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert server.stop() == 0


def test_those_who_run_it_have_an_address_of_their_own(folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "admin"
    key.write_text("sesame-open-sesame\n")
    key.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ("--admin-port", str(port), "--admin-key-file", str(key), "--http.metrics", "false")
    with serving(folder, *options) as server:

        def ask(path: str, method: str = "GET", secret: str = "sesame-open-sesame") -> tuple[int, bytes]:
            asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
            asked.add_header("Authorization", f"Bearer {secret}")
            try:
                with urllib.request.urlopen(asked, timeout=10) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.read()

        for path in ("/metrics", "/engines", "/nothing"):
            assert ask(path, secret="open-sesame-sesame")[0] == 401
        assert ask("/metrics")[0] == 200 and b"lockstep_" in ask("/metrics")[1]
        assert ask("/engines/1/restart", "POST")[0] == 404 and ask("/v1/models")[0] == 404
        for path in ("/metrics", "/engines", "/drain", "/engines/0/restart"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{server.address}{path}", timeout=10)
        (engine,) = server.engines()
        assert ask("/engines/0/restart", "POST")[0] == 200
        server.awaited("it is started again")
        end = time.monotonic() + 30
        while not (told := json.loads(ask("/engines")[1])["engines"][0])["there"]:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert told["restarts"] == 1 and engine not in server.engines()
        assert ask("/drain", "POST")[0] == 200
        assert server.process.wait(20) == 0
