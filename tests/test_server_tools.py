"""Calls of functions: read off any text however it is cut, asked for by grammars, and told as OpenAI does."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import HERMES, Played, tokenizer
from served import Served, load, write_model

from infer.chat import ChatTemplate
from infer.server.calls.formats import FORMATS, PLAIN, Format
from infer.server.calls.piece import Piece, joined
from infer.server.config import ServerConfig
from infer.server.dialect import Dialect

ALL = {**{name: FORMATS[name] for name in FORMATS}, "plain": PLAIN}
NAMES = ("f", "get_weather")
TRAPS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<", "<tool", "[TOOL", "\n", " "),
    *('{"name": "f", ', '"arguments": {', '"parameters": {', '"name"', '"f"', '{"a": 1}', '"', "\\", "\\u00e9", "é"),
    *(":", "}", "}}", "{", "[", "]", ", ", ";", "(", ")", "=", "'", "a", "1", "-0.5e3", "true", "null", "f"),
    *('{"name": "f", "arguments": {"a": [1, "}"]}}', '{"name": "get_weather", "parameters": {}}'),
    *("get_weather", "[f(a=1), get_weather(b='x')]", '<tool_call>\n{"name": "f"}\n</tool_call>'),
    *('<|python_tag|>{"name": "f"}', '[TOOL_CALLS] [{"name": "f"}]', '[TOOL_CALLS]f[ARGS]{"a": 1}', '[{"name": "f"}]'),
]


def parts(form: Format, text: str, cuts: list[int], *, eager: bool = False) -> list[Piece]:
    parser = form.parser(NAMES, eager=eager)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    told = [piece for start, end in itertools.pairwise(places) for piece in parser.push(text[start:end])]
    return joined([*told, *parser.flush()])


@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("eager", [False, True])
def test_the_cut_changes_nothing_and_nothing_is_lost(name: str, eager: bool) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.sampled_from(TRAPS), max_size=12).map("".join), st.lists(st.integers(0, 400), max_size=12))
    def check(text: str, cuts: list[int]) -> None:
        whole = parts(ALL[name], text, [], eager=eager)
        assert parts(ALL[name], text, cuts, eager=eager) == whole
        assert parts(ALL[name], text, list(range(len(text))), eager=eager) == whole
        calls = [piece for piece in whole if piece.kind == "call"]
        assert [piece.call for piece in calls] == list(range(len(calls))) and {piece.text for piece in calls} <= set(
            NAMES
        )
        said = "".join(piece.text for piece in whole if piece.kind == "content")
        if not calls:
            assert said == text
        if not eager:
            for place in range(len(calls)):
                given = "".join(piece.text for piece in whole if (piece.kind, piece.call) == ("arguments", place))
                assert isinstance(json.loads(given), dict)
        if name != "pythonic":  # its arguments are written anew
            kept = said + "".join(piece.text for piece in whole if piece.kind == "arguments")
            assert all(text.count(char) >= kept.count(char) for char in set(kept) - set("{}"))

    check()


CASES: list[tuple[str, str, list[tuple[str, str]], str]] = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', [("f", '{"a": 1}')], ""),
    ("hermes", 'Hm.\n<tool_call>{"arguments": {"a": "}"}, "name": "f"}</tool_call>\n<tool_call>{"name":"f"}'
     "</tool_call> ok", [("f", '{"a": "}"}'), ("f", "{}")], "Hm.ok"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}', [("f", "{}")], ""),
    ("llama", '{"name": "f", "parameters": {"a": "b"}}', [("f", '{"a": "b"}')], ""),
    ("llama", '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"a": 2}}',
     [("f", "{}"), ("f", '{"a": 2}')], ""),
    ("llama", ' {"type": "function", "name": "f", "parameters": {}}', [("f", "{}")], ""),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}, {"name": "get_weather", "arguments": {}}]',
     [("f", '{"a": [1]}'), ("get_weather", "{}")], ""),
    ("mistral", 'I look. [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather{"b": 2}',
     [("f", '{"a": 1}'), ("get_weather", '{"b": 2}')], "I look."),
    ("pythonic", "[f(a=1, b=[True, None, {'k': -1.5}]), get_weather(c=\"x\\n\")]",
     [("f", '{"a": 1, "b": [true, null, {"k": -1.5}]}'), ("get_weather", '{"c": "x\\n"}')], ""),
    ("plain", '[{"name": "f", "arguments": {}}]', [("f", "{}")], ""),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(CASES)))
def test_calls_of_each_family(place: int) -> None:
    name, text, want, said = CASES[place]
    for eager in (False, True):
        told = parts(ALL[name], text, list(range(0, 400, 3)), eager=eager)
        assert [piece.text for piece in told if piece.kind == "call"] == [own for own, _ in want]
        for call, (_, arguments) in enumerate(want):
            assert "".join(p.text for p in told if (p.kind, p.call) == ("arguments", call)) == arguments
        assert "".join(piece.text for piece in told if piece.kind == "content") == said


MALFORMED = [
    ("hermes", '<tool_call>{"name": "g", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a":}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}, "more": 1}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "name": "f"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cut'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call>'),
    ("hermes", "a <tool_call> b </tool_call> <tool_"),
    ("llama", '{"name": "g", "parameters": {}}'),
    ("llama", 'Look: {"name": "f", "parameters": {}}'),
    ("llama", '<|python_tag|>print("hi")'),
    ("mistral", "[TOOL_CALLS] []"),
    ("mistral", '[TOOL_CALLS]g[ARGS]{"a": 1}'),
    *[("pythonic", text) for text in ("[f(1)]", "[f(a=open('x'))]", "[f(a=1)", "[f(a=__import__('os'))]", "[1] x")],
    *[("pythonic", text) for text in ("[f(a=1, a=2)]", "[f(a='x' 'y')]", "[f(**{})]", "[f(a=" + "[" * 99 + "]" * 99)],
]


@pytest.mark.parametrize("place", range(len(MALFORMED)))
def test_what_is_no_call_is_content_all_of_it(place: int) -> None:
    name, text = MALFORMED[place]
    assert parts(ALL[name], text, list(range(len(text)))) == [Piece("content", text)]


def test_hostile_texts_take_linear_time() -> None:
    seeds = [
        *(
            "<tool_call>",
            '<tool_call>{"a":',
            '<tool_call>{"name":"f","arguments":{"a":"',
            "<tool_call",
            "<",
            "[TOOL_CALLS]",
        ),
        *("[TOOL_CALLS]f", "{", "[", "[f(a='", "[f(", "\\", " ", '{"name":"f","parameters":{"a":['),
    ]
    for form, seed in itertools.product((FORMATS[name] for name in FORMATS), seeds):
        for text in (seed * (300_000 // len(seed)), seed + "1," * 20_000):
            began = time.process_time()
            parser, told = form.parser(NAMES, eager=False), []
            for at in range(0, len(text), 64):
                told += parser.push(text[at : at + 64])
            assert "".join(piece.text for piece in joined([*told, *parser.flush()])) == text
            assert time.process_time() - began < 3


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Köln"}}\n</tool_call>'
USER: list[Any] = [{"role": "user", "content": "tea"}]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    with Played(tmp_path_factory.mktemp("played") / "model", HERMES) as found:
        yield found


@pytest.fixture
def client(played: Played) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=played.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.mark.parametrize("step", [1, 4, 1000])
def test_the_client_puts_a_stream_together_to_the_whole_answer(
    played: Played, client: openai.OpenAI, step: int
) -> None:
    played.says(f"I look.\n{CALL}\n{CALL}", step=step)
    whole = client.chat.completions.create(model="tiny", messages=USER, tools=[WEATHER]).choices[0]
    with client.chat.completions.stream(model="tiny", messages=USER, tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        told = stream.get_final_completion().choices[0]
    for choice in (whole, told):
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
        calls = choice.message.tool_calls or []
        assert [json.loads(call.function.arguments) for call in calls] == [{"place": "Köln"}] * 2
        assert {call.function.name for call in calls} == {"get_weather"} and len({call.id for call in calls}) == 2
    prompt, params = played.engine.asked[-1]
    assert prompt.startswith(json.dumps(WEATHER) + "\nUse <tool_call>.[user] tea") and params.constraint is None


def test_text_that_is_no_call_stays_and_none_is_read_without_tools(played: Played, client: openai.OpenAI) -> None:
    for text, tools, choice in (
        (CALL, None, None),
        (CALL, [WEATHER], "none"),
        (CALL.replace("get", "got"), [WEATHER], "auto"),
    ):
        played.says(text)
        given = {"tools": tools, **({"tool_choice": choice} if choice else {})} if tools else {}
        found = client.chat.completions.create(model="tiny", messages=USER, **given).choices[0]  # type: ignore[arg-type]
        assert (found.message.content, found.message.tool_calls, found.finish_reason) == (text, None, "stop")
    assert "Use <tool_call>" in played.engine.asked[-1][0]


def test_several_choices_and_an_answer_that_is_cut(played: Played, client: openai.OpenAI) -> None:
    played.says(CALL, "none", end="length")
    for stream in (False, True):
        options: dict[str, Any] = {"model": "tiny", "messages": USER, "tools": [WEATHER], "n": 2, "seed": 1}
        if stream:
            with client.chat.completions.stream(**options) as events:
                chunks = [event.chunk for event in events if event.type == "chunk"]
            found = {i: [c for chunk in chunks for c in chunk.choices if c.index == i] for i in (0, 1)}
            assert [c.finish_reason for c in found[0] if c.finish_reason] == ["length"]
            assert "".join(c.delta.content or "" for c in found[1]) == "none"
            calls = [call for c in found[0] for call in c.delta.tool_calls or []]
            assert "".join((call.function and call.function.arguments) or "" for call in calls) == '{"place": "Köln"}'
        else:
            first, second = client.chat.completions.create(**options).choices
            assert (first.finish_reason, len(first.message.tool_calls or [])) == ("length", 1)
            assert (second.message.content, second.message.tool_calls) == ("none", None)


def test_calls_and_their_results_go_back_into_the_conversation(played: Played, client: openai.OpenAI) -> None:
    played.says("21 degrees")
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"place": "Köln"}'}}
    messages: list[Any] = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "c1", "content": "21"}
    found = client.chat.completions.create(model="tiny", messages=[*messages, result], tools=[WEATHER])
    assert found.choices[0].message.content == "21 degrees"
    assert '[assistant] <tool_call>{"place": "Köln"}</tool_call>[tool] 21' in played.engine.asked[0][0]
    bad = json.loads(json.dumps(call).replace('"arguments": "{', '"arguments": "['))
    deep = {**call, "function": {"name": "f", "arguments": '{"a":' * 5000 + "1" + "}" * 5000}}
    for wrong, param in (
        ([*messages, {**result, "tool_call_id": "c2"}], "messages.tool_call_id"),
        ([result, *messages], "messages.tool_call_id"),
        ([*messages, {"role": "tool", "content": "21"}], "messages.tool_call_id"),
        ([*USER, {"role": "assistant", "tool_calls": [bad]}], "messages.tool_calls"),
        ([*USER, {"role": "assistant", "tool_calls": [deep]}], "messages.tool_calls"),
        ([*USER, {"role": "user", "content": "x", "tool_calls": [call]}], "messages.tool_calls"),
        ([*USER, {"role": "assistant"}], "messages.content"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=wrong)
        assert caught.value.param == param


def accepts(text: str, answer: str) -> bool:
    """Whether llguidance, which keeps the form in the engine, lets the answer be."""
    llguidance = pytest.importorskip("llguidance")
    made = tokenizer()
    kept = llguidance.LLTokenizer(made.to_str(), n_vocab=made.get_vocab_size(), eos_token=made.token_to_id("</s>"))
    matcher = llguidance.LLMatcher(kept, text, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = made.encode(answer, add_special_tokens=False).ids
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_what_must_be_a_call_is_made_one_by_a_grammar(played: Played, client: openai.OpenAI) -> None:
    other = {"type": "function", "function": {"name": "stop"}}
    named = {"type": "function", "function": {"name": "stop"}}
    stop, wrong = CALL.replace("get_weather", "stop").replace('"place": "Köln"', ""), CALL.replace('"Köln"', "5")
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    for more, right, never in (
        ({"tool_choice": "required"}, [CALL, stop, f"{CALL}\n{stop}"], ["text", wrong, "", f"hm {CALL}"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [CALL, stop], [f"{CALL}\n{stop}"]),
        ({"tool_choice": named}, [stop], [CALL, "text", f"{stop}\n{stop}"]),
        ({"tools": [strict, other]}, ["text", CALL, f"hm {CALL}\n{stop} ok"], [wrong, "<tool_call>x</tool_call>"]),
        ({"parallel_tool_calls": False}, ["text", wrong, f"hm {CALL} ok"], [f"{CALL}{CALL}"]),
        ({"tool_choice": "auto"}, [], []),
    ):
        played.says(right[0] if right else CALL)
        options: dict[str, Any] = {"model": "tiny", "messages": USER, "tools": [WEATHER, other], **more}
        found = client.chat.completions.create(**options).choices[0]
        form = played.engine.asked[0][1].constraint
        assert (form is None) == (not right)
        if right[0:] and right[0] != "text":
            assert found.finish_reason == "tool_calls" and len(found.message.tool_calls or []) == 1
        assert "strict" not in played.engine.asked[0][0]
        if form is not None:
            assert form.kind == "grammar"
            assert all(accepts(form.text, answer) for answer in right)
            assert not any(accepts(form.text, answer) for answer in never)


def test_arguments_of_forced_calls_come_as_they_are_made(played: Played, client: openai.OpenAI) -> None:
    for choice, pieces in (("required", 10), ("auto", 1)):
        played.says(CALL)
        given: dict[str, Any] = {"tools": [WEATHER], "tool_choice": choice, "stream": True}
        told = list(client.chat.completions.create(model="tiny", messages=USER, **given))
        deltas = [call for chunk in told for c in chunk.choices for call in c.delta.tool_calls or []]
        assert sum(bool(call.function and call.function.arguments) for call in deltas) >= pieces
        assert (sum(bool(call.function and call.function.arguments) for call in deltas) == 1) == (choice == "auto")
    played.says(CALL[:-30], end="length")
    found = client.chat.completions.create(
        model="tiny", messages=USER, tools=[WEATHER], tool_choice="required"
    ).choices[0]
    assert found.finish_reason == "length" and found.message.tool_calls
    assert '{"place": "Köln"}'.startswith(found.message.tool_calls[0].function.arguments)


def test_marks_that_are_special_tokens_are_seen(tmp_path: Path) -> None:
    template = HERMES.replace("<tool_call>", "[TOOL_CALLS]")
    text = '[TOOL_CALLS] [{"name": "get_weather", "arguments": {}}]'
    with Played(tmp_path, template) as played:
        played.says(text)
        body = {"model": "tiny", "messages": USER, "tools": [WEATHER]}
        message = httpx2.post(played.url + "/v1/chat/completions", json=body).json()["choices"][0]["message"]
        assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": "{}"}
        assert len(message["tool_calls"][0]["id"]) == 9 and message["tool_calls"][0]["id"].isalnum()


def test_tools_that_cannot_be_honoured_are_refused(played: Played, tmp_path: Path) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": USER, "tools": [WEATHER]}
    bare = {"type": "function", "function": {"name": "f"}}
    array = {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
    played.says("x").refuses = ["constraint: the schema cannot be kept"]
    told = httpx2.post(played.url + "/v1/chat/completions", json={**body, "tool_choice": "required"})
    assert (told.status_code, told.json()["error"]["param"]) == (400, "tools")
    played.engine.refuses = []
    for more, param in (
        ({"tools": [bare, bare]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.function.name"),
        ({"tools": [array]}, "tools.function.parameters"),
        ({"tools": [bare] * 129}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
    ):
        answer = httpx2.post(played.url + "/v1/chat/completions", json={**body, **more})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    for template, config, more, param in (
        ("{{ messages[0].content }}", ServerConfig(), {}, "tools"),
        ("{{ messages[0].content }}{{ tools }}", ServerConfig(), {}, "tool_choice"),
        ("{{ messages[0].content }}{{ tools }}", ServerConfig(), {"tool_choice": "required"}, None),
        (
            "{{ messages[0].content }}{{ tools }}",
            ServerConfig(tool_parser="pythonic"),
            {"parallel_tool_calls": False},
            "tools",
        ),
    ):
        with Played(tmp_path, template, config) as other:
            other.says('[{"name": "get_weather", "arguments": {"place": ""}}]')
            answer = httpx2.post(other.url + "/v1/chat/completions", json={**body, **more})
            assert answer.json().get("error", {"param": None})["param"] == param, answer.text
            if param is None:
                assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"
    assert any("tool_parser = 'x'" in problem for problem in ServerConfig(tool_parser="x").problems())


def test_the_template_says_how_calls_are_written(tmp_path: Path) -> None:
    for text, name in (
        ("tools <tool_call>", "hermes"),
        ("tools <|python_tag|>", "llama"),
        ("tools [TOOL_CALLS]", "mistral"),
        ("tools <tool_call><function=", None),
        ("", None),
    ):
        (tmp_path / "chat_template.jinja").write_text(text)
        found = Dialect.of(ChatTemplate(tmp_path), "auto", "auto")
        assert found.form is (None if name is None else FORMATS[name]) and found.tools == bool(text)


def test_a_real_model_that_must_call_calls(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = write_model(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ tools[0].type }}<tool_call>"}))
    short = {"type": "string", "maxLength": 8}
    parameters = {
        "type": "object",
        "properties": {"place": short},
        "required": ["place"],
        "additionalProperties": False,
    }
    tool: Any = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    with Served(load(folder)) as served, openai.OpenAI(base_url=served.url + "/v1", api_key="none") as client:
        for seed, choice in itertools.product(range(2), ("required", {**tool, "function": {"name": "get_weather"}})):
            options: dict[str, Any] = {
                "tools": [tool],
                "tool_choice": choice,
                "parallel_tool_calls": False,
                "seed": seed,
            }
            found = client.chat.completions.create(model="tiny", messages=USER, **options).choices[0]
            assert found.finish_reason == "tool_calls" and found.message.tool_calls
            (call,) = found.message.tool_calls
            assert list(json.loads(call.function.arguments)) == ["place"]
            with client.chat.completions.stream(model="tiny", messages=USER, **options) as stream:
                told = stream.get_final_completion().choices[0]
            assert told.message.tool_calls and told.message.tool_calls[0].function.arguments == call.function.arguments
        wrong = {**tool["function"], "parameters": {"type": "object", "properties": {"a": {"type": "strange"}}}}
        with pytest.raises(openai.BadRequestError) as caught:
            options = {"tools": [{"type": "function", "function": wrong}], "tool_choice": "required"}
            client.chat.completions.create(model="tiny", messages=USER, **options)
        assert caught.value.param == "tools"
