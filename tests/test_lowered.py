"""Lowered steps: the bits of the model itself, for every family that can be lowered; what cannot be, and why."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from ranks import Ranks
from test_llm import MODELS, config_of, folders, work  # noqa: F401 - a fixture
from torch import Tensor

from infer import LLM, EngineConfig
from infer.batch import StepBatch
from infer.cache import CacheConfig
from infer.lowered import Lowered
from parallel.errors import ConfigError, DataError
from parallel.kernels import inference
from parallel.kernels.inference import Program, panels, panels_product
from parallel.mesh import Layout, Mesh
from parallel.models.batch import Batch
from parallel.models.config import DecoderConfig, RopeConfig
from parallel.models.rope import KeptAngles, angles

T = TypeVar("T")


@pytest.fixture(autouse=True)
def panelled() -> None:
    if panels(torch.zeros(2, 2)) is None:
        pytest.skip("no products in C on this machine")


def watched(llm: LLM) -> list[int]:
    """Let lowered steps be computed by the model too, and compare; the tokens of each, negative: some are wanted."""
    runner, seen = llm.engine.runner, []
    lowered = runner.graphs
    assert isinstance(lowered, Lowered)

    def both(batch: StepBatch) -> Tensor | None:
        got = lowered(batch)
        if got is not None:
            seen.append(len(batch) if batch.wanted_R is None else -len(batch))
            got = got.clone()
            before = [raw.clone() for raw in runner.cache.raw]
            assert torch.equal(runner.model(batch), got)
            assert all(map(torch.equal, before, runner.cache.raw))
        return got

    runner.graphs = both
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_bits_are_those_of_the_model(folders: dict[str, Path], name: str, dtype: torch.dtype) -> None:  # noqa: F811
    if panels(torch.zeros(2, 2, dtype=dtype)) is None:
        pytest.skip("no products in C in this precision")
    llm = LLM(folders[name], config=config_of(running=20, chunk=11), dtype=dtype)
    seen = watched(llm)
    llm.generate(*work(60))
    assert min(seen) < 0
    assert 20 in seen and len(seen) > 20


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantized_pages(folders: dict[str, Path], precision: str) -> None:  # noqa: F811
    config = dataclasses.replace(config_of(page=4), cache=CacheConfig(memory_gib=0.01, precision=precision))  # pyright: ignore[reportArgumentType]
    llm = LLM(folders["llama"], config=config)
    seen = watched(llm)
    llm.generate(*work(30))
    assert len(seen) > 10


def test_threads_change_no_bit(folders: dict[str, Path]) -> None:  # noqa: F811
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            llm = LLM(folders["llama"], config=config_of())
            lowered, logits = llm.engine.runner.graphs, []
            assert lowered is not None
            llm.engine.runner.graphs = lambda batch, lowered=lowered, logits=logits: _kept(lowered(batch), logits)
            llm.generate(*work(30))
            found.append(logits)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert len(other) == len(found[0]) and all(map(torch.equal, other, found[0]))


def _kept(logits: Tensor | None, into: list[Tensor]) -> Tensor | None:
    into += [] if logits is None else [logits.clone()]
    return logits


def test_off_and_what_cannot_be(folders: dict[str, Path]) -> None:  # noqa: F811
    def engine(name: str, graphs: str, **cache: str) -> LLM:
        return LLM(
            folders[name],
            config=EngineConfig(graphs=graphs, cache=CacheConfig(memory_gib=0.01, **cache)),  # pyright: ignore
        )

    assert engine("llama", "off").engine.runner.graphs is None
    assert isinstance(engine("llama", "on").engine.runner.graphs, Lowered)
    assert engine("gpt2", "auto").engine.runner.graphs is None
    assert engine("llama", "auto", attention="reference").engine.runner.graphs is None
    with pytest.raises(ConfigError) as caught:
        engine("gpt2", "on")
    for reason in ("the norms are not RMSNorm", "positions are learned", "not SwiGLU", "has a bias"):
        assert f"graphs = on: {reason}" in str(caught.value) or reason in str(caught.value)
    with pytest.raises(ConfigError, match="graphs = on: attention is not the CPU's"):
        engine("llama", "on", attention="reference")


def test_without_a_compiler(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    prompts, params = work(12)
    want = LLM(folders["llama"], config=config_of()).generate(prompts, params)
    monkeypatch.setattr(inference, "kernels", lambda: None)
    llm = LLM(folders["llama"], config=config_of())
    assert llm.engine.runner.graphs is None
    assert [c.tokens for c in llm.generate(prompts, params)] == [c.tokens for c in want]
    with pytest.raises(ConfigError, match="no compiled kernels"):
        Program(torch.float32, 4)


def test_bad_steps_are_refused(folders: dict[str, Path]) -> None:  # noqa: F811
    llm = LLM(folders["llama"], config=config_of())
    lowered, raw = llm.engine.runner.graphs, llm.engine.runner.cache.raw[0]
    assert isinstance(lowered, Lowered)

    def step(token: int = 7, page: int = 0, wanted: Tensor | None = None) -> StepBatch:
        return StepBatch(
            tokens_T=torch.tensor([token]),
            positions_T=torch.tensor([0]),
            boundaries=(0, 1),
            table=(torch.tensor([[page]], dtype=torch.int32),),
            slots_T=(torch.tensor([page * 16]),),
            context_R=torch.tensor([1], dtype=torch.int32),
            starts_R=torch.tensor([0, 1], dtype=torch.int32),
            longest=1,
            widest=1,
            wanted_R=wanted,
        )

    assert lowered(step()) is not None
    assert lowered(step(wanted=torch.zeros(257, dtype=torch.int64))) is None
    for token in (-1, MODELS["llama"].vocabulary):
        with pytest.raises(DataError, match=f"token id {token} is outside the vocabulary of 211"):
            lowered(step(token))
    for page in (-1, len(raw)):
        with pytest.raises(IndexError, match="page group 0 names a page outside"):
            lowered(step(page=page))


def test_a_cache_that_is_allocated_again(folders: dict[str, Path]) -> None:  # noqa: F811
    llm = LLM(folders["llama"], config=config_of())
    before = llm.generate(*work(20))
    cache = llm.engine.runner.cache
    cache.allocate([len(raw) for raw in cache.raw])
    seen = watched(llm)
    assert [c.tokens for c in llm.generate(*work(20))] == [c.tokens for c in before]
    assert seen


def test_a_program_reads_no_row_that_its_table_has_not() -> None:
    program = Program(torch.float32, 3)
    rows, out = program.memory(1, torch.int64), program.memory(5)
    program.embed(rows, torch.arange(10.0).view(2, 5), out)
    rows[:, 0] = torch.tensor([1, 2, -1])
    out.fill_(-7)
    program.run(3)
    assert out.tolist() == [[5, 6, 7, 8, 9], [-7] * 5, [-7] * 5]


def test_what_does_not_fit_a_program_is_refused() -> None:
    held, program = done(panels(torch.zeros(6, 4))), Program(torch.float32, 3)
    x, out = program.memory(4), program.memory(6)
    with pytest.raises(ValueError, match=r"\(3, 6\) does not fit 3 rows of 4"):
        program.product(out, held, out)
    for narrow in (program.memory(5), torch.zeros(2, 6), torch.zeros(6, 3).t()):
        with pytest.raises(ValueError, match="does not fit 3 rows of 6"):
            program.product(x, held, narrow)
    with pytest.raises(ValueError, match="does not fit 3 rows of 3"):
        program.gated(x, held, out)
    with pytest.raises(ValueError, match=r"in a program in torch\.float32"):
        program.product(x, held, out.bfloat16())
    with pytest.raises(ValueError, match="a bias"):
        program.product(x, held, out, torch.zeros(5))
    program.product(x, held, out)
    for rows in (-1, 4):
        with pytest.raises(ValueError, match="rows of 3"):
            program.run(rows)


def test_gates_without_a_panel_of_their_own_share_memory() -> None:
    held, program = done(panels(torch.zeros(66, 4))), Program(torch.float32, 2)
    taken, memory = [], program.memory
    program.memory = lambda *size: taken.append(size) or memory(*size)  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(3):
        program.gated(memory(4), held, memory(33))
    assert taken == [(66,)]


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2)])
def test_a_shared_model_is_not_lowered(ranks: Ranks, folders: dict[str, Path], degrees: tuple[int, int]) -> None:  # noqa: F811
    """The last stage of a tied model has embedding and head, and is not the model for that."""
    tp, pp = degrees
    for told in ranks.run(check_shared, world=2, folder=str(folders["qwen2"]), tp=tp, pp=pp):
        assert told == "graphs = on: the model is shared by several ranks"


def check_shared(folder: str, tp: int, pp: int) -> str:
    mesh = Mesh.build(Layout(tp=tp, pp=pp))
    assert LLM(folder, mesh=mesh, config=config_of()).engine.runner.graphs is None
    with pytest.raises(ConfigError) as caught:
        LLM(folder, mesh=mesh, config=EngineConfig(graphs="on", cache=CacheConfig(memory_gib=0.01)))
    return str(caught.value)


def test_an_odd_number_of_bfloat16_inputs_is_refused() -> None:
    held = panels(torch.zeros(4, 3, dtype=torch.bfloat16))
    if held is None:
        pytest.skip("no products in C in this precision")
    program = Program(torch.bfloat16, 2)
    with pytest.raises(ConfigError, match="product of 3 inputs"):
        program.product(program.memory(3), held, program.memory(4))


def done(result: T | None) -> T:
    assert result is not None
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [64, 192, 48])
def test_a_program_has_the_bits_of_the_functions(inner: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(4)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    hidden, heads, most = 40, 5, 230
    up, down, bias = panels(tensor(2 * inner, hidden)), panels(tensor(hidden, inner)), tensor(hidden)
    if up is None or down is None:
        pytest.skip("no products in C in this precision")
    weight, head_weight, given = tensor(hidden), tensor(8), tensor(most, hidden)
    cos, sin = tensor(most, 4).float(), tensor(most, 4).float()
    program = Program(dtype, most)
    x, normed, mid = program.memory(hidden), program.memory(hidden), program.memory(inner)
    program.norm(x, weight, normed, 1e-5)
    program.gated(normed, up, mid)
    program.product(mid, down, x, bias, add=True)
    program.norm_heads(x, 1, 3, head_weight, 1e-5)
    program.rotate(x, heads - 1, cos, sin)
    for rows in (1, 6, 7, 17, 95, 97, most):
        x[:rows] = given[:rows]
        assert program.run(rows) == 0
        with torch.inference_mode():
            want = given[:rows].clone()
            inside = done(inference.swiglu_rows(panels_product(done(inference.norm(want, weight, 1e-5)), up)))
            want += panels_product(inside, down, bias)
            heads_H = want.view(rows, heads, 8)
            heads_H[:, 1:4] = done(inference.norm(heads_H[:, 1:4].contiguous(), head_weight, 1e-5))
            assert inference.rotate_(want, heads - 1, cos[:rows], sin[:rows])
        assert torch.equal(x[:rows], want)


@pytest.mark.parametrize("scaling", ["default", "linear", "dynamic", "llama3", "yarn"])
def test_angles_that_are_kept_are_those_of_the_batch(scaling: str) -> None:
    """As the positions grow, and beyond those that are kept; rows behind the batch's stay as they were."""
    rope = RopeConfig(scaling=scaling, factor=4.0, original=64, beta_slow=0.5)  # type: ignore[arg-type]
    config = DecoderConfig(vocabulary=11, hidden=64, heads=2, rope=rope, max_positions=1024).resolved()
    kept = KeptAngles(config, 256)
    for lengths in ((3, 1), (40, 7), (33,), (255, 2), (256,), (300, 4), (5,)):
        batch = Batch.pack([torch.zeros(length, dtype=torch.int64) for length in lengths])
        out = torch.full((310, 16), 7.0), torch.full((310, 16), 7.0)
        kept.write(batch, max(lengths), out)
        for got, want in zip(out, angles(config, batch), strict=True):
            assert torch.equal(got[: len(batch)], want)
            assert torch.equal(got[len(batch) :], torch.full((310 - len(batch), 16), 7.0))
