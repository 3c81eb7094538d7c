"""Generation: the greedy tokens of `transformers` at every layout, however requests are packed and preempted."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from transformers import AutoModelForCausalLM

from infer import LLM, EngineConfig, RequestError, SamplingParams
from infer.cache import CacheConfig
from infer.policy import SchedulerConfig
from parallel.errors import ConfigError, DataError
from parallel.hf import save_model
from parallel.mesh import Layout, Mesh
from parallel.models.build import Build
from parallel.models.config import DecoderConfig, RopeConfig
from parallel.models.decoder import build_model

LLAMA = DecoderConfig(
    vocabulary=211,
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=12,
    feed_forward=48,
    max_positions=128,
    std=0.3,
    rope=RopeConfig(scaling="llama3", factor=4.0, original=16),
)
MODELS = {
    "llama": LLAMA,
    "mistral": dataclasses.replace(LLAMA, family="mistral", kv_heads=1, window=5, rope=RopeConfig()),
    "qwen2": dataclasses.replace(
        LLAMA, family="qwen2", head_size=8, qkv_bias=True, tied=True, window=7, window_layers=(1,), rope=RopeConfig()
    ),
    "qwen3": dataclasses.replace(LLAMA, family="qwen3", head_size=24, qk_norm=True, rope=RopeConfig()),
    "gpt2": DecoderConfig(
        family="gpt2",
        vocabulary=211,
        hidden=32,
        layers=2,
        heads=4,
        activation="gelu_tanh",
        gated=False,
        norm="layer",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        positions="learned",
        max_positions=128,
        tied=True,
        std=0.3,
    ),
}
END = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each."""
    root = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        model = build_model(config, Build(mesh=Mesh.single()), seed=7)
        save_model(model, Mesh.single(), root / name, eos=END)
    return {name: root / name for name in MODELS}


def work(count: int = 200) -> tuple[list[list[int]], list[SamplingParams]]:
    """Mixed requests; every fourth begins as the one before does."""
    draw = random.Random(3)
    prompts: list[list[int]] = []
    for index in range(count):
        own = [draw.randrange(6, 211) for _ in range(draw.choice((1, 2, 3, 9, 17, 30, 33, 48)))]
        prompts.append(prompts[-1][: draw.randint(1, 40)] + own[:20] if index % 4 == 3 else own)
    return prompts, [SamplingParams(max_tokens=draw.randint(1, 24)) for _ in prompts]


def generated(folder: str | Path, mesh: Mesh | None = None, count: int = 200, **options: Any) -> list[list[int]]:
    """Tokens of all requests, with the end-of-text token where there was one."""
    llm = LLM(folder, mesh=mesh, config=config_of(**options))
    completions = llm.generate(*work(count))
    llm.engine.scheduler.check()
    again = llm.generate(*work(count)) if options.get("warm") else completions
    assert [c.tokens for c in again] == [c.tokens for c in completions]
    if options.get("few") and any(group.window is None for group in llm.engine.scheduler.groups):
        assert llm.engine.stats.recomputed + llm.engine.stats.swaps > 0, "nothing was preempted"
    if options.get("warm"):
        assert llm.engine.stats.hits > 0, "nothing was found in the cache"
    return [[*c.tokens, *([END] if c.finish_reason == "stop" else [])] for c in completions]


def config_of(
    *,
    page: int = 16,
    chunk: int = 0,
    budget: int = 2048,
    running: int = 256,
    prefix: bool = False,
    few: float = 0.0,
    swap: bool = False,
    warm: bool = False,
    overlap: bool = False,
) -> EngineConfig:
    """An engine with little memory if ``few`` KiB are given."""
    memory = {"memory_gib": few / 2**20, "host_gib": 2 * few / 2**20 if swap else 0.0} if few else {"memory_gib": 0.01}
    return EngineConfig(
        cache=CacheConfig(**memory),
        scheduler=SchedulerConfig(
            page_size=page,
            chunk=chunk,
            budget=budget,
            requests=min(budget, running),
            prefix_cache=prefix or warm,
            horizon=1,
            preemption="swap" if swap else "auto",
        ),
        overlap="on" if overlap else "off",
    )


def assert_greedy(folder: Path, prompts: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> None:
    """Every token is what `transformers` finds likeliest after all before it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    texts = [[*prompt, *tokens] for prompt, tokens in zip(prompts, found, strict=True)]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    with torch.inference_mode():
        best = model(ids, attention_mask=mask).logits.argmax(-1).tolist()
    for prompt, tokens, row in zip(prompts, found, best, strict=True):
        assert row[len(prompt) - 1 : len(prompt) - 1 + len(tokens)] == list(tokens)


WAYS: dict[str, dict[str, Any]] = {
    "one token pages": {"page": 1},
    "pages of 5, chunks of 7": {"page": 5, "chunk": 7},
    "small budget": {"budget": 11, "running": 3},
    "prefix cache, cold": {"prefix": True, "page": 4},
    "prefix cache, warm": {"warm": True, "page": 4, "chunk": 9},
    "preempted, recomputed": {"few": 130, "page": 4},
    "preempted, swapped": {"few": 130, "page": 4, "swap": True, "prefix": True},
    "planned ahead": {"overlap": True, "prefix": True, "page": 3, "few": 160},
}


@pytest.mark.parametrize("name", list(MODELS))
def test_greedy_tokens_are_those_of_transformers(folders: dict[str, Path], name: str) -> None:
    found = generated(folders[name])
    prompts, params = work()
    assert_greedy(folders[name], prompts, found)
    for tokens, own in zip(found, params, strict=True):
        assert END not in tokens[:-1]
        assert len(tokens) == own.max_tokens or tokens[-1] == END
    for way, options in WAYS.items():
        assert generated(folders[name], **options) == found, way


def test_greedy_tokens_are_those_of_generate(folders: dict[str, Path]) -> None:
    """The same by the peer's own loop, for some."""
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32).eval()
    prompts, params = work(12)
    for prompt, own, found in zip(prompts, params, generated(folders["llama"], count=12), strict=True):
        ids, mask = torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long)
        options = {"max_new_tokens": own.max_tokens, "do_sample": False, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=mask, **options)
        assert out[0, len(prompt) :].tolist() == found


LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [{"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}, {"dp": 2}],
    4: [{"tp": 2, "pp": 2}, {"tp": 4}, {"dp": 2, "tp": 2}],
}
LAYOUT_WAYS: list[dict[str, Any]] = [
    {"budget": 40, "running": 12, "overlap": True},
    {"few": 170, "page": 4, "warm": True, "swap": True},
]


def check_layouts(folder: str, layouts: list[dict[str, Any]], ways: list[dict[str, Any]]) -> list[list[list[int]]]:
    """On the ranks: the tokens that every rank sees."""
    found = []
    for degrees in layouts:
        mesh = Mesh.build(Layout(**{"sequence_parallel": False, **degrees}))
        for options in ways:  # a rank has a part of each page, so that less memory is as little
            less = options | ({"few": options["few"] / mesh.tp.size / mesh.pp.size} if "few" in options else {})
            found.append(generated(folder, mesh, 40, **(less if mesh.dp.size == 1 else {})))
    return found


@pytest.mark.parametrize("world", list(LAYOUTS))
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_the_tokens_do_not_depend_on_the_layout(ranks: Ranks, folders: dict[str, Path], name: str, world: int) -> None:
    want = generated(folders[name], count=40)
    options = {"folder": str(folders[name]), "layouts": LAYOUTS[world], "ways": LAYOUT_WAYS}
    for rank in ranks.run(check_layouts, world=world, **options):
        assert all(found == want for found in rank)


def test_bad_prompts_are_refused_alone(folders: dict[str, Path]) -> None:
    llm = LLM(folders["gpt2"])
    want = llm.generate([[4], [5, 6]], SamplingParams(max_tokens=10))
    prompts = [[], [4], [1, 211], [-1], [5, 6], [3] * 120]
    got = llm.generate(prompts, SamplingParams(max_tokens=10))
    assert [completion.tokens for completion in got if not completion.error] == [one.tokens for one in want]
    assert [completion.prompt for completion in got] == [tuple(prompt) for prompt in prompts]
    said = [completion.error for completion in got if completion.finish_reason == "error"]
    assert said == [
        "the prompt is empty",
        "token id 211 of the prompt is outside the vocabulary of 211",
        "token id -1 of the prompt is outside the vocabulary of 211",
        "120 tokens of the prompt and max_tokens = 10 exceed the context of 128",
    ]
    with pytest.raises(DataError, match="no tokenizer"):
        llm.generate(["text"])
    with pytest.raises(RequestError, match="1 prompts, 2 parameters"):
        llm.generate([[1]], [SamplingParams()] * 2)
    (both,) = llm.generate([[1]], SamplingParams(max_tokens=0, temperature=-1.0))
    assert "max_tokens = 0" in both.error
    assert "temperature = -1.0" in both.error
    with pytest.raises(RequestError, match="the prompt is empty"):
        next(llm.stream([]))
    assert not llm.engine.busy


def test_a_request_larger_than_the_cache_is_refused_alone(folders: dict[str, Path]) -> None:
    llm = LLM(folders["llama"], config=config_of(few=150))
    (want,) = llm.generate([[4, 5]], SamplingParams(max_tokens=8))
    llm.engine.limits = dataclasses.replace(llm.engine.limits, context=10**6)  # which the cache alone would allow
    short, long = llm.generate([[4, 5], [3] * 5000], SamplingParams(max_tokens=8))
    assert short.tokens == want.tokens
    assert "up to 5008 tokens need 313 pages of 16 tokens; the whole cache of page group 0 has" in long.error


def test_memory_for_less_than_one_sequence_is_refused_with_the_numbers(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"not enough memory for one sequence: 128 tokens need .* KiB"):
        LLM(folders["llama"], config=config_of(few=1))
