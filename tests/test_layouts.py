"""The whole decoder: at every layout the same loss, logits and gradients as on one device, and the promised costs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor

from parallel import comm
from parallel.mesh import Layout, Mesh
from parallel.models.batch import Batch
from parallel.models.build import Build, Recompute
from parallel.models.config import DecoderConfig
from parallel.models.decoder import Decoder, build_model
from parallel.shard import finalize_gradients, param_shards

LLAMA = DecoderConfig(vocabulary=97, hidden=24, layers=2, heads=6, kv_heads=2, feed_forward=32)
GPT2 = DecoderConfig(
    vocabulary=97,
    hidden=32,
    layers=2,
    heads=4,
    feed_forward=48,
    activation="gelu_tanh",
    gated=False,
    norm="layer",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    positions="learned",
    max_positions=32,
    tied=True,
)
REPEATED = DecoderConfig(vocabulary=97, hidden=32, layers=2, heads=8, kv_heads=2, feed_forward=32, qk_norm=True)
DROPPED = {"embedding_dropout": 0.1, "residual_dropout": 0.1, "attention_dropout": 0.1}
CONFIGS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "repeated": dataclasses.replace(REPEATED, qkv_bias=True),
    "large vocabulary": dataclasses.replace(REPEATED, vocabulary=50257, hidden=16, head_size=4, layers=1),
    "window": dataclasses.replace(REPEATED, window=3, window_layers=(1,), tied=True, activation="gelu"),
    "dropout": dataclasses.replace(REPEATED, **DROPPED),
    "gpt2 dropout": dataclasses.replace(GPT2, **DROPPED),
}
LENGTHS = (5, 6, 2)  # three documents of T = 13 tokens in all
COUNTED = 11  # of which these have a label


def documents(vocabulary: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(vocabulary, (length,), generator=generator) for length in LENGTHS]
    tokens[0][0], tokens[1][2] = vocabulary - 1, 0
    labels = [torch.cat([d[1:], torch.tensor([-100])]) for d in tokens]
    labels[0][-1] = vocabulary - 1
    return tokens, labels


def batch_of(vocabulary: int, mesh: Mesh) -> Batch:
    """The documents of this data-parallel rank; the first has two of three."""
    tokens, labels = documents(vocabulary)
    mine = slice(None) if mesh.data.size == 1 else slice(2 * mesh.data.rank, 2 + mesh.data.rank)
    first = sum(LENGTHS[: mine.start or 0])
    return Batch.pack(tokens[mine], labels[mine], first_index=first, key=7)


def step(model: Decoder, batch: Batch, mesh: Mesh) -> Tensor:
    """The loss over all tokens of the step; gradients complete on every rank."""
    total = model.loss(batch, scale=1 / COUNTED, block=5).total
    total.backward()
    finalize_gradients(model, mesh)
    for parameter in model.parameters():
        assert parameter.grad is not None
        comm.sum_(parameter.grad, mesh.data)
    return comm.sum_(total.detach().clone(), mesh.data)


def build_for(mesh: Mesh, config: DecoderConfig, recompute: Recompute = "none") -> Decoder:
    return build_model(config, Build(mesh=mesh, dtype=torch.float64, seed=11, recompute=recompute), seed=2)


def joined_gradients(model: Decoder, mesh: Mesh) -> dict[str, Tensor]:
    """The gradients of the whole parameters, joined from all ranks of tp by the shard table."""
    whole = {}
    for (name, parameter), shard in zip(model.named_parameters(), param_shards(model).values(), strict=True):
        assert parameter.grad is not None
        locals_ = comm.start_all_gather(parameter.grad[None], mesh.tp).wait().view(mesh.tp.size, *parameter.shape)
        whole[name] = shard.join(({"tp": (rank, mesh.tp.size)}, local) for rank, local in enumerate(locals_))
        assert torch.equal(shard.cut(whole[name], mesh.place), parameter.grad), f"{name}: copies or padding differ"
    return whole


def assert_equal_to(got: Tensor, expected: Tensor, name: str) -> None:
    difference = (got - expected).norm() / expected.norm()
    assert difference < 1e-10, f"{name} differs by {difference:.1e}"


def check_layouts(config: str, layouts: list[dict[str, Any]]) -> list[float]:
    alone, losses = Mesh.single(), []
    single = build_for(alone, CONFIGS[config])
    batch = batch_of(CONFIGS[config].vocabulary, alone)
    reference = step(single, batch, alone)
    logits = single.eval()(batch)
    for degrees in layouts:
        mesh = Mesh.build(Layout(**degrees))
        model = build_for(mesh, CONFIGS[config])
        own = batch_of(CONFIGS[config].vocabulary, mesh)
        loss = step(model, own, mesh)
        assert abs(loss / reference - 1) < 1e-12, f"{degrees}: loss {loss} instead of {reference}"
        grads = joined_gradients(model, mesh)
        for name, parameter in single.named_parameters():
            assert parameter.grad is not None
            assert_equal_to(grads[name], parameter.grad, f"{degrees}: gradient of {name}")
        assert own.index_T is not None
        assert_equal_to(model.eval()(own), logits[own.index_T], f"{degrees}: logits")
        wanted = torch.tensor([len(own) - 1, 1])
        few = model(dataclasses.replace(own, wanted_R=wanted))
        assert_equal_to(few, logits[own.index_T[wanted]], f"{degrees}: logits that are wanted")
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("config", CONFIGS)
def test_every_layout_equals_one_device(ranks: Ranks, config: str) -> None:
    """tp 2; dp 2; tp 4; tp 2 and dp 2; each with tokens cut and not."""
    two = [{"tp": 2}, {"tp": 2, "sequence_parallel": False}, {"dp": 2}]
    four = [{"tp": 4}, {"tp": 4, "sequence_parallel": False}] if CONFIGS[config].heads % 4 == 0 else []
    four += [{"tp": 2, "dp": 2}, {"tp": 2, "cp": 1, "dp": 2, "sequence_parallel": False}]
    results = ranks.run(check_layouts, world=2, config=config, layouts=two)
    results += ranks.run(check_layouts, world=4, config=config, layouts=four)
    assert all(0.5 * math.log(97) < loss < 2 * math.log(50257) for losses in results for loss in losses)


def test_dropout_drops_and_follows_the_key() -> None:
    mesh = Mesh.single()
    config = CONFIGS["dropout"]
    model, batch = build_for(mesh, config), batch_of(97, mesh)
    losses = {
        name: model.loss(b).total.item()
        for name, b in (("a", batch), ("again", batch), ("b", dataclasses.replace(batch, key=8)))
    }
    assert losses["a"] == losses["again"] != losses["b"]
    plain = build_for(mesh, dataclasses.replace(config, **dict.fromkeys(DROPPED, 0.0)))
    assert model.eval().loss(batch).total.item() == pytest.approx(plain.eval().loss(batch).total.item(), rel=1e-12)
    seen = {losses["a"]}
    for name in DROPPED:
        only = build_for(mesh, dataclasses.replace(config, **(dict.fromkeys(DROPPED, 0.0) | {name: 0.1})))
        seen.add(only.loss(batch).total.item())
    assert len(seen) == 4


def check_recompute(config: str) -> None:
    mesh = Mesh.build(Layout(tp=dist.get_world_size()))
    batch, grads = batch_of(97, mesh), {}
    for recompute in ("none", "selective", "full"):
        model = build_for(mesh, CONFIGS[config], recompute)
        loss = step(model, batch, mesh)
        grads[recompute] = [loss, *(p.grad for p in model.parameters())]
    for recompute in ("selective", "full"):
        for expected, got in zip(grads["none"], grads[recompute], strict=True):
            assert torch.equal(expected, got), recompute


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("config", ["dropout", "gpt2 dropout", "window"])
def test_recomputing_changes_no_bit(ranks: Ranks, config: str, world: int) -> None:
    ranks.run(check_recompute, world=world, config=config)


def saved_bytes(model: Decoder, batch: Batch) -> int:
    """Bytes of the storages that one forward keeps for backward, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(x: Tensor) -> Tensor:
        pointer = x.untyped_storage().data_ptr()
        if pointer not in parameters:
            kept[pointer] = (x.untyped_storage().nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = model.hidden(batch)
    total = sum(size for size, _ in kept.values())
    y.sum().backward()
    return total


BIG = DecoderConfig(vocabulary=64, hidden=64, layers=3, heads=8, kv_heads=4, feed_forward=128)


def measure_memory(sequence: bool, recompute: Recompute = "none", norm: str = "rms", drop: float = 0.0) -> int:
    config = dataclasses.replace(BIG, norm=norm, attention_dropout=drop)
    mesh = Mesh.build(Layout(tp=dist.get_world_size(), sequence_parallel=sequence))
    batch = Batch.pack([torch.arange(128) % 64, torch.arange(128) % 61])
    return saved_bytes(build_model(config, Build(mesh=mesh, recompute=recompute)), batch)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_activation_memory_is_cut_by_tp(ranks: Ranks, norm: str) -> None:
    alone = ranks.run(measure_memory, world=1, sequence=True, norm=norm)[0]
    for world in (2, 4):
        shares = [kept * world / alone for kept in ranks.run(measure_memory, world=world, sequence=True, norm=norm)]
        assert all(0.9 < share < 1.1 for share in shares), shares
    assert min(ranks.run(measure_memory, world=4, sequence=False, norm=norm)) * 4 / alone > 1.3


def test_recomputing_keeps_less(ranks: Ranks) -> None:
    sizes = [
        ranks.run(measure_memory, world=2, sequence=True, recompute=name, drop=0.1)[0]
        for name in ("none", "selective", "full")
    ]
    square = 256 * 256 * BIG.heads // 2 * BIG.layers
    assert sizes[0] - sizes[1] > square * (4 + 1), "the probabilities and what survives of them"
    assert sizes[1] > 1.5 * sizes[2]
    start = 256 // 2 * BIG.hidden * 4  # what each block starts from
    assert sizes[2] < (BIG.layers + 2) * start + 256 * BIG.hidden // BIG.heads * 4 * 2


def measure_traffic(config: str, sequence: bool) -> list[list[list[Any]]]:
    mesh = Mesh.build(Layout(tp=dist.get_world_size(), sequence_parallel=sequence))
    model, batch = build_for(mesh, CONFIGS[config]), batch_of(97, mesh)
    mesh.ledger.reset()
    total = model.loss(batch).total
    passes = [[[e.operation, e.payload] for e in mesh.ledger.recent]]
    mesh.ledger.reset()
    total.backward()
    passes.append([[e.operation, e.payload] for e in mesh.ledger.recent])
    mesh.ledger.reset()
    finalize_gradients(model, mesh)
    return [*passes, [[e.operation, e.payload] for e in mesh.ledger.recent]]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("config", ["repeated", "gpt2"])
def test_traffic_of_a_step_is_exact(ranks: Ranks, config: str, world: int) -> None:
    """Of T x D messages: 4 a layer forward and 6 backward with tokens cut, 2 and 2 without; and the ends.

    The head sums the gradient of its input first, as there are fewer tokens than hidden values.
    """
    layers, hidden = CONFIGS[config].layers, CONFIGS[config].hidden
    td = 13 * hidden * 8
    cut = -(-13 // world) * world * hidden * 8
    loss = [["all_reduce", 13 * 8], ["all_reduce", 2 * 13 * 8]]
    gather, scatter, reduce = ["all_gather", cut], ["reduce_scatter", cut], ["all_reduce", td]
    for forward, backward, _ in ranks.run(measure_traffic, world=world, config=config, sequence=True):
        assert forward == [scatter, *[gather, scatter] * 2 * layers, gather, *loss]
        assert backward == [scatter, *[gather, gather, scatter] * 2 * layers, gather]
    for forward, backward, _ in ranks.run(measure_traffic, world=world, config=config, sequence=False):
        assert forward == [reduce, *[reduce] * 2 * layers, *loss]
        assert backward == [reduce] * (2 * layers + 1)


@pytest.mark.parametrize(("world", "sequence"), [(2, False), (2, True), (4, False), (4, True)])
def test_traffic_of_partial_gradients_is_exact(ranks: Ranks, world: int, sequence: bool) -> None:
    """One message for all norms, and one for each repeated section of each layer: k and v, weight and bias."""
    config = CONFIGS["repeated"]
    norms = 2 * config.layers * config.hidden // 8 + (2 * config.layers + 1) * config.hidden * sequence
    heads = 2 * (config.hidden // 8) * (config.hidden + 1)
    for _, _, finalized in ranks.run(measure_traffic, world=world, config="repeated", sequence=sequence):
        sizes = sorted(size for _, size in finalized)
        assert sum(sizes) == 8 * (norms + (config.layers * heads if world == 4 else 0))
        assert len(sizes) == 1 + (4 * config.layers if world == 4 else 0)
