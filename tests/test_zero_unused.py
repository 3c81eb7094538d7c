"""Ranks that use different parameters in one pass: no rank waits for ever, nothing of a gradient is lost."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn

from parallel import comm
from parallel.mesh import Layout, Mesh
from zero.bucket import Bucket
from zero.optimizer import OptimizerConfig, ZeroConfig, ZeroOptimizer
from zero.script import OutOfStep

OPTIMIZER = OptimizerConfig(lr=1e-2, clip=0.5, bucket_mb=4e-4)


@pytest.fixture(scope="module")
def own(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """A pool for failures alone: what they leave under way is nobody else's."""
    pool = Ranks([*request.config.getini("filterwarnings")])
    yield pool
    pool.close()


class Block(nn.Module):
    """A layer that all tokens pass, and experts of which a batch uses one, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """(N, 6) -> (N, 6)."""
        x = torch.tanh(self.shared(x))
        return x + self.experts[expert](x) if expert < 3 else x


class Head(nn.Module):
    """A part for all batches, and one for some."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.seldom = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        """(N, 6) -> (N, 2)."""
        return self.always(x) + self.seldom(x) if both else self.always(x)


class Routed(nn.Module):
    """Blocks with experts, a picture tower and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = Head()
        self.skipped = -1

    def forward(self, x: Tensor, pictures: Tensor, choice: list[int]) -> Tensor:
        """(N, 6), (P, 4) -> a scalar; ``choice``: the expert of every block."""
        x = torch.cat([x, self.tower(pictures)])
        for index, (block, expert) in enumerate(zip(self.blocks, choice, strict=True)):
            if index != self.skipped:
                x = block(x, expert)
        return self.head(x, choice[0] == 1).square().sum()


Part = tuple[Tensor, Tensor, list[int]]


def parts(step: int, rank: int) -> list[Part]:
    """Two microbatches of one of two ranks; ranks have other experts, and one of them seldom has pictures."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    found: list[Part] = []
    for index in range(2):
        x, pictures = (torch.randn(3, n, generator=generator).double() for n in (6, 4))
        choice = [(rank + index) % 4, (2 * rank + step) % 3, 2 * rank]
        if rank == 0:
            choice[0] = 0
        found.append((x, pictures[: 0 if rank == 1 and index == 0 else 3], choice))
    return found


def model_of(seed: int = 3) -> Routed:
    torch.manual_seed(seed)
    return Routed().double()


def expected(steps: int) -> dict[str, Tensor]:
    """Plain torch on one device."""
    model = model_of()
    groups = [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in model.parameters()]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(steps):
        for rank in range(2):
            for part in parts(step, rank):
                (model(*part) / 12).backward()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        plain.step()
        plain.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def difference(weights: dict[str, Tensor], steps: int) -> float:
    theirs = expected(steps)
    assert weights.keys() == theirs.keys()
    return max(float((w - theirs[n]).abs().max()) for n, w in weights.items())


def routed(zero: dict[str, Any]) -> tuple[float, list[int]]:
    """On the ranks: three steps against one device; how many buckets were on their way before the last steps ended."""
    mesh = Mesh.build(Layout(dp=2))
    model = model_of()
    optimizer = ZeroOptimizer(model, mesh, OPTIMIZER, zero=ZeroConfig(**zero))
    early = []
    for step in range(3):
        optimizer.begin()
        for index, part in enumerate(parts(step, mesh.data.rank)):
            optimizer.expect_last(index == 1)
            (model(*part) / 12).backward()
        early.append(sum(b.sums > zero["stage"] // 2 for b in optimizer.buckets.buckets))
        comm.sum_(torch.ones(3), mesh.data)  # as the trainer does for the loss, before gradients are complete
        optimizer.step()
    weights = {name: value.clone() for name, value in optimizer.pieces("master")}
    return difference(weights, 3), early


@pytest.mark.parametrize("zero", [{"stage": stage} for stage in range(4)] + [{"stage": 3, "ahead": 0}], ids=str)
def test_ranks_may_use_different_parameters(ranks: Any, zero: dict[str, Any]) -> None:
    """Experts, a tower without pictures, a seldom part; reductions overlap again once it is known what comes late."""
    for apart, early in ranks.run(routed, world=2, zero=zero):
        assert apart < 1e-12
        assert early[2] >= max(2, early[0])


def twice(stage: int) -> float:
    """On the ranks: two backward passes where one was announced; gradients come after their bucket was reduced."""
    mesh = Mesh.build(Layout(dp=2))
    model = model_of()
    optimizer = ZeroOptimizer(model, mesh, OPTIMIZER, zero=ZeroConfig(stage=stage))
    for step in range(3):
        optimizer.begin()
        optimizer.expect_last(True)
        for part in parts(step, mesh.data.rank):
            (model(*part) / 12).backward()
        optimizer.step()
    return difference({name: value.clone() for name, value in optimizer.pieces("master")}, 3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_that_come_after_the_reduction_are_not_lost(ranks: Any, stage: int) -> None:
    assert max(ranks.run(twice, world=2, stage=stage)) < 1e-12


def broken(stage: int) -> float:
    """On the ranks: the first step is broken off in backward, when some buckets are reduced, not the same on each."""
    mesh = Mesh.build(Layout(dp=2))
    model = model_of()
    optimizer = ZeroOptimizer(model, mesh, OPTIMIZER, zero=ZeroConfig(stage=stage))

    def fail(grad: Tensor) -> Tensor:
        raise ValueError("broken on the way")

    handle = model.get_parameter("blocks.0.shared.weight").register_hook(fail)
    optimizer.begin()
    optimizer.expect_last(True)
    with pytest.raises(ValueError, match="broken"):
        (model(*parts(7, mesh.data.rank)[1]) / 12).backward()
    handle.remove()
    for step in range(2):
        optimizer.begin()
        for index, part in enumerate(parts(step, mesh.data.rank)):
            optimizer.expect_last(index == 1)
            (model(*part) / 12).backward()
        optimizer.step()
    return difference({name: value.clone() for name, value in optimizer.pieces("master")}, 2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_breaks_in_backward_leaves_nothing(ranks: Any, stage: int) -> None:
    assert max(ranks.run(broken, world=2, stage=stage)) < 1e-12


def alive(stage: int) -> tuple[int, int]:
    """On the ranks: the most whole gradients of buckets in memory at a time, and the buckets."""
    mesh = Mesh.build(Layout(dp=2))
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(9, 9, bias=False) for _ in range(12)))
    optimizer = ZeroOptimizer(model, mesh, OPTIMIZER, zero=ZeroConfig(stage=stage))
    rooms: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def room() -> Tensor:
            nonlocal most
            made = make()
            rooms.append(weakref.ref(made))
            most = max(most, sum(ref() is not None for ref in rooms))
            return made

        return room

    for bucket in optimizer.buckets.buckets:
        bucket._room = watched(bucket._room)  # type: ignore[method-assign]
    optimizer.begin()
    optimizer.expect_last(True)
    model(torch.randn(4, 9)).square().sum().backward()
    optimizer.step()
    return most, len(optimizer.buckets.buckets)


@pytest.mark.parametrize("stage", [2, 3])
def test_few_gradients_are_whole_at_a_time(ranks: Any, stage: int) -> None:
    """One that is filling and those of which the sums are under way."""
    for most, buckets in ranks.run(alive, world=2, stage=stage):
        assert buckets == 12
        assert most <= 4


def parted(how: str, at: int) -> str:
    """On the ranks: what is said when one of them does something else at a step."""
    mesh = Mesh.build(Layout(dp=2, tp=2))
    model = model_of()
    optimizer = ZeroOptimizer(model, mesh, OPTIMIZER, zero=ZeroConfig(stage=3))
    try:
        for step in range(at + 1):
            if step == at and mesh.data.rank == 1:
                if how == "whole":
                    with optimizer.whole():
                        return "all parameters were gathered by one rank alone"
                model.skipped = 1
            optimizer.begin()
            optimizer.expect_last(True)
            model(*parts(step, mesh.data.rank)[1]).backward()
            optimizer.step()
    except OutOfStep as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("how,at", [("skip", 0), ("skip", 2), ("whole", 1)])
def test_ranks_that_gather_different_parameters_are_named(own: Ranks, how: str, at: int) -> None:
    """A block that one rank leaves out is as large as the next: gathered without a word the two would be mixed."""
    found = own.run(parted, world=4, how=how, at=at)
    for text in found:
        assert "data rank 1 of 2" in text or "rank 1 at" in text, text
        assert ("all parameters" if how == "whole" else "forward of blocks.2") in text, text
    assert found[0] == found[2]


def test_the_order_of_reduction_does_not_depend_on_the_rank(ranks: Any) -> None:
    one, other = ranks.run(sequence, world=2)
    assert one == other
    assert len(one) > 3 * 5


def sequence() -> list[int]:
    """On the ranks: the buckets in the order in which they are reduced, as places in the model."""
    mesh = Mesh.build(Layout(dp=2))
    model = model_of()
    optimizer = ZeroOptimizer(model, mesh, OPTIMIZER, zero=ZeroConfig(stage=2))
    buckets, reduce = optimizer.buckets.buckets, Bucket.reduce
    order: list[int] = []
    for place, bucket in enumerate(buckets):

        def noted(axis: Any, place: int = place, bucket: Bucket = bucket) -> None:
            order.append(place)
            reduce(bucket, axis)

        bucket.reduce = noted  # type: ignore[method-assign]
    for step in range(3):
        optimizer.begin()
        for part in parts(step, mesh.data.rank):
            optimizer.expect_last(False)
            (model(*part) / 12).backward()
        optimizer.step()
    return order
