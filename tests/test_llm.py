"""Generation: the tokens of `transformers` generate, at every layout, however requests are packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from infer import LLM, SamplingParams
from infer.request import Request, plan
from parallel.errors import ConfigError, DataError
from parallel.hf import save_model
from parallel.mesh import Layout, Mesh
from parallel.models.build import Build
from parallel.models.config import DecoderConfig, RopeConfig
from parallel.models.decoder import build_model

MODELS = {
    "llama": DecoderConfig(
        vocabulary=211,
        hidden=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=12,
        feed_forward=48,
        max_positions=64,
        std=0.3,
        rope=RopeConfig(scaling="llama3", factor=4.0, original=16),
    ),
    "mistral": DecoderConfig(
        family="mistral", vocabulary=97, hidden=32, layers=2, heads=4, kv_heads=1, feed_forward=48, window=5, std=0.3
    ),
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
        max_positions=64,
        tied=True,
        std=0.3,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each."""
    root = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        model = build_model(config, Build(mesh=Mesh.single()), seed=7)
        save_model(model, Mesh.single(), root / name, eos=5)
    return {name: root / name for name in MODELS}


def prompts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(6, vocabulary, (n,), generator=generator).tolist() for n in (1, 9, 17, 3, 30, 2, 12)]


def expected(folder: Path, most: int) -> list[list[int]]:
    """What `transformers` generates, one prompt at a time, without the end-of-text token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    results = []
    for ids in prompts(model.config.vocab_size):
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=0,
        )[0, len(ids) :]
        results.append([token for token in out.tolist() if token != 5])
    return results


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(("budget", "requests"), [(2048, 256), (7, 3)])
def test_greedy_tokens_are_those_of_transformers(
    folders: dict[str, Path], name: str, budget: int, requests: int
) -> None:
    llm = LLM(folders[name], budget=budget, requests=requests)
    completions = llm.generate(prompts(MODELS[name].vocabulary), SamplingParams(max_tokens=20))
    assert [list(completion.tokens) for completion in completions] == expected(folders[name], 20)
    assert all(completion.finish_reason in ("stop", "length") for completion in completions)
    assert all(not core._kept for core in llm._cores)


def generate_at(folder: str, tp: int, vocabulary: int) -> list[list[int]]:
    """On the ranks: the tokens that every rank sees."""
    llm = LLM(folder, mesh=Mesh.build(Layout(tp=tp, sequence_parallel=False)), budget=11)
    completions = llm.generate(prompts(vocabulary), SamplingParams(max_tokens=12))
    return [list(completion.tokens) for completion in completions]


@pytest.mark.parametrize("name", list(MODELS))
def test_the_tokens_do_not_depend_on_the_layout(ranks: Any, folders: dict[str, Path], name: str) -> None:
    want = expected(folders[name], 12)
    for tp in (2, 4):
        results = ranks.run(generate_at, world=tp, folder=str(folders[name]), tp=tp, vocabulary=MODELS[name].vocabulary)
        assert results == [want] * tp


def test_bad_prompts_are_refused_all_at_once(folders: dict[str, Path]) -> None:
    llm = LLM(folders["gpt2"])
    with pytest.raises(DataError) as caught:
        llm.generate([[], [1, 211], [-1], [3] * 60, [4]], SamplingParams(max_tokens=10))
    assert len(caught.value.problems) == 4
    assert "token id 211 is outside the vocabulary of 211" in caught.value.problems[1]
    with pytest.raises(DataError, match="no tokenizer"):
        llm.generate(["text"])
    with pytest.raises(ConfigError) as caught_config:
        llm.generate([[1]], SamplingParams(max_tokens=0, temperature=1.0))
    assert len(caught_config.value.problems) == 2


def test_a_step_closes_the_gap_within_its_budget() -> None:
    requests = [Request(i, [0] * n, n, SamplingParams(max_tokens=2)) for i, n in enumerate((5, 4, 3))]
    steps = [[tuple(piece[1:]) for piece in plan(requests, 6, 2)]]
    assert steps[0] == [(0, 5), (0, 1)]
    requests[0].computed, requests[1].computed = 5, 1
    requests[0].commit(1, (9,))
    assert [tuple(piece[1:]) for piece in plan(requests, 6, 2)] == [(5, 6), (1, 4)]
    requests[0].commit(9, (9,))
    assert requests[0].finished == "stop"
    assert [piece.request.id for piece in plan(requests, 6, 2)] == [1, 2]
