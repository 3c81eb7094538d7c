"""What top-k keeps back is state: it is saved, comes back bit for bit, and at another layout nothing of it is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel import comm
from parallel.errors import CheckpointError
from parallel.mesh import Layout, Mesh
from parallel.shard import gather_whole
from tests.test_trainer import batches
from tests.test_zero import trainer_on
from zero import checkpoint
from zero.fragment import Fragment
from zero.optimizer import OptimizerConfig, ZeroConfig, ZeroOptimizer
from zero.residue import residue, summands
from zero.trainer import Trainer

OPTIMIZER = OptimizerConfig(lr=1e-2, clip=0.5, bucket_mb=0.02)


def test_every_residue_goes_to_one_rank_and_to_its_own_if_there_are_as_many() -> None:
    assert summands("exp_avg", ["master", "exp_avg"]) == ["exp_avg"]
    for saved in range(1, 7):
        held = ["master", *(residue(rank, saved) for rank in range(saved))]
        for now in range(1, 7):
            given = [summands(residue(rank, now), held) for rank in range(now)]
            assert sorted(name for names in given for name in names) == sorted(held[1:])
            if now == saved:
                assert given == [[name] for name in held[1:]]
    assert summands(residue(1, 2), ["master", "exp_avg"]) == []


def residues(trainer: Trainer) -> list[Fragment]:
    assert isinstance(trainer.optimizer, ZeroOptimizer)
    return [*trainer.optimizer.buckets.residues()]


def start(layout: dict[str, Any], zero: dict[str, Any]) -> Trainer:
    mesh = Mesh.build(Layout(**layout)) if layout else Mesh.single()
    return trainer_on(mesh, ZeroConfig(**zero), dtype=torch.float32, optimizer=OPTIMIZER)


def advance(trainer: Trainer, first: int, last: int) -> list[float]:
    data = trainer.mesh.data
    return [trainer.step(batches(step, data.rank, data.size)).loss for step in range(first, last)]


def kept(trainer: Trainer) -> dict[str, Tensor]:
    """The residues of all ranks summed, as whole tensors in float64."""
    found = {}
    for name, shard in trainer.optimizer.buckets.shards.items():
        local = torch.zeros(shard.local_shape(trainer.mesh.place), dtype=torch.float64)
        for fragment in residues(trainer):
            if fragment.parameter == name:
                local += fragment.values.view(local.shape)
        found[name] = gather_whole(comm.sum_(local, trainer.mesh.data), shard, trainer.mesh)
    return found


def resumed(folder: str, layout: dict[str, Any], zero: dict[str, Any]) -> list[Any]:
    """On the ranks: four steps, and two steps, a checkpoint, two steps; whether every bit is the same."""
    through = start(layout, zero)
    losses = advance(through, 0, 4)
    before = start(layout, zero)
    advance(before, 0, 2)
    checkpoint.save(Path(folder), before.mesh, before.optimizer, step=2, tokens=0, keep=1)
    after = start(layout, zero)
    found = checkpoint.latest(Path(folder))
    assert found is not None
    checkpoint.load(found, after.mesh, after.optimizer)
    some = sum(bool(fragment.values.any()) for fragment in residues(after))
    again = advance(after, 2, 4)
    state = zip(through.optimizer.state(), after.optimizer.state(), strict=True)
    return [losses[2:] == again, all(a.key == b.key and torch.equal(a.values, b.values) for a, b in state), some]


@pytest.mark.parametrize(
    "layout,zero",
    [
        ({"dp": 2}, {"stage": 0}),
        ({"dp": 2}, {"stage": 1}),
        ({"dp": 4}, {"stage": 1, "shard_size": 2}),
        ({"dp": 2, "tp": 2}, {"stage": 1}),
        ({"dp": 2, "pp": 2}, {"stage": 1}),
    ],
    ids=str,
)
def test_a_run_continues_bit_for_bit(ranks: Any, tmp_path: Path, layout: dict[str, Any], zero: dict[str, Any]) -> None:
    world = Layout(**layout).world
    for losses, state, some in ranks.run(
        resumed, world=world, folder=str(tmp_path), layout=layout, zero=zero | {"top_k": 0.1}
    ):
        assert losses
        assert state
        assert some > 3


def saved(folder: str, layout: dict[str, Any], zero: dict[str, Any]) -> dict[str, list[float]]:
    """On the ranks: train, save; the sums of what was kept."""
    trainer = start(layout, zero)
    advance(trainer, 0, 2)
    checkpoint.save(Path(folder), trainer.mesh, trainer.optimizer, step=2, tokens=0, keep=1)
    return {name: value.flatten().tolist() for name, value in kept(trainer).items()}


def loaded(folder: str, layout: dict[str, Any], zero: dict[str, Any]) -> dict[str, list[float]]:
    """On the ranks: load, train on; the sums of what was kept, as they were loaded."""
    trainer = start(layout, zero)
    found = checkpoint.latest(Path(folder))
    assert found is not None
    checkpoint.load(found, trainer.mesh, trainer.optimizer)
    sums = kept(trainer)
    advance(trainer, 2, 3)
    return {name: value.flatten().tolist() for name, value in sums.items()}


def on(ranks: Any, function: Any, layout: dict[str, Any], **arguments: Any) -> dict[str, Tensor]:
    if not layout:
        return {n: torch.tensor(v) for n, v in function(layout=layout, **arguments).items()}
    found = ranks.run(function, world=Layout(**layout).world, layout=layout, **arguments)
    assert all(other == found[0] for other in found)
    return {n: torch.tensor(v, dtype=torch.float64) for n, v in found[0].items()}


@pytest.mark.parametrize("layout,zero", [({"dp": 4}, {"stage": 1}), ({"dp": 2, "tp": 2}, {"stage": 0})], ids=str)
def test_any_layout_takes_over_what_was_kept(
    ranks: Any, tmp_path: Path, layout: dict[str, Any], zero: dict[str, Any]
) -> None:
    """The sum over the data ranks is what it was; parameters that travel exactly at either layout have none."""
    before = on(ranks, saved, layout, folder=str(tmp_path), zero=zero | {"top_k": 0.1})
    for other in ({"dp": 2}, {"dp": 4}, {"dp": 2, "tp": 2}):
        after = on(ranks, loaded, other, folder=str(tmp_path), zero={"stage": 1, "top_k": 0.1})
        compared = 0
        for name, value in after.items():
            if bool(value.any()) and bool(before[name].any()):
                torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-7)
                compared += 1
        assert compared >= 8


def test_without_residues_on_either_side(ranks: Any, tmp_path: Path) -> None:
    """A run begins to keep something back, and another ceases to."""
    exact, some = {"stage": 1}, {"stage": 1, "top_k": 0.1}
    on(ranks, saved, {"dp": 2}, folder=str(tmp_path / "exact"), zero=exact)
    begun = on(ranks, loaded, {"dp": 2}, folder=str(tmp_path / "exact"), zero=some)
    assert not any(bool(value.any()) for value in begun.values())
    on(ranks, saved, {"dp": 2}, folder=str(tmp_path / "some"), zero=some)
    on(ranks, loaded, {"dp": 2}, folder=str(tmp_path / "some"), zero=exact)


def torn(folder: str) -> list[str]:
    """On the ranks: what is said when the manifest lacks the residue of one rank."""
    trainer = start({"dp": 2}, {"stage": 0, "top_k": 0.1})
    reader = checkpoint.Checkpoint.open
    gone = residue(1, 2)

    def without(path: Path) -> checkpoint.Checkpoint:
        found = reader(path)
        for key in [key for key in found._held if key[1] == gone]:
            del found._held[key]
        return found

    checkpoint.Checkpoint.open = without  # type: ignore[method-assign]
    try:
        checkpoint.load(Path(folder) / "step-00000002", trainer.mesh, trainer.optimizer)
    except CheckpointError as error:
        return list(error.problems)
    finally:
        checkpoint.Checkpoint.open = reader  # type: ignore[method-assign]
    return []


def test_a_residue_that_is_missing_is_named(ranks: Any, tmp_path: Path) -> None:
    on(ranks, saved, {"dp": 2}, folder=str(tmp_path), zero={"stage": 0, "top_k": 0.1})
    for problems in ranks.run(torn, world=2, folder=str(tmp_path)):
        assert any(residue(1, 2) in problem for problem in problems)
