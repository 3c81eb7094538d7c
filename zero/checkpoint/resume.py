"""Going on from a checkpoint, on all ranks or on none: what one finds wrong with it, all of them refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from parallel import comm
from parallel.errors import CheckpointError
from parallel.mesh import Mesh
from zero.checkpoint.publish import latest
from zero.checkpoint.reader import Checkpoint
from zero.engine import Optimizer
from zero.fragment import Fragment
from zero.residue import summands

__all__ = ["Resumed", "load", "newest_whole", "resume"]


class Resumed(NamedTuple):
    """A checkpoint that the state is now of, and why it is not the latest (empty if it is)."""

    checkpoint: Checkpoint
    passed_over: tuple[str, ...]


def load(folder: Path, mesh: Mesh, optimizer: Optimizer) -> Checkpoint:
    """Fill the optimizer, and through it the model, from a checkpoint of any layout; every rank calls it.

    The ranks share the work of checking every file's SHA-256; of the tensors each reads what it holds.

    Raises:
        CheckpointError: on every rank, with all that any of them found: files that are missing, damaged or surplus, or
            a checkpoint of another model. Nothing was changed, unless a file stopped being readable on the way.
    """
    return _taken(_checked(folder, mesh), mesh, optimizer)


def resume(folder: Path, mesh: Mesh, optimizer: Optimizer, *, fall_back: bool = False) -> Resumed | None:
    """Load the latest checkpoint, if there is one; every rank calls it.

    Args:
        folder: of all checkpoints of a run.
        fall_back: if it is damaged, load the newest one before it that is whole.

    Raises:
        CheckpointError: as :func:`load` does; the message names the one to fall back to.
    """
    try:
        found = _from_first(mesh, lambda: _name(latest(folder)))
        if found is None:
            return None
        checkpoint, damage = _checked(folder / found, mesh), ()
    except CheckpointError as error:
        whole, damage = _from_first(mesh, lambda: _name(newest_whole(folder))), error.problems
        if whole is None:
            raise CheckpointError([*damage, f"{folder}: no other checkpoint is whole"]) from None
        if not fall_back:
            offer = f"{folder / whole} is whole: give --trainer.fall_back true to continue from it"
            raise CheckpointError([*damage, offer]) from None
        checkpoint = _checked(folder / whole, mesh)
    return Resumed(_taken(checkpoint, mesh, optimizer), damage)


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint under ``folder`` all of whose files are as they were written, whatever ``latest`` says."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            if not any(Checkpoint.open(path).problems()):
                return path
        except CheckpointError:
            continue
    return None


def _name(path: Path | None) -> str | None:
    return None if path is None else path.name


def _checked(folder: Path, mesh: Mesh) -> Checkpoint:
    """A checkpoint whose files are as they were written, or the same refusal on every rank."""
    opened: list[Checkpoint] = []

    def check() -> Iterator[str]:
        opened.append(Checkpoint.open(folder))
        yield from opened[0].problems(mesh.world.rank, mesh.world.size)

    _refuse_everywhere(mesh, check)
    return opened[0]


def _taken(checkpoint: Checkpoint, mesh: Mesh, optimizer: Optimizer) -> Checkpoint:
    """Fill the optimizer, or refuse on every rank."""
    _refuse_everywhere(mesh, lambda: _mismatches(checkpoint, optimizer))
    optimizer.prepare()
    _refuse_everywhere(mesh, lambda: _fill(checkpoint, mesh, optimizer))
    optimizer.restore(checkpoint.scalars)
    checkpoint.close()
    return checkpoint


def _mismatches(checkpoint: Checkpoint, optimizer: Optimizer) -> Iterator[str]:
    """Why the checkpoint does not fit the model and the optimizer."""
    buckets = optimizer.buckets
    ours = {name: shard.shape for name, shard in buckets.shards.items()}
    theirs = {name: shard.shape for name, shard in checkpoint.shards.items()}
    elsewhere = buckets.holders.keys() - ours.keys()
    for name in sorted((ours.keys() | theirs.keys()) - (elsewhere & theirs.keys())):
        if ours.get(name) != theirs.get(name):
            yield f"{checkpoint.folder}: {name} is {theirs.get(name, 'absent')}, the model has {ours.get(name, 'none')}"
    for fragment in optimizer.state():
        name = fragment.parameter
        for part in _parts(checkpoint, fragment) if ours[name] == theirs.get(name) else ():
            if problem := checkpoint.covers(part, buckets.shards[name], optimizer.mesh.place):
                yield problem
    for name in sorted(optimizer.scalars().keys() - checkpoint.scalars.keys()):
        yield f"{checkpoint.folder}: has no {name}"


def _fill(checkpoint: Checkpoint, mesh: Mesh, optimizer: Optimizer) -> Iterator[str]:
    for fragment in optimizer.state():
        parts, shard = _parts(checkpoint, fragment), optimizer.buckets.shards[fragment.parameter]
        if parts and parts[0] is fragment:
            checkpoint.fill(fragment, shard, mesh.place)
            continue
        fragment.values.zero_()
        for part in parts:
            summand = part._replace(values=torch.empty_like(fragment.values))
            checkpoint.fill(summand, shard, mesh.place)
            fragment.values.add_(summand.values)
    yield from ()


def _parts(checkpoint: Checkpoint, fragment: Fragment) -> list[Fragment]:
    """What of a checkpoint a fragment is the sum of."""
    names = summands(fragment.what, checkpoint.kinds(fragment.parameter))
    return [fragment if name == fragment.what else fragment._replace(what=name) for name in names]


def _refuse_everywhere(mesh: Mesh, check: Callable[[], Iterable[str]]) -> None:
    """Raise on every rank what any of them finds.

    Raises:
        CheckpointError: that.
    """
    try:
        problems = [*check()]
    except CheckpointError as error:
        problems = [*error.problems]
    found = [problem for own in comm.gather_json(problems, mesh.world) for problem in own]
    if found:
        raise CheckpointError(dict.fromkeys(found))


def _from_first(mesh: Mesh, ask: Callable[[], str | None]) -> str | None:
    """What rank 0 is told.

    Raises:
        CheckpointError: on every rank, what it raised there.
    """
    answer: list[str | None] = [None]

    def on_first() -> Iterable[str]:
        if mesh.rank == 0:
            answer[0] = ask()
        return ()

    _refuse_everywhere(mesh, on_first)
    return comm.gather_json(answer[0], mesh.world)[0]
