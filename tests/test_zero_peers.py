"""ZeRO stages 1, 2 and 3 end where DistributedDataParallel and FSDP2 end: float64, 20 steps, 2 and 4 ranks.

DeepSpeed is the third peer; it needs processes of its own, see test_deepspeed.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from parallel.mesh import Layout, Mesh
from parallel.models.batch import IGNORE, Batch
from parallel.models.build import Build
from parallel.models.decoder import Decoder, build_model
from tests.test_trainer import CONFIG, batches
from zero.optimizer import OptimizerConfig, ZeroConfig, ZeroOptimizer
from zero.trainer import Trainer

OPTIMIZER = OptimizerConfig(lr=3e-3, clip=0.5, bucket_mb=0.02)
STEPS, MICROBATCHES = 20, 2

Run = tuple[list[float], dict[str, Tensor]]


class Loss(nn.Module):
    """The model's loss as what a module returns: the peers hook ``forward``."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """The sum over the tokens of the batch."""
        assert batch.labels_T is not None
        logits = self.model(batch)
        return nn.functional.cross_entropy(logits, batch.labels_T, ignore_index=IGNORE, reduction="sum")


def decoder() -> Decoder:
    """The small model, whole."""
    return build_model(CONFIG, Build(mesh=Mesh.single(), dtype=torch.float64, seed=5), seed=3)


def loop(mesh: Mesh, model: nn.Module) -> list[float]:
    """The losses of a plain torch loop around a model that averages gradients over the ranks."""
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=OPTIMIZER.lr,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        foreach=False,
    )
    losses = []
    for step in range(STEPS):
        parts = batches(step, mesh.data.rank, mesh.data.size, MICROBATCHES)
        count = torch.tensor(sum(int((part.labels_T != IGNORE).sum()) for part in parts))
        torch.distributed.all_reduce(count)
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            loss = model(part)
            (loss * mesh.data.size / count).backward()
            total += loss.detach()
        torch.distributed.all_reduce(total)
        losses.append(float(total / count))
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def under_ddp(mesh: Mesh) -> Run:
    """DistributedDataParallel, reducing after every microbatch."""
    inner = Loss(decoder())
    losses = loop(mesh, DistributedDataParallel(inner, gradient_as_bucket_view=True))
    return losses, {name: p.detach() for name, p in inner.model.named_parameters()}


def under_fsdp(mesh: Mesh, reshard: bool) -> Run:
    """FSDP2 over the blocks and the rest."""
    model = Loss(decoder())
    devices = DeviceMesh("cpu", list(range(mesh.data.size)))
    for block in model.model.layers.values():
        fully_shard(block, mesh=devices, reshard_after_forward=reshard)
    fully_shard(model, mesh=devices, reshard_after_forward=reshard)
    losses = loop(mesh, model)
    whole = {}
    for name, parameter in model.model.named_parameters():
        assert isinstance(parameter, DTensor)
        whole[name] = parameter.full_tensor().detach()
    return losses, whole


def ours(mesh: Mesh, stage: int) -> Run:
    """The trainer."""
    model = build_model(CONFIG, Build(mesh=mesh, dtype=torch.float64, seed=5), seed=3)
    trainer = Trainer(model, ZeroOptimizer(model, mesh, OPTIMIZER, zero=ZeroConfig(stage=stage)), mesh, steps=STEPS)
    losses = [trainer.step(batches(step, mesh.data.rank, mesh.data.size, MICROBATCHES)).loss for step in range(STEPS)]
    return losses, {name: value.clone() for name, value in trainer.optimizer.pieces("master")}


def differences() -> dict[str, tuple[float, float, float]]:
    """On the ranks: stage and peer -> relative difference of losses and of weights, and how far weights have moved."""
    mesh = Mesh.build(Layout(dp=torch.distributed.get_world_size()))
    start = {name: p.detach().clone() for name, p in decoder().named_parameters()}
    peers = {
        "DDP": under_ddp(mesh),
        "FSDP2, stage 3": under_fsdp(mesh, True),
        "FSDP2, stage 2": under_fsdp(mesh, False),
    }
    found = {}
    for stage in (1, 2, 3):
        losses, weights = ours(mesh, stage)
        for name, (their_losses, theirs) in peers.items():
            assert weights.keys() == theirs.keys()
            loss = max(abs(a - b) / abs(b) for a, b in zip(losses, their_losses, strict=True))
            weight = max(float((w - theirs[n]).norm() / theirs[n].norm()) for n, w in weights.items())
            moved = min(float((w - start[n]).norm() / w.norm()) for n, w in weights.items())
            found[f"{stage} {name}"] = loss, weight, moved
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_twenty_steps_end_where_the_peers_end(ranks: Any, world: int) -> None:
    for found in ranks.run(differences, world=world, timeout=300):
        assert len(found) == 9
        for peer, (loss, weight, moved) in found.items():
            assert moved > 1e-3, peer
            assert loss < 1e-12, (peer, loss, weight)
            assert weight < 1e-12, (peer, loss, weight)
