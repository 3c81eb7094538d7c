"""Recorded decoding steps: that they are filled up rightly is seen on a CPU; CUDA itself needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_llm import config_of, folders, work  # noqa: F401 - a fixture
from torch import Tensor

from infer import LLM, EngineConfig
from infer.build import records_graphs
from infer.graphs import Graphs, cuda_graph, sizes
from parallel.errors import ConfigError


def replayed(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """As CUDA: what is computed again is where it was the first time."""
    logits = work().clone()
    return lambda: logits.copy_(work()), logits


def with_graphs(llm: LLM, record: Callable, page_size: int = 16) -> list[int]:
    """Let an engine record; the sizes that it records."""
    runner, seen = llm.engine.runner, []
    pages = [pool.total for pool in llm.engine.scheduler.memory.device]
    runner.cache.allocate([count + 1 for count in pages])
    for raw in runner.cache.raw:
        raw[-1] = 0xFF  # NaN, if it were ever read

    def noted(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        replay, logits = record(work)
        seen.append(len(logits))
        return replay, logits

    columns = [-(-llm.engine.limits.context // page_size)] * len(pages)
    options = {"columns": columns, "scratch": pages, "page_size": page_size, "device": runner.mesh.device}
    runner.graphs = Graphs(runner.model, most=24, record=noted, **options)
    return seen


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_tokens_are_those_of_steps_that_are_not_recorded(folders: dict[str, Path], name: str) -> None:  # noqa: F811
    prompts, params = work(40)
    want = [c.tokens for c in LLM(folders[name], config=config_of(running=20)).generate(prompts, params)]
    llm = LLM(folders[name], config=config_of(running=20))
    seen = with_graphs(llm, replayed)
    assert [c.tokens for c in llm.generate(prompts, params)] == want
    assert len(seen) == len(set(seen)) > 2, "each size is recorded once"


def test_sizes() -> None:
    assert sizes(1) == (1,)
    assert sizes(20) == (1, 2, 4, 8, 16, 20)
    assert sizes(256)[-3:] == (192, 224, 256)


def test_where_nothing_can_be_recorded(folders: dict[str, Path]) -> None:  # noqa: F811
    llm = LLM(folders["llama"], config=config_of())
    cache, mesh = llm.engine.runner.cache, llm.mesh
    assert not records_graphs(EngineConfig(graphs="on"), cache, mesh), "on a CPU steps are lowered"
    with pytest.raises(ConfigError, match="graphs = on: attention 'cpu' asks the host"):
        mesh.device = torch.device("cuda")
        records_graphs(EngineConfig(graphs="on"), cache, mesh)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_replay() -> None:
    given = torch.ones(3, device="cuda")
    replay, found = cuda_graph()(lambda: given * 2)
    given.fill_(5)
    replay()
    assert found.tolist() == [10, 10, 10]
