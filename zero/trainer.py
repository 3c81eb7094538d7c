"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel import comm
from parallel.config import option
from parallel.mesh import Mesh
from parallel.models.batch import IGNORE, Batch
from parallel.models.decoder import Decoder
from parallel.models.pipelined import PipelinedModel
from parallel.pp import PipelineConfig, Schedule, Timeline
from zero import checkpoint
from zero.metrics import Metrics, MetricsLog, measured_peak, peak_memory, training_flops
from zero.optimizer import ZeroOptimizer
from zero.run import RunFolder
from zero.schedule import ScheduleConfig

__all__ = ["Trainer", "TrainerConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """What to do on the way."""

    label_smoothing: float = option(0.0, "weight of the uniform distribution in the loss")
    z_loss: float = option(0.0, "weight of the squared log-sum-exp in the loss")
    validate_every: int = option(0, "steps between validations (0: only at the end)")
    save_every: int = option(0, "steps between checkpoints (0: only at the end)")
    keep: int = option(2, "checkpoints that stay")

    def problems(self) -> Iterator[str]:
        """Why such a run cannot be."""
        for name in ("validate_every", "save_every"):
            if getattr(self, name) < 0:
                yield f"{name} = {getattr(self, name)}: must not be negative"
        if self.keep < 1:
            yield f"keep = {self.keep}: at least one checkpoint must stay"
        if not 0 <= self.label_smoothing < 1:
            yield f"label_smoothing = {self.label_smoothing}: must be at least 0 and below 1"
        if self.z_loss < 0:
            yield f"z_loss = {self.z_loss}: must not be negative"


class Trainer:
    """Steps of one model on all ranks of a mesh.

    Args:
        model: built on the mesh.
        optimizer: over the same model.
        mesh: where.
        steps: optimizer steps of the whole run.
        config: of the loop.
        schedule: of the learning rate.
        data: step (from 0) -> this rank's microbatches; a pure function, so that the step is the data position.
        validation: -> this rank's validation batches.
        bytes_per_token: of the validation text, for bits per byte.
        pipeline: which schedule; the model is built with its stages (``Build.cuts``).
        traced: called on rank 0 with the measured timeline of the run's third step (or its last, if sooner), and the
            schedule.
        folder: where checkpoints and metrics go; None writes nothing.
        report: called on rank 0 after every step.
        stop: asked on every rank before every step; when any rank says yes, all save and return.
    """

    def __init__(
        self,
        model: Decoder,
        optimizer: ZeroOptimizer,
        mesh: Mesh,
        *,
        steps: int,
        config: TrainerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        data: Callable[[int], Sequence[Batch]] | None = None,
        validation: Callable[[], Iterable[Batch]] | None = None,
        bytes_per_token: float = 0.0,
        pipeline: PipelineConfig | None = None,
        traced: Callable[[Timeline, Schedule], None] | None = None,
        folder: RunFolder | None = None,
        report: Callable[[Metrics], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model, self.optimizer, self.mesh, self.steps = model, optimizer, mesh, steps
        self.config = TrainerConfig() if config is None else config
        self.schedule = ScheduleConfig(kind="constant", warmup=0) if schedule is None else schedule
        self.data, self.validation, self.bytes_per_token = data, validation, bytes_per_token
        self.folder, self.report, self.stop, self.traced = folder, report, stop, traced
        self.done = 0
        self.tokens = 0
        self._peak = 0.0
        self._stages = PipelinedModel(model, mesh, PipelineConfig() if pipeline is None else pipeline)
        self._loss_options = {"label_smoothing": self.config.label_smoothing, "z_loss": self.config.z_loss}

    def step(self, batches: Sequence[Batch], *, trace: bool = False) -> Metrics:
        """One optimizer step over this rank's microbatches; what it returns is the same on every rank.

        Args:
            trace: measure every action, for :meth:`timeline`.
        """
        started = time.perf_counter()
        mean, count = self.accumulate(batches, trace=trace)
        norm, lr = self.update()
        self.tokens += count
        seconds = time.perf_counter() - started
        return Metrics(
            step=self.done,
            loss=mean,
            grad_norm=norm,
            lr=lr,
            tokens=self.tokens,
            skipped=not math.isfinite(norm),
            seconds=seconds,
            tokens_per_second=count / seconds,
            mfu=self._utilization(batches, seconds),
            peak_memory=peak_memory(self.mesh.device),
        )

    def accumulate(self, batches: Sequence[Batch], *, trace: bool = False) -> tuple[float, int]:
        """The gradients of one step, on their way to being reduced.

        Returns:
            the mean loss, and the number of labels, of all ranks.
        """
        batches = [batch.to(self.mesh.device) for batch in batches]
        count = self._count(batches)
        self.optimizer.begin()
        options = {"scale": 1 / max(1, count), **self._loss_options}
        total = self._stages.train(batches, self.optimizer.expect_last, trace=trace, **options)
        return float(self._sum(total)) / max(1, count), count

    def update(self) -> tuple[float, float]:
        """Apply the gradients of this step; their norm before clipping, and the learning rate."""
        lr = self.optimizer.config.lr * self.schedule.factor(self.done, self.steps)
        norm = self.optimizer.step(lr)
        self.done += 1
        return norm, lr

    def _count(self, batches: Iterable[Batch]) -> int:
        """Labels of the step on all ranks."""
        own = sum(int((batch.labels_T != IGNORE).sum()) for batch in batches if batch.labels_T is not None)
        return int(comm.sum_(torch.tensor(own, device=self.mesh.device), self.mesh.data))

    def _sum(self, value: Tensor) -> Tensor:
        """Over all data and pipeline ranks."""
        return comm.sum_(comm.sum_(value, self.mesh.data), self.mesh.pp)

    def _utilization(self, batches: Sequence[Batch], seconds: float) -> float:
        if not self._peak:
            return 0.0
        flops = training_flops(self.model.config, batches) / (self.mesh.tp.size * self.mesh.pp.size)
        return flops / seconds / self._peak

    @torch.no_grad()
    def validate(self) -> tuple[float, float] | None:
        """Mean loss in nats a token and bits a byte over the validation batches of all ranks; None without any."""
        if self.validation is None:
            return None
        batches = [batch.to(self.mesh.device) for batch in self.validation()]
        if not batches:
            return None
        count = self._count(batches)
        total = float(self._sum(self._stages.evaluate(batches)))
        if not count:
            return None
        loss = total / count
        return loss, loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else 0.0

    def timeline(self) -> Timeline:
        """What the ranks of this pipeline did when in the last step, which was traced; all of them call this."""
        return self._stages.timeline()

    def resume(self) -> bool:
        """Continue from the latest checkpoint of the folder, if there is one; whether there was.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        found = checkpoint.latest(self.folder.checkpoints) if self.folder else None
        if found is None:
            return False
        loaded = checkpoint.load(found, self.mesh, self.optimizer)
        self.done, self.tokens = loaded.step, loaded.tokens
        return True

    def save(self) -> None:
        """Write a checkpoint."""
        if self.folder:
            checkpoint.save(
                self.folder.checkpoints,
                self.mesh,
                self.optimizer,
                step=self.done,
                tokens=self.tokens,
                keep=self.config.keep,
            )

    def run(self) -> bool:
        """Train from where the run stands to its end; False if it was asked to stop before."""
        assert self.data is not None, "run() needs data"
        first = self.mesh.rank == 0
        trace_at = min(self.done + 2, self.steps - 1) if self.traced else -1
        log = MetricsLog(self.folder.metrics, self.done) if first and self.folder else None
        self._peak = measured_peak(next(self.model.parameters()).dtype, self.mesh.device)
        saved = self.done
        try:
            while self.done < self.steps:
                if self._stop_everywhere():
                    break
                batches, trace = self.data(self.done), self.done == trace_at
                metrics = self._validated(self.step(batches, trace=trace))
                if trace and self.traced:
                    timeline = self.timeline()
                    if first:
                        self.traced(timeline, self._stages.table(len(batches)))
                if log:
                    log.write(metrics)
                if first and self.report:
                    self.report(metrics)
                if self.config.save_every and self.done % self.config.save_every == 0:
                    self.save()
                    saved = self.done
            if saved != self.done:
                self.save()
        finally:
            if log:
                log.close()
        return self.done >= self.steps

    def _validated(self, metrics: Metrics) -> Metrics:
        every = self.config.validate_every
        if not (self.done == self.steps or (every and self.done % every == 0)):
            return metrics
        result = self.validate()
        return metrics if result is None else replace(metrics, validation_loss=result[0], bits_per_byte=result[1])

    def _stop_everywhere(self) -> bool:
        asked = torch.tensor(int(self.stop()), device=self.mesh.device)
        return bool(comm.sum_(asked, self.mesh.world, "max"))
