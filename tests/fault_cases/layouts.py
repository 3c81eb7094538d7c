"""T16 and T18: saved at one layout, continued at another."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any

import torch
from test_trainer import deterministic, trainer_on

from fault_cases.processes import ran, world
from fault_cases.runs import recipe, resumed, train, unbroken
from fault_cases.suite import case
from parallel.mesh import Layout, Mesh
from zero import checkpoint
from zero.data import DataConfig, prepare
from zero.loader import Loader

__all__: list[str] = []


@case("T16 reshard", ("tp2", "dp2"), ("dp2", "tp2"), ("tp2", "single"), ("single", "tp2"), every=2)
def resharded(folder: Path, one: str, other: str) -> None:
    """Saved at one layout, loaded and saved at another, loaded back: every value of it as it was."""
    layouts = {"tp2": {"tp": 2}, "dp2": {"dp": 2}, "single": None}

    def go(layout: dict[str, int] | None, source: Path, target: Path) -> None:
        trainer = trainer_on(Mesh.build(Layout(**layout)) if layout else Mesh.single(), dtype=torch.float32)
        if source.exists():
            found = checkpoint.latest(source)
            assert found is not None
            checkpoint.load(found, trainer.mesh, trainer.optimizer)
        else:
            assert trainer.data is not None
            trainer.step(trainer.data(0))
        checkpoint.save(target, trainer.mesh, trainer.optimizer, step=1, tokens=1, keep=1)

    places = [folder / name for name in ("none", "one", "other", "back")]
    for (source, target), name in zip(itertools.pairwise(places), (one, other, one), strict=True):
        size = 2 if layouts[name] else 1
        assert world(size, folder, lambda s=source, t=target, n=name: go(layouts[n], s, t)) == [0] * size
    opened = [checkpoint.Checkpoint.open(place / "step-00000001") for place in places[1:]]
    for name in opened[0].shards:
        for what in ("master", "exp_avg", "exp_avg_sq"):
            first, *others = (found.whole(name, what) for found in opened)
            assert first.abs().sum() > 0 and all(torch.equal(first, value) for value in others), (name, what)
    assert opened[0].scalars == opened[1].scalars == opened[2].scalars


@case("T18 resume at another world size", ())
def other_world(folder: Path) -> None:
    """Trained by one rank, then two, then one: the losses of one rank throughout, to rounding."""
    whole, run = unbroken(folder), folder / "run"
    assert ran(lambda: train(run, fault="kill@0,2,step.forward") and None) == -signal.SIGKILL
    codes = world(2, folder, lambda: train(run, {"dp": 2}, fault="kill@0,4,step.forward; kill@1,4,step.forward"))
    assert codes == [-signal.SIGKILL] * 2
    resumed(run)
    for ours, theirs in zip(*(deterministic(path / "metrics.jsonl") for path in (run, whole)), strict=True):
        assert (ours["step"], ours["tokens"]) == (theirs["step"], theirs["tokens"])
        assert abs(ours["loss"] / theirs["loss"] - 1) < 1e-5, (ours, theirs)


@case("T18 every sample once an epoch", ())
def samples_once(folder: Path) -> None:
    """Steps of 1, 2 and 4 ranks one after the other: the same global order, each window once."""
    prepared = prepare(DataConfig(source=str(recipe(folder).parent / "corpus"), vocabulary=280), folder / "data")
    tokens = prepared.open("train")
    windows = tokens.windows(15) // 4 * 4

    def ids(step: int, size: int) -> list[int]:
        options: dict[str, Any] = {"sequence": 15, "sequences": 4, "size": size, "seed": 1}
        rows = [b for rank in range(size) for b in Loader(tokens, rank=rank, **options).step(step)]
        return [hash(tuple(part.tolist())) for b in rows for part in b.tokens_T.split(15)]

    alone = [ids(step, 1) for step in range(windows // 4)]
    mixed = [ids(step, (1, 2, 4)[step % 3]) for step in range(windows // 4)]
    assert alone == mixed
    starts = {hash(tuple(tokens.window(index, 15)[0].tolist())) for index in range(tokens.windows(15))}
    assert {one for step in alone for one in step} <= starts
