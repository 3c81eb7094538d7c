"""An optimizer that is not elementwise, under ZeRO: Muon, whose update is an orthogonalized momentum matrix.

    python examples/muon.py                                   one process
    torchrun --nproc-per-node 2 examples/muon.py              dp = 2, ZeRO 2, the same losses
    torchrun --nproc-per-node 2 examples/muon.py tp           tp = 2, the same losses

``whole_matrices=True`` gives the optimizer every parameter in its whole shape: ZeRO then places whole parameters on
ranks instead of cutting through them, and tensor-parallel ranks gather the gradient of the matrix that they share.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Layout, Mesh
from parallel.models.batch import Batch
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import build_model
from zero import OptimizerConfig, Trainer, ZeroConfig, ZeroOptimizer


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """Near the orthogonal factor of a matrix: a few Newton-Schulz steps of the quintic that Muon takes."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalization for matrices; vectors take a plain step (keller.jordan/muon, 2024)."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(p.grad)
                update = p.grad.add(momentum, alpha=group["momentum"])
                if p.ndim == 2:
                    update = orthogonalized(update) * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def main() -> None:
    """Twenty steps on eight random sentences; rank 0 prints the loss now and then."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    mesh = Mesh.build(Layout(tp=ranks) if "tp" in sys.argv else Layout(dp=ranks))
    config = DecoderConfig(vocabulary=64, hidden=32, layers=2, heads=4, kv_heads=2, feed_forward=64, family="llama")
    model = build_model(config, Build(mesh=mesh, dtype=torch.float64), seed=0)
    stage = 2 if mesh.data.size > 1 else 0
    optimizer = ZeroOptimizer(
        model, mesh, OptimizerConfig(lr=0.02), Muon, zero=ZeroConfig(stage=stage), whole_matrices=True
    )
    trainer = Trainer(model, optimizer, mesh, steps=20)
    ids = torch.randint(0, 64, (8, 17), generator=torch.Generator().manual_seed(1))
    each = 8 // mesh.data.size
    rows = range(mesh.data.rank * each, (mesh.data.rank + 1) * each)
    batch = Batch.pack([ids[row, :-1] for row in rows], [ids[row, 1:] for row in rows], first_index=rows.start * 16)
    for step in range(20):
        metrics = trainer.step([batch])
        if mesh.rank == 0 and step % 5 in (0, 4):
            print(f"step {step + 1:3}  loss {metrics.loss:.9f}")


if __name__ == "__main__":
    main()
