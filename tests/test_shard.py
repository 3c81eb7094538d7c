"""The shard table: cutting, joining, resharding and initial values, at every layout."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from torch import Tensor, nn

from parallel import rng
from parallel.errors import ShardError
from parallel.mesh import Layout, Mesh
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import build_model
from parallel.reshard import reshard
from parallel.shard import Section, Shard, assemble, fill, finalize_gradients, initialize, param_shards
from parallel.tp import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

Q, KV = Section(8 * 3, 3, name="q"), Section(2 * 3, 3, repeat=True, name="k")
QKV = Shard(shape=(36, 5), split=("tp", None), sections=(Q, KV, KV))
SHARDS = {
    "whole": Shard(shape=(3, 5)),
    "scalar": Shard(shape=()),
    "column": Shard(shape=(8, 3), split=("tp", None)),
    "row": Shard(shape=(3, 8), split=(None, "tp")),
    "gate_up": Shard(shape=(16, 2), split=("tp", None), sections=(Section(8), Section(8))),
    "qkv": QKV,
    "qkv_bias": Shard(shape=(36,), split=("tp",), sections=(Q, KV, KV)),
    "heads_row": Shard(shape=(2, 24), split=(None, "tp"), sections=(Q,)),
    "vocabulary": Shard(shape=(97, 3), split=("tp", None), pad=True),
    "tiny_vocabulary": Shard(shape=(2, 3), split=("tp", None), pad=True),
    "experts": Shard(shape=(4, 6, 5), split=("ep", "etp", None)),
}


def counting(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(1, 1 + math.prod(shape), dtype=torch.float64).view(shape)


def places(layout: Layout) -> list[dict[str, tuple[int, int]]]:
    return [layout.place(rank) for rank in range(layout.world)]


LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=4),
    Layout(dp=2, tp=2),
    Layout(dp=4),
    Layout(cp=2, tp=2),
    Layout(dp=4, ep=4),
    Layout(dp=2, tp=2, ep=2, etp=2),
    Layout(tp=4, ep=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", SHARDS)
def test_join_undoes_cut_and_each_value_is_held_once(name: str, layout: Layout) -> None:
    shard = SHARDS[name]
    full = counting(shard.shape)
    locals_ = [(place, shard.cut(full, place)) for place in places(layout)]
    assert torch.equal(shard.join(locals_), full)
    held = [part.reshape(-1) for place, local in locals_ for part in shard.held(place, local)]
    assert torch.equal(torch.cat(held).sort().values, full.reshape(-1))
    for place, local in locals_:
        assert tuple(local.shape) == shard.local_shape(place)
        kept = torch.cat([local[piece.local].reshape(-1) for piece in shard.pieces(place)] or [torch.zeros(0)])
        assert int((local != 0).sum()) == kept.numel(), "what lies outside the pieces is not zero"


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4), st.booleans()), min_size=1, max_size=4),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.integers(0, 2),
    st.booleans(),
    st.lists(st.integers(1, 3), min_size=2, max_size=2),
)
@settings(max_examples=150, deadline=None)
def test_sections_of_any_shape(
    parts: list[tuple[int, int, bool]], size: int, dim: int, pad: bool, rest: list[int]
) -> None:
    sections = tuple(Section(units * unit, unit, repeat) for units, unit, repeat in parts)
    shape = [*rest[:dim], sum(s.size for s in sections), *rest[dim:]]
    split = tuple("tp" if d == dim else None for d in range(3))
    shard = Shard(shape=tuple(shape), split=split, sections=sections, pad=pad)
    fits = all(s.divides(size) for s in sections)
    if not fits and not pad:
        with pytest.raises(ShardError, match=f"{size} ranks do not divide"):
            shard.local_shape({"tp": (0, size)})
        return
    repeats = any(s.repeat and size > s.size // s.unit and size % (s.size // s.unit) for s in sections)
    if repeats:
        return
    full = counting(shard.shape)
    locals_ = [(place, shard.cut(full, place)) for place in places(Layout(tp=size))]
    assert torch.equal(shard.join(reversed(locals_)), full)
    held = [part.reshape(-1) for place, local in locals_ for part in shard.held(place, local)]
    assert torch.equal(torch.cat(held).sort().values, full.reshape(-1))


def test_fused_sections_are_cut_each_by_itself() -> None:
    full = counting((36, 5))
    for rank in range(4):
        local = QKV.cut(full, {"tp": (rank, 4)})
        heads = [2 * rank, 2 * rank + 1, 8 + rank // 2, 10 + rank // 2]
        assert torch.equal(local, torch.cat([full[3 * h : 3 * h + 3] for h in heads]))
        assert [piece.first for piece in QKV.pieces({"tp": (rank, 4)})] == [True, rank % 2 == 0, rank % 2 == 0]
    assert QKV.repeated(4)
    assert not QKV.repeated(2)


def test_a_vocabulary_that_the_ranks_do_not_divide_is_padded_with_zeros() -> None:
    shard, full = SHARDS["vocabulary"], counting((97, 3))
    pieces = [shard.cut(full, {"tp": (rank, 4)}) for rank in range(4)]
    assert torch.equal(torch.cat(pieces)[:97], full)
    assert torch.equal(pieces[3][22:], torch.zeros(3, 3, dtype=torch.float64))


def test_assemble_reads_no_more_than_the_piece() -> None:
    full, boxes = counting((36, 5)), []
    local = assemble(QKV, {"tp": (1, 4)}, lambda box: boxes.append(box) or full[box], torch.float64)
    assert torch.equal(local, QKV.cut(full, {"tp": (1, 4)}))
    assert sum(full[box].numel() for box in boxes) == local.numel()


def test_what_contradicts_the_table_is_an_error() -> None:
    column, two = SHARDS["column"], Layout(tp=2).place(0)
    with pytest.raises(ShardError, match="expected the whole tensor"):
        column.cut(torch.zeros(8, 4), two)
    with pytest.raises(ShardError, match="expected a piece"):
        column.join([(two, torch.zeros(8, 3))])
    with pytest.raises(ShardError, match="cover 12 of"):
        column.join([(two, torch.zeros(4, 3))])
    with pytest.raises(ShardError, match="cover 0 of"):
        column.join([])
    with pytest.raises(ShardError, match="3 ranks do not divide the 8 units"):
        column.cut(torch.zeros(8, 3), {"tp": (0, 3)})
    with pytest.raises(ShardError, match="one entry for each dim"):
        Shard(shape=(3, 4), split=("tp",))
    with pytest.raises(ShardError, match="do not add up"):
        Shard(shape=(3, 4), split=("tp", None), sections=(Section(4),))
    with pytest.raises(ShardError):
        column.join([(two, torch.zeros(4, 3))] * 2)
    with pytest.raises(ShardError, match="units"):
        QKV.local_shape({"tp": (0, 3)})
    with pytest.raises(ShardError, match="whole units"):
        Shard(shape=(7,), split=("tp",), sections=(Section(7, unit=2),))


MOVES = [
    (Layout(tp=4), Layout(dp=4)),
    (Layout(dp=4), Layout(tp=4)),
    (Layout(dp=2, tp=2), Layout(tp=4)),
    (Layout(tp=4), Layout(dp=2, tp=2)),
    (Layout(tp=2), Layout(tp=4)),
    (Layout(tp=4), Layout(tp=2)),
    (Layout(), Layout(dp=2, tp=2)),
    (Layout(dp=2, tp=2), Layout(dp=2, tp=2)),
    (Layout(dp=4, ep=4), Layout(dp=2, tp=2, ep=2, etp=2)),
    (Layout(dp=2, tp=2, ep=2), Layout(dp=4, ep=4)),
    (Layout(cp=2, tp=2), Layout(tp=4, ep=2)),
]


def lacking(shard: Shard, old: Layout, new: Layout) -> int:
    """How many values of their new pieces the ranks do not hold yet, over all ranks."""
    lack, ids = 0, counting(shard.shape)
    for rank in range(new.world):
        wanted = set(shard.cut(ids, new.place(rank)).reshape(-1).tolist()) - {0.0}
        if rank < old.world:
            wanted -= set(shard.cut(ids, old.place(rank)).reshape(-1).tolist())
        lack += len(wanted)
    return lack


def check_moves() -> list[list[int]]:
    mesh = Mesh.build()
    sent = []
    for (old, new), (name, shard) in itertools.product(MOVES, SHARDS.items()):
        full = counting(shard.shape)
        local = shard.cut(full, old.place(mesh.rank)) if mesh.rank < old.world else torch.zeros(0, dtype=full.dtype)
        mesh.ledger.reset()
        moved = reshard(local, shard, old, new, mesh.world)
        expected = shard.cut(full, new.place(mesh.rank)) if mesh.rank < new.world else torch.zeros(0, dtype=full.dtype)
        assert torch.equal(moved, expected), f"{name}: {old} to {new}"
        sent.append(mesh.ledger.sent() // 8)
    return sent


def test_reshard_moves_what_is_lacking_and_nothing_else(ranks: Ranks) -> None:
    sent = ranks.run(check_moves, world=4)
    for index, ((old, new), (name, shard)) in enumerate(itertools.product(MOVES, SHARDS.items())):
        assert sum(row[index] for row in sent) == lacking(shard, old, new), f"{name}: {old} to {new}"


CONFIG = DecoderConfig(
    vocabulary=97, hidden=32, layers=2, heads=8, kv_heads=2, feed_forward=40, qkv_bias=True, qk_norm=True
)


def weights(tp: int, dtype: torch.dtype, seed: int = 3, config: DecoderConfig = CONFIG) -> dict[str, Tensor]:
    """The whole weights, joined from the pieces of ``tp`` fake ranks."""
    meshes = [Mesh.fake(Layout(tp=tp), rank) for rank in range(tp)]
    models = [build_model(config, Build(mesh=mesh, dtype=dtype), seed) for mesh in meshes]
    tables = [dict(model.named_parameters()) for model in models]
    return {
        name: shard.join((mesh.place, table[name].detach()) for mesh, table in zip(meshes, tables, strict=True))
        for name, shard in param_shards(models[0]).items()
    }


def test_initial_weights_are_the_same_at_every_layout_and_in_every_precision() -> None:
    whole = weights(1, torch.float32)
    for tp, dtype in itertools.product((1, 2, 4), (torch.float32, torch.float64, torch.bfloat16)):
        for name, weight in weights(tp, dtype).items():
            assert weight.dtype == dtype
            assert torch.equal(weight, whole[name].to(dtype)), f"{name}, tp {tp}, {dtype}"
    other = weights(1, torch.float32, seed=4)
    for name, weight in whole.items():
        if weight.dim() == 2:
            assert not torch.equal(weight, other[name]), name
    for one, two in itertools.combinations((w for w in whole.values() if w.dim() == 2), 2):
        assert one.shape != two.shape or not torch.equal(one, two), "two weights draw alike"


def test_initial_weights_have_the_stated_deviation() -> None:
    whole = weights(2, torch.float64, config=DecoderConfig(vocabulary=997, hidden=64, layers=2, heads=4, norm="layer"))
    for name, weight in whole.items():
        if weight.dim() == 2:
            std = 0.02 / (2 if ("out." in name or "down." in name) else 1)
            assert abs(weight.std() / std - 1) < 5 / (2 * weight.numel()) ** 0.5, name
            assert abs(weight.mean()) < 5 * std / weight.numel() ** 0.5, name
        else:
            assert torch.equal(weight, torch.full_like(weight, 0.0 if name.endswith("bias") else 1.0))


def test_every_value_follows_from_its_global_index_and_padding_is_zero() -> None:
    shard = Shard(shape=(97, 3), split=("tp", None), pad=True, mean=5.0, std=2.0)
    expected = (rng.normal(7, torch.arange(97 * 3)) * 2.0 + 5.0).float().view(97, 3)
    for rank in range(4):
        local = torch.full((25, 3), math.nan)
        fill(local, shard, {"tp": (rank, 4)}, 7)
        assert torch.equal(local, shard.cut(expected, {"tp": (rank, 4)}))


class Part(nn.Module):
    """A user's module: layers of ours beside plain parameters."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.embedding = VocabParallelEmbedding(10, 4, mesh.tp)
        self.up = ColumnParallelLinear(4, 8, mesh.tp)
        self.down = RowParallelLinear(8, 4, mesh.tp, sequence_parallel=True)
        self.scale = nn.Parameter(torch.zeros(()))
        self.again = self.up


def test_the_table_has_one_entry_a_parameter_under_its_own_name() -> None:
    model = Part(Mesh.fake(Layout(tp=4), 3))
    table = param_shards(model)
    assert list(table) == [name for name, _ in model.named_parameters()]
    assert table["up.weight"] == Shard(shape=(8, 4), split=("tp", None), std=0.5)
    assert table["down.bias"].partial == ("tp",)
    assert table["scale"] == Shard(shape=())
    for name, parameter in model.named_parameters():
        assert tuple(parameter.shape) == table[name].local_shape({"tp": (3, 4)})
    initialize(model, {"tp": (3, 4)}, seed=0)
    assert torch.equal(model.embedding.weight[1:], torch.zeros(2, 4))


def finalize_by_hand() -> list[list[float]]:
    mesh = Mesh.build(Layout(tp=4))
    model = Part(mesh)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 10.0 ** dist.get_rank())
    model.embedding.weight.grad = None
    finalize_gradients(model, mesh)
    names = ("up.weight", "up.bias", "down.weight", "down.bias", "scale")
    grads = {name: p.grad for name, p in model.named_parameters()}
    return [[float(x) for x in {float(v) for v in grads[name].reshape(-1)}] for name in names]  # type: ignore[union-attr]


def test_finalize_gradients_sums_only_what_is_partial(ranks: Ranks) -> None:
    for rank, grads in enumerate(ranks.run(finalize_by_hand, world=4)):
        own = [10.0**rank]
        assert grads == [own, own, own, [1111.0], own]


def test_memory_for_a_model_is_had_without_importing_sympy() -> None:
    """Which takes as long as all else that a small model needs to be loaded."""
    code = (
        "import sys; from parallel.mesh import Mesh; from parallel.models.build import Build;"
        "from parallel.models.config import DecoderConfig; from parallel.models.decoder import build_model;"
        "model = build_model(DecoderConfig(vocabulary=8, hidden=8, heads=2, layers=1), Build(mesh=Mesh.single()));"
        "assert not any(p.is_meta for p in model.parameters()); sys.exit('sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
