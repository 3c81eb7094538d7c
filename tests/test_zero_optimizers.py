"""Other optimizers than AdamW over sharded state, elementwise ones and one that needs whole matrices."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.mesh import Layout, Mesh
from parallel.models.batch import IGNORE
from parallel.models.build import Build
from parallel.models.decoder import build_model
from parallel.shard import gather_whole
from tests.test_trainer import CONFIG, batches
from tests.test_zero import trainer_on
from zero.fragment import Fragment
from zero.optimizer import OptimizerConfig, ZeroConfig, ZeroOptimizer

SPEC = importlib.util.spec_from_file_location("muon", Path(__file__).parent.parent / "examples" / "muon.py")
assert SPEC is not None and SPEC.loader is not None
MUON = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(MUON)

OPTIMIZER = OptimizerConfig(lr=3e-3, clip=0.5, bucket_mb=0.02)
STEPS = 3


class Lion(torch.optim.Optimizer):
    """The sign of a mixture of momentum and gradient (arXiv 2302.06675)."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                update = (0.9 * momentum + 0.1 * p.grad).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                momentum.mul_(0.99).add_(p.grad, alpha=0.01)


FACTORIES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1.0, momentum=0.5, centered=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1.0, initial_accumulator_value=0.1),
    "lion": Lion,
    "muon": MUON.Muon,
}


def plain(kind: str) -> dict[str, Tensor]:
    """The weights after a loop of torch alone, one device, every parameter by itself."""
    model = build_model(CONFIG, Build(mesh=Mesh.single(), dtype=torch.float64), seed=3)
    groups = [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in model.parameters()]
    optimizer = FACTORIES[kind](groups)
    for group in optimizer.param_groups:
        group["lr"] = OPTIMIZER.lr
    for step in range(STEPS):
        (batch,) = batches(step)
        assert batch.labels_T is not None
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), batch.labels_T, ignore_index=IGNORE).backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def weights_of(trainer: Any) -> dict[str, Tensor]:
    shards = trainer.optimizer.buckets.shards
    return {n: gather_whole(v, shards[n], trainer.mesh).clone() for n, v in trainer.optimizer.pieces("master")}


def apart(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest weight of each parameter."""
    assert weights.keys() == expected.keys()
    return max(float((w - expected[n]).abs().max() / expected[n].abs().max()) for n, w in weights.items())


def worst(kind: str, layout: dict[str, int], stages: list[int], whole: bool, **zero: Any) -> dict[str, float]:
    """On the ranks: the difference from the loop of torch alone, by stage."""
    mesh, expected, found = Mesh.build(Layout(**layout)), plain(kind), {}
    for stage in stages:
        trainer = trainer_on(
            mesh,
            ZeroConfig(stage=stage, **zero),
            optimizer=OPTIMIZER,
            factory=FACTORIES[kind],
            whole_matrices=whole,
        )
        for step in range(STEPS):
            trainer.step(batches(step, mesh.data.rank, mesh.data.size))
        found[str(stage)] = apart(weights_of(trainer), expected)
    return found


@pytest.mark.parametrize("kind", ["sgd", "rmsprop", "adagrad", "lion"])
def test_elementwise_optimizers_equal_one_device(ranks: Any, kind: str) -> None:
    for found in ranks.run(worst, world=2, kind=kind, layout={"dp": 2}, stages=[1, 2, 3], whole=False):
        assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("layout", [{"dp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_whole_matrices_are_updated_as_on_one_device(ranks: Any, layout: dict[str, int]) -> None:
    """Cut over dp they would be orthogonalized in parts, and over tp as well."""
    world, stages = Layout(**layout).world, [1, 3] if "tp" in layout else [0, 1, 2, 3]
    for found in ranks.run(worst, world=world, kind="muon", layout=layout, stages=stages, whole=True):
        assert max(found.values()) < 1e-10, found


def test_whole_matrices_in_cpu_memory(ranks: Any) -> None:
    options = {"kind": "muon", "layout": {"tp": 2}, "stages": [0, 2], "whole": True, "offload": "optimizer"}
    for found in ranks.run(worst, world=2, **options):
        assert max(found.values()) < 1e-10, found


def test_more_ranks_than_matrices(ranks: Any) -> None:
    """A rank may own nothing at all; and flat runs are no matrices: without ``whole_matrices`` the answer differs."""
    for found in ranks.run(lonely, world=4):
        assert found[0] < 1e-12
        assert found[1] > 1e-3


def lonely() -> tuple[float, float]:
    """On the ranks: a model of two matrices on four ranks, whole and cut, against one device."""
    weights = []
    for mesh, whole in ((Mesh.build(Layout(dp=4)), True), (Mesh.build(Layout(dp=4)), False), (Mesh.single(), True)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10, bias=False), nn.Linear(10, 3, bias=False)).double()
        stage = min(2, mesh.data.size - 1)
        optimizer = ZeroOptimizer(model, mesh, OPTIMIZER, MUON.Muon, zero=ZeroConfig(stage=stage), whole_matrices=whole)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).double()
        for _ in range(2):
            optimizer.begin()
            optimizer.expect_last(True)
            (model(x.chunk(mesh.data.size)[mesh.data.rank]).square().sum() / 8).backward()
            optimizer.step()
        weights.append({name: value.clone() for name, value in optimizer.pieces("master")})
    return apart(weights[0], weights[2]), apart(weights[1], weights[2])


def resumed(stage: int) -> float:
    """On the ranks: what a step gives after state went through :meth:`state` into a new optimizer, and without."""
    mesh = Mesh.build(Layout(dp=2, tp=2))
    options = {"optimizer": OPTIMIZER, "factory": MUON.Muon, "whole_matrices": True}
    first, second = (trainer_on(mesh, ZeroConfig(stage=stage), **options) for _ in range(2))
    first.step(batches(0, mesh.data.rank, 2))
    saved = {(f.parameter, f.what): f.values.clone() for f in map(Fragment._make, first.optimizer.state())}
    second.optimizer.prepare()
    for fragment in second.optimizer.state():
        fragment.values.copy_(saved[fragment.parameter, fragment.what])
    second.optimizer.restore(first.optimizer.scalars())
    for trainer in (first, second):
        trainer.step(batches(1, mesh.data.rank, 2))
    return apart(weights_of(second), weights_of(first))


def test_state_of_shared_matrices_can_be_restored(ranks: Any) -> None:
    for stage in (0, 2):
        assert max(ranks.run(resumed, world=4, stage=stage)) == 0


def test_preparing_leaves_no_trace() -> None:
    """Coupled weight decay must not put the weights into the momentum before the first step."""
    trainers = [
        trainer_on(Mesh.single(), ZeroConfig(), optimizer=OPTIMIZER, factory=FACTORIES["sgd"]) for _ in range(2)
    ]
    trainers[0].optimizer.prepare()
    for trainer in trainers:
        trainer.step(batches(0))
    assert apart(weights_of(trainers[0]), weights_of(trainers[1])) == 0
