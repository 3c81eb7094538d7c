"""The same decoder under our own engine and under DeepSpeed's, in the same trainer: ZeRO 0 to 3, the same losses.

    torchrun --nproc-per-node 4 examples/under_deepspeed.py --tp 2          tp = 2 x dp = 2
    torchrun --nproc-per-node 2 examples/under_deepspeed.py --stages 3      dp = 2

Needs `pip install 'lockstep[deepspeed]'`; without a GPU set DS_ACCELERATOR=cpu. Rank 0 prints a JSON line a stage:
the losses of both, and the largest relative differences of losses, gradient norms and weights.
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Layout, Mesh
from parallel.models.batch import Batch
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import Decoder, build_model
from zero import Metrics, OptimizerConfig, Trainer, ZeroConfig, ZeroOptimizer
from zero.deepspeed_engine import UnderDeepSpeed

CONFIG = DecoderConfig(vocabulary=97, hidden=32, layers=2, heads=4, kv_heads=2, head_size=8, feed_forward=48)
OPTIMIZER = OptimizerConfig(lr=3e-3, clip=0.5, eps=1e-6)
SEQUENCES, MICROBATCHES = 16, 2


def batches(mesh: Mesh, step: int) -> list[Batch]:
    """This rank's microbatches of a step: sequences that count on, with a few wrong numbers."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, 97, (SEQUENCES, 1), generator=generator)
    rows = (start + torch.arange(13) + (torch.rand(SEQUENCES, 13, generator=generator) < 0.1)) % 97
    each = SEQUENCES // (mesh.data.size * MICROBATCHES)
    found = []
    for microbatch in range(MICROBATCHES):
        first = (microbatch * mesh.data.size + mesh.data.rank) * each
        own = rows[first : first + each]
        found.append(Batch.pack(list(own[:, :-1]), list(own[:, 1:]), first_index=first * 12, key=step))
    return found


def optimizer_of(mesh: Mesh, model: Decoder, stage: int, engine: str) -> ZeroOptimizer | UnderDeepSpeed:
    """Ours, or DeepSpeed with our AdamW."""
    if engine == "lockstep":
        return ZeroOptimizer(model, mesh, OPTIMIZER, zero=ZeroConfig(stage=stage))
    document = {"zero_optimization": {"stage": stage}}
    return UnderDeepSpeed(model, mesh, document, microbatches=MICROBATCHES, optimizer=OPTIMIZER)


def train(mesh: Mesh, stage: int, steps: int, engine: str) -> tuple[list[Metrics], dict[str, Tensor]]:
    """What the steps gave, and this rank's pieces of the master weights."""
    model = build_model(CONFIG, Build(mesh=mesh), 7)
    optimizer = optimizer_of(mesh, model, stage, engine)
    trainer = Trainer(model, optimizer, mesh, steps=steps)
    metrics = [trainer.step(batches(mesh, step)) for step in range(steps)]
    return metrics, {name: value.clone() for name, value in optimizer.pieces("master")}


def largest(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    """Train under both at every stage and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 1, 2, 3])
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = Mesh.build(Layout(tp=args.tp, dp=dist.get_world_size() // args.tp))
    for stage in args.stages:
        (ours, weights), (theirs, their_weights) = (
            train(mesh, stage, args.steps, engine) for engine in ("lockstep", "deepspeed")
        )
        weight = torch.tensor(
            max(float((w - their_weights[name]).abs().max() / w.abs().max()) for name, w in weights.items())
        )
        dist.all_reduce(weight, dist.ReduceOp.MAX)
        if mesh.rank == 0:
            report = {
                "stage": stage,
                "loss": largest([m.loss for m in ours], [m.loss for m in theirs]),
                "norm": largest([m.grad_norm for m in ours], [m.grad_norm for m in theirs]),
                "weight": float(weight),
                "ours": [m.loss for m in ours],
                "deepspeed": [m.loss for m in theirs],
            }
            print(json.dumps(report), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
