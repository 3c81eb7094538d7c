"""Sampling parameters: everything that cannot be honoured is named, all at once, with the field and its value."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from infer.params import BOUNDS, SamplingParams

NAN, INF = float("nan"), float("inf")


def problems(vocabulary: int | None = 100, ends: tuple[int, ...] = (0,), text: bool = True, **given: Any) -> list[str]:
    return list(SamplingParams(**given).problems(vocabulary=vocabulary, ends=ends, text=text))


def test_defaults_are_fine_and_greedy() -> None:
    params = SamplingParams()
    assert list(params.problems()) == [] and list(params.problems(vocabulary=5, ends=(1,), text=False)) == []
    assert (params.max_tokens, params.temperature, params.ignore_eos) == (128, 0.0, False)
    assert params.samples == 1


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.9},
        {"temperature": 1, "top_k": 10**9, "top_p": 1.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 1.3},
        {
            "logit_bias": {99: -100.0, 0: 100},
            "allowed_tokens": (1, 2),
            "banned_tokens": [1],
            "bad_words": ((2, 1), "x"),
        },
        {"seed": 2**64 - 1, "temperature": 1.0, "n": 2, "best_of": 3},
        {"beams": 4, "n": 4, "length_penalty": 0.6, "early_stopping": "never"},
        {"stop": ["\n"], "stop_tokens": (5,), "min_tokens": 128, "logprobs": 100, "prompt_logprobs": 0},
        {"logits_processors": (print,), "logprobs_of": "processed", "include_stop": True},
    ],
)
def test_sensible_values_are_accepted(given: dict[str, Any]) -> None:
    assert problems(**given) == []


WRONG = {
    "max_tokens": [0, -1, 1.5, True, "8", None, INF],
    "min_tokens": [-1, 0.5],
    "temperature": [-0.1, NAN, INF, 101, "hot", None, 1e-5],
    "top_k": [-1, 1.0, True],
    "top_p": [0, 0.0, -0.5, 1.01, NAN],
    "min_p": [-0.01, 1.5, NAN],
    "typical_p": [0, 2, NAN],
    "presence_penalty": [-2.1, 3, NAN],
    "frequency_penalty": [2.1, NAN],
    "repetition_penalty": [0, -1, INF, NAN],
    "logit_bias": [{100: 1.0}, {-1: 1.0}, {1: NAN}, {1: 101}, {"a": 1.0}, [(1, 1.0)], {1: True}],
    "allowed_tokens": [(100,), (-1,), "ab", (1.5,), (True,)],
    "banned_tokens": [(100,), "a", 7],
    "bad_words": [((100, 1),), ("",), (" ",), ((),), "word", (5,)],
    "seed": [-1, 2**64, 1.0, True],
    "stop": ["text", ("",), ("a", 5)],
    "stop_tokens": [(100,), (-5,), 5],
    "include_stop": [1, None],
    "ignore_eos": ["yes"],
    "skip_special_tokens": [None],
    "n": [0, 1.0],
    "best_of": [0],
    "beams": [0, True],
    "length_penalty": [NAN],
    "early_stopping": ["sometimes", 1, None],
    "logprobs": [-1, True, 101],
    "prompt_logprobs": [-1, 101],
    "logprobs_of": ["cooked", None],
    "logits_processors": [(1,), print],
    "constraint": ["a*", ("regex", "a")],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG for value in WRONG[field]])
def test_a_wrong_value_is_named_with_its_field(field: str, value: Any) -> None:
    found = problems(**{field: value})
    assert len(found) == 1 and found[0].startswith(field), found
    if field not in ("logit_bias", "allowed_tokens", "banned_tokens", "bad_words", "stop_tokens"):
        assert repr(value) in found[0] or f" {value}" in found[0]


def test_every_field_has_wrong_values_and_a_line_of_documentation() -> None:
    fields = dataclasses.fields(SamplingParams)
    assert {field.name for field in fields} == set(WRONG)
    assert {bound.field for bound in BOUNDS} < set(WRONG)
    assert all(field.metadata["doc"] for field in fields)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens = 9: more than max_tokens = 8"),
        ({"temperature": 1.0, "n": 3, "best_of": 2}, "best_of = 2: fewer than n = 3"),
        ({"n": 2}, "n = 2: at temperature = 0 every completion would be the same"),
        ({"best_of": 2}, "best_of = 2: at temperature = 0"),
        ({"beams": 2, "temperature": 0.5}, "temperature = 0.5: beam search (beams = 2) draws nothing at random"),
        ({"beams": 2, "top_p": 0.5}, "top_p = 0.5: beam search"),
        ({"beams": 2, "seed": 1}, "seed = 1: beam search"),
        ({"beams": 2, "best_of": 2}, "best_of = 2: beam search"),
        ({"beams": 2, "n": 3}, "n = 3: more than beams = 2"),
        ({"beams": 2, "logprobs_of": "processed"}, "logprobs_of = 'processed': beam search"),
        ({"length_penalty": 2.0}, "length_penalty = 2.0: only beam search has it"),
        ({"early_stopping": True}, "early_stopping = True: only beam search has it"),
        ({"allowed_tokens": ()}, "together leave no token"),
        ({"allowed_tokens": (1, 2), "banned_tokens": (1,), "bad_words": ((2,), (3, 4))}, "together leave no token"),
        ({"banned_tokens": tuple(range(100))}, "together leave no token"),
        ({"allowed_tokens": (0, 7), "stop_tokens": (7,), "min_tokens": 1}, "every token that is allowed would stop"),
    ],
)
def test_contradictions_are_named(given: dict[str, Any], says: str) -> None:
    found = problems(**given)
    assert len(found) == 1 and says in found[0], found


def test_texts_need_a_tokenizer_and_token_ids_a_vocabulary() -> None:
    found = problems(stop=("x",), bad_words=("y",), text=False)
    assert len(found) == 2 and found[0].startswith("stop") and found[1].startswith("bad_words")
    assert problems(vocabulary=None, banned_tokens=(10**6,), logprobs=10**6) == []
    assert len(problems(vocabulary=None, banned_tokens=(-1,))) == 1


def test_all_problems_come_at_once() -> None:
    found = problems(
        max_tokens=0,
        temperature=NAN,
        top_p=0,
        stop=("",),
        logit_bias={500: 1.0},
        n=2,
        best_of=1,
        seed=-1,
        bad_words=((),),
    )
    names = ["max_tokens", "temperature", "top_p", "stop", "logit_bias", "seed", "bad_words", "best_of"]
    assert all(any(line.startswith(name) for line in found) for name in names) and len(found) == len(names)


def test_what_follows_from_the_fields() -> None:
    assert SamplingParams(stop_tokens=(9, 3)).stops((3, 1)) == (1, 3, 9)
    assert SamplingParams(stop_tokens=(9,), ignore_eos=True).stops((1,)) == (9,)
    assert SamplingParams(bad_words=("a", (1, 2), (3,))).sequences == ((1, 2), (3,))
    assert SamplingParams(temperature=1.0, best_of=2).samples == 2 == SamplingParams(temperature=1.0, n=2).samples
