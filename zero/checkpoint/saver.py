"""Saving: every rank writes what it holds, all agree that it is on the disk, rank 0 publishes it.

In the background the same happens behind the training: threads of each rank copy and write, and the ranks agree between
two steps, where :meth:`Saver.poll` is called, since no thread may use a group that training uses. The state is copied
while forward and backward only read it; the optimizer waits for what is left of that before it changes anything.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel import comm
from parallel.errors import SaveError
from parallel.mesh import Mesh
from zero.checkpoint.buffers import Buffers
from zero.checkpoint.image import Image, divided
from zero.checkpoint.manifest import FileEntry, Manifest
from zero.checkpoint.publish import Publication
from zero.checkpoint.writer import write_images
from zero.engine import Optimizer
from zero.faults import Injector
from zero.fragment import Fragment
from zero.spikes import Past

__all__ = ["Saver", "save"]

_FILES = 4  # of a rank at most: one thread hashes a file, and a disk may be faster than that
_LEAST = 256 << 20  # bytes of a file, where a rank has several


def save(
    folder: Path,
    mesh: Mesh,
    optimizer: Optimizer,
    *,
    step: int,
    tokens: int,
    keep: int,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of all ranks and make it the latest; every rank calls it.

    Args:
        folder: ``checkpoints`` of the run.
        mesh: of the optimizer.
        optimizer: master weights and state.
        step: steps done.
        tokens: labels learned from so far.
        keep: how many complete checkpoints stay; older ones are removed once this one is durable.
        about: the effective configuration, as nested values.

    Raises:
        SaveError: some rank could not; the latest checkpoint is the one that it was.
    """
    saver = Saver(folder, mesh, optimizer, keep=keep, about=about)
    saver.save(step=step, tokens=tokens)
    saver.close()
    return folder / f"step-{step:08d}"


class Saver:
    """Saves the state of an optimizer, one checkpoint at a time; every rank makes one and calls it at the same steps.

    Args:
        folder: ``checkpoints`` of the run.
        mesh: of the optimizer.
        optimizer: master weights and state.
        keep: how many complete checkpoints stay; older ones are removed once a new one is durable.
        about: the effective configuration, as nested values.
        faults: for tests.

    Attributes:
        durable: step of the newest checkpoint that this saver has published, or -1.
    """

    def __init__(
        self,
        folder: Path,
        mesh: Mesh,
        optimizer: Optimizer,
        *,
        keep: int,
        about: Mapping[str, Any] | None = None,
        faults: Injector | None = None,
    ) -> None:
        self.folder, self.mesh, self.optimizer, self.keep = folder, mesh, optimizer, keep
        self.about = {} if about is None else about
        self.faults = Injector() if faults is None else faults
        self.durable = -1
        self._flight: _Flight | None = None
        self._sweep = _Task(_nothing)
        self._lost = False
        self._own: frozenset[tuple[str, str, int]] | None = None
        self._buffers = Buffers(pinned=mesh.device.type == "cuda")
        self._stream: Any = None

    def save(self, *, step: int, tokens: int, past: Past | None = None, background: bool = False) -> None:
        """Save the state as it is now.

        Args:
            step: steps done.
            tokens: labels learned from so far.
            past: of the steps before.
            background: return at once, and copy and write behind the training. What is saved is the state at the call:
                the next :meth:`~zero.optimizer.ZeroOptimizer.step` waits until it is copied. Who changes the state by
                other means calls :meth:`~zero.optimizer.ZeroOptimizer.settle` first. The first save after one that
                failed is not in the background, whatever is asked.

        Raises:
            SaveError: some rank could not save; or, after this save was done, that the one before it, in the
                background, could not. ``latest`` names a whole checkpoint in any case.
        """
        before: SaveError | None = None
        try:
            self.close()  # with the room that an old checkpoint takes
        except SaveError as error:
            before = error
        background, self._lost = background and not self._lost, False
        publication = Publication(self.folder, step, self.faults)
        begin = _Task(publication.begin if self.mesh.rank == 0 else _nothing)
        self._flight = _Flight(publication, tokens, past or Past(), begin)
        self._agree(self._flight)
        own = self._held()
        entry = self._entry(own)
        behind = self._read_behind() if background else None
        self._flight.task = _Task(lambda: self._write(publication, entry, own, behind), background)
        if behind is not None:
            self.optimizer.read_behind(behind.over.wait)
        self._flight.background = background
        if not background:
            self._finish()
        if before is not None:
            raise before

    def poll(self) -> None:
        """Let a save in the background go on; called on every rank between two steps.

        Raises:
            SaveError: it has failed, on some rank.
        """
        while self._flight is not None and self._everywhere(self._flight.task.done):
            self._advance(self._flight)

    def close(self) -> None:
        """Wait for a save in the background to end, and for the removal of what it replaces; every rank calls it.

        Raises:
            SaveError: it has failed, on some rank.
        """
        self._finish()
        self._sweep.wait()

    def _finish(self) -> None:
        while self._flight is not None:
            self._flight.task.wait()
            self._advance(self._flight)

    def _advance(self, flight: _Flight) -> None:
        """The task of every rank is done: begin the next, or be done."""
        reports = self._agree(flight)
        if flight.publishing:
            self.durable, self._flight = flight.publication.step, None
            self._sweep = _Task(flight.publication.sweep, background=True)
            return
        flight.publishing = True
        work: Callable[[], Any] = _nothing
        if self.mesh.rank == 0:
            manifest = self._manifest(flight, [report for report in reports if report]).to_bytes()
            work = lambda: flight.publication.publish(manifest, self.keep)  # noqa: E731
        flight.task = _Task(work, flight.background)

    def _agree(self, flight: _Flight) -> list[Any]:
        """What the tasks of all ranks gave.

        Raises:
            SaveError: one raised; the draft is gone then.
        """
        task = flight.task
        reports = comm.gather_json({"error": task.error, "result": task.result}, self.mesh.world)
        errors = [f"rank {rank}: {report['error']}" for rank, report in enumerate(reports) if report["error"]]
        if errors:
            self._flight, self._lost = None, True
            if self.mesh.rank == 0:
                flight.publication.abandon()
            step = flight.publication.step
            raise SaveError(f"the checkpoint of step {step} could not be saved: {'; '.join(errors)}") from task.cause
        return [report["result"] for report in reports]

    def _everywhere(self, done: bool) -> bool:
        return bool(comm.sum_(torch.tensor(int(done), device=self.mesh.device), self.mesh.world, "min"))

    def _held(self) -> list[Fragment]:
        """What this rank is to write: what it holds as the first of the ranks that hold the same."""
        held = [fragment for fragment in self.optimizer.state() if fragment.values.numel()]
        if self._own is None:
            keys = [[f.parameter, f.what, f.start, f.values.numel()] for f in held]
            before = comm.gather_json(keys, self.mesh.data)[: self.mesh.data.rank]
            taken = {tuple(key) for table in before for key in table}
            self._own = frozenset(
                (f.parameter, f.what, f.start)
                for f, key in zip(held, keys, strict=True)
                if tuple(key) not in taken and self._first(f.parameter)
            )
        return [f for f in held if (f.parameter, f.what, f.start) in self._own]

    def _first(self, name: str) -> bool:
        """Whether no pipeline or tensor rank before this one holds all of the same values."""
        place = {"tp": (self.mesh.tp.rank, self.mesh.tp.size)}
        buckets = self.optimizer.buckets
        first = any(piece.first for piece in buckets.shards[name].pieces(place))
        return first and buckets.holders[name][0] == self.mesh.pp.rank

    def _entry(self, own: list[Fragment]) -> dict[str, Any]:
        """What this rank tells of itself, apart from its file."""
        names = {fragment.parameter for fragment in own}
        scalars = {k: v for k, v in self.optimizer.scalars().items() if k.rpartition("|")[0] in names}
        speaks = self.mesh.tp.rank == self.mesh.data.rank == 0
        shards = self.optimizer.buckets.shards if speaks else {}
        return {"scalars": scalars, "shards": Manifest.table(shards), "files": []}

    def _read_behind(self) -> _Reading:
        """What is computed on a GPU up to here is what is copied beside all that follows."""
        if self.mesh.device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(self.mesh.device)
            self._stream.wait_stream(torch.cuda.current_stream(self.mesh.device))
        return _Reading(self.optimizer.changes)

    def _write(
        self, publication: Publication, entry: dict[str, Any], own: list[Fragment], behind: _Reading | None
    ) -> dict[str, Any]:
        """Write the files of this rank."""
        with behind or contextlib.nullcontext(), self._beside(behind):
            size = sum(f.values.numel() * f.values.element_size() for f in own)
            parts = list(divided(own, max(1, min(_FILES, size // _LEAST)))) if own else []
            names = [f"rank-{self.mesh.rank:05d}{f'.{part}' if part else ''}.safetensors" for part in range(len(parts))]
            images = [(publication.draft / name, Image(part)) for name, part in zip(names, parts, strict=True)]
            check = behind.check if behind is not None else None
            written = write_images(images, self._buffers, self.faults, publication.step, check) if images else []
        for name, part, file in zip(names, parts, written, strict=True):
            held = tuple((f.parameter, f.what, f.start, f.values.numel()) for f in part)
            entry["files"].append({"name": name, "rank": self.mesh.rank, "fragments": held, **file._asdict()})
        return entry

    def _beside(self, behind: _Reading | None) -> contextlib.AbstractContextManager[Any]:
        """Where copies from a GPU go on beside what the training has it compute."""
        return contextlib.nullcontext() if behind is None or self._stream is None else torch.cuda.stream(self._stream)

    def _manifest(self, flight: _Flight, reports: list[dict[str, Any]]) -> Manifest:
        return Manifest(
            step=flight.publication.step,
            tokens=flight.tokens,
            layout=self.mesh.layout,
            zero_stage=self.optimizer.stage,
            scalars={name: value for report in reports for name, value in report["scalars"].items()},
            shards={name: shard for report in reports for name, shard in Manifest.shards_of(report["shards"]).items()},
            files=tuple(FileEntry.parse(file) for report in reports for file in report["files"]),
            about=self.about,
            past=flight.past,
        )


class _Reading:
    """State that is being copied while training goes on.

    Args:
        changes: counts those of what must not change meanwhile.

    Attributes:
        over: the state is not read any more.
    """

    def __init__(self, changes: Callable[[], int]) -> None:
        self.over = threading.Event()
        self._changes, self._before = changes, changes()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *raised: object) -> None:
        self.over.set()

    def check(self) -> None:
        """It is all copied.

        Raises:
            RuntimeError: it was changed meanwhile.
        """
        changed = self._changes() != self._before
        self.over.set()
        if changed:
            raise RuntimeError(
                "weights or optimizer state were changed while they were being copied, and not by ZeroOptimizer.step; "
                "call ZeroOptimizer.settle before such a change"
            )


class _Task:
    """Work that is done here or by a thread, and keeps what it raised."""

    def __init__(self, work: Callable[[], Any], background: bool = False) -> None:
        self.result: Any = None
        self.cause: BaseException | None = None
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, args=(work,), daemon=True, name="checkpoint")
            self._thread.start()
        else:
            self._run(work)

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    @property
    def error(self) -> str:
        return f"{type(self.cause).__name__}: {self.cause}" if self.cause is not None else ""

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self.result = work()
        except Exception as error:  # noqa: BLE001 - whatever it is, every rank must hear of it
            self.cause = error


@dataclass(slots=True)
class _Flight:
    """A save under way: first the ranks write, then rank 0 publishes."""

    publication: Publication
    tokens: int
    past: Past
    task: _Task
    background: bool = False
    publishing: bool = False


def _nothing() -> None:
    return None
