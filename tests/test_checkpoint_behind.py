"""Checkpoints that are copied and written behind the training: the state at the call, whatever becomes of it then."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
from test_checkpoint import trained
from test_trainer import batches, trainer_on
from torch import Tensor

from parallel import comm
from parallel.errors import SaveError
from parallel.mesh import Layout, Mesh
from zero import checkpoint
from zero.checkpoint import saver as saving
from zero.checkpoint.saver import Saver
from zero.faults import InjectedFault, Injector
from zero.run import RunFolder
from zero.trainer import Trainer, TrainerConfig


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() <= before


class Gate(Injector):
    """Holds the writer at a point until it is opened."""

    def __init__(self, point: str) -> None:
        super().__init__()
        self.point, self.reached, self.opened = point, threading.Event(), threading.Event()

    def at(self, point: str, step: int | None = None) -> None:
        """Wait here."""
        if point == self.point:
            self.reached.set()
            assert self.opened.wait(20)


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path) -> None:
    trainer, gate = trained(tmp_path / "run"), Gate("save.write")
    saver = Saver(tmp_path / "c", trainer.mesh, trainer.optimizer, keep=1, faults=gate)
    expected = {f.key: f.values.clone() for f in trainer.optimizer.state()}
    saver.save(step=1, tokens=0, background=True)
    assert gate.reached.wait(20)
    trainer.step(batches(9))
    for fragment in trainer.optimizer.state():
        fragment.values.fill_(7)
    assert checkpoint.latest(tmp_path / "c") is None
    saver.poll()
    assert saver.durable == -1
    gate.opened.set()
    saver.close()
    assert saver.durable == 1
    read = load_file(tmp_path / "c" / "step-00000001" / "rank-00000.safetensors")
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], value) for key, value in expected.items())


def test_one_save_at_a_time(tmp_path: Path) -> None:
    trainer, gate = trained(tmp_path / "run"), Gate("save.fsync")
    saver = Saver(tmp_path / "c", trainer.mesh, trainer.optimizer, keep=5, faults=gate)
    saver.save(step=1, tokens=0, background=True)
    assert gate.reached.wait(20)
    threading.Timer(0.1, gate.opened.set).start()
    saver.save(step=2, tokens=0, background=True)
    found = checkpoint.latest(tmp_path / "c")
    assert found is not None and found.name == "step-00000001", "the first was waited for"
    saver.close()
    assert sorted(p.name for p in (tmp_path / "c").glob("step-*")) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("point", ["save.write", "save.rename", "save.pointer"])
def test_a_writer_that_fails_is_heard_of_and_the_next_save_is_not_left_to_it(tmp_path: Path, point: str) -> None:
    trainer = trained(tmp_path / "run")
    saver = Saver(
        tmp_path / "c", trainer.mesh, trainer.optimizer, keep=5, faults=Injector(f"raise@0,2,{point}; eio@0,4,{point}")
    )
    saver.save(step=1, tokens=0, background=True)
    saver.save(step=2, tokens=0, background=True)
    with pytest.raises(SaveError, match=f"step 2 could not be saved: rank 0: InjectedFault: injected at {point}"):
        while True:
            saver.poll()
    assert not list((tmp_path / "c").glob(".*"))
    saver.save(step=3, tokens=0, background=True)
    assert saver.durable == 3, "in the foreground"
    saver.save(step=4, tokens=0, background=True)
    with pytest.raises(SaveError, match=r"step 4 .*Input/output error"):
        saver.save(step=5, tokens=0, background=True)
    assert saver.durable == 5, "the state was saved nevertheless, and at once"
    assert isinstance(InjectedFault(), Exception)


class Held:
    """Memory for copies that is not there before it is let go."""

    def __init__(self, saver: Saver) -> None:
        self.asked, self.free = threading.Event(), threading.Event()
        self._take, saver._buffers.take = saver._buffers.take, self.take

    def take(self) -> Tensor:
        """Wait here."""
        self.asked.set()
        assert self.free.wait(20)
        return self._take()


def held(folder: Path, saved: bool = True) -> tuple[Trainer, Saver, Held]:
    """A save behind the training whose copy has begun and cannot go on."""
    trainer = trained(folder / "run")
    saver = Saver(folder / "c", trainer.mesh, trainer.optimizer, keep=1)
    gate = Held(saver)
    saver.save(step=1, tokens=0, background=True)
    assert gate.asked.wait(20)
    return trainer, saver, gate


def state(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of all there is, without waiting for anybody."""
    trainer.optimizer._readers, readers = [], trainer.optimizer._readers
    copied = {f.key: f.values.clone() for f in trainer.optimizer.state()}
    trainer.optimizer._readers = readers
    return copied


CHANGES: dict[str, Callable[[Trainer], Any]] = {
    "step": lambda trainer: trainer.step(batches(9)),
    "fragments": lambda trainer: [f.values.fill_(7) for f in trainer.optimizer.state()],
    "load": lambda trainer: trainer.resume(),
    "prepare": lambda trainer: trainer.optimizer.prepare(),
    "restore": lambda trainer: trainer.optimizer.restore(dict.fromkeys(trainer.optimizer.scalars(), 5.0)),
}


@pytest.mark.parametrize("how", CHANGES)
def test_nothing_changes_before_it_is_copied(tmp_path: Path, how: str) -> None:
    """Forward and backward go on meanwhile; what would change the state waits."""
    trainer, saver, gate = held(tmp_path)
    expected = state(trainer)
    trainer.accumulate(batches(8))
    trainer.optimizer.reduce()
    change = threading.Thread(target=CHANGES[how], args=(trainer,), daemon=True)
    change.start()
    change.join(0.3)
    assert change.is_alive()
    assert all(torch.equal(value, expected[key]) for key, value in state(trainer).items())
    gate.free.set()
    change.join(20)
    assert not change.is_alive()
    saver.close()
    read = load_file(tmp_path / "c" / "step-00000001" / "rank-00000.safetensors")
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], value) for key, value in expected.items())


ASIDE: dict[str, Callable[[Trainer], Any]] = {
    "parameter": lambda trainer: next(trainer.model.parameters()).mul_(2),
    "load_state_dict": lambda trainer: trainer.model.load_state_dict(trainer.model.state_dict()),
    "optimizer state": lambda trainer: next(iter(trainer.optimizer.inner.state.values()))["exp_avg"].zero_(),
    "master": lambda trainer: trainer.optimizer.buckets.buckets[0].master.add_(1),
}


@pytest.mark.parametrize("what", ASIDE)
def test_a_change_behind_the_back_is_not_saved_and_is_told(tmp_path: Path, what: str) -> None:
    """Half of the old state and half of the new is no state."""
    trainer, saver, gate = held(tmp_path)
    with torch.no_grad():
        ASIDE[what](trainer)
    gate.free.set()
    with pytest.raises(SaveError, match=r"changed while they were being copied.*settle"):
        saver.close()
    assert not [*(tmp_path / "c").iterdir()]
    saver.save(step=2, tokens=0, background=True)
    assert saver.durable == 2, "in the foreground"


@pytest.mark.parametrize("what", ASIDE)
def test_after_settling_anybody_may_change_anything(tmp_path: Path, what: str) -> None:
    trainer, saver, gate = held(tmp_path)
    threading.Timer(0.1, gate.free.set).start()
    trainer.optimizer.settle()
    with torch.no_grad():
        ASIDE[what](trainer)
    saver.close()
    assert saver.durable == 1


def test_a_writer_that_fails_lets_the_training_go_on(tmp_path: Path) -> None:
    """Even where it fails before all is copied."""
    trainer = trained(tmp_path / "run")
    saver = Saver(tmp_path / "c", trainer.mesh, trainer.optimizer, keep=1)

    def fail() -> Tensor:
        raise MemoryError("none left")

    saver._buffers.take = fail
    saver.save(step=1, tokens=0, background=True)
    trainer.step(batches(9))
    with pytest.raises(SaveError, match="none left"):
        saver.close()


def save_in_parts(folder: str, layout: dict[str, int], files: int, background: bool) -> list[str]:
    """On the ranks: a step, and a save in so many files; then another step, and back again."""
    mesh = Mesh.build(Layout(**layout)) if layout else Mesh.single()
    trainer = trainer_on(mesh, dtype=torch.float32)
    trainer.step(batches(0, mesh.data.rank, mesh.data.size))
    saver = Saver(Path(folder), mesh, trainer.optimizer, keep=1)
    size = sum(f.values.nbytes for f in saver._held())
    before, saving._LEAST = saving._LEAST, size // files
    try:
        expected = {f.key: f.values.clone() for f in trainer.optimizer.state()}
        saver.save(step=1, tokens=5, background=background)
        trainer.step(batches(1, mesh.data.rank, mesh.data.size))
        saver.close()
    finally:
        saving._LEAST = before
    found = checkpoint.latest(Path(folder))
    assert found is not None
    checkpoint.load(found, mesh, trainer.optimizer)
    assert all(torch.equal(f.values, expected[f.key]) for f in trainer.optimizer.state())
    comm.barrier(mesh.world)
    return sorted(path.name for path in found.glob("rank-*"))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("layout", [{}, {"tp": 2}])
def test_a_rank_with_much_to_write_has_several_files(
    ranks: Ranks, tmp_path: Path, layout: dict[str, int], background: bool
) -> None:
    world = Layout(**layout).world
    for asked, files in ((1, 1), (2, 2), (4, 4), (9, 4)):
        folder = str(tmp_path / str(asked))
        arguments: dict[str, Any] = {"folder": folder, "layout": layout, "files": asked, "background": background}
        names = ranks.run(save_in_parts, world=world, **arguments)[0] if layout else save_in_parts(**arguments)
        expected = [f"rank-{rank:05d}{f'.{k}' if k else ''}.safetensors" for rank in range(world) for k in range(files)]
        assert names == sorted(expected), asked
    single = trainer_on(Mesh.single(), dtype=torch.float32)
    checkpoint.load(tmp_path / "9" / "step-00000001", single.mesh, single.optimizer)
    (tmp_path / "9" / "step-00000001" / "rank-00000.2.safetensors").write_bytes(b"")
    with pytest.raises(checkpoint.reader.CheckpointError, match=r"rank-00000\.2\.safetensors: damaged"):
        checkpoint.load(tmp_path / "9" / "step-00000001", single.mesh, single.optimizer)


def train_behind(folder: str, background: bool) -> list[Any]:
    """On the ranks: a run that saves every step; the losses and what is there at the end."""
    mesh = Mesh.build(Layout(tp=2, dp=2))
    trainer = trainer_on(
        mesh,
        dtype=torch.float32,
        steps=5,
        folder=RunFolder(Path(folder)),
        loop=TrainerConfig(save_every=1, keep=9, save_async=background, fault="enospc@1,3,save.write"),
    )
    trainer.run()
    comm.barrier(mesh.world)
    return sorted(p.name for p in (Path(folder) / "checkpoints").iterdir())


def test_saving_behind_the_training_of_several_ranks(ranks: Ranks, tmp_path: Path) -> None:
    """Rank 1 has no room in step 3: no rank publishes that step, all go on."""
    values = []
    for background in (False, True):
        folder = tmp_path / str(background)
        folder.mkdir()
        steps = ranks.run(train_behind, world=4, folder=str(folder), background=background)[0]
        assert steps == ["latest", *(f"step-{step:08d}" for step in (1, 2, 4, 5))]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        failed = {line["step"]: line["save_failed"] for line in lines if "save_failed" in line}
        assert [*failed] in ([4], [5]) and "No space left" in next(iter(failed.values()))
        saved = checkpoint.Checkpoint.open(folder / "checkpoints" / "step-00000002")
        assert not any(saved.problems())
        values.append({name: saved.whole(name, "exp_avg") for name in saved.shards})
    assert all(torch.equal(value, values[1][name]) for name, value in values[0].items())
