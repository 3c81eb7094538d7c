"""Forms and the engine: the same tokens however requests are packed, preempted and laid out; failures alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from served import write_model
from test_llm import config_of

from infer import LLM, EngineConfig, SamplingParams
from infer.constrain.forms import Form
from infer.constraint import Constraint
from parallel.mesh import Layout, Mesh

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "of": {"type": "array", "items": {"enum": ["a", 1]}}},
    "required": ["name", "of"],
}
FORMS = [
    Constraint("json", json.dumps(SCHEMA)),
    Constraint("regex", "([ab]{2,9} ){1,4}é"),
    Constraint("choice", '["yes", "yesterday", "no"]'),
    Constraint("grammar", 'start: item+\nitem: "(" /[0-9]+/ ")" | "[" item "]"'),
]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.9, "seed": 11, "top_p": 0.95},
    {"temperature": 1.2, "seed": 12, "n": 3, "logprobs": 1},
    {"presence_penalty": 0.5, "ignore_eos": True},
    {"temperature": 0.7, "seed": 13, "best_of": 3, "n": 2, "min_tokens": 6},
    {"beams": 3, "n": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("constrain") / "model")


def work(count: int = 20) -> tuple[list[list[int]], list[SamplingParams]]:
    """Every kind with every form; between them, plain requests."""
    prompts, params = [], []
    for place in range(count):
        given = {"max_tokens": 12 + place, **KINDS[place % len(KINDS)]}
        prompts.append([3 + (7 * place + step) % 250 for step in range(4 + 3 * (place % 7))])
        params.append(SamplingParams(**given, constraint=FORMS[place % len(FORMS)]))
    for place in range(0, count, 4):
        plain = {"max_tokens": 20, "temperature": 0.8 * (place % 8 > 0), "seed": place}
        prompts.append([9 + place, 30, 31, 32])
        params.append(SamplingParams(**plain))
    return prompts, params


def told(
    folder: str | Path, mesh: Mesh | None = None, config: EngineConfig | None = None, count: int = 20
) -> list[Any]:
    llm = LLM(folder, mesh=mesh, config=config)
    found = [
        [[list(choice.tokens), choice.text, choice.finish_reason] for choice in own.choices] + [own.error]
        for own in llm.generate(*work(count))
    ]
    llm.engine.scheduler.check()
    if config is not None and config.cache.memory_gib < 0.001:
        assert llm.engine.stats.recomputed + llm.engine.stats.swaps > 0, "nothing was preempted"
    return json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def want(folder: Path) -> list[Any]:
    return told(folder)


def test_nothing_failed_and_forms_were_kept(want: list[Any]) -> None:
    assert [own[-1] for own in want] == [""] * len(want)
    ended = 0
    for own, params in zip(want, work()[1], strict=True):
        if params.constraint is not None:
            ended += sum(end == "stop" for *_, end in own[:-1])
    assert ended >= 10


@pytest.mark.parametrize(
    "options",
    [
        {"page": 3, "chunk": 2, "budget": 9},
        {"page": 3, "few": 72, "swap": True},
        {"page": 3, "few": 72},
        {"overlap": True, "running": 24, "chunk": 3},
        {"overlap": True, "page": 3, "few": 72, "chunk": 5, "prefix": True},
    ],
)
def test_the_same_tokens_however_they_are_computed(folder: Path, want: list[Any], options: dict[str, Any]) -> None:
    assert told(folder, config=config_of(**options)) == want


def check_told(folder: str, layouts: list[dict[str, Any]]) -> list[Any]:
    return [
        told(folder, Mesh.build(Layout(**{"sequence_parallel": False, **degrees})), config_of(budget=50), 5)
        for degrees in layouts
    ]


def test_the_same_tokens_at_every_layout(ranks: Ranks, folder: Path) -> None:
    want = told(folder, count=5)
    layouts = [{"tp": 2}, {"pp": 2}, {"dp": 2}]
    for rank in ranks.run(check_told, world=2, folder=str(folder), layouts=layouts):
        for degrees, found in zip(layouts, rank, strict=True):
            assert found == want, degrees


def test_samples_are_those_of_single_requests(folder: Path) -> None:
    """A choice of n has the tokens that the same request has when it is alone; so has a beam search."""
    llm = LLM(folder, config=config_of())
    alone = LLM(folder, config=config_of())
    prompts, params = work()
    for own, found in zip(zip(prompts, params, strict=True), llm.generate(prompts, params), strict=True):
        (one,) = alone.generate([own[0]], own[1])
        assert [choice.tokens for choice in one.choices] == [choice.tokens for choice in found.choices]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_form_that_fails_ends_its_request_alone(
    folder: Path, want: list[Any], monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """Its matcher gives up after some tokens; beside it everybody gets the same tokens."""
    broken = Constraint("regex", "x{100}")
    prompts, params = work()
    llm = LLM(folder, config=config_of(overlap=overlap))
    forms = llm.engine.forms
    assert forms is not None
    fill = forms.fill

    def failing(own: Sequence[Form], holding: Sequence[bool]) -> Any:
        for form in own:
            if form.constraint == broken and form.seen == 7:
                forms.advance(form, [1])
        return fill(own, holding)

    monkeypatch.setattr(forms, "fill", failing)
    bomb = SamplingParams(max_tokens=100, constraint=broken)
    found = llm.generate([[5, 6, 7], *prompts, [8, 9]], [bomb, *params, bomb])
    for own in (found[0], found[-1]):
        assert own.finish_reason == "error" and "form of the completion cannot be kept" in own.error
        assert own.text == "x" * 7
    others = [[list(choice.tokens) for choice in own.choices] for own in found[1:-1]]
    seeded = [place for place, own in enumerate(params) if own.seed is not None or own.temperature == 0]
    assert [others[place] for place in seeded] == [[choice[0] for choice in want[place][:-1]] for place in seeded]
    llm.engine.scheduler.check()
    assert not llm.engine.busy and llm.engine.stats.used == (0,)


def test_a_matcher_that_raises_nothing_but_says_error_is_tried_afresh(folder: Path) -> None:
    """What many requests have found out of the words of a form is shared; if that is too much, one goes on alone."""
    llm = LLM(folder, config=config_of())
    params = SamplingParams(max_tokens=40, constraint=FORMS[1], temperature=1.0, seed=2)
    (before,) = llm.generate([[5, 6]], params)
    forms = llm.engine.forms
    assert forms is not None
    spoiled = forms.begin(FORMS[1])
    spoiled.matcher.consume_token(1)
    spoiled.compiled.matcher = spoiled.matcher  # everybody begins with an error now
    assert spoiled.matcher.is_error()
    (after,) = llm.generate([[5, 6]], params)
    assert after.choices[0].tokens == before.choices[0].tokens and after.finish_reason == "stop"


def test_rows_without_a_form_do_no_work_for_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(folder, config=config_of())
    forms = llm.engine.forms
    assert forms is not None
    for name in ("advance", "fill", "begin", "problems"):
        monkeypatch.setattr(forms, name, None)
    assert llm.generate([[5, 6]], SamplingParams(max_tokens=5))[0].error == ""
    assert forms._tokenizer is None
