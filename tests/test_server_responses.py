"""/v1/responses as the unmodified `openai` client uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from scripted import HERMES, Played
from test_server_tools import CALL, WEATHER, accepts

FLAT = {"type": "function", **WEATHER["function"]}
TEXT = f"<think>Hm.</think>\nI look.\n{CALL}\n{CALL}"


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    template = HERMES.replace("{{ m.content }}", "{{ m.reasoning_content or '' }}{{ m.content }}{{ m.tool_call_id }}|")
    with Played(tmp_path_factory.mktemp("played") / "model", template + "{# <think> #}") as found:
        yield found


@pytest.fixture
def client(played: Played) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=played.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


def told(played: Played, **more: Any) -> list[dict[str, Any]]:
    """The events of a stream, as they are sent."""
    answer = httpx2.post(played.url + "/v1/responses", json={"model": "tiny", "input": "x", "stream": True, **more})
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_a_text(played: Played, client: openai.OpenAI) -> None:
    played.says("Tea. é")
    found = client.responses.create(
        model="tiny",
        input="what?",
        instructions="be kind",
        metadata={"a": "b"},
        temperature=0.5,
        top_p=0.9,
        store=False,
    )
    assert (found.output_text, found.status, found.metadata) == ("Tea. é", "completed", {"a": "b"})
    assert found.usage and (found.usage.output_tokens, found.usage.input_tokens) == (7, len(played.engine.asked[0][0]))
    prompt, params = played.engine.asked[0]
    assert prompt == "[system] be kind|[user] what?|" and (params.temperature, params.top_p) == (0.5, 0.9)
    value = httpx2.post(played.url + "/v1/responses", json={"model": "tiny", "input": "x"}).json()
    Response.model_validate(value, strict=True)
    assert (value["store"], value["error"], value["instructions"]) == (False, None, None)


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_items_are_those_of_the_stream(played: Played, client: openai.OpenAI, step: int) -> None:
    played.says(TEXT, step=step)
    options: dict[str, Any] = {"model": "tiny", "input": "x", "tools": [FLAT]}
    whole = client.responses.create(**options)
    with client.responses.stream(**options) as stream:
        events = list(stream)
        final = stream.get_final_response()
    for found in (whole, final):
        thought, message, first, second = found.output
        assert thought.type == "reasoning" and thought.content and thought.content[0].text == "Hm."
        assert message.type == "message" and found.output_text == "I look."
        for call in (first, second):
            assert call.type == "function_call" and json.loads(call.arguments) == {"place": "Köln"}
        assert first.type == second.type == "function_call" and first.call_id != second.call_id
        assert found.usage and found.usage.output_tokens_details.reasoning_tokens == 5
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_every_event_has_the_shape_of_openai(played: Played) -> None:
    played.says(TEXT)
    events = told(played, tools=[FLAT])
    shape = pydantic.TypeAdapter(ResponseStreamEvent)
    for event in events:
        assert type(shape.validate_python(event)).__name__.startswith("Response")
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert [kind for kind in kinds if not kind.endswith(".delta")][4:] == [
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.done", "output_item.done") * 2,
        "completed",
    ]
    last = events[-1]["response"]
    assert [e["item"] for e in events if e["type"] == "response.output_item.done"] == last["output"]
    for place, item in enumerate(last["output"]):
        text = "".join(e["delta"] for e in events if e["type"].endswith(".delta") and e["output_index"] == place)
        assert text == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


def test_an_answer_that_is_cut_is_incomplete(played: Played, client: openai.OpenAI) -> None:
    played.says("I say", end="length")
    found = client.responses.create(model="tiny", input="x", max_output_tokens=5)
    assert found.status == "incomplete" and found.incomplete_details
    assert found.incomplete_details.reason == "max_output_tokens" and found.output_text == "I say"
    assert played.engine.asked[0][1].max_tokens == 5
    last = told(played)[-1]
    assert (last["type"], last["response"]["output"][0]["status"]) == ("response.incomplete", "incomplete")
    played.says("I", end="error")
    last = told(played)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["message"] == "the model failed on this prompt"


def test_a_stream_that_is_aborted_fails(played: Played) -> None:
    script = played.says("I say nothing")
    script.gate.clear()
    body = {"model": "tiny", "input": "x", "stream": True}
    with httpx2.stream("POST", played.url + "/v1/responses", json=body) as answer:
        lines = answer.iter_lines()
        while "output_text.delta" not in next(lines):
            pass
        loop = played._server.servers[0].get_loop()
        loop.call_soon_threadsafe(played.app.state.abort)
        rest = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    script.gate.set()
    assert [event["type"] for event in rest][-1] == "response.failed"
    assert rest[-1]["response"]["output"][0]["content"][0]["text"] == "I"


def test_items_of_an_answer_are_the_input_of_the_next(played: Played, client: openai.OpenAI) -> None:
    played.says(TEXT)
    first = client.responses.create(model="tiny", input="x", tools=[FLAT])  # type: ignore[list-item]
    played.says("21 degrees")
    calls = [item for item in first.output if item.type == "function_call"]
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
        *[item.model_dump(exclude_none=True) for item in first.output],
        *[{"type": "function_call_output", "call_id": call.call_id, "output": "21"} for call in calls],
    ]
    found = client.responses.create(model="tiny", input=items, tools=[FLAT])  # type: ignore[list-item]
    assert found.output_text == "21 degrees"
    made = '<tool_call>{"place": "Köln"}</tool_call>'
    results = "".join(f"[tool] 21{call.call_id}|" for call in calls)
    assert played.engine.asked[0][0].endswith(f"[user] x|[assistant] Hm.I look.|{made * 2}{results}")


class Answer(pydantic.BaseModel):
    """What is wanted."""

    place: str
    degrees: int


def test_a_form_is_kept_by_the_engine_and_parsed_by_the_client(played: Played, client: openai.OpenAI) -> None:
    text = '{"place": "Köln", "degrees": 21}'
    played.says(text)
    parsed = client.responses.parse(model="tiny", input="x", text_format=Answer).output_parsed
    assert parsed == Answer(place="Köln", degrees=21)
    form = played.engine.asked[0][1].constraint
    assert form is not None and form.kind == "grammar"
    assert accepts(form.text, text) and accepts(form.text, f"<think>so</think>{text}") and not accepts(form.text, "x")
    with client.responses.stream(model="tiny", input="x", text_format=Answer) as stream:
        assert stream.get_final_response().output_parsed == parsed
    played.says(CALL)
    both = client.responses.create(
        model="tiny",
        input="x",
        tools=[FLAT],  # type: ignore[list-item]
        text={"format": {"type": "json_object"}},
    )
    form = played.engine.asked[0][1].constraint
    assert [item.type for item in both.output] == ["function_call"] and form is not None
    assert accepts(form.text, CALL) and accepts(form.text, '{"a": 1}') and not accepts(form.text, "x")


def test_a_function_that_must_be_called(played: Played, client: openai.OpenAI) -> None:
    played.says(CALL)
    choice = {"type": "function", "name": "get_weather"}
    found = client.responses.create(model="tiny", input="x", tools=[FLAT], tool_choice=choice)  # type: ignore[list-item,arg-type]
    assert [item.type for item in found.output] == ["function_call"]
    form = played.engine.asked[0][1].constraint
    assert form is not None and accepts(form.text, CALL) and not accepts(form.text, "text")


def texts_of(played: Played, path: str, stream: bool, body: dict[str, Any]) -> tuple[str, str, list[Any]]:
    """What is told as text, how it ended, and its calls."""
    answer = httpx2.post(f"{played.url}/v1/{path}", json={"model": "tiny", "stream": stream, **body})
    events = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: {")]
    if path == "responses":
        value = events[-1]["response"] if stream else answer.json()
        text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
        items = [item for item in value["output"] if item["type"] != "reasoning"]
        text += "".join(item["content"][0]["text"] for item in items if item["type"] == "message")
        return text, value["status"], [item["arguments"] for item in items if item["type"] == "function_call"]
    if stream:
        (*_, end), deltas = events, [event["choices"][0]["delta"] for event in events]
        calls = [call for delta in deltas for call in delta.get("tool_calls", []) if "id" in call]
        return "".join(delta.get("content") or "" for delta in deltas), end["choices"][0]["finish_reason"], calls
    choice = answer.json()["choices"][0]
    return choice["message"]["content"] or "", choice["finish_reason"], choice["message"].get("tool_calls", [])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["responses", "chat/completions"])
def test_a_required_call_that_is_cut_leaves_no_text(played: Played, path: str, stream: bool) -> None:
    given: dict[str, Any] = {"input": "x", "tools": [FLAT]}
    if path != "responses":
        given = {"messages": [{"role": "user", "content": "x"}], "tools": [WEATHER]}
    for cut, count in ((0, 0), (1, 0), (4, 0), (12, 0), (20, 0), (40, 0), (len(CALL) - 3, 1), (len(CALL), 1)):
        played.says(CALL[:cut], end="length")
        text, end, calls = texts_of(played, path, stream, {**given, "tool_choice": "required"})
        assert (text, end, len(calls)) == ("", "incomplete" if path == "responses" else "length", count), cut
    for start in ("<th", f"{CALL}\n<tool_"):
        played.says(start, end="length")
        assert texts_of(played, path, stream, {**given, "tool_choice": "required"})[0] == ""
    played.says(CALL[:20], end="length")  # where text may be, it may have been text
    assert CALL[:20] in texts_of(played, path, stream, given)[0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    *[({name: value}, name) for name, value in (("store", True), ("background", True), ("previous_response_id", "a"))],
    *[({name: value}, name) for name, value in (("conversation", "a"), ("truncation", "auto"), ("top_logprobs", 3))],
    *[({name: value}, name) for name, value in (("include", ["reasoning.encrypted_content"]), ("prompt", {"id": "x"}))],
    *[({name: value}, name) for name, value in (("reasoning", {"effort": "low"}), ("nonsense", 1), ("input", []))],
    *[({name: value}, name) for name, value in (("input", ""), ("max_output_tokens", 0), ("stream", 1))],
    ({"input": [{"type": "web_search_call"}]}, "input.type"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input.content.type",
    ),
    ({"input": [{"type": "function_call_output", "call_id": "a", "output": "1"}]}, "input.call_id"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "["}]}, "input.arguments"),
    ({"tools": [{"type": "web_search", "name": "x"}]}, "tools.type"),
    ({"tools": [{**FLAT, "parameters": {"type": "array"}}]}, "tools.parameters"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"metadata": {"a": 1}}, "metadata.a"),
]


@pytest.mark.parametrize("place", range(len(REFUSED)))
def test_what_is_not_honoured_is_refused_by_name(played: Played, place: int) -> None:
    more, param = REFUSED[place]
    answer = httpx2.post(played.url + "/v1/responses", json={"model": "tiny", "input": "x", **more})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_the_document_has_the_route(played: Played, tmp_path: Path) -> None:
    document = httpx2.get(played.url + "/openapi.json").json()
    assert "ResponsesBody" in document["components"]["schemas"]
    assert "text/event-stream" in document["paths"]["/v1/responses"]["post"]["responses"]["200"]["content"]
