"""Tensor-parallel layers alone, inside a user's module, against plain torch in float64, and against DTensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import Ranks
from torch import Tensor, nn

from parallel import comm
from parallel.errors import ConfigError, DataError
from parallel.mesh import Axis, Layout, Mesh
from parallel.shard import Section, Shard, finalize_gradients, param_shards
from parallel.tp import (
    ColumnParallelLinear,
    Dense,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from parallel.tp.method import Packed

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
TOKENS = (8, 13, 5, 1)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(build: Callable[[Axis], nn.Module], axis: Axis) -> nn.Module:
    """The module over an axis, its weights drawn alike everywhere, biases included."""
    torch.manual_seed(5)
    module = build(axis).double()
    shards = param_shards(module)
    for seed, (name, parameter) in enumerate(module.named_parameters()):
        if parameter.dim() == 1:
            parameter.data.copy_(shards[name].cut(tensor(*shards[name].shape, seed=50 + seed), axis.place))
    return module


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in module.parameters()]


def check_against(
    build: Callable[[Axis], nn.Module],
    plain: Callable[..., Tensor],
    mesh: Mesh,
    x: Tensor,
    *,
    cut_input: Callable[[Tensor], Tensor] = lambda x: x,
    cut_output: Callable[[Tensor], Tensor] = lambda y: y,
    call: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x),
    gather_gradient: Callable[[Tensor], Tensor] = lambda g: g,
) -> None:
    """Output and every gradient of a module over ``mesh.tp`` equal those of ``plain(x, *whole weights)``.

    ``cut_input`` and ``cut_output`` say what of the plain input and output this rank has; ``gather_gradient`` undoes
    the first.
    """
    alone = make(build, Mesh.single().tp)
    module, params = make(build, mesh.tp), weights(alone)
    shards = param_shards(module)
    for p, (name, mine) in zip(params, module.named_parameters(), strict=True):
        assert torch.equal(shards[name].cut(p.detach(), mesh.place), mine), f"{name} is drawn otherwise"
    whole_x = x.clone().requires_grad_(x.is_floating_point())
    y = plain(whole_x, *params)
    g = tensor(*y.shape, seed=9)
    y.backward(g)
    own_x = cut_input(x).clone().requires_grad_(x.is_floating_point())
    own_y = call(module, own_x)
    torch.testing.assert_close(own_y, cut_output(y).detach(), **CLOSE)
    own_y.backward(cut_output(g).contiguous())
    finalize_gradients(module, mesh)
    for p, (name, mine) in zip(params, module.named_parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(
            mine.grad, shards[name].cut(p.grad, mesh.place), **CLOSE, msg=lambda m: f"{name}: {m}"
        )
    if whole_x.grad is not None:
        torch.testing.assert_close(gather_gradient(own_x.grad), whole_x.grad, **CLOSE, msg=lambda m: f"input: {m}")


def rows_of(axis: Axis) -> Callable[[Tensor], Tensor]:
    return lambda x: x[comm.chunk(x.shape[0], axis)]


def columns_of(axis: Axis) -> Callable[[Tensor], Tensor]:
    return lambda x: x.chunk(axis.size, -1)[axis.rank]


class FeedForward(nn.Module):
    """A user's own module: a column and a row layer around a non-linearity."""

    def __init__(self, axis: Axis, sequence: bool, bias: bool) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(6, 20, axis, bias=bias, sequence_parallel=sequence)
        self.down = RowParallelLinear(20, 7, axis, bias=bias, sequence_parallel=sequence)

    def forward(self, x: Tensor, tokens: int | None = None) -> Tensor:
        return self.down(torch.tanh(self.up(x, tokens)))


def plain_feed_forward(x: Tensor, *w: Tensor) -> Tensor:
    up, up_bias, down, down_bias = w if len(w) == 4 else (w[0], None, w[1], None)
    return F.linear(torch.tanh(F.linear(x, up, up_bias)), down, down_bias)


def check_feed_forward() -> None:
    mesh = Mesh.build(Layout(tp=dist.get_world_size()))
    axis = mesh.tp
    for tokens, sequence, bias in itertools.product(TOKENS, (False, True), (False, True)):
        cut = rows_of(axis) if sequence else lambda x: x
        check_against(
            lambda a, s=sequence, b=bias: FeedForward(a, s, b),
            plain_feed_forward,
            mesh,
            tensor(tokens, 6),
            cut_input=cut,
            cut_output=cut,
            call=lambda module, x, t=tokens: module(x, t),
            gather_gradient=lambda g, s=sequence, t=tokens: comm.start_all_gather(g, axis, t).wait() if s else g,
        )


def check_lone_layers() -> None:
    mesh = Mesh.build(Layout(tp=dist.get_world_size()))
    axis, linear = mesh.tp, lambda x, w, b: F.linear(x, w, b)
    for t in TOKENS:
        x6, x8, rows = tensor(t, 6), tensor(t, 8), rows_of(axis)
        gathered = lambda g, t=t: comm.start_all_gather(g, axis, t).wait()  # noqa: E731
        joined = lambda g: comm.all_gather(g, axis, dim=1)  # noqa: E731
        check_against(lambda a: ColumnParallelLinear(6, 8, a), linear, mesh, x6, cut_output=columns_of(axis))
        check_against(lambda a: ColumnParallelLinear(6, 8, a, gather_output=True), linear, mesh, x6)
        check_against(
            lambda a: ColumnParallelLinear(6, 8, a, gather_output=True, sequence_parallel=True),
            linear,
            mesh,
            x6,
            cut_input=rows,
            call=lambda m, x, t=t: m(x, t),
            gather_gradient=gathered,
        )
        for sequence in (False, True):
            out = rows if sequence else lambda y: y
            check_against(
                lambda a, s=sequence: RowParallelLinear(8, 6, a, sequence_parallel=s),
                linear,
                mesh,
                x8,
                cut_input=columns_of(axis),
                cut_output=out,
                gather_gradient=joined,
            )
            check_against(
                lambda a, s=sequence: RowParallelLinear(8, 6, a, sequence_parallel=s, input_is_parallel=False),
                linear,
                mesh,
                x8,
                cut_output=out,
            )


def check_fused_layers() -> None:
    mesh = Mesh.build(Layout(tp=dist.get_world_size()))
    axis, linear = mesh.tp, lambda x, w, b: F.linear(x, w, b)

    def of_sections(sections: tuple[Section, ...]) -> Callable[[Tensor], Tensor]:
        def cut(y: Tensor) -> Tensor:
            runs, start = [], 0
            for section in sections:
                first, rows, _ = section.share(axis.rank, axis.size)
                runs.append(y[:, start + first : start + first + rows])
                start += section.size
            return torch.cat(runs, 1)

        return cut

    merged = lambda a, **o: MergedColumnParallelLinear(6, [8, 12], a, names=["gate", "up"], **o)  # noqa: E731
    check_against(merged, linear, mesh, tensor(5, 6), cut_output=of_sections((Section(8), Section(12))))
    check_against(lambda a: merged(a, gather_output=True), linear, mesh, tensor(5, 6))
    for heads, kv in ((8, 4), (8, 2), (4, 1), (4, 4)):
        qkv = lambda a, h=heads, k=kv, **o: QKVParallelLinear(6, 3, h, k, a, **o)  # noqa: E731
        q, k = Section(3 * heads, 3), Section(3 * kv, 3, repeat=True)
        module = make(qkv, axis)
        parts = module.split_heads(module(tensor(5, 6)))
        assert [tuple(p.shape) for p in parts] == [
            (5, heads // axis.size, 3),
            *[(5, max(1, kv // axis.size), 3)] * 2,
        ]
        if kv < axis.size:
            check_repeated(qkv, mesh, (q, k, k), of_sections)
        else:
            check_against(qkv, linear, mesh, tensor(5, 6), cut_output=of_sections((q, k, k)))
            check_against(lambda a, qkv=qkv: qkv(a, gather_output=True), linear, mesh, tensor(5, 6))


def check_repeated(build: Any, mesh: Mesh, sections: tuple[Section, ...], of_sections: Any) -> None:
    """Repeated heads: every rank uses its copy, so the gradient of the whole is the sum over the copies."""
    axis = mesh.tp
    x, alone, module = tensor(5, 6), make(build, Mesh.single().tp), make(build, axis)
    y = alone(x)
    own = of_sections(sections)
    torch.testing.assert_close(module(x), own(y).detach(), **CLOSE)
    weight = [tensor(*own(y).shape, seed=70 + rank) for rank in range(axis.size)]
    total = torch.zeros((), dtype=torch.float64)
    for rank in range(axis.size):
        there = Mesh.fake(mesh.layout, rank).tp
        runs, start = [], 0
        for section in sections:
            first, rows, _ = section.share(there.rank, there.size)
            runs.append(y[:, start + first : start + first + rows])
            start += section.size
        total = total + (torch.cat(runs, 1) * weight[rank]).sum()
    total.backward()
    (module(x) * weight[axis.rank]).sum().backward()
    finalize_gradients(module, mesh)
    shards = param_shards(module)
    for (name, mine), theirs in zip(module.named_parameters(), alone.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad, shards[name].cut(theirs.grad, mesh.place), **CLOSE)
    gathered = make(lambda a: build(a, gather_output=True), axis)(x)
    torch.testing.assert_close(gathered, y.detach(), **CLOSE)


def check_vocabulary() -> None:
    mesh = Mesh.build(Layout(tp=dist.get_world_size()))
    axis, rows = mesh.tp, rows_of(mesh.tp)
    for sequence, vocabulary in itertools.product((False, True), (97, 8, 3)):
        cut = rows if sequence else lambda x: x
        ids = torch.tensor([i % vocabulary for i in (0, 96, 24, 25, 96, 50, 74, 75, 1, 24, 2, 3, 49)])
        check_against(
            lambda a, s=sequence, v=vocabulary: VocabParallelEmbedding(v, 4, a, sequence_parallel=s),
            lambda x, w: F.embedding(x, w),
            mesh,
            ids,
            cut_output=cut,
        )
        check_against(
            lambda a, s=sequence, v=vocabulary: ParallelLMHead(v, 4, a, sequence_parallel=s),
            lambda x, w: F.linear(x, w),
            mesh,
            tensor(13, 4),
            cut_input=cut,
            call=lambda m, x: m(x, 13),
            gather_gradient=lambda g, s=sequence: comm.start_all_gather(g, axis, 13).wait() if s else g,
        )
    module = make(lambda a: VocabParallelEmbedding(97, 4, a), axis)
    for bad in (97, -1, 99):
        with pytest.raises(DataError, match=f"token id {bad} is outside the vocabulary of 97"):
            module(torch.tensor([0, bad, 5]))
    assert module(torch.zeros(0, dtype=torch.int64)).shape == (0, 4)


CHECKS = [check_feed_forward, check_lone_layers, check_fused_layers, check_vocabulary]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_layers_equal_plain_torch(ranks: Ranks, check: Callable[[], None], world: int) -> None:
    ranks.run(check, world=world)


class Normed(nn.Module):
    """A norm in the sequence-parallel region, before the pair."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.norm = NormOfTokens(6, axis)
        self.inner = FeedForward(axis, True, True)

    def forward(self, x: Tensor, tokens: int | None = None) -> Tensor:
        return self.inner(self.norm(x), tokens)


class NormOfTokens(nn.LayerNorm):
    """Layer norm of this rank's tokens."""

    def __init__(self, size: int, axis: Axis) -> None:
        super().__init__(size)
        self.name = axis.name

    def shards(self) -> dict[str, Shard]:
        return {name: Shard(shape=(6,), partial=(self.name,)) for name in ("weight", "bias")}


def check_norm() -> None:
    mesh = Mesh.build(Layout(tp=dist.get_world_size()))
    cut = rows_of(mesh.tp)
    for tokens in TOKENS:
        check_against(
            Normed,
            lambda x, w, b, *rest: plain_feed_forward(F.layer_norm(x, (6,), w, b), *rest),
            mesh,
            tensor(tokens, 6),
            cut_input=cut,
            cut_output=cut,
            call=lambda module, x, t=tokens: module(x, t),
            gather_gradient=lambda g, t=tokens: comm.start_all_gather(g, mesh.tp, t).wait(),
        )


@pytest.mark.parametrize("world", [2, 4])
def test_finalize_gradients_completes_norms_under_sequence_parallelism(ranks: Ranks, world: int) -> None:
    ranks.run(check_norm, world=world)


def traffic(sequence: bool) -> list[Any]:
    mesh = Mesh.build(Layout(tp=dist.get_world_size()))
    axis, module = mesh.tp, make(lambda a: FeedForward(a, sequence, False), mesh.tp)
    x = tensor(8, 6)[comm.chunk(8, axis) if sequence else slice(None)].requires_grad_()
    mesh.ledger.reset()
    y = module(x)
    forward = [(e.operation, e.payload, e.sent) for e in mesh.ledger.recent]
    mesh.ledger.reset()
    y.sum().backward()
    assert all(e.place.endswith(" (backward)") for e in mesh.ledger.recent), mesh.ledger.table()
    assert all(e.place.startswith("tests/test_tp_layers.py:") for e in mesh.ledger.recent), mesh.ledger.table()
    return [forward, [(e.operation, e.payload, e.sent) for e in mesh.ledger.recent]]


@pytest.mark.parametrize("world", [2, 4])
def test_a_pair_costs_what_the_papers_say(ranks: Ranks, world: int) -> None:
    def entry(operation: str, width: int, times: int = 1) -> list[Any]:
        size = 8 * width * 8
        return [operation, size, size * times * (world - 1) // world]

    for forward, backward in ranks.run(traffic, world=world, sequence=True):
        assert forward == [entry("all_gather", 6), entry("reduce_scatter", 7)]
        assert backward == [entry("all_gather", 7), entry("all_gather", 6), entry("reduce_scatter", 6)]
    for forward, backward in ranks.run(traffic, world=world, sequence=False):
        assert forward == [entry("all_reduce", 7, 2)]
        assert backward == [entry("all_reduce", 6, 2)]


def test_what_the_ranks_cannot_share_is_refused() -> None:
    axis = Mesh.fake(Layout(tp=4), 0).tp
    with pytest.raises(ConfigError, match="ColumnParallelLinear: 4 tensor-parallel ranks cannot share the 6 units"):
        ColumnParallelLinear(4, 6, axis)
    with pytest.raises(ConfigError, match=r"RowParallelLinear: 4 .* 6 units"):
        RowParallelLinear(6, 4, axis)
    with pytest.raises(ConfigError) as refused:
        MergedColumnParallelLinear(4, [6, 8, 7], axis)
    assert len(refused.value.problems) == 2
    with pytest.raises(ConfigError, match="6 units of q"):
        QKVParallelLinear(4, 2, 6, 2, axis)
    with pytest.raises(ConfigError, match="3 units of k"):
        QKVParallelLinear(4, 2, 12, 3, axis)
    assert QKVParallelLinear(4, 2, 8, 1, axis).weight.shape == (8, 4)


@pytest.mark.parametrize("sequence", [True, False])
def test_backward_of_a_column_layer_overlaps_its_communication(monkeypatch: pytest.MonkeyPatch, sequence: bool) -> None:
    """The input is gathered beside the input's gradient, whose sum is on its way beside the weight's gradient."""
    events: list[str] = []

    class Watched(Dense):
        def input_gradient(self, gy_TO: Tensor, weight: Tensor) -> Tensor:
            events.append("input gradient")
            return super().input_gradient(gy_TO, weight)

        def weight_gradient(self, gy_TO: Tensor, x_TI: Tensor) -> Tensor:
            events.append("weight gradient")
            return super().weight_gradient(gy_TO, x_TI)

    def watch(name: str) -> None:
        start = getattr(comm, name)

        def started(*arguments: Any, **options: Any) -> comm.Pending:
            events.append(f"start {name}")
            pending = start(*arguments, **options)
            return comm.Pending(pending.result, Done(name), pending.rows)

        monkeypatch.setattr(comm, name, started)

    class Done:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait(self) -> None:
            events.append(f"end {self.name}")

    axis = Mesh.fake(Layout(tp=2), 0).tp
    layer = ColumnParallelLinear(6, 8, axis, sequence_parallel=sequence, method=Watched())
    y = layer(torch.randn(4, 6, requires_grad=True))
    for name in ("start_all_gather", "start_reduce_scatter", "start_all_reduce"):
        watch(name)
    y.sum().backward()
    total = "start_reduce_scatter" if sequence else "start_all_reduce"
    gather = ["start start_all_gather"] if sequence else []
    gathered = ["end start_all_gather"] if sequence else []
    assert events == [
        *gather,
        "input gradient",
        f"start {total}",
        *gathered,
        "weight gradient",
        f"end {total}",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_multiplies_as_it_did(dtype: torch.dtype) -> None:
    for out, in_, tokens in ((97, 33, 1), (64, 48, 31), (8, 5, 300)):
        weight, x, bias = tensor(out, in_).to(dtype), tensor(tokens, in_, seed=1).to(dtype), tensor(out).to(dtype)
        method, want = Packed(), F.linear(x.double(), weight.double(), bias.double())
        held = torch.nn.Parameter(weight.clone())
        method.finish(held, keep=False)
        got = method.product(x, held, bias).double()
        assert (got - want).abs().max() <= (0.02 if dtype == torch.bfloat16 else 1e-5) * want.abs().max()
