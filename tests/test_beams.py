"""Beam search through the engine: the sequences of `transformers` generate, whatever pages and layouts do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from test_llm import END, LLAMA, config_of, work
from transformers import AutoModelForCausalLM

from infer import LLM, SamplingParams
from parallel.hf import save_model
from parallel.mesh import Layout, Mesh
from parallel.models.build import Build
from parallel.models.decoder import build_model

WAYS: list[dict[str, Any]] = [
    {"beams": 3, "n": 3},
    {"beams": 4, "n": 2, "length_penalty": 0.3, "early_stopping": True},
    {"beams": 2, "early_stopping": "never", "length_penalty": 1.5},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    path = tmp_path_factory.mktemp("model") / "llama"
    save_model(build_model(LLAMA, Build(mesh=Mesh.single()), seed=7), Mesh.single(), path, eos=END)
    return path


def searched(folder: str | Path, mesh: Mesh | None = None, digits: int = 5, **options: Any) -> list[Any]:
    """Tokens and scores of every choice; plain requests run beside them."""
    llm = LLM(folder, mesh=mesh, config=config_of(**options))
    prompts, plain = work(9)
    params = [SamplingParams(max_tokens=11, **WAYS[i % 3]) if i % 2 else own for i, own in enumerate(plain)]
    found = llm.generate(prompts, params)
    llm.engine.scheduler.check()
    assert set(llm.engine.stats.used) == {0}
    return [
        [[list(choice.tokens), choice.finish_reason, round(choice.score, digits)] for choice in completion.choices]
        for completion in found
    ]


def test_sequences_and_scores_are_those_of_generate(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts, _ = work(9)
    found = searched(folder)
    for place in range(1, 9, 2):
        prompt, way = prompts[place], WAYS[place % 3]
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=way["beams"],
            num_return_sequences=way.get("n", 1),
            length_penalty=way.get("length_penalty", 1.0),
            early_stopping=way.get("early_stopping", False),
            max_new_tokens=11,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert len(found[place]) == way.get("n", 1)
        for (tokens, reason, score), row, other in zip(found[place], out.sequences, out.sequences_scores, strict=True):
            ended = [*tokens, END] if reason == "stop" else tokens
            assert row[len(prompt) : len(prompt) + len(ended)].tolist() == ended
            assert abs(score - float(other)) < 1e-3


def on_ranks(folder: str, degrees: dict[str, int]) -> list[Any]:
    return searched(folder, Mesh.build(Layout(**degrees, sequence_parallel=False)), 3, overlap=True)


def test_nothing_else_matters(ranks: Ranks, folder: Path) -> None:
    want = searched(folder, digits=3)
    assert searched(folder, digits=3, page=2, chunk=5, prefix=True, overlap=True) == want
    assert searched(folder, digits=3, few=150, page=4, swap=True) == want
    for degrees in ({"tp": 2}, {"pp": 2}):
        assert ranks.run(on_ranks, world=2, folder=str(folder), degrees=degrees) == [want, want]


def test_what_beams_cannot_do_is_refused(folder: Path) -> None:
    (found,) = LLM(folder, config=config_of()).generate([[7]], SamplingParams(beams=2, logprobs=1))
    assert "reports scores only" in found.error


@pytest.mark.parametrize("running", [2, 5])
def test_more_beams_than_rows_take_turns_while_steps_overlap(folder: Path, running: int) -> None:
    """All rows come to be held by beams that wait for beams without one: these must get theirs all the same."""
    prompts = [[3 + place, *range(5, 9 + place)] for place in range(6)]
    params = [SamplingParams(max_tokens=12, beams=3)] * 6
    want = [own.choices[0].tokens for own in LLM(folder, config=config_of()).generate(prompts, params)]
    engine = LLM(folder, config=config_of(running=running, overlap=True, chunk=3)).engine
    ids = [engine.add(prompt, own, seed=1) for prompt, own in zip(prompts, params, strict=True)]
    found = {}
    for _ in range(5000):
        found |= {event.id: event.completion for event in engine.step() if event.completion is not None}
        if not engine.busy:
            break
    assert [found[id].choices[0].tokens for id in ids] == want
    engine.scheduler.check()
