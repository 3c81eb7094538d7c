"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from parallel import comm
from parallel.config import option
from parallel.errors import SaveError
from parallel.mesh import Mesh
from parallel.models.batch import IGNORE, Batch
from parallel.models.decoder import Decoder
from parallel.models.pipelined import PipelinedModel
from parallel.pp import PipelineConfig, Schedule, Timeline
from zero import checkpoint
from zero.faults import Injector, fault_problems
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
    save_async: bool = option(False, "write checkpoints behind the training, from a copy in memory")
    keep: int = option(2, "checkpoints that stay")
    fall_back: bool = option(False, "continue from the newest checkpoint that is whole if the latest is damaged")
    fault: str = option("", "for tests of what a run survives: kind@rank,step,point; see docs/checkpoints.md")

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
        yield from fault_problems(self.fault)


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
        about: the effective configuration, as nested values, for the checkpoints.
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
        about: Mapping[str, Any] | None = None,
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
        self.passed_over: tuple[str, ...] = ()
        self.faults = Injector(self.config.fault, mesh.rank)
        self._save_failed = ""
        self._saver: checkpoint.Saver | None = None
        if folder:
            kept = {"keep": self.config.keep, "about": about, "faults": self.faults}
            self._saver = checkpoint.Saver(folder.checkpoints, mesh, optimizer, **kept)
        self._peak = 0.0
        self._stages = PipelinedModel(model, mesh, PipelineConfig() if pipeline is None else pipeline)
        self._loss_options = {"label_smoothing": self.config.label_smoothing, "z_loss": self.config.z_loss}

    def step(self, batches: Sequence[Batch], *, trace: bool = False) -> Metrics:
        """One optimizer step over this rank's microbatches; what it returns is the same on every rank.

        Args:
            trace: measure every action, for :meth:`timeline`.
        """
        started = time.perf_counter()
        self.faults.begin(self.done + 1)
        self.faults.at("step.forward")
        mean, count = self.accumulate(batches, trace=trace)
        self.faults.at("step.backward")
        norm, lr = self.update()
        bad = None if math.isfinite(norm) else "; ".join(self.optimizer.culprits())
        self.faults.at("step.update")
        self.tokens += count
        seconds = time.perf_counter() - started
        return Metrics(
            step=self.done,
            loss=mean,
            grad_norm=norm,
            lr=lr,
            tokens=self.tokens,
            skipped=bad is not None,
            not_finite=bad,
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

        What was wrong with the latest where an older one had to do (``fall_back``) is in ``passed_over``.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        if self.folder is None:
            return False
        fall_back = self.config.fall_back
        found = checkpoint.resume(self.folder.checkpoints, self.mesh, self.optimizer, fall_back=fall_back)
        if found is None:
            return False
        self.done, self.tokens = found.checkpoint.step, found.checkpoint.tokens
        self.passed_over = found.passed_over
        return True

    def save(self, *, background: bool = False) -> None:
        """Write a checkpoint.

        Args:
            background: return when a copy of the state is in memory.

        Raises:
            SaveError: some rank could not; the latest checkpoint is the one that it was.
        """
        if self._saver:
            self._saver.save(step=self.done, tokens=self.tokens, background=background)

    def _attempt(self, save: Callable[[], None]) -> None:
        """Go on training whatever becomes of a save; the next line of the metrics says so."""
        try:
            save()
        except SaveError as error:
            self._save_failed = str(error)

    def _with_save(self, metrics: Metrics) -> Metrics:
        """Let a save in the background go on; with what became of saves since the last step."""
        if self._saver:
            self._attempt(self._saver.poll)
        failed, self._save_failed = self._save_failed, ""
        return replace(metrics, save_failed=failed) if failed else metrics

    def _finish_saving(self, begun_at: int) -> None:
        """Make sure that the last step is saved, which is the one thing that may not fail."""
        if self._saver:
            self._attempt(self._saver.close)
            if self.done not in (begun_at, self._saver.durable):
                self.save()

    def run(self) -> bool:
        """Train from where the run stands to its end; False if it was asked to stop before.

        Raises:
            SaveError: the last step could not be saved; a checkpoint that fails on the way is a metric, no more.
        """
        assert self.data is not None, "run() needs data"
        first = self.mesh.rank == 0
        trace_at = min(self.done + 2, self.steps - 1) if self.traced else -1
        log = MetricsLog(self.folder.metrics, self.done) if first and self.folder else None
        self._peak = measured_peak(next(self.model.parameters()).dtype, self.mesh.device)
        begun_at = self.done
        try:
            while self.done < self.steps:
                if self._stop_everywhere():
                    break
                batches, trace = self.data(self.done), self.done == trace_at
                metrics = self._with_save(self._validated(self.step(batches, trace=trace)))
                if trace and self.traced:
                    timeline = self.timeline()
                    if first:
                        self.traced(timeline, self._stages.table(len(batches)))
                if log:
                    log.write(metrics)
                if first and self.report:
                    self.report(metrics)
                if self.config.save_every and self.done % self.config.save_every == 0:
                    self._attempt(lambda: self.save(background=self.config.save_async))
            self._finish_saving(begun_at)
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
