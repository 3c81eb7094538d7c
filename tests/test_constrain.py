"""Forms of completions: what a random model writes is judged by others (jsonschema_rs, re), masks token by token."""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from served import END, load, write_model
from tokenizers import Tokenizer

from infer import LLM, RequestError, SamplingParams
from infer.constraint import Constraint

pytest.importorskip("llguidance")
from infer.constrain.compile import compile_form, llg_tokenizer
from infer.constrain.forms import Forms

SCHEMAS: dict[str, dict[str, Any]] = {
    "nested": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "at": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
        },
        "required": ["name", "at"],
        "additionalProperties": False,
    },
    "enum": {"enum": ["é😀", 'quo"te', "a\\b\n", 3, None, [1, {"a": True}]]},
    "const": {"const": {"a": [1.5, "x"]}},
    "anyOf": {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 5, "maximum": 70}, {"type": "null"}]},
    "oneOf": {"oneOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 40}]},
    "ref": {"$ref": "#/$defs/p", "$defs": {"p": {"type": "array", "items": {"$ref": "#/$defs/q"}, "maxItems": 3},
                                         "q": {"enum": ["a", "b"]}}},
    "recursive": {
        "type": "object",
        "properties": {"v": {"enum": [1, 2]}, "n": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["v", "n"],
        "additionalProperties": False,
    },
    "bounded": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 9},
                "minItems": 2, "maxItems": 4},
    "prefix": {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": [1, 2]}], "items": False, "minItems": 2},
    "range": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 12},
    "open range": {"type": "integer", "exclusiveMinimum": 100},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 99},
    "pattern": {"type": "string", "pattern": "^[a-f]{2,4}-[0-9]+$", "maxLength": 9},
    "search": {"type": "string", "pattern": "x[0-9]", "maxLength": 6},
    "length": {"type": "string", "minLength": 3, "maxLength": 3},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "optional": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}},
                 "additionalProperties": False},
    "additional": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "maxProperties": 2,
                   "additionalProperties": {"type": "boolean"}},
    "pattern properties": {"type": "object", "patternProperties": {"^k[0-9]$": {"type": "null"}},
                           "additionalProperties": False, "minProperties": 1, "maxProperties": 2},
    "types": {"type": ["null", "boolean", "integer"]},
    "draft 4": {"$schema": "http://json-schema.org/draft-04/schema#", "type": "integer", "minimum": 3, "maximum": 5,
                "exclusiveMinimum": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    torch.set_num_threads(1)
    return load(write_model(tmp_path_factory.mktemp("constrain") / "model"))


def asked(kind: Any, text: Any, **params: Any) -> SamplingParams:
    form = Constraint(kind, text if isinstance(text, str) else json.dumps(text))
    return SamplingParams(**{"max_tokens": 120, "temperature": 1.0, **params, "constraint": form})


def written(llm: LLM, kind: Any, text: Any, seeds: int, **params: Any) -> list[str]:
    """What came to its end; all of it stopped there, or at the length."""
    found = llm.generate(["some text"] * seeds, [asked(kind, text, seed=seed, **params) for seed in range(seeds)])
    assert {own.error for own in found} == {""}
    ended = [own.text for own in found if own.finish_reason == "stop"]
    assert len(ended) >= seeds // 2, [own.text for own in found]
    return ended


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_is_valid_by_its_schema(llm: LLM, name: str) -> None:
    oracle = pytest.importorskip("jsonschema_rs")
    validator = oracle.validator_for(SCHEMAS[name], validate_formats=True)
    for text in [*written(llm, "json", SCHEMAS[name], 12), *written(llm, "json", SCHEMAS[name], 2, temperature=0.0)]:
        validator.validate(json.loads(text))
        between = re.findall(r"\s+", re.sub(r'"(\\.|[^"\\])*"', "text", text))
        assert all(re.fullmatch(r" |\n {0,32}", own) for own in between), text


def test_any_object(llm: LLM) -> None:
    bias = {llm.tokenizer.token_to_id(char): 12.0 for char in '"}:,'} if llm.tokenizer else {}
    texts = written(llm, "json", {"type": "object"}, 24, logit_bias=bias)
    assert all(isinstance(json.loads(text), dict) for text in texts) and len(set(texts)) > 3


@pytest.mark.parametrize(
    "pattern",
    [
        r"[ab]{3}x{1,4}",
        r"(yes|no|ma\w{1,3}be)\.",
        r"\d{1,3}(\.\d{1,3}){3}",
        r"é{2}[à-ü]{1,3}😀?",
        r"a\n\tb",
        r"(ab|ba){2}",
    ],
)
def test_a_regex_matches_the_whole(llm: LLM, pattern: str) -> None:
    assert all(re.fullmatch(pattern, text) for text in written(llm, "regex", pattern, 20))


def test_choice_and_grammar(llm: LLM) -> None:
    choices = ["yes", "yesterday", 'é"\n\\z😀', " ", "/a(b", "<[3]>"]
    texts = written(llm, "choice", choices, 60, temperature=3.0)
    assert set(texts) <= set(choices) and len(set(texts)) > 3
    lark = 'start: "(" item ("," item)* ")"\nitem: /[1-9][0-9]?/ | start'
    for text in written(llm, "grammar", lark, 20, max_tokens=100):
        assert re.fullmatch(r"[0-9(),]+", text) and text.count("(") == text.count(")")
        assert isinstance(ast.literal_eval(text), int | tuple)


def tiny() -> tuple[Tokenizer, Callable[[Constraint], Any]]:
    from tokenizers import decoders, models, pre_tokenizers

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("ab", "ba", '":', "12", '{"', "}}", "Ã©")]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    made.add_special_tokens(["<s>", "</s>"])
    made.decoder = decoders.ByteLevel()

    tokenizer = llg_tokenizer(made.to_str(), 300, (1,))
    return made, lambda form: compile_form(form.kind, form.text, tokenizer)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_mask_has_the_tokens_that_can_be_taken_and_no_others(threads: int) -> None:
    """A vocabulary of 300, of which the tokenizer has 265; and as many rows as there are forms, filled together."""
    made, compiled = tiny()
    forms, draw = Forms(made, 300, (1, 299)), random.Random(1)
    kinds = [("json", json.dumps(SCHEMAS[name])) for name in ("nested", "anyOf", "enum", "range")]
    kinds += [("regex", "(ab|a){1,3}é?"), ("choice", '["ab", "abba", "é"]'), ("grammar", 'start: "a" <[0]>? "b"*')]
    texts = [Constraint(kind, text) for kind, text in kinds]  # type: ignore[arg-type]
    own, before = [forms.begin(form) for form in texts], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(12):
            bits = forms.fill(own, [False] * len(own))
            for row, form in enumerate(own):
                assert not form.error
                allowed = set(np.unpackbits(bits[row].view(np.uint8), bitorder="little").nonzero()[0].tolist())
                want = set()
                here = compiled(form.constraint)
                assert not form.tokens or here.consume_tokens(form.tokens)
                for token in range(300):
                    probe = here.deep_copy()
                    stopped = probe.is_stopped() and token == 1
                    if token < made.get_vocab_size() and (stopped or probe.try_consume_tokens([token]) == 1):
                        want.add(token)
                assert allowed == want, (form.constraint, form.tokens)
                if 1 not in form.tokens:
                    forms.advance(form, [draw.choice(sorted(allowed))])
    finally:
        torch.set_num_threads(before)


def test_ends_come_only_when_the_form_is_complete(llm: LLM) -> None:
    for text in written(llm, "regex", "a{2,30}", 10, ignore_eos=True):
        assert text == "a" * 30
    for text in written(llm, "regex", "a{2,30}", 10, min_tokens=9):
        assert 9 <= len(text) <= 30
    assert written(llm, "choice", ["no"], 4, min_tokens=50, ignore_eos=True) == ["no"] * 4
    (done,) = llm.generate(["x"], asked("choice", ["no"], include_stop=True, skip_special_tokens=False))
    assert done.text == "no</s>" and done.tokens[-1] == END and done.choices[0].stop_reason == END


def test_it_goes_with_the_other_parameters(llm: LLM) -> None:
    encode = llm.tokenizer.token_to_id  # type: ignore[union-attr]
    b = encode("b")
    assert set(written(llm, "regex", "[abc]{8}", 10, logit_bias={b: 100.0})) == {"bbbbbbbb"}
    assert not any("b" in text for text in written(llm, "regex", "[abc]{8}", 10, banned_tokens=(b,)))
    assert set(written(llm, "regex", "[abc]{4}", 10, allowed_tokens=(b, END))) == {"bbbb"}
    assert all(text.count("c") == 0 for text in written(llm, "regex", "[ab]{3}c[ab]{3}", 10, stop=("c",)))
    for extra in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.2}, {"typical_p": 0.5}, {"presence_penalty": 2.0}):
        assert all(re.fullmatch("[abc]{8}", text) for text in written(llm, "regex", "[abc]{8}", 8, **extra))
    (done,) = llm.generate(["x"], asked("regex", "[ab]{4}", logprobs=300, logprobs_of="processed", seed=1))
    for scored in done.choices[0].logprobs or ():
        spelled = {llm.tokenizer.id_to_token(token) for token, _ in scored.top}  # type: ignore[union-attr]
        assert all(re.fullmatch("[ab]{1,2}|</s>", own or "") for own in spelled)
        assert abs(sum(np.exp(value) for _, value in scored.top) - 1) < 1e-4
    (done,) = llm.generate(["x"], asked("regex", "a!b", banned_tokens=(encode("!"),)))
    assert done.finish_reason == "error" and "no token is left" in done.error


def test_beams_keep_forms_too(llm: LLM) -> None:
    """The best of all texts that there are, by scoring each."""
    choices = ["ab", "ba", "abc", "cab", "xyz", "zzz", "b"]
    params = asked("choice", choices, beams=7, n=3, temperature=0.0, length_penalty=0.0)
    (found,) = llm.generate(["some text"], params)
    assert llm.tokenizer is not None
    scores = {}
    prompt = llm.tokenizer.encode("some text").ids
    for choice in found.choices:
        own = llm.generate([prompt + list(choice.tokens) + [END]], SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
        scores[choice.text] = sum(scored.value for scored in own.prompt_logprobs[len(prompt) - 1 :])  # type: ignore[index]
        assert abs(choice.score - scores[choice.text]) < 1e-3
    assert set(scores) <= set(choices) and sorted(scores.values(), reverse=True) == list(scores.values())


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "keyword": ("json", {"not": {}}, 'Unimplemented keys: ["not"]'),
    "inside": ("json", {"properties": {"a": {"divisibleBy": 3}}}, "properties.a.divisibleBy: is not honoured"),
    "options": ("json", {"x-guidance": {"lenient": True}, "not": {}}, "x-guidance: is not honoured"),
    "format": ("json", {"type": "string", "format": "color"}, "Unknown format: color"),
    "overlap": ("json", {"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf constraints are not supported"),
    "impossible": ("json", {"type": "string", "minLength": 3, "maxLength": 2}, "Unsatisfiable schema"),
    "elsewhere": ("json", {"$ref": "http://169.254.169.254/x"}, "does not fetch resources"),
    "bound": ("json", {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "exclusiveMinimum: together with"),
    "not JSON": ("json", "{", "not JSON"),
    "true": ("json", "true", "must be an object"),
    "nan": ("json", '{"const": NaN}', "NaN is no JSON"),
    "deep": ("json", '{"items":' * 70 + "{}" + "}" * 70, "deeper than 64"),
    "surrogate": ("json", '{"const": "\\ud800"}', "hex escape"),
    "look-around": ("regex", "a(?=b)", "look-ahead"),
    "unclosed": ("regex", "(a", "unclosed group"),
    "lone": ("regex", "\ud800", "half a character"),
    "empty choice": ("choice", [], "must be a list of texts"),
    "no text": ("choice", [1], "must be a list of texts"),
    "lark": ("grammar", "start: nothing", "nothing"),
    "temperature": ("grammar", "start: x\nx[temperature=0.5]: /a/", "temperature"),
    "warning": ("grammar", 'start: %json {"x-guidance": {"lenient": true}, "not": {}}', "x-guidance"),
    "in a grammar": ("grammar", 'start: "%json" %json {"items": {"extends": 1}}', "items.extends: is not honoured"),
    "kind": ("xml", "<a>", "one of json, regex, grammar, choice"),
    "long": ("regex", "a" * (1 << 19), "at most 262144"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(llm: LLM, name: str) -> None:
    kind, text, says = REFUSED[name]
    with pytest.raises(RequestError) as found:
        llm.engine.add([5], asked(kind, text))
    assert found.value.problems[0].startswith("constraint: ") and says in str(found.value), str(found.value)
    assert not llm.engine.busy


def test_white_space_within_a_grammar_is_bounded_as_well() -> None:
    made, _ = tiny()
    forms = Forms(made, 300, (1,))
    ids = {char: made.token_to_id({" ": "Ġ", "\n": "Ċ"}.get(char, char)) for char in '{"a: \n1}'}
    form = '{"properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": false}'
    for text, fine in {'{"a": 1}': True, '{\n  "a": 1\n}': True, '{"a":  1}': False, '{ \n"a":1}': False}.items():
        for own in (Constraint("json", form), Constraint("grammar", f"start: %json {form}")):
            begun = forms.begin(own)
            forms.advance(begun, [ids[char] for char in text])
            assert (not begun.error) == fine, (text, own.kind)


def test_no_tokenizer_or_no_end_is_named() -> None:
    made, _ = tiny()
    assert Forms(None, 300, (1,)).problems(Constraint("regex", "a")) == [
        "constraint: there is no tokenizer, so there is no text"
    ]
    assert "has no end-of-text token" in Forms(made, 300, (299,)).problems(Constraint("regex", "a"))[0]


def test_compiled_forms_are_kept_within_their_bound() -> None:
    made, _ = tiny()
    forms = Forms(made, 300, (1,), kept_bytes=4 << 20)
    for index in range(300):
        assert forms.problems(Constraint("json", json.dumps({"const": index}))) == []
        assert forms.kept <= 4 << 20
    once = forms.begin(Constraint("regex", "a*"))
    for _ in range(700):
        forms.advance(once, [made.token_to_id("a")])
    assert forms.begin(Constraint("regex", "a*")).compiled is not once.compiled  # it had grown too large


def test_tokens_that_only_the_model_has_are_never_allowed() -> None:
    made, _ = tiny()
    forms = Forms(made, 300, (1,))
    bits = forms.fill([forms.begin(Constraint("grammar", 'start: <[290]> | "a"'))], [False])
    assert np.unpackbits(bits.view(np.uint8), bitorder="little").nonzero()[0].tolist() == [made.token_to_id("a")]
