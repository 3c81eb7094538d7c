"""Trains, saves and continues under DeepSpeed's engine and under ours; one JSON line a case, from rank 0.

    python -m torch.distributed.run --nproc-per-node 2 tests/deepspeed_program.py FOLDER TP CASE ...

CASE is STAGE or STAGE:OPTION: bf16; optimizer, parameters (offload to CPU memory); disk (the optimizer's state is
there), disk-bf16 (the parameters as well).
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "examples")]
from under_deepspeed import MICROBATCHES, OPTIMIZER, batches

from parallel.mesh import Layout, Mesh
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import build_model
from parallel.shard import gather_whole
from zero import Trainer, TrainerConfig, ZeroConfig, ZeroOptimizer, checkpoint
from zero.deepspeed_document import engine_document
from zero.deepspeed_engine import UnderDeepSpeed
from zero.run import RunFolder

SMALL = DecoderConfig(vocabulary=97, hidden=32, layers=2, heads=4, kv_heads=2, feed_forward=48, tied=True)
LARGE = DecoderConfig(vocabulary=97, hidden=512, layers=1, heads=4, kv_heads=2, feed_forward=2048)
"""DeepSpeed leaves in memory what has less than a MiB."""


class Case:
    """One configuration, on all ranks."""

    def __init__(self, text: str, mesh: Mesh, folder: Path) -> None:
        stage, _, option = text.partition(":")
        self.stage, self.option, self.mesh, self.folder = int(stage), option, mesh, folder
        self.dtype = torch.bfloat16 if option.endswith("bf16") else torch.float32
        self.config = LARGE if option.startswith("disk") else SMALL

    def document(self) -> dict[str, Any]:
        offload = self.option if self.option in ("optimizer", "parameters") else "none"
        given: dict[str, Any] = {}
        if self.option.startswith("disk"):
            disk = {"device": "nvme", "nvme_path": str(self.folder / "disk")}
            given = {"zero_optimization": {"offload_optimizer": disk}}
            if self.option == "disk-bf16":
                given["zero_optimization"]["offload_param"] = disk | {"buffer_size": 5_000_000, "buffer_count": 8}
        return engine_document(given, ZeroConfig(stage=self.stage, offload=offload), OPTIMIZER, self.dtype)

    def trainer(self, engine: str, seed: int, name: str, stage: int = 0, fault: str = "") -> Trainer:
        model = build_model(self.config, Build(mesh=self.mesh, dtype=self.dtype), seed)
        optimizer: Any = ZeroOptimizer(model, self.mesh, OPTIMIZER, zero=ZeroConfig(stage=stage))
        if engine == "deepspeed":
            options = {"microbatches": MICROBATCHES, "optimizer": OPTIMIZER}
            model = build_model(self.config, Build(mesh=self.mesh, dtype=self.dtype), seed)
            optimizer = UnderDeepSpeed(model, self.mesh, self.document(), **options)
        trainer = Trainer(
            model,
            optimizer,
            self.mesh,
            steps=4,
            config=TrainerConfig(fault=fault),
            folder=RunFolder(self.folder / name),
            validation=lambda: batches(self.mesh, 100),
        )
        return trainer

    def steps(self, trainer: Trainer, count: int) -> list[float]:
        return [trainer.step(batches(self.mesh, trainer.done)).loss for _ in range(count)]

    def wholes(self, trainer: Trainer) -> dict[str, Tensor]:
        """Everything that an optimizer holds, gathered by its own means."""
        table = trainer.optimizer.buckets.shards
        return {
            f"{name}|{what}": gather_whole(piece.clone().float(), table[name], self.mesh)
            for what in ("master", "exp_avg", "exp_avg_sq")
            for name, piece in trainer.optimizer.pieces(what)
        }

    def is_saved(self, trainer: Trainer, name: str) -> bool:
        """Whether what an optimizer holds is, bit for bit, what the latest checkpoint holds."""
        folder = checkpoint.latest(self.folder / name / "checkpoints")
        assert folder is not None
        saved, held = checkpoint.Checkpoint.open(folder), self.wholes(trainer)
        same = all(torch.equal(saved.whole(*key.split("|")).float(), value) for key, value in held.items())
        return same and all(value == saved.step for value in saved.scalars.values()) and len(saved.scalars) > 0

    def run(self) -> dict[str, Any]:
        """Train, save and continue both ways."""
        theirs = self.trainer("deepspeed", 7, "theirs")
        before, report = self.steps(theirs, 2), {"stage": theirs.optimizer.stage, "option": self.option}
        validation = theirs.validate()
        theirs.save()
        report["saved"] = self.is_saved(theirs, "theirs")
        losses = before + self.steps(theirs, 2)
        del theirs

        again = self.trainer("deepspeed", 8, "theirs")
        assert again.resume()
        report["resumed"] = self.is_saved(again, "theirs")
        report["same"] = again.validate() == validation and self.steps(again, 2) == losses[2:]
        del again

        ours = self.trainer("lockstep", 8, "theirs", stage=(self.stage + 1) % 4)
        assert ours.resume()
        report["resumed by ours"] = self.is_saved(ours, "theirs")
        report["as ours"] = far(self.steps(ours, 2), losses[2:])
        ours = self.trainer("lockstep", 7, "ours", stage=(self.stage + 2) % 4)
        own = self.steps(ours, 2)
        ours.save()
        own += self.steps(ours, 2)
        report["from the start"] = far(losses, own)
        theirs = self.trainer("deepspeed", 8, "ours")
        assert theirs.resume()
        report["resumed from ours"] = self.is_saved(theirs, "ours")
        report["after ours"] = far(self.steps(theirs, 2), own[2:])
        return report

    def not_finite(self) -> dict[str, Any]:
        """A gradient that is not a number on one rank: nothing changes on any."""
        trainer = self.trainer("deepspeed", 7, "spoiled", fault=f"nan@{self.mesh.world.size - 1},2,step.backward")
        self.steps(trainer, 1)
        before = self.wholes(trainer)
        metrics = trainer.step(batches(self.mesh, 1))
        same = all(torch.equal(value, before[key]) for key, value in self.wholes(trainer).items())
        after = trainer.step(batches(self.mesh, 2))
        told = metrics.skipped and not math.isfinite(metrics.grad_norm) and not after.skipped
        return {"unchanged": same and told and math.isfinite(after.loss)}


def far(one: list[float], two: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, two, strict=True))


def main() -> None:
    folder, tp, *cases = sys.argv[1:]
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = Mesh.build(Layout(tp=int(tp), dp=dist.get_world_size() // int(tp)))
    for index, text in enumerate(cases):
        case = Case(text, mesh, Path(folder) / str(index))
        report = case.run() | case.not_finite()
        if mesh.rank == 0:
            report["swapped"] = sum(1 for _ in Path(folder).glob(f"{index}/disk/**/*.swp"))
            print(json.dumps(report), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # as our own ranks leave: DeepSpeed's threads now and then abort an interpreter that shuts down


if __name__ == "__main__":
    main()
