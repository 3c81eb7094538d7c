"""ZeRO with what models and runs do: reuse, absence, frozen parts, plain layers, evaluation, errors, schedules."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.mesh import Layout, Mesh
from parallel.models.config import DecoderConfig
from tests.test_trainer import CONFIG, batches
from tests.test_zero import OPTIMIZER, trainer_on, worst
from zero.optimizer import OptimizerConfig, ZeroConfig, ZeroOptimizer


class Odd(nn.Module):
    """Plain torch layers: one used twice, one not at all, one frozen, and a parameter that no part of it owns."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((5,), 1.5))
        self.first = nn.Linear(5, 7)
        self.twice = nn.Linear(7, 7)
        self.never = nn.Linear(7, 3)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.mixed = nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7))
        self.blocks = nn.ModuleList([nn.Linear(7, 7), nn.Linear(7, 2)])
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4, 5) -> (N, 4, 2)."""
        x = torch.tanh(self.first(x * self.scale))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = self.mixed(torch.tanh(self.frozen(x)))
        if self.broken:
            raise ValueError("broken on the way")
        return self.blocks[1](torch.tanh(self.blocks[0](x)))


def data(step: int, rank: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, 5, generator=generator).double().chunk(size)[rank]


def odd(mesh: Mesh, zero: ZeroConfig, broken_at: int = -1) -> tuple[dict[str, Tensor], list[float], ZeroOptimizer]:
    """Weights, and losses of evaluations between the steps; two microbatches a step."""
    torch.manual_seed(3)
    model = Odd().double()
    optimizer = ZeroOptimizer(model, mesh, OptimizerConfig(lr=1e-2, clip=0.5, bucket_mb=1e-3), zero=zero)
    evaluated = []
    for step in range(3):
        model.broken = step == broken_at
        parts = data(step, mesh.data.rank, mesh.data.size).chunk(2)
        optimizer.begin()
        try:
            for index, part in enumerate(parts):
                optimizer.expect_last(index == 1)
                (model(part).square().sum() / 8).backward()
            optimizer.step()
        except ValueError:
            continue
        with torch.no_grad():
            evaluated.append(float(model(data(9, 0, 1)).square().sum()))
    return {name: value.clone() for name, value in optimizer.pieces("master")}, evaluated, optimizer


def odd_apart(broken_at: int) -> dict[str, float]:
    """On the ranks: the difference from plain torch on one device, by stage."""
    torch.manual_seed(3)
    model = Odd().double()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in trained]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    evaluated = []
    for step in range(3):
        if step == broken_at:
            continue
        (model(data(step, 0, 1)).square().sum() / 8).backward()
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        nn.utils.clip_grad_norm_(trained, 0.5)
        plain.step()
        plain.zero_grad()
        with torch.no_grad():
            evaluated.append(float(model(data(9, 0, 1)).square().sum()))
    expected, found = dict(model.named_parameters()), {}
    mesh = Mesh.build(Layout(dp=2))
    for stage in range(4):
        weights, losses, optimizer = odd(mesh, ZeroConfig(stage=stage), broken_at)
        assert weights.keys() == expected.keys()
        worst = max(float((w - expected[n]).abs().max()) for n, w in weights.items())
        found[str(stage)] = max(worst, *(abs(a - b) for a, b in zip(losses, evaluated, strict=True)))
        with optimizer.whole():
            assert all(bool(torch.isfinite(p).all()) for p in optimizer.buckets.where)
    torch.manual_seed(3)
    assert not torch.equal(expected["never.weight"], Odd().double().never.weight)
    return found


@pytest.mark.parametrize("broken_at", [-1, 1])
def test_any_model_of_plain_layers(ranks: Any, broken_at: int) -> None:
    """Gathered again where autograd saved views; what was not used decays; a step that broke leaves nothing."""
    for found in ranks.run(odd_apart, world=2, broken_at=broken_at):
        assert max(found.values()) < 1e-12, found


def held_after_an_error() -> tuple[int, bool, bool]:
    """On the ranks: values that are whole when the step after a broken one begins; what a released weight reads as."""
    mesh = Mesh.build(Layout(dp=2))
    torch.manual_seed(3)
    model = Odd().double()
    optimizer = ZeroOptimizer(model, mesh, zero=ZeroConfig(stage=3))

    def fail(module: nn.Module, arguments: Any) -> None:
        raise ValueError("inside a unit")

    handle = model.twice.register_forward_pre_hook(fail)
    optimizer.begin()
    with pytest.raises(ValueError):
        model(data(0, mesh.data.rank, 2))
    handle.remove()
    assert model.twice.weight.untyped_storage().nbytes() > 8 * 7
    optimizer.begin()
    whole = sum(b.length for b in optimizer.buckets.buckets if b.unit and b.values.untyped_storage().nbytes())
    released = model.first.weight + 0
    with optimizer.whole():
        inside = bool(torch.isfinite(model.first.weight).all())
    return whole, bool(released.isnan().all()) and released.shape == (7, 5), inside


def test_a_released_parameter_is_not_a_number(ranks: Any) -> None:
    for whole, nan, inside in ranks.run(held_after_an_error, world=2):
        assert whole == 0
        assert nan
        assert inside


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("schedule,microbatches", [("interleaved", 4), ("zb-v", 4), ("dualpipev", 4)])
def test_schedules(ranks: Any, stage: int, schedule: str, microbatches: int) -> None:
    config = {"layers": 4}
    options = {"microbatches": microbatches, "schedule": schedule}
    for difference in ranks.run(
        deeper, world=4, layout={"dp": 2, "pp": 2}, zero={"stage": stage}, steps=2, options=options, config=config
    ):
        assert difference < 1e-11


def deeper(config: dict[str, Any], **arguments: Any) -> float:
    """On the ranks: :func:`worst` for a model of more layers."""
    arguments["options"] = arguments["options"] | {"config": dataclasses.replace(CONFIG, **config)}
    return worst(**arguments)


def masters(stage: int) -> tuple[list[float], list[float]]:
    """On the ranks: losses and sums of bf16 training with fp32 masters, without clipping."""
    mesh = Mesh.build(Layout(dp=2))
    optimizer = OptimizerConfig(lr=3e-3, clip=0.0, bucket_mb=0.02)
    trainer = trainer_on(mesh, ZeroConfig(stage=stage), dtype=torch.bfloat16, optimizer=optimizer)
    losses = [trainer.step(batches(step, mesh.data.rank, 2)).loss for step in range(3)]
    assert all(b.master.dtype == torch.float32 for b in trainer.optimizer.buckets.buckets)
    weights = [float(w.view(torch.int32).double().sum()) for _, w in sorted(trainer.optimizer.pieces("master"))]
    with trainer.optimizer.whole():
        rounded = [float(p.detach().view(torch.int16).double().sum()) for p in trainer.model.parameters()]
    return losses, weights + rounded


def test_bf16_with_fp32_masters_has_the_same_bits_at_every_stage(ranks: Any) -> None:
    """Two ranks: a sum of two has one order. Two microbatches would not: stages 2 and 3 sum over ranks first."""
    expected = ranks.run(masters, world=2, stage=0)
    for stage in (1, 2, 3):
        assert ranks.run(masters, world=2, stage=stage) == expected


DEEP = DecoderConfig(
    vocabulary=97, hidden=24, layers=6, heads=4, kv_heads=2, head_size=6, feed_forward=36, family="llama"
)


def most(ahead: int, microbatches: int) -> tuple[int, int, int]:
    """On the ranks: the most values whole at a time, those of the largest unit, and all."""
    mesh = Mesh.build(Layout(dp=2))
    trainer = trainer_on(mesh, ZeroConfig(stage=3, ahead=ahead), config=DEEP, microbatches=microbatches)
    for step in range(2):
        trainer.step(batches(step, mesh.data.rank, 2, microbatches))
    live = trainer.optimizer.live
    assert live is not None
    units = [sum(bucket.length for bucket in buckets) for buckets in live.buckets.values()]
    assert sum(b.values.untyped_storage().nbytes() for b in trainer.optimizer.buckets.buckets) == 0
    return live.most, max(units), sum(units)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_live_memory_is_bounded(ranks: Any, ahead: int) -> None:
    for whole, unit, total in ranks.run(most, world=2, ahead=ahead, microbatches=2):
        assert whole <= unit * (2 + ahead)
        assert unit <= whole < total


def poisoned(stage: int, offload: str = "none") -> tuple[list[str], list[bool], list[bool]]:
    """On the ranks: who is named, which steps were skipped, and whether the weights stayed and then moved."""
    mesh = Mesh.build(Layout(dp=2))
    trainer = trainer_on(mesh, ZeroConfig(stage=stage, offload=offload), optimizer=OPTIMIZER)
    weight = trainer.model.get_parameter("layers.1.mlp.down.weight")
    if mesh.data.rank == 1:
        calls = []

        def poison(grad: Tensor) -> Tensor:
            calls.append(1)
            return (
                torch.where(torch.arange(grad.numel()).view_as(grad) == 3, float("nan"), grad)
                if len(calls) == 2
                else grad
            )

        weight.register_hook(poison)
    names: list[str] = []
    skipped, changed = [], []
    for step in range(3):
        before = {f"{f.parameter}|{f.what}": f.values.clone() for f in trainer.optimizer.state()}
        skipped.append(trainer.step(batches(step, mesh.data.rank, 2)).skipped)
        if skipped[-1]:
            names = trainer.optimizer.culprits()
        changed.append(
            any(not torch.equal(f.values, before[f"{f.parameter}|{f.what}"]) for f in trainer.optimizer.state())
        )
    return names, skipped, changed


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_with_nan(ranks: Any, stage: int) -> None:
    for names, skipped, changed in ranks.run(poisoned, world=2, stage=stage):
        assert names == ["rank 1: layers.1.mlp.down.weight"]
        assert skipped == [False, True, False]
        assert changed == [True, False, True]


def test_a_schedule_of_skips_is_the_same_offloaded(ranks: Any) -> None:
    for _, skipped, changed in ranks.run(poisoned, world=2, stage=2, offload="optimizer"):
        assert skipped == [False, True, False]
        assert changed == [True, False, True]
