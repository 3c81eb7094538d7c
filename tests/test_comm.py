"""Collectives: values and gradients against a single process that holds every rank's tensors, and the ledger."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor

from parallel import comm, transport
from parallel.ledger import Entry, Ledger
from parallel.mesh import Axis, Layout, Mesh

HERE = str(Path(__file__).relative_to(Path(__file__).parent.parent))


def here() -> str:
    return f"{HERE}:{sys._getframe(1).f_lineno}"


def below() -> str:
    return f"{HERE}:{sys._getframe(1).f_lineno + 1}"


def pieces(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    """A dim cut into pieces of ceil(n / size), the last ones shorter or empty."""
    rows, total = -(-x.shape[dim] // size), x.shape[dim]
    return [x.narrow(dim, min(r * rows, total), min(rows, total - min(r * rows, total))) for r in range(size)]


def added(xs: list[Tensor]) -> Tensor:
    return torch.stack(xs).sum(0)


@dataclass
class Case:
    """A collective: what it does with every rank's input, and with every rank's gradient of the result.

    ``shapes`` are those of the inputs, one a rank.
    """

    name: str
    call: Callable[[Tensor, Axis], Tensor]
    shapes: list[tuple[int, ...]]
    forward: Callable[[list[Tensor]], list[Tensor]]
    backward: Callable[[list[Tensor]], list[Tensor]]


def cut_cases(n: int, shape: tuple[int, ...], dim: int) -> list[Case]:
    """Collectives that cut or join a dim, for a whole tensor of ``shape``."""
    whole, total = [shape] * n, shape[dim]
    parts = [tuple(p.shape) for p in pieces(torch.empty(shape), n, dim)]
    name = f"{shape} dim {dim}"
    return [
        Case(
            f"all_gather partial {name}",
            lambda x, a: comm.all_gather(x, a, dim, total),
            parts,
            lambda xs: [torch.cat(xs, dim)] * n,
            lambda gs: pieces(added(gs), n, dim),
        ),
        Case(
            f"all_gather replicated {name}",
            lambda x, a: comm.all_gather(x, a, dim, total, grad="replicated"),
            parts,
            lambda xs: [torch.cat(xs, dim)] * n,
            lambda gs: [pieces(g, n, dim)[r] for r, g in enumerate(gs)],
        ),
        Case(
            f"reduce_scatter {name}",
            lambda x, a: comm.reduce_scatter(x, a, dim),
            whole,
            lambda xs: pieces(added(xs), n, dim),
            lambda gs: [torch.cat(gs, dim)] * n,
        ),
        Case(
            f"split {name}",
            lambda x, a: comm.split(x, a, dim),
            whole,
            lambda xs: [pieces(x, n, dim)[r] for r, x in enumerate(xs)],
            lambda gs: [torch.cat(gs, dim)] * n,
        ),
    ]


def whole_cases(n: int, shape: tuple[int, ...]) -> list[Case]:
    """Collectives that keep the shape."""
    zero = torch.zeros(shape, dtype=torch.float64)
    cases = [
        Case(f"all_reduce {shape}", comm.all_reduce, [shape] * n, lambda xs: [added(xs)] * n, lambda gs: gs),
        Case(f"replicate {shape}", comm.replicate, [shape] * n, lambda xs: xs, lambda gs: [added(gs)] * n),
    ]
    for source in range(n):
        cases.append(
            Case(
                f"broadcast from {source}",
                lambda x, a, source=source: comm.broadcast(x, a, source),
                [shape] * n,
                lambda xs, source=source: [xs[source]] * n,
                lambda gs, source=source: [added(gs) if r == source else zero for r in range(n)],
            )
        )
    for by in (-1, 0, 1, 2, 3, n):
        cases.append(
            Case(
                f"shift by {by}",
                lambda x, a, by=by: comm.shift(x, a, by),
                [shape] * n,
                lambda xs, by=by: [xs[(r - by) % n] for r in range(n)],
                lambda gs, by=by: [gs[(r + by) % n] for r in range(n)],
            )
        )
    return cases


def ragged_case(counts: list[list[int]]) -> Case:
    """All-to-all where rank i sends ``counts[i][j]`` rows to rank j."""
    n = len(counts)

    def moved(xs: list[Tensor], table: list[list[int]]) -> list[Tensor]:
        rows = [x.split(row) for x, row in zip(xs, table, strict=True)]
        return [torch.cat([rows[i][j] for i in range(n)]) for j in range(n)]

    back = [list(column) for column in zip(*counts, strict=True)]
    return Case(
        f"all_to_all {counts}",
        lambda x, a: comm.all_to_all(x, a, counts[a.rank], back[a.rank]),
        [(sum(row), 3) for row in counts],
        lambda xs: moved(xs, counts),
        lambda gs: moved(gs, back),
    )


def cases_for(n: int) -> list[Case]:
    counts = [[(3 * i + 5 * j) % 4 for j in range(n)] for i in range(n)]
    silent = [[0] * n, *counts[1:]]
    cases = [ragged_case(counts), ragged_case(silent), ragged_case([[0] * n] * n)]
    for shape, dim in (((8, 3), 0), ((5, 3), 0), ((1, 3), 0), ((7,), 0), ((3, 5), 1), ((2, 6, 4), 1), ((2, 3, 1), -1)):
        cases += cut_cases(n, shape, dim)
    for shape in ((4, 3), (1,), (), (0, 3)):
        cases += whole_cases(n, shape)
    return cases


def check_case(case: Case, axis: Axis, seed: int, dtype: torch.dtype, strided: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double() for shape in case.shapes]
    expected = case.forward(xs)
    gs = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype).double() for y in expected]
    own, g = xs[axis.rank].to(dtype), gs[axis.rank].to(dtype)
    if strided and own.dim() > 1:
        own, g = own.mT.contiguous().mT, g.mT.contiguous().mT
    x = own.clone().requires_grad_()
    y = case.call(x, axis)
    y.backward(g)
    close = {"rtol": 0, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(y, expected[axis.rank].to(dtype), **close, msg=lambda m: f"{case.name}: value: {m}")
    torch.testing.assert_close(
        x.grad, case.backward(gs)[axis.rank].to(dtype), **close, msg=lambda m: f"{case.name}: {m}"
    )
    assert torch.equal(x, own), f"{case.name} wrote over its input"
    assert torch.equal(g, gs[axis.rank].to(dtype)), f"{case.name} wrote over its gradient"


def check_cases(dtype: str, strided: bool) -> int:
    axis = Mesh.build().dp
    cases = cases_for(axis.size)
    for seed, case in enumerate(cases):
        check_case(case, axis, seed, getattr(torch, dtype), strided)
    return len(cases)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("dtype", "strided"), [("float64", False), ("float64", True), ("bfloat16", False)])
def test_values_and_gradients(ranks: Ranks, world: int, dtype: str, strided: bool) -> None:
    done = ranks.run(check_cases, world=world, dtype=dtype, strided=strided)
    assert min(done) > 40


def check_subgroups() -> None:
    mesh = Mesh.build(Layout(dp=2, tp=2))
    for axis in (mesh.dp, mesh.tp, mesh.subaxis("tp", 1)):
        for seed, case in enumerate(cases_for(axis.size)):
            check_case(case, axis, 100 + seed, torch.float64, strided=False)


def test_axes_that_are_part_of_the_world(ranks: Ranks) -> None:
    ranks.run(check_subgroups, world=4)


def check_plain() -> None:
    axis = Mesh.build(Layout(tp=4)).tp
    r = axis.rank
    for op, expected in (("sum", [6.0, -6.0]), ("max", [3.0, 0.0]), ("min", [0.0, -3.0])):
        x = torch.tensor([float(r), -float(r)])
        assert comm.sum_(x, axis, op) is x  # type: ignore[arg-type]
        assert x.tolist() == expected
    pending = [comm.start_all_gather(torch.full((2 if r < 2 else 1 - r % 2, 2), r), axis, total=5)]
    pending.append(comm.start_reduce_scatter(torch.arange(5) * 2**r, axis))
    pending.append(comm.start_all_reduce(torch.tensor([r]), axis))
    gathered, scattered, reduced = (work.wait() for work in pending)
    assert gathered[:, 0].tolist() == [0, 0, 1, 1, 2]
    assert scattered.tolist() == [[0, 15], [30, 45], [60], []][r]
    assert reduced.tolist() == [6]
    assert pending[2].wait() is reduced
    comm.barrier(axis)


def test_collectives_outside_autograd(ranks: Ranks) -> None:
    ranks.run(check_plain, world=4)


def gather_texts(values: list[Any]) -> Any:
    axis = Mesh.build().dp
    return comm.gather_json(values[axis.rank], axis)


@pytest.mark.parametrize(
    "values", [[None, {"a": [1, 2.5, "ü" * 300]}, "", []], [0, 0, 0, 0], ["x" * 100_000, 1, True, {"": None}]]
)
def test_gather_json_of_different_lengths(ranks: Ranks, values: list[Any]) -> None:
    assert ranks.run(gather_texts, world=4, values=values) == [values] * 4
    assert comm.gather_json(values[1], Mesh.single().dp) == [values[1]]
    assert comm.gather_json(values[1], Mesh.fake(Layout(dp=3), 1).dp) == [values[1]] * 3


@pytest.mark.parametrize("size", [2, 4, 512])
def test_fake_axes_give_the_right_shapes(size: int) -> None:
    for rank in {0, 1, size - 1}:
        axis = Mesh.fake(Layout(tp=size), rank).tp
        for case in cases_for(size) if size < 10 else cut_cases(size, (1023, 2), 0) + cut_cases(size, (3, 5), 0):
            x = torch.zeros(case.shapes[rank], requires_grad=True)
            y = case.call(x, axis)
            zeros = [torch.zeros(shape, dtype=torch.float64) for shape in case.shapes]
            assert y.shape == case.forward(zeros)[rank].shape, case.name
            y.backward(torch.ones_like(y))
            assert x.grad is not None
            assert x.grad.shape == x.shape, case.name
        comm.barrier(axis)


def test_alone_every_collective_is_the_identity_and_records_nothing() -> None:
    axis = Mesh.single().tp
    for case in cases_for(1):
        if not case.name.startswith("all_to_all"):
            x = torch.randn(case.shapes[0], requires_grad=True)
            assert case.call(x, axis) is x, case.name
    x = torch.randn(3)
    for work in (comm.start_all_reduce(x, axis), comm.start_all_gather(x, axis), comm.start_reduce_scatter(x, axis)):
        assert work.wait() is x
    comm.barrier(axis)
    assert comm.gather_json({"a": 1}, axis) == [{"a": 1}]
    assert axis.ledger.calls() == 0


def test_chunks_cover_every_row_once() -> None:
    for size in (1, 2, 3, 4, 7):
        axis = Axis("tp", 1 % size, size)
        for total in range(12):
            cuts = [comm.chunk(total, axis, rank) for rank in range(size)]
            assert [row for cut in cuts for row in range(total)[cut]] == list(range(total))
            assert [cut.stop - cut.start for cut in cuts] == [len(p) for p in pieces(torch.empty(total), size)]
            assert comm.chunk(total, axis) == cuts[axis.rank]


def record_all(axis: Axis) -> list[tuple[Entry, Entry]]:
    """Every recorded entry beside what the formulas of :class:`Entry` say, float32."""
    n, r = axis.size, axis.rank
    table: list[tuple[str, int, float, str]] = []

    def run(
        call: Callable[[Tensor], Tensor], shape: tuple[int, ...], place: str, *entries: tuple[str, int, float]
    ) -> None:
        x = torch.zeros(shape, requires_grad=True)
        call(x).sum().backward()
        for index, (operation, payload, share) in enumerate(entries):
            table.append((operation, payload, share, place + (" (backward)" if index else "")))

    gather, reduce, x3 = (n - 1) / n, 2 * (n - 1) / n, 4 * 3
    run(lambda x: comm.all_reduce(x, axis), (8, 3), here(), ("all_reduce", 8 * x3, reduce))
    y = torch.zeros(8, 3, requires_grad=True)
    table.append(("all_reduce", 8 * x3, reduce, below() + " (backward)"))
    comm.replicate(y, axis).sum().backward()
    wide, rows = -(-5 // n) * n * x3, len(range(5)[comm.chunk(5, axis)])
    both = ("all_gather", wide, gather), ("reduce_scatter", wide, gather)
    run(lambda x: comm.all_gather(x, axis, total=5), (rows, 3), here(), *both)
    run(lambda x: comm.all_gather(x, axis, 0, 5, "replicated"), (rows, 3), here(), both[0])
    run(lambda x: comm.reduce_scatter(x, axis), (5, 3), here(), *both[::-1])
    y = torch.zeros(5, 3, requires_grad=True)
    table.append((*both[0], below() + " (backward)"))
    comm.split(y, axis).sum().backward()
    send, receive = [r + 1] * n, [i + 1 for i in range(n)]
    away = [1 - 1 / n, 1 - (r + 1) / sum(receive)]
    there = ("all_to_all", sum(send) * x3, away[0]), ("all_to_all", sum(receive) * x3, away[1])
    run(lambda x: comm.all_to_all(x, axis, send, receive), (sum(send), 3), here(), *there)
    sent = 1.0 if r == 1 else 0.0
    cast = ("broadcast", 2 * x3, sent), ("all_reduce", 2 * x3, reduce)
    run(lambda x: comm.broadcast(x, axis, 1), (2, 3), here(), *cast)
    run(lambda x: comm.shift(x, axis), (2, 3), here(), ("shift", 2 * x3, 1), ("shift", 2 * x3, 1))
    table.append(("all_reduce", 28, reduce, below()))
    comm.sum_(torch.zeros(7), axis)
    expected = [Entry(op, axis.name, payload, round(payload * share), at) for op, payload, share, at in table]
    assert len(expected) == len(axis.ledger.recent) == axis.ledger.calls()
    return list(zip(axis.ledger.recent, expected, strict=True))


def check_records() -> None:
    for got, expected in record_all(Mesh.build().dp):
        assert got == expected, f"{got} is not {expected}"


@pytest.mark.parametrize("world", [2, 4])
def test_the_ledger_is_exact(ranks: Ranks, world: int) -> None:
    ranks.run(check_records, world=world)
    for rank in range(world):
        for got, expected in record_all(Mesh.fake(Layout(tp=world), rank).tp):
            assert got == expected, f"{got} is not {expected}"


def test_ledger_totals() -> None:
    ledger = Ledger(recent=3)
    for entry in (Entry("all_reduce", "tp", 10, 10, "a:1"), Entry("shift", "cp", 4, 4, "b:2")):
        for _ in range(2):
            ledger.record(entry)
    assert [e.operation for e in ledger.recent] == ["all_reduce", "shift", "shift"]
    assert (ledger.calls(), ledger.calls("shift"), ledger.calls(axis="tp"), ledger.calls("shift", "tp")) == (4, 2, 2, 0)
    assert (ledger.payload(), ledger.sent("all_reduce", "tp")) == (28, 20)
    assert [line.split()[:5] for line in ledger.table().splitlines()[1:]] == [
        ["all_reduce", "tp", "2", "20", "20"],
        ["shift", "cp", "2", "8", "8"],
    ]
    ledger.reset()
    assert (ledger.calls(), len(ledger.recent)) == (0, 0)


def gather_and_scatter_by_old_names() -> list[float]:
    axis, names = Mesh.build(Layout(tp=dist.get_world_size())).tp, ("_gather_into", "_reduce_scatter_into")
    kept = [getattr(transport, name) for name in names]
    transport._gather_into, transport._reduce_scatter_into = dist.all_gather_into_tensor, dist.reduce_scatter_tensor
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            whole = comm.all_gather(torch.full((3,), float(axis.rank)), axis)
            return [*whole.tolist(), *comm.reduce_scatter(whole, axis).tolist()]
    finally:
        transport._gather_into, transport._reduce_scatter_into = kept


def test_the_names_that_torch_2_11_has_do_the_same(ranks: Ranks) -> None:
    first, second = ranks.run(gather_and_scatter_by_old_names, world=2)
    assert first == [0.0] * 3 + [1.0] * 3 + [0.0] * 3
    assert second == [0.0] * 3 + [1.0] * 3 + [2.0] * 3
