"""Reasoning at the beginning of an answer: told apart from it however the text is cut, and counted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import HERMES, THINK, Played, tokenizer
from test_server_tools import CALL, USER, WEATHER, accepts

from infer.constraint import Constraint
from infer.server.calls.formats import FORMATS
from infer.server.calls.grammar import answer_after
from infer.server.calls.piece import Piece, joined
from infer.server.calls.thinking import Thinking
from infer.server.config import ServerConfig

OPENS = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
TRAPS = [
    "<think>",
    "</think>",
    "<",
    "</",
    "<thi",
    "nk>",
    " ",
    "\n",
    "a",
    "bc",
    "<tool_call>",
    "</tool_call>",
    '{"name":"f"}',
]


def parts(text: str, cuts: list[int], *, opened: bool, calls: bool) -> tuple[list[Piece], int]:
    rest = FORMATS["hermes"].parser(("f",), eager=False) if calls else None
    parser = Thinking(opened=opened, rest=rest)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    told = [piece for start, end in itertools.pairwise(places) for piece in parser.push(text[start:end])]
    return joined([*told, *parser.flush()]), parser.length


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("calls", [False, True])
def test_the_cut_changes_nothing(opened: bool, calls: bool) -> None:
    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.sampled_from(TRAPS), max_size=10).map("".join), st.lists(st.integers(0, 99), max_size=8))
    def check(text: str, cuts: list[int]) -> None:
        whole, length = parts(text, [], opened=opened, calls=calls)
        for other in (cuts, list(range(len(text)))):
            assert parts(text, other, opened=opened, calls=calls) == (whole, length)
        begins = text.lstrip().startswith("<think>")
        inner, closed, after = (text if opened else text.lstrip()[7:]).partition("</think>")
        thought = "".join(piece.text for piece in whole if piece.kind == "reasoning")
        if not opened and not begins:
            assert (thought, length) == ("", 0)
            assert calls or "".join(piece.text for piece in whole) == text
            return
        assert thought == (inner.strip() if closed else inner.lstrip().rstrip())
        assert length == len(text) - len(after)
        if not calls:
            assert "".join(piece.text for piece in whole if piece.kind == "content") == after.lstrip()

    check()


@pytest.mark.parametrize(
    "text", ["<think>" + " " * 500_000, " " * 500_000, "<think>" + "</thin" * 80_000, "<" * 500_000]
)
def test_hostile_texts_take_linear_time(text: str) -> None:
    assert parts(text, list(range(0, len(text), 10)), opened=False, calls=True)[0] is not None


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    with Played(tmp_path_factory.mktemp("played") / "model", THINK) as found:
        yield found


def post(played: Played, **more: Any) -> dict[str, Any]:
    return httpx2.post(played.url + "/v1/chat/completions", json={"model": "tiny", "messages": USER, **more}).json()


@pytest.mark.parametrize("step", [1, 3, 100])
def test_reasoning_is_no_content(played: Played, step: int) -> None:
    played.says("<think>\nSo: é\n</think>\n\nTea.", step=step)
    whole = post(played)
    message = whole["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Tea.", "So: é")
    count = len(tokenizer().encode("<think>\nSo: é\n</think>", add_special_tokens=False).ids)
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": count}
    with openai.OpenAI(base_url=played.url + "/v1", api_key="none", max_retries=0) as client:
        options: dict[str, Any] = {"stream_options": {"include_usage": True}}
        with client.chat.completions.stream(model="tiny", messages=USER, **options) as stream:
            chunks = [event.chunk for event in stream if event.type == "chunk"]
            final = stream.get_final_completion()
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "So: é"
    assert final.choices[0].message.content == "Tea." and final.usage is not None
    assert final.usage.completion_tokens_details and final.usage.completion_tokens_details.reasoning_tokens == count


def test_an_answer_without_reasoning_or_with_nothing_else(played: Played) -> None:
    played.says("Tea </think>", "<think>so")
    first, second = (choice["message"] for choice in post(played, n=2, seed=1)["choices"])
    assert first["content"] == "Tea </think>" and "reasoning_content" not in first
    assert (second["content"], second["reasoning_content"]) == ("", "so")


def test_a_template_may_open_the_tag_or_close_it(tmp_path: Path) -> None:
    with Played(tmp_path, OPENS) as played:
        played.says("So.\n</think>\nTea.")
        found = post(played)
        assert found["choices"][0]["message"]["reasoning_content"] == "So."
        marks = len(tokenizer().encode("So.\n</think>", add_special_tokens=False).ids)
        assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == marks
        assert post(played, add_generation_prompt=False)["choices"][0]["message"]["content"] == "So.\n</think>\nTea."
    with Played(tmp_path, OPENS.replace("<think>\n", "<think>\n\n</think>\n\n")) as played:
        played.says("<think> is a tag")
        assert post(played)["choices"][0]["message"]["content"] == "<think> is a tag"
    with Played(tmp_path, OPENS, ServerConfig(reasoning_parser="none")) as played:
        played.says("So.\n</think>\nTea.")
        found = post(played)
        assert found["choices"][0]["message"]["content"] == "So.\n</think>\nTea."
        assert "completion_tokens_details" not in found["usage"]


def test_calls_follow_reasoning_also_where_they_are_forced(tmp_path: Path) -> None:
    with Played(tmp_path, HERMES + "<think>") as played:
        text = f"I need it. <tool_call> it is.</think>\n\n{CALL}"
        for choice in ("auto", "required"):
            played.says(text)
            (found,) = post(played, tools=[WEATHER], tool_choice=choice)["choices"]
            assert found["message"]["reasoning_content"] == "I need it. <tool_call> it is."
            assert json.loads(found["message"]["tool_calls"][0]["function"]["arguments"]) == {"place": "Köln"}
            assert (found["finish_reason"], found["message"]["content"]) == ("tool_calls", None)
        form = played.engine.asked[0][1].constraint
        assert form is not None and accepts(form.text, f"I need it.</think>\n\n{CALL}") and not accepts(form.text, CALL)


def test_a_form_is_that_of_what_comes_after_the_reasoning() -> None:
    for kind, text, right, wrong in (
        ("json", '{"type": "integer"}', "12", "x"),
        ("choice", '["a", "b"]', "b", "c"),
        ("regex", r"a/b+|\d\/", "a/bb", "a"),
    ):
        for state, before in (("opened", "so"), ("possible", "<think>so")):
            form = answer_after(Constraint(kind, text), state, tokenizer().token_to_id)  # type: ignore[arg-type]
            assert form is not None
            assert accepts(form.text, f"{before}</think>\n\n{right}")
            assert not accepts(form.text, f"{before}</think>\n\n{wrong}")
            assert accepts(form.text, right) == (state == "possible")
    own = Constraint("grammar", 'start: "a"')
    assert answer_after(own, "opened", tokenizer().token_to_id) is None and answer_after(own, "none", len) == own


def test_a_schema_is_no_part_of_a_grammar(played: Played) -> None:
    for text, fine in (('{"type": "integer"}', True), ('{"type": "integer"}\nANY: /x/', False), ("[" * 99_999, False)):
        played.says("12")
        answer = post(played, structured_outputs={"json": text})
        assert ("choices" in answer) == fine
        assert fine or answer["error"]["param"] == "structured_outputs"


def test_reasoning_goes_back_to_the_template(played: Played) -> None:
    with_it = {"role": "assistant", "content": "x", "reasoning_content": "because"}
    assert "choices" in post(played, messages=[*USER, with_it, *USER])
    error = post(played, messages=[{**with_it, "role": "user"}])["error"]
    assert error["param"] == "messages.reasoning_content"
