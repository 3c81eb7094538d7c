"""Bodies that ask for what cannot be: S1 to S5, S10, S38; those that are large are in ``costly``."""

from __future__ import annotations

import json
import random
from typing import Any

from serving_faults.house import House
from serving_faults.stage import Stage, together
from serving_faults.suite import Seen, case, must
from serving_faults.wire import JSON, Answer, Client, error_of

TEXT: dict[str, Any] = {"model": "tiny", "prompt": "tea", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "tea"}], "max_tokens": 2}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": TEXT,
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"model": "tiny", "input": "tea", "max_output_tokens": 2},
    "/v1/embeddings": {"model": "tiny", "input": "tea"},
    "/tokenize": {"prompt": "tea"},
    "/detokenize": {"tokens": [7, 8]},
}
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    2**64,
    10**30,
    10**400,
    1e300,
    -1e-320,
    "",
    "é😀",
    "\x00",
    "a" * 5000,
]
JUNK += [
    [],
    [[]],
    [None],
    {},
    {"a": []},
    -0.5,
    "null",
    [1, "a"],
    [[1], ["a"]],
    {"": ""},
    ["\ud800"],
    "../../etc/passwd",
]
JUNK += [
    {"type": "object"},
    {"$ref": "#"},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}},
]
LIKELY: list[Any] = [None, 1, 2, 0, 0.5, True, False, "a", ["a"], [7], [[7], [8, 9]], {"5": 1}, {"include_usage": True}]
FIELDS = (
    *("model", "prompt", "messages", "input", "tokens", "max_tokens", "n", "best_of", "beams", "temperature", "stream"),
    *("stop", "seed", "logprobs", "top_logprobs", "logit_bias", "min_tokens", "top_k", "top_p", "min_p", "typical_p"),
    *(
        "bad_words",
        "allowed_tokens",
        "banned_tokens",
        "stop_tokens",
        "stream_options",
        "include_stop",
        "echo",
        "suffix",
    ),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty", "early_stopping", "ignore_eos"),
    *(
        "tools",
        "tool_choice",
        "response_format",
        "functions",
        "function_call",
        "parallel_tool_calls",
        "user",
        "metadata",
    ),
    *(
        "guided_json",
        "guided_regex",
        "structured_outputs",
        "regex",
        "grammar",
        "choice",
        "json_schema",
        "chat_template",
    ),
    *(
        "chat_template_kwargs",
        "add_generation_prompt",
        "encoding_format",
        "dimensions",
        "max_completion_tokens",
        "text",
    ),
    *("max_output_tokens", "instructions", "previous_response_id", "reasoning", "truncation", "cache_salt", "priority"),
)
TYPES = ("text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "application/jsonp")
RAW: list[bytes] = [
    *(
        b"",
        b"{",
        b"[]",
        b"null",
        b'"a"',
        b"5",
        b"{}x",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"{'a': 1}",
        b'{"a": 1,}',
        b"\0" * 50,
    ),
    *(
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 01}',
        b'{"a": 0x1}',
        b'{"a": +1}',
    ),
    *(
        b'{"model": "\\ud800"}',
        b'{"prompt": "\\udc00\\ud800"}',
        b'{"a": "\\u12"}',
        b'{"a": "\x01"}',
        b'{"a": "\xc3\x28"}',
    ),
    *(b"[" * 10_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b'{"prompt":' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
    *(b'{"model": "tiny", "prompt": ' + b"9" * 10_000 + b"}", b'{"max_tokens": 1' + b"0" * 5000 + b"}"),
    *(b'{"model":"tiny","model":"x","prompt":"a"}', b"// a\n{}", b"{}" * 1000, b'{"a": 1e-999999999}'),
]


def _wild(draw: random.Random, depth: int = 0) -> Any:
    pick = draw.random()
    if pick < 0.4 and depth == 0:
        return draw.choice(LIKELY)
    if pick < 0.7 or depth > 3:
        return draw.choice(JUNK)
    if pick < 0.85:
        return [_wild(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    return {draw.choice(FIELDS): _wild(draw, depth + 1) for _ in range(draw.randint(0, 3))}


def _mutated(draw: random.Random, value: Any) -> Any:
    """The same with something in it exchanged."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice(list(value))
        return {**value, name: _mutated(draw, value[name])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        return [*value[:place], _mutated(draw, value[place]), *value[place + 1 :]]
    return _wild(draw)


def fuzzed(draw: random.Random, body: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    """A body that is wrong in some way, or not; and its headers."""
    if draw.random() < 0.08:
        return draw.choice(RAW), JSON
    value: Any = dict(body)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if draw.random() < 0.5:
            value = _mutated(draw, value)
        else:
            value = {**(value if isinstance(value, dict) else body), draw.choice(FIELDS): _wild(draw)}
        if not isinstance(value, dict):
            break
    data = bytearray(json.dumps(value).encode())
    if draw.random() < 0.1:
        for _ in range(draw.randint(1, 5)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    if draw.random() < 0.05:
        del data[draw.randrange(len(data)) :]
    return bytes(data), JSON if draw.random() < 0.97 else {"Content-Type": draw.choice(TYPES)}


def _ask(client: Client | None, house: House, path: str, data: bytes, headers: dict[str, str]) -> tuple[Client, Answer]:
    client = client or house.client()
    answer = client.ask("POST", path, data, headers)
    if answer.status == 0 or answer.header("connection") == "close":
        client.close()
        return house.client(), answer
    return client, answer


@case("S1 fuzzed bodies on every route that takes one", secure=True)
def fuzz(stage: Stage, seen: Seen) -> None:
    house, count = stage.plain(), 700 if stage.short else 6000
    with stage.watched(house, seen):
        documented = house.ask("GET", "/openapi.json").json()["paths"]
        paths = [path for path, methods in documented.items() if "post" in methods]
        must(set(paths) <= set(BODIES), f"no bodies for {set(paths) - set(BODIES)}")
        draw, counted = random.Random(11), dict[int, int]()
        before, client = house.answered(), None
        sent: dict[str, int] = dict.fromkeys(paths, 0)
        for number in range(count + len(RAW) * len(paths)):
            path = paths[number % len(paths)]
            data, headers = (
                fuzzed(draw, BODIES[path]) if number < count else (RAW[(number - count) // len(paths)], JSON)
            )
            client, answer = _ask(client, house, path, data, headers)
            sent[path] += 1
            must(200 <= answer.status < 500, f"{path} {data[:300]!r}: {answer.status} {answer.body[:300]!r}")
            must(answer.terminals() == 1, f"{path} {data[:200]!r}: ended {answer.terminals()} times")
            if answer.status != 200:
                must(answer.status in (400, 404), f"{path} {data[:200]!r}: {answer.status}")
                error_of(answer, (400, 404))
                seen.bodies.add(answer.body.decode())
                seen.inputs += 1
            counted[answer.status] = counted.get(answer.status, 0) + 1
        must(house.answered() - before >= sum(sent.values()), "requests were not counted")
        seen.note(f"{sum(sent.values())} bodies over {len(paths)} routes: {dict(sorted(counted.items()))}")


REFUSED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "S2": [
        *[("/v1/completions", {**TEXT, "prompt": p}) for p in ("", [], [[]], [""], ["a", ""], None, [[7], []])],
        *[("/v1/chat/completions", {**CHAT, "messages": m}) for m in ([], None, [{}], [{"role": "user"}])],
        ("/v1/chat/completions", {"model": "tiny"}),
        ("/v1/completions", {"model": "tiny"}),
        *[("/v1/embeddings", {"model": "tiny", "input": i}) for i in ("", [], [""], None)],
        ("/tokenize", {}),
    ],
    "S4": [
        *[("/v1/completions", {**TEXT, "n": v}) for v in (0, -1, 17, 10**9, 10**30, 1.5, "2", True)],
        *[("/v1/completions", {**TEXT, "max_tokens": v}) for v in (-1, 0, 10**9, 10**30, 1.5, "4", [4])],
        *[("/v1/completions", {**TEXT, "best_of": v}) for v in (0, 99, 10**12)],
        *[("/v1/completions", {**TEXT, "logprobs": v}) for v in (-1, 21, 10**12, 10**30)],
        *[("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": v}) for v in (-1, 21, 10**12)],
        *[("/v1/completions", {**TEXT, "stop": v}) for v in ("", [""], ["a"] * 17, "a" * 100_000, [["a"]], [5])],
        *[
            ("/v1/completions", {**TEXT, "logit_bias": v})
            for v in ({"-1": 1}, {"320": 1}, {"5": 101}, {"5": -1e9}, [1])
        ],
        ("/v1/completions", {**TEXT, "logit_bias": {str(i): 1 for i in range(50_000)}}),
        ("/v1/completions", {**TEXT, "prompt": ["a"] * 100_000}),
        ("/v1/completions", {**TEXT, "prompt": [[7]] * 100_000}),
        ("/v1/completions", {**TEXT, "beams": 10**6, "temperature": None}),
        ("/v1/completions", {**TEXT, "stop_tokens": [7] * 100_000}),
        ("/v1/completions", {**TEXT, "bad_words": ["a" * 900] * 3000}),
        *[("/v1/completions", {**TEXT, name: 10**30}) for name in ("seed", "top_k", "min_tokens")],
        *[("/v1/completions", {**TEXT, "temperature": v}) for v in (-1, 1e308, 10**400, "1", True)],
    ],
    "S5": [
        *[("/v1/completions", {**TEXT, "prompt": p}) for p in ([-1], [320], [2**31], [10**30], [[7], [320]], [7, -7])],
        *[("/v1/completions", {**TEXT, "prompt": p}) for p in ([True], [1.5], [7, "a"], [None], [[7, None]])],
        *[("/v1/embeddings", {"model": "tiny", "input": i}) for i in ([-1], [320], [[7], [10**20]])],
        *[("/detokenize", {"tokens": t}) for t in ([-1], [320], [2**40], [1.5])],
        *[("/v1/completions", {**TEXT, name: [320]}) for name in ("stop_tokens", "allowed_tokens", "banned_tokens")],
    ],
    "S38": [
        *[
            (path, {**body, name: value})
            for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT))
            for name in (
                "lora",
                "lora_path",
                "lora_name",
                "lora_request",
                "lora_adapter",
                "adapter",
                "adapter_path",
                "peft",
            )
            for value in ("../../etc/passwd", "/etc/passwd", "http://169.254.169.254/", {"path": "/tmp", "rank": 10**9})
        ],
    ],
}


def _refused(stage: Stage, seen: Seen, number: str) -> None:
    house = stage.plain()
    with stage.watched(house, seen):
        for path, body in REFUSED[number]:
            answer = house.ask("POST", path, body)
            must(answer.status == 400, f"{path} {json.dumps(body)[:200]}: {answer.status} {answer.body[:200]!r}")
            error_of(answer, 400)
            must(answer.seconds < 2.0, f"{path} {json.dumps(body)[:200]}: refused after {answer.seconds:.1f} s")
            seen.bodies.add(answer.body.decode())
            seen.inputs += 1
        seen.note(f"{len(REFUSED[number])} refused with 400")


@case("S2 nothing to continue")
def empty(stage: Stage, seen: Seen) -> None:
    _refused(stage, seen, "S2")


@case("S3 prompts that are too long, a hundred times")
def long(stage: Stage, seen: Seen) -> None:
    house = stage.plain()
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {**TEXT, "prompt": [7] * 300}),
        ("/v1/completions", {**TEXT, "prompt": "a b " * 5000}),
        ("/v1/completions", {**TEXT, "prompt": [7] * 250, "max_tokens": 7}),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "tea " * 5000}]}),
    ]
    for path, body in bodies * (
        25 if stage.short else 75
    ):  # the memory of its threads stays with the allocator: no more of it after a while
        house.ask("POST", path, body)
    for _ in range(3):
        house.ask("POST", "/v1/completions", {**TEXT, "prompt": [7] * 700_000})
    with stage.watched(house, seen):
        for number in range(100):
            path, body = bodies[number % len(bodies)]
            error = error_of(house.ask("POST", path, body), 400)
            must(error["code"] == "context_length_exceeded", f"{error}")
            must("n_prompt = " in error["message"] and "n_ctx = 256" in error["message"], f"{error}")
            seen.inputs += 1
        fits = house.ask("POST", "/v1/completions", {**TEXT, "prompt": [7] * 250, "max_tokens": 6})
        must(fits.status == 200, "what just fits is refused")
        huge = house.ask("POST", "/v1/completions", {**TEXT, "prompt": [7] * 700_000})
        error_of(huge, 400)
        seen.note(f"100 refused with both numbers, one of 700,000 tokens after {huge.seconds:.2f} s")


@case("S4 absurd counts and lists")
def absurd(stage: Stage, seen: Seen) -> None:
    _refused(stage, seen, "S4")


@case("S5 token ids that are none")
def tokens(stage: Stage, seen: Seen) -> None:
    _refused(stage, seen, "S5")


@case("S10 ids of requests: the same twice, somebody else's, cancelled", secure=True)
def ids(stage: Stage, seen: Seen) -> None:
    house = stage.keyed()
    key = {"Authorization": f"Bearer {house.key}"}
    with stage.watched(house, seen), house.slowly(0.005):
        named = {**key, "X-Request-Id": "the-same", "X-Correlation-Id": "the-same"}
        work = [lambda: house.ask("POST", "/v1/completions", {**TEXT, "max_tokens": 50, "seed": 5}, named)] * 4
        answers = [answer for answer in together(work) if isinstance(answer, Answer)]
        must([answer.status for answer in answers] == [200] * 4, "one of four with the same id failed")
        found = {answer.json()["id"] for answer in answers} | {answer.header("x-request-id") for answer in answers}
        must(len(found) == 8 and not any("the-same" in own for own in found), f"ids are not the server's own: {found}")
        id = answers[0].json()["id"]
        for name in ("request_id", "id", "response_id"):
            error_of(house.ask("POST", "/v1/completions", {**TEXT, name: id}), 400)
        for method, path in (
            ("POST", f"/v1/completions/{id}/cancel"),
            ("DELETE", f"/v1/completions/{id}"),
            ("GET", f"/v1/completions/{id}"),
            ("POST", f"/v1/chat/completions/{id}"),
            ("POST", "/v1/responses/resp_foreign/cancel"),
            ("GET", "/v1/responses/resp_foreign"),
            ("DELETE", "/v1/responses/resp_foreign"),
            ("POST", "/abort_request"),
        ):
            error_of(house.ask(method, path), (400, 404, 405))
            seen.inputs += 1
        seen.note("four with one id answered each for itself; no cancel of another's")


@case("S38 fields of LoRA", secure=True)
def lora(stage: Stage, seen: Seen) -> None:
    _refused(stage, seen, "S38")
    for name in ("tiny:lora", "tiny/../x", "../tiny", "lora/../../etc", "/etc/passwd", "tiny\x00"):
        error_of(stage.plain().ask("POST", "/v1/completions", {**TEXT, "model": name}), 404)
        seen.inputs += 1
