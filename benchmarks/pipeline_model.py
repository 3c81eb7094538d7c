"""What the pipeline benchmarks share: how the Llama is cut, and contenders that train stages of the plain one.

Every document is a microbatch. The head costs about as much as a block and a half, so the stages are cut with that in
mind; both sides of a race have the same cuts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.pipelining as peer
import workload
from plain_llama import Stage, load_plain
from torch import Tensor
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, ScheduleDualPipeV, ScheduleZBVZeroBubble
from torch.nn.functional import cross_entropy

from parallel.mesh import Layout, Mesh
from parallel.models.batch import Batch
from parallel.pp import Cut, PipelineConfig, partition
from parallel.pp.run import Pipeline

__all__ = [
    "MICROBATCHES",
    "PEERS",
    "RANKS",
    "OurExecutor",
    "PlainPipeline",
    "TorchPipeline",
    "cuts",
    "microbatches",
    "options",
]

RANKS = 2
MICROBATCHES = 8
ENDS = (0.0, 1.5)
"""What the embedding, and the norm and head, cost, in blocks."""

PEERS: dict[str, Any] = {
    "gpipe": peer.ScheduleGPipe,
    "1f1b": peer.Schedule1F1B,
    "interleaved": peer.ScheduleInterleaved1F1B,
    "zb-h1": peer.ScheduleInterleavedZeroBubble,
    "zb-v": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
"""Our schedule -> torch's; its interleaved zero-bubble schedule with one stage a rank is ZB-H1."""


def options(schedule: str) -> PipelineConfig:
    """Of a schedule; interleaved with two stages a rank."""
    return PipelineConfig(schedule=schedule, virtual=2 if schedule == "interleaved" else 1)


def cuts(config: PipelineConfig, layers: int, rank: int) -> tuple[Cut, ...]:
    """The stages of a rank."""
    table = config.table(RANKS, MICROBATCHES, layers)
    whole = partition(layers, table.stages, ends=ENDS)
    return tuple(whole[stage] for stage in table.stages_of(rank))


def microbatches() -> list[Batch]:
    """Each document as a packed batch."""
    tokens_BS = workload.documents()
    assert len(tokens_BS) == MICROBATCHES
    return [workload.batch(row_1S, index * row_1S.numel()) for index, row_1S in enumerate(tokens_BS.split(1))]


class PlainPipeline:
    """Stages of the plain Llama and torch's loop around them; subclasses form the gradients.

    Clipping is by the norm of this rank's gradients, as torch.distributed.pipelining leaves it.
    """

    def __init__(self, spec: dict[str, Any], rank: int) -> None:
        self.dtype = workload.DTYPES[spec["precision"]]
        self.tokens_BS = workload.documents()
        self.labels_BS = workload.targets(self.tokens_BS)
        layers = spec["layers"]
        whole = load_plain(workload.config(layers), Path(spec["weights"]), self.tokens_BS.shape[1], self.dtype).train()
        self.config = options(spec["pipeline"])
        self.cuts = cuts(self.config, layers, rank)
        self.stages = {cut.stage: Stage(whole, cut) for cut in self.cuts}
        self.last = any(cut.last for cut in self.cuts)
        self.parameters = [p for stage in self.stages.values() for p in stage.parameters()]
        choice = {"fused": True} if spec["adamw"] == "fused" else {}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=3e-4, **choice)

    def gradients(self) -> list[Tensor]:
        """Form the gradients of the mean loss; the mean loss of every microbatch, on the rank with the last stage."""
        raise NotImplementedError

    def step(self) -> float:
        """One step; the last stage's rank, which alone knows the loss, speaks for all."""
        losses = self.gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return RANKS * float(torch.stack(losses).mean()) if self.last else 0.0


def _loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    return cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten())


class TorchPipeline(PlainPipeline):
    """Gradients by torch.distributed.pipelining."""

    def __init__(self, spec: dict[str, Any], rank: int) -> None:
        super().__init__(spec, rank)
        cpu = torch.device("cpu")
        stages = [peer.PipelineStage(self.stages[c.stage], c.stage, c.stages, cpu) for c in self.cuts]
        kind = PEERS[spec["pipeline"]]
        several = issubclass(kind, PipelineScheduleMulti)
        self.schedule = kind(stages if several else stages[0], MICROBATCHES, loss_fn=_loss)
        self.inputs = [self.tokens_BS] if any(cut.first for cut in self.cuts) else []
        self.labels = self.labels_BS if self.last else None

    def gradients(self) -> list[Tensor]:
        """By its schedule, without the outputs of the last stage, which nothing needs."""
        losses: list[Tensor] = []
        self.schedule.step(*self.inputs, target=self.labels, losses=losses, return_outputs=False)
        return [loss.detach() for loss in losses]


class OurExecutor(PlainPipeline):
    """Gradients by our executor, of the very same modules."""

    def __init__(self, spec: dict[str, Any], rank: int) -> None:
        super().__init__(spec, rank)
        mesh = Mesh.build(Layout(pp=RANKS))
        self.table = self.config.table(RANKS, MICROBATCHES, spec["layers"])
        self.pipeline: Pipeline[tuple[Tensor, Tensor]] = Pipeline(mesh, self._forward, self._shape, self.dtype)
        self.batches = list(zip(self.tokens_BS.split(1), self.labels_BS.split(1), strict=True))

    def _forward(self, stage: int, x_BSD: Tensor | None, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens_BS, labels_BS = batch
        y = self.stages[stage](tokens_BS if x_BSD is None else x_BSD)
        return _loss(y, labels_BS) / MICROBATCHES if stage == self.table.stages - 1 else y

    def _shape(self, stage: int, batch: tuple[Tensor, Tensor]) -> tuple[int, ...]:
        return (*batch[0].shape, workload.CONFIG.hidden)

    def gradients(self) -> list[Tensor]:
        """By our schedule."""
        losses = self.pipeline.run(self.table, self.batches)
        return [MICROBATCHES * loss for loss in losses.values()]
