"""The server's routes as the unmodified `openai` client uses them; texts are those of the offline engine."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from served import CONTEXT, Served, load, texts, write_model

from infer import LLM, Completion, SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def offline(folder: Path) -> LLM:
    """The same model, for what is expected."""
    return load(folder)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with Served(load(folder)) as found:
        yield found
        assert not found.errors


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "seed": 11, "top_p": 0.9},
    "samples": {"temperature": 1.2, "seed": 3, "n": 3},
    "penalties": {"temperature": 0, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {"70": -100.0}},
    "stops": {"temperature": 0.8, "seed": 4, "stop": ["e", "t"], "min_tokens": 3, "max_tokens": 60},
    "ours": {
        "seed": 5,
        "top_k": 40,
        "min_p": 0.01,
        "typical_p": 0.95,
        "repetition_penalty": 1.3,
        "ignore_eos": True,
        "bad_words": ["a", [9, 10]],
        "banned_tokens": [40, 41],
        "stop_tokens": [12, 13],
        "include_stop": True,
        "skip_special_tokens": False,
    },
    "best": {"temperature": 1.0, "seed": 6, "best_of": 4, "n": 2},
    "beams": {"beams": 3, "length_penalty": 0.5, "early_stopping": True, "n": 2},
}
STANDARD = {
    "temperature",
    "seed",
    "top_p",
    "n",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "best_of",
}


def as_sent(options: dict[str, Any]) -> dict[str, Any]:
    """Fields that the client does not know go into its extra body."""
    known = {name: value for name, value in options.items() if name in STANDARD | {"max_tokens"}}
    return {**known, "extra_body": {name: value for name, value in options.items() if name not in known}}


def params_of(options: dict[str, Any], **more: Any) -> SamplingParams:
    """The same for the offline engine."""
    given = {"max_tokens": 16, **({} if "beams" in options else {"temperature": 1.0}), **options, **more}
    if "logit_bias" in given:
        given["logit_bias"] = {int(name): value for name, value in given["logit_bias"].items()}
    frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return SamplingParams(**frozen)


def expected(offline: LLM, prompts: list[Any], options: dict[str, Any], **more: Any) -> list[Completion]:
    return offline.generate(prompts, params_of(options, **more))


@pytest.mark.parametrize("name", list(CASES))
def test_completions_are_those_of_the_offline_engine(client: openai.OpenAI, offline: LLM, name: str) -> None:
    options = CASES[name]
    prompts = list(texts(3))
    want = [
        (choice.text, choice.finish_reason) for done in expected(offline, prompts, options) for choice in done.choices
    ]
    assert len({text for text, _ in want}) > 1
    got = client.completions.create(model="tiny", prompt=prompts, **as_sent(options))
    assert [(choice.text, choice.finish_reason) for choice in got.choices] == want
    assert [choice.index for choice in got.choices] == list(range(len(want)))
    if name in ("best", "beams"):
        with pytest.raises(openai.BadRequestError, match="cannot be streamed"):
            client.completions.create(model="tiny", prompt=prompts, stream=True, **as_sent(options))
        return
    pieces, ends = [""] * len(want), [""] * len(want)
    for chunk in client.completions.create(model="tiny", prompt=prompts, stream=True, **as_sent(options)):
        for choice in chunk.choices:
            assert not ends[choice.index], "nothing follows an end"
            pieces[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ""
    assert list(zip(pieces, ends, strict=True)) == want


def test_prompts_are_texts_or_token_ids_one_or_many(client: openai.OpenAI, offline: LLM) -> None:
    text, ids = "one prompt", [7, 30, 99, 12]
    for prompt, alone in (
        (text, [text]),
        ([text, "two"], [text, "two"]),
        (ids, [ids]),
        ([ids, [5, 6]], [ids, [5, 6]]),
    ):
        want = expected(offline, alone, {"temperature": 0})
        got = client.completions.create(model="also", prompt=prompt, temperature=0)
        assert [choice.text for choice in got.choices] == [done.text for done in want]
        assert got.usage is not None
        assert got.usage.prompt_tokens == sum(len(done.prompt) for done in want)
        assert got.usage.completion_tokens == sum(len(done.tokens) for done in want)
        assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
        assert (got.model, got.object) == ("tiny", "text_completion")


def test_log_probabilities_with_echo_score_a_prompt(client: openai.OpenAI, offline: LLM) -> None:
    prompt = "the tea in é"
    (want,) = expected(offline, [prompt], {"temperature": 0}, logprobs=2, prompt_logprobs=2, max_tokens=6)
    got = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=6, logprobs=2, echo=True)
    (choice,) = got.choices
    assert choice.text == prompt + want.text
    scored = choice.logprobs
    assert scored is not None
    assert scored.tokens and scored.token_logprobs and scored.top_logprobs and scored.text_offset
    assert len(scored.tokens) == len(want.prompt) + len(want.tokens)
    assert scored.token_logprobs[0] is None and scored.top_logprobs[0] is None
    assert want.prompt_logprobs is not None and want.choices[0].logprobs is not None
    entries = [*want.prompt_logprobs, *want.choices[0].logprobs]
    for place, entry in enumerate(entries, 1):
        assert math.isclose(scored.token_logprobs[place], entry.value, abs_tol=1e-5)
        found = scored.top_logprobs[place]
        assert math.isclose(found[scored.tokens[place]], entry.value, abs_tol=1e-5)
        assert len(found) == len({entry.token, *(token for token, _ in entry.top)})
        assert math.isclose(max(found.values()), entry.top[0][1], abs_tol=1e-5)
    offsets = scored.text_offset
    assert offsets[0] == 0 and offsets == sorted(offsets)
    for token, start in zip(scored.tokens, offsets, strict=True):
        # a character that was left unfinished is given, as U+FFFD, with the token after it
        assert token.startswith("bytes:") or choice.text[start:].lstrip("\ufffd").startswith(token)
    only = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=0, logprobs=2, echo=True)
    assert only.choices[0].text == prompt
    assert only.choices[0].logprobs is not None
    assert only.choices[0].logprobs.token_logprobs == scored.token_logprobs[: len(want.prompt)]
    assert only.usage is not None and only.usage.completion_tokens == 0


def test_streamed_log_probabilities_are_the_whole_ones(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "tea", "max_tokens": 12, "seed": 2, "logprobs": 1}
    whole = client.completions.create(**options).choices[0].logprobs
    assert whole is not None
    parts: dict[str, list[Any]] = {name: [] for name in whole.model_dump()}
    for chunk in client.completions.create(stream=True, **options):
        for choice in chunk.choices:
            for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                parts[name] += values
    assert parts == whole.model_dump()


def test_a_streamed_echo_comes_first(client: openai.OpenAI, offline: LLM) -> None:
    (want,) = expected(offline, ["tea"], {"temperature": 0})
    chunks = list(client.completions.create(model="tiny", prompt="tea", temperature=0, echo=True, stream=True))
    assert chunks[0].choices[0].text == "tea"
    assert "".join(chunk.choices[0].text for chunk in chunks) == "tea" + want.text


MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Tea"}, {"type": "text", "text": " or no tea?"}]},
]
PLAIN = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tea or no tea?"}]


@pytest.mark.parametrize("name", ["greedy", "seeded", "samples", "stops", "ours", "best"])
def test_chats_are_those_of_the_offline_engine(client: openai.OpenAI, offline: LLM, name: str) -> None:
    options = {"max_tokens": 16, **CASES[name]}
    want = offline.chat([PLAIN], params_of(options))[0]
    sent = as_sent(options)
    if "best_of" in sent:
        sent["extra_body"]["best_of"] = sent.pop("best_of")
    got = client.chat.completions.create(model="tiny", messages=MESSAGES, **sent)
    assert [(c.message.content, c.finish_reason) for c in got.choices] == [
        (c.text, c.finish_reason) for c in want.choices
    ]
    assert all(choice.message.role == "assistant" for choice in got.choices)
    if name == "best":
        return
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **sent
    )
    chunks = list(stream)
    count = options.get("n", 1)
    assert [chunk.choices[0].delta.role for chunk in chunks[:count]] == ["assistant"] * count
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage == got.usage
    pieces, ends = [""] * count, [""] * count
    for chunk in chunks[count:-1]:
        for choice in chunk.choices:
            assert choice.delta.role is None
            pieces[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert list(zip(pieces, ends, strict=True)) == [(c.text, c.finish_reason) for c in want.choices]


def test_a_chat_reports_log_probabilities(client: openai.OpenAI, offline: LLM) -> None:
    want = offline.chat([PLAIN], SamplingParams(max_tokens=9, logprobs=3))[0].choices[0]
    options: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "logprobs": True}
    options |= {"top_logprobs": 3, "max_completion_tokens": 9}
    whole = client.chat.completions.create(**options).choices[0].logprobs
    assert whole is not None and whole.content is not None and want.logprobs is not None
    assert len(whole.content) == len(want.logprobs) == 9
    for entry, own in zip(whole.content, want.logprobs, strict=True):
        assert math.isclose(entry.logprob, own.value, abs_tol=1e-5)
        assert [round(top.logprob, 4) for top in entry.top_logprobs] == [round(value, 4) for _, value in own.top]
    assert bytes(b for entry in whole.content for b in entry.bytes or ()).decode(errors="replace") == want.text
    parts = []
    for chunk in client.chat.completions.create(stream=True, **options):
        parts += (chunk.choices[0].logprobs.content or []) if chunk.choices[0].logprobs else []
    assert parts == whole.content


def test_a_chat_without_a_limit_uses_the_context(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert got.usage is not None and got.usage.total_tokens == CONTEXT
    assert got.choices[0].finish_reason == "length"


def test_embeddings_are_those_of_the_offline_model(client: openai.OpenAI, offline: LLM) -> None:
    given = ["tea", "no tea, é"]
    want = offline.embed(given, normalize=True)
    for encoding in ({}, {"encoding_format": "float"}):
        got = client.embeddings.create(model="tiny", input=given, **encoding)
        assert torch.allclose(torch.tensor([entry.embedding for entry in got.data]), want, atol=1e-6)
        assert [entry.index for entry in got.data] == [0, 1]
        assert got.usage.prompt_tokens == got.usage.total_tokens > 4
    one = client.embeddings.create(model="tiny", input=[7, 8, 9])
    assert torch.allclose(torch.tensor(one.data[0].embedding), offline.embed([[7, 8, 9]], normalize=True)[0], atol=1e-6)


def test_models_tokens_version_and_document(client: openai.OpenAI, served: Served, offline: LLM) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "also"]
    assert client.models.retrieve("also").id == "also"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/one")
    assert offline.tokenizer is not None
    with httpx2.Client(base_url=served.url) as http:
        text = "one € and 😀"
        found = http.post("/tokenize", json={"prompt": text}).json()
        ids = offline.tokenizer.encode(text).ids
        assert found == {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids}
        assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}
        chat = http.post("/tokenize", json={"messages": PLAIN}).json()["tokens"]
        assert offline.tokenizer.decode(chat).endswith("Tea or no tea?\n[assistant] ")
        assert http.get("/version").json() == {"version": "1"}
        assert http.get("/health/live").json() == http.get("/health/ready").json() == {"status": "ok"}
        assert http.get("/health").json() == {"status": "ok"}
        document = http.get("/openapi.json").json()
        assert {route.path.replace("{name:path}", "{name}") for route in served.app.routes} == set(document["paths"])
        schemas = document["components"]["schemas"]
        assert schemas["ChatBody"]["additionalProperties"] is False
        refs = [part.split('"')[0] for part in http.get("/openapi.json").text.split("#/components/schemas/")[1:]]
        assert set(refs) <= set(schemas)


def test_64_streams_at_once_neither_mix_nor_lose(served: Served, offline: LLM) -> None:
    prompts = list(texts(64, seed=9))
    params = [SamplingParams(max_tokens=8 + i % 30, temperature=0.8, seed=i) for i in range(64)]
    want = offline.generate(prompts, params)

    async def one(client: openai.AsyncOpenAI, place: int) -> tuple[str, int, str | None]:
        own, text, end, count = params[place], "", None, 0
        stream = await client.completions.create(
            model="tiny",
            prompt=prompts[place],
            stream=True,
            stream_options={"include_usage": True},
            **{name: getattr(own, name) for name in ("max_tokens", "temperature", "seed")},
        )
        async for chunk in stream:
            for choice in chunk.choices:
                text, end = text + choice.text, choice.finish_reason or end
            count = chunk.usage.completion_tokens if chunk.usage else count
        return text, count, end

    async def every() -> list[tuple[str, int, str | None]]:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, place) for place in range(64)))

    found = asyncio.run(every())
    assert found == [(done.text, len(done.tokens), done.finish_reason) for done in want]
    assert len(set(found)) > 60
    served.check_empty()


def test_every_sampling_parameter_has_a_field() -> None:
    from infer.server.bodies import CompletionBody

    # functions cannot be sent; echo with logprobs scores a prompt; forms have the names that clients know
    ours = {"logits_processors", "prompt_logprobs", "constraint"}
    assert {"response_format", "structured_outputs"} <= set(CompletionBody.model_fields)
    assert {field.name for field in dataclasses.fields(SamplingParams)} - ours <= set(CompletionBody.model_fields)
