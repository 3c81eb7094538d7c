"""Forms behind the server: the openai client's own fields, hostile forms, and what they cost."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx2
import openai
import pytest
import torch
from pydantic import BaseModel, Field
from served import Served, load, wait_for, write_model
from tokenizers import Tokenizer

from infer.constrain.checker import Checker
from infer.constraint import Constraint
from infer.server.config import ServerConfig

pytest.importorskip("llguidance")


class Place(BaseModel):
    name: str = Field(max_length=6)
    kind: Literal["town", "river"]


class Trip(BaseModel):
    to: list[Place] = Field(max_length=2)
    days: int = Field(ge=1, le=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with Served(load(folder), ServerConfig(form_mib=256)) as found:
        yield found
        assert not found.errors


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "where"}], "max_tokens": 180}


def test_parse_of_a_pydantic_model(client: openai.OpenAI) -> None:
    done = [
        client.chat.completions.parse(**CHAT, response_format=Trip, seed=seed, temperature=0.8) for seed in range(6)
    ]
    trips = [one.choices[0].message.parsed for one in done]
    assert all(isinstance(trip, Trip) and 1 <= trip.days <= 30 for trip in trips)
    assert {one.choices[0].finish_reason for one in done} == {"stop"} and len({one.id for one in done}) == 6


def test_json_schema_and_json_object_streamed_and_not(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["é", 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    formats: list[Any] = [
        {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}},
        {"type": "json_object"},
        {"type": "text"},
    ]
    for form in formats:
        bias = {"logit_bias": {"95": 20}} if form["type"] == "json_object" else {}
        given = {**CHAT, "response_format": form, "seed": 3, "temperature": 0.5, **bias, "max_tokens": 40}
        whole = client.chat.completions.create(**given).choices[0]
        parts = [part.choices[0] for part in client.chat.completions.create(**given, stream=True)]
        text = "".join(part.delta.content or "" for part in parts)
        assert text == whole.message.content and parts[-1].finish_reason == whole.finish_reason
        if form["type"] != "text":
            assert isinstance(json.loads(text), dict) and whole.finish_reason == "stop"


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_structured_outputs(client: openai.OpenAI, route: str) -> None:
    def written(**outputs: Any) -> str:
        extra = {"structured_outputs": outputs}
        if route == "chat":
            return client.chat.completions.create(**CHAT, extra_body=extra).choices[0].message.content or ""
        given = {"model": "tiny", "prompt": "where", "max_tokens": 60}
        return client.completions.create(**given, extra_body=extra).choices[0].text

    assert written(choice=["north", "south"]) in ("north", "south")
    assert re.fullmatch("[a-c]{4}", written(regex="[a-c]{4}"))
    assert json.loads(written(json={"enum": [1, "two"]})) in (1, "two")
    assert json.loads(written(json='{"const": "text"}')) == "text"
    assert re.fullmatch("a(b|c)d", written(grammar='start: "a" x "d"\nx: "b" | "c"'))


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema belongs to"),
    ({"response_format": {"type": "xml"}}, "response_format.type", ""),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}}, "response_format", ""),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}, "", "name"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
        "response_format",
        "Unimplemented keys",
    ),
    ({"structured_outputs": {}}, "structured_outputs", "give one of"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "give one of"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "not supported"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", ""),
    ({"structured_outputs": {"json": 3}}, "structured_outputs", ""),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "one of",
    ),
]


@pytest.mark.parametrize("place", range(len(WRONG)))
def test_what_is_wrong_is_named(served: Served, place: int) -> None:
    given, param, says = WRONG[place]
    answer = httpx2.post(served.url + "/v1/completions", json={"model": "tiny", "prompt": "a", **given})
    error = answer.json()["error"]
    assert answer.status_code == 400 and (error["param"] or "").startswith(param) and says in error["message"], error


BOMBS: dict[str, dict[str, Any]] = {
    "(a{1000}){1000}": {"regex": "(a{1000}){1000}"},
    "multipleOf": {"json": {"type": "integer", "multipleOf": 999983}},
    "5,000 properties": {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}},
    "26 at once": {"grammar": "start: X\nX: " + " & ".join(f"/.*{chr(97 + i)}.*/" for i in range(26))},
    "nested groups": {"regex": "(" * 50000 + "a" + ")" * 50000},
    "nested rules": {"grammar": "start: " + "(" * 50000 + '"a"' + ")" * 50000},
    "all of any": {"json": {"allOf": [{"anyOf": [{"minLength": 10 * i + j} for j in range(8)]} for i in range(8)]}},
    "long text": {"regex": "a" * 250000},
    "enum": {"json": {"enum": [f"x{i}" for i in range(15000)]}},
    "doubling": {
        "json": {
            "$defs": {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(24)} | {"a24": {}},
            "$ref": "#/$defs/a0",
        }
    },
    "(a?){5000}a{5000}": {"regex": "(a?){5000}a{5000}"},
    "(x+x+)+y": {"regex": "(x+x+)+y"},
}


def test_hostile_forms_harm_nobody(served: Served) -> None:
    """Each is answered within a second or so, 400 or 200; meanwhile the event loop answers at once."""
    worst = 0.0

    async def every() -> None:
        async with httpx2.AsyncClient(base_url=served.url, timeout=30) as client:
            nonlocal worst
            for outputs in BOMBS.values():
                body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "structured_outputs": outputs}
                began = time.monotonic()
                asking = asyncio.create_task(client.post("/v1/completions", json=body))
                while not asking.done():
                    asked = time.monotonic()
                    assert (await client.get("/health/live")).status_code == 200
                    worst = max(worst, time.monotonic() - asked)
                    await asyncio.sleep(0.02)
                answer = asking.result()
                assert answer.status_code in (200, 400), answer.text
                assert time.monotonic() - began < 3.0, outputs  # the bound is 1 s; the machine may be busy

    asyncio.run(every())
    assert worst < 0.5
    assert served.app.state.server.forms.starts >= 2  # some were killed


def small() -> Tokenizer:
    from tokenizers import decoders, models, pre_tokenizers

    words = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    made.add_special_tokens(["</s>"])
    made.decoder = decoders.ByteLevel()
    return made


def tried(checker: Checker, kind: Any, text: str) -> str:
    return asyncio.run(checker.problem(Constraint(kind, text)))


def test_what_takes_too_long_or_too_much_is_killed() -> None:
    checker = Checker(small(), 257, seconds=0.5, memory=64 << 20)

    assert tried(checker, "regex", "a") == "" and checker.starts == 1
    child = checker.pid
    assert child is not None
    costly = tried(checker, "json", '{"type": "integer", "multipleOf": 999983}')
    assert any(reason in costly for reason in ("too long", "more than", "too much memory")), costly
    assert "memory" in tried(checker, "regex", "(a{1000}){1000}") or checker.starts > 1
    assert tried(checker, "regex", "b") == ""
    os.kill(checker.pid or 0, signal.SIGKILL)
    while checker.pid is not None:
        time.sleep(0.01)
    assert tried(checker, "regex", "c") == "" and checker.pid != child
    before, starts = time.monotonic(), checker.starts
    assert tried(checker, "json", '{"type": "integer", "multipleOf": 999983}')  # remembered
    assert time.monotonic() - before < 0.1 and checker.starts == starts
    last = checker.pid
    del checker
    gc.collect()
    wait_for(lambda: not os.path.exists(f"/proc/{last}"))


def test_what_is_remembered_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    checker = Checker(small(), 257, kept_bytes=20_000)

    async def every() -> None:
        for place in range(400):
            assert await checker.problem(Constraint("json", json.dumps({"const": place}))) == ""
            assert checker.kept <= 20_000 and len(checker._known) <= 100

    asyncio.run(every())
    pid = checker.pid
    with open(f"/proc/{pid}/statm") as file:
        assert int(file.read().split()[1]) * 4096 < 200 << 20
    assert os.readlink(f"/proc/{pid}/fd/2") == "/dev/null" and len(os.listdir(f"/proc/{pid}/fd")) <= 4
    assert not os.listdir(tmp_path)
    checker.close()
