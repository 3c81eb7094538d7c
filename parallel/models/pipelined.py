"""A model and its pipeline: the stages of this rank, trained or evaluated by a schedule."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parallel import comm
from parallel.errors import ConfigError
from parallel.mesh import Mesh
from parallel.models.batch import Batch
from parallel.models.decoder import Decoder
from parallel.pp import PipelineConfig, Schedule, Timeline
from parallel.pp.run import Pipeline
from parallel.pp.wavefront import forward_only, spread

__all__ = ["ExpectLast", "PipelinedModel"]

_NONE: frozenset[nn.Parameter] = frozenset()


class ExpectLast(Protocol):
    """What is told before gradients arrive: whether they are the last of the step, of which parameters, and whether
    none of a microbatch is put off; and when they have, with no parameters."""

    def __call__(self, last: bool, of: Set[nn.Parameter], whole: bool) -> None: ...


class PipelinedModel:
    """Runs a model by the schedule of its pipeline; with one stage, that is a loop over microbatches.

    Args:
        model: this rank's stages, built with ``Build.cuts``.
        mesh: that it was built on; every rank makes one at the same time.
        config: which schedule.
    """

    def __init__(self, model: Decoder, mesh: Mesh, config: PipelineConfig) -> None:
        self.model, self.mesh, self.config = model, mesh, config
        self.cuts = {cut.stage: cut for cut in model.cuts}
        used = [set(model.stage_parameters(cut)) for cut in model.cuts]
        self._own = {
            cut.stage: own - set().union(*(other for other in used if other is not own))
            for cut, own in zip(model.cuts, used, strict=True)
        }
        dtype = next(model.parameters()).dtype
        self.pipeline: Pipeline[Batch] = Pipeline(
            mesh, self._forward, self._shape, dtype, deferral=model.deferral, timeout_s=config.timeout_s
        )
        self._placement = spread(comm.gather_json(sorted(self.cuts), mesh.pp))
        self._tables: dict[int, Schedule] = {}
        self._options: dict[str, Any] = {}
        self._total = torch.zeros(())

    def train(
        self, batches: Sequence[Batch], expect_last: ExpectLast, *, trace: bool = False, **options: Any
    ) -> Tensor:
        """Form the gradients of a step; the sum of the losses that this rank has seen, a float64 scalar.

        Args:
            batches: microbatches, the same on all stages.
            expect_last: told before gradients arrive.
            trace: keep a record for :meth:`timeline`.
            options: of :meth:`Decoder.loss`.
        """
        self.model.train()
        self._begin(options)

        def arriving(stage: int | None, last: bool, whole: bool) -> None:
            expect_last(last, _NONE if stage is None else self._own[stage], whole)

        self.pipeline.run(self.table(len(batches)), batches, arriving=arriving, trace=trace)
        return self._total

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """The sum of the losses that this rank has seen, without gradients."""
        self.model.eval()
        self._begin({})
        self.pipeline.run(forward_only(self._placement, self.mesh.pp.size, len(batches)), batches)
        return self._total

    def timeline(self) -> Timeline:
        """Of the last traced step; every rank of the pipeline calls this."""
        return self.pipeline.timeline()

    def table(self, microbatches: int) -> Schedule:
        """The schedule of a step with so many microbatches.

        Raises:
            ConfigError: there is none, or it has other stages than the model.
        """
        if microbatches not in self._tables:
            table = self.config.table(self.mesh.pp.size, microbatches, self.model.config.layers)
            held = set(table.stages_of(self.mesh.pp.rank))
            if table.stages != self.model.cuts[0].stages or not held <= self.cuts.keys():
                raise ConfigError(
                    f"{self.config.schedule} puts stages {sorted(held)} of {table.stages} on this rank; the model was "
                    f"built with {sorted(self.cuts)} of {self.model.cuts[0].stages} (Build.cuts)"
                )
            self._tables[microbatches] = table
        return self._tables[microbatches]

    def _begin(self, options: dict[str, Any]) -> None:
        self._options = options
        self._total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)

    def _forward(self, stage: int, x_TD: Tensor | None, batch: Batch) -> Tensor:
        cut = self.cuts[stage]
        if not cut.last:
            return self.model.hidden(batch, x_TD, cut)
        loss = self.model.loss(batch, x_TD, cut, **self._options)
        self._total += loss.losses_T.sum()
        return loss.total

    def _shape(self, stage: int, batch: Batch) -> tuple[int, int]:
        tokens, axis = len(batch), self.mesh.tp
        if self.mesh.layout.sequence_parallel:
            own = comm.chunk(tokens, axis)
            tokens = own.stop - own.start
        return tokens, self.model.config.hidden
