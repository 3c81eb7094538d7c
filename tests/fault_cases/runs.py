"""Small runs, and what must be true of them when nothing was lost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from test_trainer import CONFIG, OPTIMIZER, batches, deterministic

from fault_cases.processes import ran
from parallel.mesh import Layout, Mesh
from parallel.models.batch import Batch
from parallel.models.build import Build
from parallel.models.decoder import build_model
from parallel.pp import PipelineConfig
from zero import checkpoint
from zero.faults import POINTS
from zero.loader import Sample
from zero.metrics import Metrics
from zero.optimizer import ZeroConfig, ZeroOptimizer
from zero.run import RunFolder
from zero.trainer import Trainer, TrainerConfig

__all__ = [
    "SAVE_POINTS",
    "STEPS",
    "assert_failed",
    "assert_loads",
    "assert_nothing_lost",
    "assert_same",
    "lines",
    "names",
    "recipe",
    "resumed",
    "start",
    "train",
    "unbroken",
]

STEPS = 4
SAVE_POINTS = [point for point in POINTS if point.startswith("save.") and point != "save.displace"]


def start(
    folder: Path,
    layout: dict[str, int] | None = None,
    *,
    zero: ZeroConfig | None = None,
    steps: int = STEPS,
    report: Callable[[Metrics], None] | None = None,
    data: Callable[[int], list[Batch]] | None = None,
    **loop: Any,
) -> Trainer:
    """A trainer of a small model in a folder, from where that is.

    Args:
        layout: default: one rank.
        zero: default: stage 0.
        data: step -> microbatches; default: eight documents a step, the same whatever the layout.
        loop: options of the loop; a checkpoint is saved every step, and one stays, unless they say otherwise.
    """
    folder.mkdir(exist_ok=True)
    mesh = Mesh.build(Layout(**layout)) if layout else Mesh.single()
    pipeline, parts = PipelineConfig(), mesh.pp.size
    table = pipeline.table(mesh.pp.size, parts, CONFIG.layers)
    cuts = pipeline.cuts(CONFIG.layers, table.stages)
    build = Build(mesh=mesh, dtype=torch.float32, seed=5, cuts=tuple(cuts[s] for s in table.stages_of(mesh.pp.rank)))
    model = build_model(CONFIG, build, seed=3)
    trainer = Trainer(
        model,
        ZeroOptimizer(model, mesh, OPTIMIZER, zero=zero),
        mesh,
        steps=steps,
        pipeline=pipeline,
        folder=RunFolder(folder),
        config=TrainerConfig(**{"save_every": 1, "keep": 1, **loop}),
        data=data or (lambda step: batches(step, mesh.data.rank, mesh.data.size, parts)),
        samples=lambda step: [Sample(8 * step + row, row, row) for row in range(8)],
        report=report,
    )
    trainer.resume()
    return trainer


def train(folder: Path, layout: dict[str, int] | None = None, **options: Any) -> float:
    """Train to the end, from where the folder is; seconds until the first step was done."""
    seen: list[float] = []
    began = time.monotonic()
    start(folder, layout, report=lambda metrics: seen.append(time.monotonic()), **options).run()
    return (seen[0] if seen else time.monotonic()) - began


def resumed(folder: Path, **options: Any) -> float:
    """Go on in another process, and say how long its first step took from the start of the process."""
    note = folder / "seconds"
    assert ran(lambda: note.write_text(str(train(folder, **options))) and None) == 0, "the run could not be continued"
    seconds = float(note.read_text())
    note.unlink()
    return seconds


def unbroken(folder: Path) -> Path:
    """A run without faults, made once beside all cases."""
    whole = folder.parent / "unbroken"
    if not whole.exists():
        assert ran(lambda: train(whole) and None) == 0
    return whole


def assert_nothing_lost(folder: Path, whole: Path, but: tuple[str, ...] = ("save_failed",)) -> None:
    """Losses, weights and optimizer state are those of the unbroken run, bit for bit, and no leftovers lie about.

    Args:
        but: keys of the metrics that are not compared.
    """
    ours, theirs = (
        [{key: value for key, value in line.items() if key not in (*but, "slow_ranks")} for line in read]
        for read in (deterministic(path / "metrics.jsonl") for path in (folder, whole))
    )
    assert ours == theirs, f"the metrics differ: {ours} and {theirs}"
    assert_same(folder, whole, len(theirs))
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == ["latest", f"step-{len(theirs):08d}"], left


def assert_same(folder: Path, whole: Path, step: int) -> None:
    """Two checkpoints of a step have the same weights and optimizer state, bit for bit."""
    one, two = (sorted((path / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")) for path in (folder, whole))
    assert [path.name for path in one] == [path.name for path in two] != [], (one, two)
    for ours, theirs in zip(map(load_file, one), map(load_file, two), strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), "the state differs"


def assert_loads(folder: Path) -> int:
    """The latest checkpoint is whole; its step."""
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None, "there is no latest checkpoint"
    opened = checkpoint.Checkpoint.open(found)
    assert not [*opened.problems()], [*opened.problems()]
    return opened.step


def assert_failed(run: Path, reason: str, background: bool = False) -> None:
    """One line of the metrics tells why step 2 could not be saved: the next, or where it was behind, one more on."""
    failed = [(line["step"], line["save_failed"]) for line in lines(run) if "save_failed" in line]
    assert len(failed) == 1 and failed[0][0] in ((3, 4) if background else (3,)), failed
    assert "step 2" in failed[0][1] and reason in failed[0][1], failed


def lines(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    """What a folder holds."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def recipe(folder: Path) -> Path:
    """A recipe over a small corpus."""
    (folder / "corpus").mkdir()
    for index in range(8):
        text = [f"def function_{index}_{line}(x):\n    return x + {line * index}\n" for line in range(20)]
        (folder / "corpus" / f"{index}.txt").write_text("\n".join(text))
    path = folder / "small.toml"
    path.write_text(
        "[model]\nhidden = 16\nlayers = 1\nheads = 2\nfeed_forward = 24\n"
        f'[data]\nsource = "{folder / "corpus"}"\nvocabulary = 280\nvalidation = 0.3\n'
        "[batch]\nsequence = 15\nsequences = 4\n[trainer]\nsave_every = 1\nkeep = 1\n"
    )
    return path
