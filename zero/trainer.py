"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parallel import comm
from parallel.errors import SaveError
from parallel.mesh import Mesh
from parallel.models.batch import IGNORE, Batch
from parallel.models.decoder import Decoder
from parallel.pp import PipelineConfig, Schedule, Timeline
from zero import checkpoint
from zero.engine import Optimizer, engine_of
from zero.faults import Injector
from zero.loader import Sample
from zero.loop import NotFiniteError, TrainerConfig
from zero.metrics import Metrics, MetricsLog, Rewound, measured_peak, peak_memory, training_flops
from zero.run import RunFolder
from zero.schedule import ScheduleConfig
from zero.spikes import Spikes
from zero.stragglers import Stragglers

__all__ = ["NotFiniteError", "Trainer", "TrainerConfig"]


class Trainer:
    """Steps of one model on all ranks of a mesh.

    Args:
        model: built on the mesh.
        optimizer: over the same model; ours, or one that brings its own :class:`zero.engine.Engine`.
        mesh: where.
        steps: optimizer steps of the whole run.
        config: of the loop.
        schedule: of the learning rate.
        data: step (from 0) -> this rank's microbatches; a pure function, so that the step is the data position.
        samples: step (from 0) -> what all ranks learn from in it, to name it where the loss jumps.
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
        optimizer: Optimizer,
        mesh: Mesh,
        *,
        steps: int,
        config: TrainerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        data: Callable[[int], Sequence[Batch]] | None = None,
        samples: Callable[[int], Sequence[Sample]] | None = None,
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
        self.data, self.samples = data, samples
        self.validation, self.bytes_per_token = validation, bytes_per_token
        self.folder, self.report, self.stop, self.traced = folder, report, stop, traced
        self.done = 0
        self.tokens = 0
        self.passed_over: tuple[str, ...] = ()
        self.spikes = Spikes(self.config.spike)
        self.faults = Injector(self.config.fault, mesh.rank)
        if self.faults.spoils:
            optimizer.buckets.arriving = lambda gradient: self.faults.spoil("step.backward", [gradient])
        self._stragglers = Stragglers(mesh, self.config.slow)
        self._news: dict[str, Any] = {}
        self._saver: checkpoint.Saver | None = None
        if folder:
            kept = {"keep": self.config.keep, "about": about, "faults": self.faults}
            self._saver = checkpoint.Saver(folder.checkpoints, mesh, optimizer, **kept)
        self._peak = 0.0
        self._engine = engine_of(model, optimizer, mesh, PipelineConfig() if pipeline is None else pipeline)
        self._loss_options = {"label_smoothing": self.config.label_smoothing, "z_loss": self.config.z_loss}

    def step(self, batches: Sequence[Batch], *, trace: bool = False) -> Metrics:
        """One optimizer step over this rank's microbatches; what it returns is the same on every rank.

        Args:
            trace: measure every action, for :meth:`timeline`.

        Raises:
            NotFiniteError: gradients are not finite, and ``on_not_finite`` says to stop.
            NotEnoughMemory: this rank has not enough.
        """
        started = time.perf_counter()
        self.faults.begin(self.done + 1)
        with self._engine.explained(lambda: peak_memory(self.mesh.device)):
            self.faults.at("step.forward")
            mean, count = self.accumulate(batches, trace=trace)
            self.faults.at("step.backward")
            norm, lr = self.update()
            bad = None if math.isfinite(norm) else "; ".join(self.optimizer.culprits())
            self.faults.at("step.update")
        if bad is not None and self.config.on_not_finite == "stop":
            self.done -= 1
            raise NotFiniteError(f"step {self.done + 1}: gradients are not finite ({bad}); nothing was changed")
        spike = self.spikes.judge(mean)
        samples = None if spike is None or not self.samples else self.samples(self.spikes.share(self.done - 1))
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
            spike=spike,
            samples=samples,
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
        factor = self.faults.factor("step.forward")
        options = {"scale": factor / max(1, count), **self._loss_options}
        total = self._engine.train(batches, trace=trace, **options)
        return float(self._sum(total * factor)) / max(1, count), count

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
        total = float(self._sum(self._engine.evaluate(batches)))
        if not count:
            return None
        loss = total / count
        return loss, loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else 0.0

    def timeline(self) -> Timeline:
        """What the ranks of this pipeline did when in the last step, which was traced; all of them call this."""
        return self._engine.timeline()

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
        self.spikes.past = found.checkpoint.manifest.past
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
            past = self.spikes.past
            self._saver.save(step=self.done, tokens=self.tokens, past=past, background=background)

    def _attempt(self, save: Callable[[], None]) -> None:
        """Go on training whatever becomes of a save; the next line of the metrics says so."""
        try:
            save()
        except SaveError as error:
            self._news["save_failed"] = str(error)

    def _with_news(self, metrics: Metrics) -> Metrics:
        """Let a save in the background go on; with what has happened since the last step."""
        if self._saver:
            self._attempt(self._saver.poll)
        news, self._news = self._news, {}
        return replace(metrics, **news)

    def _gone_back(self, metrics: Metrics) -> bool:
        """Whether the run is at its latest checkpoint again, from where it passes over what gave this step's spike."""
        share, before = self.spikes.share(metrics.step - 1), self.spikes.past.passed_over
        if len(before) >= self.config.rewind or not self._anywhere(metrics.spike is not None) or not self._saver:
            return False
        self._attempt(self._saver.close)
        if not self.resume():
            return False
        self.spikes.pass_over(*before, share)
        if metrics.spike is not None:
            told = {"share": share, "loss": metrics.loss, "spike": metrics.spike, "samples": metrics.samples}
            self._news["rewound"] = Rewound(from_step=metrics.step, to_step=self.done, **told)
        return True

    def _finish_saving(self, begun_at: int) -> None:
        """Make sure that the last step is saved, which is the one thing that may not fail."""
        if self._saver:
            self._attempt(self._saver.close)
            if self.done not in (begun_at, self._saver.durable):
                self.save()
            self._saver.close()

    def run(self) -> bool:
        """Train from where the run stands to its end; False if it was asked to stop before.

        Raises:
            SaveError: the last step could not be saved; a checkpoint that fails on the way is a metric, no more.
            NotFiniteError: as :meth:`step`; the step before is saved.
            NotEnoughMemory: as :meth:`step`.
        """
        first = self.mesh.rank == 0
        trace_at = min(self.done + 2, self.steps - 1) if self.traced else -1
        log = self._open_log()
        self._peak = measured_peak(next(self.model.parameters()).dtype, self.mesh.device)
        begun_at = self.done
        if self.config.rewind and not self.done:
            self._attempt(self.save)
        try:
            while self.done < self.steps:
                if self._anywhere(self.stop()):
                    break
                self._stragglers.begin()
                batches, trace = self._read(), self.done == trace_at
                metrics = self.step(batches, trace=trace)
                if slow := self._stragglers.end():
                    self._news["slow_ranks"] = slow
                if self._gone_back(metrics):
                    log = self._open_log(log)
                    continue
                metrics = self._with_news(self._validated(metrics))
                if trace and self.traced:
                    timeline = self.timeline()
                    if first:
                        self.traced(timeline, self._engine.table(len(batches)))
                if log:
                    log.write(metrics)
                if first and self.report:
                    self.report(metrics)
                if self.config.save_every and self.done % self.config.save_every == 0:
                    self._attempt(lambda: self.save(background=self.config.save_async))
            self._finish_saving(begun_at)
        except NotFiniteError:
            self._finish_saving(begun_at)
            raise
        finally:
            if log:
                log.close()
        return self.done >= self.steps

    def _read(self) -> Sequence[Batch]:
        """The microbatches of the next step."""
        assert self.data is not None, "run() needs data"
        self.faults.begin(self.done + 1)
        self.faults.at("step.data")
        return self.data(self.spikes.share(self.done))

    def _open_log(self, before: MetricsLog | None = None) -> MetricsLog | None:
        """The metrics, to go on after the last step that is done; on rank 0."""
        if before:
            before.close()
        return MetricsLog(self.folder.metrics, self.done) if self.mesh.rank == 0 and self.folder else None

    def _validated(self, metrics: Metrics) -> Metrics:
        every = self.config.validate_every
        if not (self.done == self.steps or (every and self.done % every == 0)):
            return metrics
        result = self.validate()
        return metrics if result is None else replace(metrics, validation_loss=result[0], bits_per_byte=result[1])

    def _anywhere(self, asked: bool) -> bool:
        """Whether any rank says yes."""
        return bool(comm.sum_(torch.tensor(int(asked), device=self.mesh.device), self.mesh.world, "max"))
