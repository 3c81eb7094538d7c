"""What a wrong body is told: where, what is allowed, what was given, and what to write instead; each once."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import torch
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from served import Served, load, write_model

from infer.server import foreign
from infer.server.bodies import ChatBody, CompletionBody, EmbeddingBody, TokenizeBody, parse
from infer.server.body import Body
from infer.server.errors import ApiError, of_problems
from infer.server.response_body import ResponsesBody

TEXT: dict[str, Any] = {"model": "tiny", "prompt": "tea"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "tea"}]}
ITEMS: dict[str, Any] = {"model": "tiny", "input": "tea"}
BASES: dict[type[Body], dict[str, Any]] = {
    CompletionBody: TEXT,
    ChatBody: CHAT,
    ResponsesBody: ITEMS,
    EmbeddingBody: ITEMS,
    TokenizeBody: {},
}


def refusal(kind: type[Body], more: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(kind, {**BASES[kind], **more})
    assert caught.value.status == 400
    return caught.value


TOLD: list[tuple[type[Body], dict[str, Any], str]] = [
    (CompletionBody, {"stop": 5}, "stop: must be a text or a list, not 5"),
    (CompletionBody, {"stop": [5]}, "stop[0]: must be a text, not 5"),
    (CompletionBody, {"stop": ""}, "stop: must not be empty"),
    (CompletionBody, {"stop": ["a"] * 17}, "stop: must have at most 16 entries, not 17"),
    (CompletionBody, {"stop": "a" * 2000}, "stop: must have at most 1024 characters, not 2000"),
    (CompletionBody, {"n": "2"}, 'n: must be a whole number, not "2"'),
    (CompletionBody, {"n": "2" * 90}, "n: must be a whole number, not a text of 90 characters"),
    (CompletionBody, {"temperature": True}, "temperature: must be a number, not true"),
    (CompletionBody, {"stream": None, "echo": []}, "echo: must be true or false, not an empty list"),
    (CompletionBody, {"early_stopping": {}}, 'early_stopping: must be true or false or "never", not an empty object'),
    (CompletionBody, {"logit_bias": {"5": "a"}}, 'logit_bias.5: must be a number, not "a"'),
    (CompletionBody, {"allowed_tokens": [1, -1]}, "allowed_tokens[1]: must be at least 0, not -1"),
    (CompletionBody, {"bad_words": ["a", [7, "x"]]}, 'bad_words[1][1]: must be a whole number, not "x"'),
    (ChatBody, {"tool_choice": "so"}, 'tool_choice: must be "none", "auto" or "required" or an object, not "so"'),
    (ChatBody, {"tool_choice": {"type": "function", "function": {"name": 5}}}, "tool_choice.function.name: must be a "
     "text, not 5"),
    (ChatBody, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name: must be 1 to "
     '64 letters, digits, _ and -, not "a b"'),
    (ChatBody, {"messages": []}, "messages: must not be empty"),
    (ChatBody, {"messages": [{"content": "x"}]}, "messages[0].role: is required"),
    (ResponsesBody, {"input": [{"type": "image"}]}, 'input[0].type: must be "message" or "function_call" or '
     '"function_call_output" or "reasoning", not "image"'),
    (ResponsesBody, {"input": [{"role": "user"}]}, "input[0].content: is required"),
    (ChatBody, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     'messages[0].content[0].type: must be "text", not "image_url"'),
    (ChatBody, {"chat_template_kwargs": {"a": {}}}, "chat_template_kwargs.a: must be a text or true or false or a "
     "number, not an empty object"),
    (EmbeddingBody, {"encoding_format": "x"}, 'encoding_format: must be "float" or "base64", not "x"'),
    # fields of other servers
    (CompletionBody, {"stop_token_ids": [1]}, "stop_token_ids: not supported; write stop_tokens"),
    (CompletionBody, {"include_stop_str_in_output": True}, "include_stop_str_in_output: not supported; write "
     "include_stop"),
    (ChatBody, {"guided_json": {}}, 'guided_json: not supported; write structured_outputs: {"json": ...}'),
    (ResponsesBody, {"guided_json": {}}, "guided_json: not supported; write text.format"),
    (CompletionBody, {"use_beam_search": True}, "use_beam_search: not supported; write beams, the number of beams"),
    (CompletionBody, {"max_completion_tokens": 5}, "max_completion_tokens: not supported; write max_tokens"),
    (ResponsesBody, {"max_tokens": 5}, "max_tokens: not supported; write max_output_tokens"),
    (ResponsesBody, {"seed": 5}, "seed: not supported on this route; completions and chat completions have it"),
    (ChatBody, {"add_special_tokens": True}, "add_special_tokens: not supported on this route; completions and "
     "tokenize have it"),
    (CompletionBody, {"truncate_prompt_tokens": 5}, "truncate_prompt_tokens: not supported"),
    (EmbeddingBody, {"truncate_prompt_tokens": 5}, "truncate_prompt_tokens: not supported; write truncate"),
    (CompletionBody, {"priority": 1}, "priority: not supported"),
    (TokenizeBody, {"content": "x"}, "content: not supported; write prompt"),
    (CompletionBody, {"temprature": 1}, "temprature: this server knows no such field; is temperature meant?"),
    (ChatBody, {"messages": [{"role": "user", "content": "x", "00": 1, "f": 1}]}, "messages[0].00: this server knows no"
     " such field; messages[0].f: this server knows no such field"),
    (CompletionBody, {"zzz": None}, "zzz: this server knows no such field"),
    (CompletionBody, dict.fromkeys("abcdefg"), "".join(f"{name}: this server knows no such field; " for name in "abcde")
     + "and more"),
    # fields of OpenAI's
    (CompletionBody, {"store": True}, "store: not supported: nothing is stored; leave it out, or give false"),
    (ChatBody, {"functions": [{}]}, "functions: not supported; write tools"),
    (ChatBody, {"verbosity": "low"}, "verbosity: not supported; leave it out"),
    (ResponsesBody, {"text": {"verbosity": "low"}}, "text.verbosity: not supported"),
    (CompletionBody, {"store": True, "n": "a", "stop_token_ids": [1]}, "store: not supported: nothing is stored; leave "
     'it out, or give false; n: must be a whole number, not "a"; stop_token_ids: not supported; write stop_tokens'),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(TOLD)))
def test_a_wrong_field_is_told_plainly(place: int) -> None:
    kind, more, message = TOLD[place]
    assert refusal(kind, more).message == message


def test_what_is_written_instead_is_a_field_of_some_body() -> None:
    fields = {name for kind in BASES for name in kind.model_fields} | {"tokens"}
    for name, texts in foreign._OURS.items():
        found = [re.match(r"\w+", text) for text in texts]
        assert all(own is not None and own[0] in fields for own in found), name
    for name in foreign._ABSENT:  # what we have after all must not be said to be absent
        assert name not in CompletionBody.model_fields and name not in ChatBody.model_fields


JUNK: list[Any] = [None, True, -1, 2**63, 10**30, 10**400, 1e300, -0.5, "", "é", "x" * 2000, [], [[]], [None], {}]
JUNK += [{"a": []}, {"type": "zz"}, {"type": 5}, ["a"] * 20, [5] * 20, {"json": 3}, {"type": "json_schema"}]
RICH: dict[type[Body], dict[str, Any]] = {
    CompletionBody: {**TEXT, "stop": ["a"], "bad_words": ["a", [5]], "logit_bias": {"5": 1.0}, "early_stopping": True,
                     "structured_outputs": {"choice": ["a"]}, "stream": True, "stream_options": {}, "top_k": 3},
    ChatBody: {**CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
               "tool_choice": {"type": "function", "function": {"name": "f"}}, "chat_template_kwargs": {"a": 1},
               "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
    ResponsesBody: {"model": "tiny", "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]},
                    {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                    {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}]}],
                    "tool_choice": {"type": "function", "name": "f"}, "text": {"format": {"type": "text"}}},
}  # fmt: skip

INNER = ["Input", "input should", "valid", "parse", "tagged", "union", "constrained", "Body", "value_error", "list["]
INNER += ["NamedTool", "FlatChoice", "MessageItem", "another value"]


def spoiled(draw: random.Random, value: Any) -> Any:
    """The same with one thing in it that is wrong."""
    value = json.loads(json.dumps(value))
    at = value
    while True:
        if not at or (isinstance(at, dict) and draw.random() < 0.1):
            if isinstance(at, dict):
                at["zzz"] = 1
            return value
        key = draw.choice(list(at)) if isinstance(at, dict) else draw.randrange(len(at))
        if not isinstance(at[key], dict | list) or draw.random() < 0.35:
            at[key] = draw.choice(JUNK)
            return value
        at = at[key]


def test_no_words_of_pydantic_and_nothing_twice() -> None:
    draw = random.Random(4)
    seen = 0
    for _ in range(4000):
        kind = draw.choice(list(RICH))
        try:
            parse(kind, spoiled(draw, RICH[kind]))
        except ApiError as error:
            seen += 1
            message = error.message
            assert not any(word in message or word in (error.param or "") for word in INNER), message
            lines = message.split("; ")
            assert len(set(lines)) == len(lines), message
            assert error.param and error.param.split(".")[0] in message, message
    assert seen > 2000


def test_problems_of_the_engine_are_told_once_and_by_the_names_of_the_client() -> None:
    error = of_problems(["constraint: no", "top_k = -3: no", "top_k = -3: no"], {"constraint": "response_format"})
    assert (error.message, error.param) == ("response_format: no; top_k = -3: no", "response_format")


OPENAI: dict[type[Body], Any] = {
    CompletionBody: completion_create_params.CompletionCreateParamsBase,
    ChatBody: chat_create_params.CompletionCreateParamsBase,
    ResponsesBody: response_create_params.ResponseCreateParamsBase,
    EmbeddingBody: embedding_create_params.EmbeddingCreateParams,
}


@pytest.mark.parametrize("kind", list(OPENAI))
def test_null_of_any_field_of_openai_asks_for_nothing(kind: type[Body]) -> None:
    names = set(OPENAI[kind].__annotations__) - {"stream"}
    assert len(names) >= 5
    parse(kind, {**dict.fromkeys(names), **BASES[kind]})
    refusal(kind, {"zzz": None})


def test_null_in_parts_that_clients_send_back() -> None:
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}", "namespace": None, "caller": None}
    tool = {"type": "function", "name": "f", "defer_loading": None, "allowed_callers": None}
    more: dict[str, Any] = {
        "input": [call],
        "tools": [tool],
        "text": {"verbosity": None, "format": None},
        "reasoning": {"effort": None},
    }
    parse(ResponsesBody, {**ITEMS, **more})
    told = "text.format: must be an object, not an empty list"
    assert refusal(ResponsesBody, {"text": {"format": []}}).message == told
    for wrong in ({"input": [{**call, "namespace": "x"}]}, {"tools": [{**tool, "defer_loading": True}]}):
        assert refusal(ResponsesBody, wrong).code == "unknown_parameter"


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    torch.set_num_threads(1)
    with (
        Served(load(write_model(tmp_path_factory.mktemp("served") / "model"))) as served,
        httpx2.Client(base_url=served.url, timeout=20) as found,
    ):
        yield found


def test_what_is_no_body_no_model_and_no_route_is_told_with_the_way_out(http: httpx2.Client) -> None:
    for data, reason in (
        ("", "it is empty"),
        ("{", "it ends too early"),
        ("{'a': 1}", "object keys must be strings (byte 1)"),
        ('{"a": 1,}', "trailing comma in object (byte 8)"),
        ('{"a": 1e999}', "number out of range"),
        (b'{"a": "\xff"}', "it is not UTF-8"),
    ):
        answer = http.post("/v1/completions", content=data, headers={"content-type": "application/json"})
        told = answer.json()["error"]["message"]
        assert (answer.status_code, told) == (400, f"the body is not JSON: {reason}")
    for answer in (http.post("/v1/completions", json={**TEXT, "model": "x"}), http.get("/v1/models/x")):
        assert answer.status_code == 404 and 'this server has "tiny", "also"' in answer.json()["error"]["message"]
    assert "/openapi.json" in http.get("/completions").json()["error"]["message"]
    assert http.get("/v1/completions").json()["error"]["message"].endswith(": POST")


def test_minus_one_is_all_tokens_and_any_seed(http: httpx2.Client) -> None:
    params = parse(CompletionBody, {**TEXT, "top_k": -1, "seed": -1}).params(4, None)
    assert (params.top_k, params.seed) == (0, None)
    assert parse(CompletionBody, {**TEXT, "top_k": 3, "seed": 5}).params(4, None).seed == 5

    def text(**more: Any) -> str:
        answer = http.post("/v1/completions", json={**TEXT, "max_tokens": 24, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    assert text(seed=5, top_k=-1) == text(seed=5) != text(seed=5, top_k=2)
    assert len({text(seed=-1) for _ in range(4)}) > 1
    error = http.post("/v1/completions", json={**TEXT, "top_k": -2}).json()["error"]
    assert error["param"] == "top_k" and "0: all tokens" in error["message"]


def test_the_field_that_was_given_is_the_one_that_is_named(http: httpx2.Client) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        error = http.post("/v1/chat/completions", json={**CHAT, name: 0}).json()["error"]
        assert (error["param"], error["message"]) == (name, f"{name}: must be at least 1")


def test_choices_that_would_be_the_same_are_refused_with_what_to_do(http: httpx2.Client) -> None:
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        for name in ("n", "best_of"):
            answer = http.post(path, json={**body, name: 2, "temperature": 0})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, name)
            assert "would be the same" in error["message"] and "higher temperature" in error["message"]
    assert http.post("/v1/completions", json={**TEXT, "n": 2, "beams": 2, "temperature": 0}).status_code == 200
