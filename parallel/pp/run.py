"""The executor: carries out the row of this rank of any valid schedule."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from parallel.deferral import Deferral, Kept, settle
from parallel.errors import ConfigError, PipelineError, ScheduleError
from parallel.mesh import Mesh
from parallel.pp.action import KINDS, TRANSFERS, Action
from parallel.pp.board import Board
from parallel.pp.links import Links, Message
from parallel.pp.lower import lower
from parallel.pp.schedule import Schedule
from parallel.pp.timeline import Timeline
from parallel.pp.trace import Trace
from parallel.pp.validate import validate

__all__ = ["HANDLERS", "Pipeline"]

M = TypeVar("M")

_SHORT_S = 0.3  # waits below this are not talked about


class Pipeline(Generic[M]):
    """The stages of this rank, ready to run schedules. Every rank of the mesh makes one at the same time.

    Args:
        mesh: stages are on the ranks of ``mesh.pp``.
        forward: (stage, input, microbatch) -> output, on this rank's stages. The input of the first stage is None; the
            output of the last is what the step is for: to train, the loss, a scalar. What travels between stages is one
            tensor of floating-point numbers.
        shape: (stage, microbatch) -> shape of the input of a stage, on any rank.
        dtype: of what travels.
        deferral: that the linear layers of the stages ask; without it I does the work of W as well.
        timeout_s: longest wait for a message.
        delay_s: every message leaves so much later: a slow link, for experiments.
    """

    def __init__(
        self,
        mesh: Mesh,
        forward: Callable[[int, Tensor | None, M], Tensor],
        shape: Callable[[int, M], Sequence[int]],
        dtype: torch.dtype = torch.float32,
        *,
        deferral: Deferral | None = None,
        timeout_s: float = 600.0,
        delay_s: float = 0.0,
    ) -> None:
        self.mesh, self.forward, self.shape, self.dtype = mesh, forward, shape, dtype
        self.deferral = Deferral() if deferral is None else deferral
        self.timeout_s = timeout_s
        self.links = Links(mesh, delay_s)
        self.board = Board(mesh.world)
        self.trace: Trace | None = None
        self._plans: dict[int, tuple[Schedule, Schedule]] = {}

    def run(
        self,
        schedule: Schedule,
        microbatches: Sequence[M],
        *,
        arriving: Callable[[int | None, bool, bool], None] | None = None,
        trace: bool = False,
    ) -> dict[int, Tensor]:
        """Carry out a schedule; what the last stage gave for each microbatch that ended on this rank.

        Gradients accumulate in the parameters, as by ``backward``. Every rank of ``mesh.pp`` calls this with the same
        schedule and microbatches.

        Args:
            schedule: a table for ``mesh.pp.size`` ranks, lowered or not.
            microbatches: as many as the schedule has.
            arriving: called before every action that gives gradients with its stage, whether no parameter of that
                stage that gets a gradient now will get another, and whether all have got theirs of the microbatch then;
                and after it with None.
            trace: keep a record for :meth:`timeline`.

        Raises:
            ScheduleError: the table is not valid, or not for these ranks and microbatches.
            PipelineError: a rank failed or stopped answering; the same on every rank that waits. The messages under way
                are lost, and with them the use of this pipeline.
        """
        lowered = self._lowered(schedule)
        if len(microbatches) != schedule.microbatches:
            raise ScheduleError(f"the schedule has {schedule.microbatches} microbatches, the step {len(microbatches)}")
        self.trace = Trace(self.mesh) if trace else None
        with torch.set_grad_enabled(schedule.trains):
            return _Step(self, lowered, microbatches, arriving).play()

    def timeline(self) -> Timeline:
        """What all ranks did when in the last run, which was traced; every rank of ``mesh.pp`` calls this."""
        if self.trace is None:
            raise ConfigError("the last run was not traced")
        return self.trace.timeline()

    def _lowered(self, schedule: Schedule) -> Schedule:
        if id(schedule) not in self._plans:
            if schedule.ranks != self.mesh.pp.size:
                raise ScheduleError(f"the schedule has {schedule.ranks} ranks, the pipeline {self.mesh.pp.size}")
            lowered = lower(validate(schedule))
            self.links.connect(_links(lowered))
            self._plans = {**dict(list(self._plans.items())[-7:]), id(schedule): (schedule, lowered)}
        return self._plans[id(schedule)][1]


def _links(lowered: Schedule) -> list[tuple[int, int]]:
    """Every (from, to) over which something is sent."""
    where = lowered.where
    pairs = {
        (rank, where[stage + KINDS[op].peer][microbatch])
        for rank, row in enumerate(lowered.rows)
        for stage, op, microbatch in row
        if KINDS[op].stream == "send"
    }
    return sorted(pairs)


class _Step(Generic[M]):
    """One run: the values that are alive, each from the action that gives it to the one that takes it."""

    def __init__(
        self,
        pipeline: Pipeline[M],
        schedule: Schedule,
        microbatches: Sequence[M],
        arriving: Callable[[int | None, bool, bool], None] | None,
    ) -> None:
        self.pipeline, self.schedule, self.microbatches = pipeline, schedule, microbatches
        self.rank, self.where = pipeline.mesh.pp.rank, schedule.where
        self.row = schedule.rows[self.rank]
        self.arriving, self.finals = arriving, _finals(self.row) if arriving else set[int]()
        self.values: dict[tuple[str, int, int], Tensor | Message] = {}
        self.saved: dict[tuple[int, int], tuple[Tensor | None, GradientEdge | None, Tensor | None]] = {}
        self.kept: dict[tuple[int, int], Kept] = {}
        self.outputs: dict[int, Tensor] = {}
        self.cell = 0

    def play(self) -> dict[int, Tensor]:
        """Carry out the row."""
        board = self.pipeline.board
        try:
            for cell, action in enumerate(self.row):
                self.cell = cell
                HANDLERS[action.op](self, action)
            for message in self.pipeline.links.leaving():
                self._await(message, self.row[-1], None)
        except PipelineError:
            raise
        except Exception as error:
            place = f"rank {self.pipeline.mesh.rank} (stage {self.row[self.cell].stage} of the pipeline)"
            text = f"{place} failed in {_told(self.row[self.cell])}: {type(error).__name__}: {error}"
            raise PipelineError(board.raise_alarm(text)) from error
        return self.outputs

    def span(self, action: Action) -> Any:
        """A context that records when an action ran, if the run is traced."""
        trace = self.pipeline.trace
        return _NOTHING if trace is None else trace.span(action)

    @contextmanager
    def announced(self, action: Action) -> Iterator[None]:
        """Say that gradients are about to arrive, and that they have."""
        if self.arriving is not None:
            self.arriving(action.stage, self.cell in self.finals, action.op != "I")
        yield
        if self.arriving is not None:
            self.arriving(None, False, True)

    def take(self, name: str, action: Action) -> Tensor:
        """A value, once it is there."""
        value = self.values.pop((name, action.stage, action.microbatch))
        if isinstance(value, Tensor):
            return value
        self._await(value, action, self.where[action.stage + (-1 if name == "input" else 1)][action.microbatch])
        assert value.tensor is not None
        return value.tensor

    def give(self, name: str, stage: int, microbatch: int, value: Tensor) -> None:
        """Keep a value for the action that takes it or sends it."""
        self.values[name, stage, microbatch] = value

    def _await(self, message: Message, action: Action, source: int | None) -> None:
        """Return when a message is there; raise if it never comes, or a rank says that the step has failed."""
        if self._there(message):
            return
        pipeline, started = self.pipeline, time.monotonic()
        board, ranks = pipeline.board, pipeline.mesh.pp.ranks
        peer = ranks[self.rank if source is None else source]
        board.wait_for(peer, {"at": str(action)})
        try:
            while not self._there(message):
                if (alarm := board.alarm()) is not None:
                    raise PipelineError(alarm)
                if time.monotonic() - started > pipeline.timeout_s:
                    silent, line = board.silent()
                    waiting = f"for {pipeline.timeout_s:g} s rank {pipeline.mesh.rank} has waited in {_told(action)}"
                    end = "" if line.get("at") == str(action) else f", by way of a rank that waits in {line.get('at')}"
                    raise PipelineError(board.raise_alarm(f"rank {silent} stopped answering: {waiting}{end}"))
        finally:
            board.go_on()

    def _there(self, message: Message) -> bool:
        """Whether a message is there, after a short wait if need be."""
        with self.pipeline.mesh.ledger.waiting():
            return message.there(_SHORT_S)


def _told(action: Action) -> str:
    return f"{action} ({KINDS[action.op].name} of microbatch {action.microbatch} through stage {action.stage})"


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


_NOTHING = _Nothing()


def _finals(row: Sequence[Action]) -> set[int]:
    """The cells after which their stage gets no more gradients of the sort that they give."""
    last: dict[tuple[int, str], int] = {}
    for cell, (stage, op, _) in enumerate(row):
        if op in ("B", "I"):
            last[stage, "I"] = cell
        if op in ("B", "W"):
            last[stage, "W"] = cell
    sorts = {"B": ("I", "W"), "I": ("I",), "W": ("W",)}
    return {cell for cell, (s, op, _) in enumerate(row) if op in sorts and all(last[s, w] == cell for w in sorts[op])}


def _forward(step: _Step[Any], action: Action) -> None:
    stage, _, microbatch = action
    x = step.take("input", action) if stage else None
    if x is not None and torch.is_grad_enabled():
        x.requires_grad_()
    with step.span(action):
        y = step.pipeline.forward(stage, x, step.microbatches[microbatch])
    last = stage == step.schedule.stages - 1
    if torch.is_grad_enabled():
        if last and y.numel() != 1:
            raise ConfigError(
                f"the last stage gave a tensor of shape {tuple(y.shape)}; to train it must give a scalar loss"
            )
        edge = get_gradient_edge(y) if y.requires_grad else None
        step.saved[stage, microbatch] = x, edge, torch.ones_like(y) if last else None
    if last:
        step.outputs[microbatch] = y.detach()
    else:
        step.give("input", stage + 1, microbatch, y.detach())


def _backward(step: _Step[Any], action: Action) -> None:
    stage, _, microbatch = action
    gradient = step.take("output_gradient", action) if stage < step.schedule.stages - 1 else None
    with step.announced(action), step.span(action):
        x, edge, one = step.saved.pop((stage, microbatch))
        if edge is not None:
            torch.autograd.backward((edge,), (one if gradient is None else gradient,))
        if x is not None:
            step.give("output_gradient", stage - 1, microbatch, torch.zeros_like(x) if x.grad is None else x.grad)


def _backward_input(step: _Step[Any], action: Action) -> None:
    with step.pipeline.deferral.keep() as kept:
        _backward(step, action)
    step.kept[action.stage, action.microbatch] = kept


def _backward_weights(step: _Step[Any], action: Action) -> None:
    with step.announced(action), step.span(action):
        settle(step.kept.pop((action.stage, action.microbatch)))


def _tag(step: _Step[Any], stage: int, microbatch: int, name: str) -> int:
    return (microbatch * step.schedule.stages + stage) * len(TRANSFERS) + list(TRANSFERS).index(name)


def _send(step: _Step[Any], action: Action) -> None:
    value = KINDS[action.op].takes[0]
    key = (value.name, action.stage + value.offset, action.microbatch)
    tensor = step.values.pop(key)
    assert isinstance(tensor, Tensor)
    step.pipeline.links.send(tensor, step.where[key[1]][key[2]], _tag(step, key[1], key[2], value.name))


def _receive(step: _Step[Any], action: Action) -> None:
    stage, op, microbatch = action
    pipeline, name = step.pipeline, KINDS[op].gives[0].name
    travels = stage if name == "input" else stage + 1
    shape = pipeline.shape(travels, step.microbatches[microbatch])
    buffer = torch.empty(tuple(shape), dtype=pipeline.dtype, device=pipeline.mesh.device)
    source = step.where[stage + KINDS[op].peer][microbatch]
    step.values[name, stage, microbatch] = pipeline.links.receive(buffer, source, _tag(step, stage, microbatch, name))


HANDLERS: Mapping[str, Callable[[_Step[Any], Action], None]] = {
    "F": _forward,
    "B": _backward,
    "I": _backward_input,
    "W": _backward_weights,
    "SF": _send,
    "RF": _receive,
    "SB": _send,
    "RB": _receive,
}
"""What each kind of action does."""
