"""``reshard`` and ``compare``: another layout writes the same checkpoint bit for bit, and no other passes for it."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_programs import recipe, run
from test_trainer import batches, trainer_on

from launch.cli import main
from parallel.mesh import Mesh
from zero import checkpoint

__all__ = ["recipe"]

NAME, OTHER = "embedding.weight", "norm.weight"


@pytest.fixture(scope="module")
def trained(recipe: Path) -> Path:
    """A run of a pipeline of tensor-parallel stages."""
    out = recipe.parent / "first"
    flags = ("--steps", 3, "--layout.tp", 2, "--layout.pp", 2, "--zero.stage", 1)
    run("train", recipe, "--out", out, *flags)
    return out


def test_resharded_is_the_same_bit_for_bit_and_continues(trained: Path) -> None:
    """As docs/checkpoints.md has it."""
    second = trained.parent / "second"
    run("reshard", trained, second, "--layout.tp", 1, "--layout.pp", 1, "--layout.dp", 4, "--zero.stage", 3)
    saved = checkpoint.Checkpoint.open(second / "checkpoints" / "step-00000003")
    assert (saved.layout.dp, saved.layout.tp, saved.manifest.zero_stage, len(saved.files)) == (4, 1, 3, 4)
    out, _ = run("compare", trained, second)
    assert "pp=2 dp=1 cp=1 tp=2 zero=1, step 3" in out and "pp=1 dp=4 cp=1 tp=1 zero=3, step 3" in out
    assert out.splitlines()[-1].startswith("EQUAL, bit for bit: ")
    values = 3 * sum(torch.Size(shard.shape).numel() for shard in saved.shards.values())
    assert f"{values:,} values" in out
    assert (second / "metrics.jsonl").read_text() == (trained / "metrics.jsonl").read_text()
    config = str(trained.parent / "small.toml")
    run("train", config, "--out", second, "--steps", 4, "--layout.dp", 4, "--zero.stage", 3)
    out, _ = run("compare", trained, second, code=1)
    assert "step: 3 and 4" in out and "NOT EQUAL" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["reshard", "{run}", "{run}"], "exists and is not empty"),
        (["reshard", "{run}", "{new}", "--model.hidden", "64"], "model.hidden was 32, now 64"),
        (["reshard", "{run}", "{new}", "--layout.tp", "3"], "tp = 3"),
        (["reshard", "{new}", "{new}"], "not a run folder"),
        (["reshard", "{run}"], "expected RUN NEW_RUN"),
        (["compare", "{run}", "{new}"], "neither a checkpoint nor a run that has one"),
        (["compare", "{run}"], "expected ONE OTHER"),
        (["compare", "{run}", "{run}", "--layout.tp", "2"], "compare has no options"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    trained: Path, capfd: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    new = trained.parent / "new"
    assert main([word.format(run=trained, new=new) for word in words]) == 2
    assert expected in capfd.readouterr().err
    assert not new.exists()


def saved(folder: Path, change: Callable[[Any], Any] = lambda trainer: None, step: int = 1) -> checkpoint.Checkpoint:
    """A checkpoint of one rank, after a step and a change."""
    trainer = trainer_on(Mesh.single(), dtype=torch.float32)
    trainer.step(batches(0))
    with torch.no_grad():
        change(trainer)
    checkpoint.save(folder, trainer.mesh, trainer.optimizer, step=step, tokens=5, keep=1)
    found = checkpoint.latest(folder)
    assert found is not None
    return checkpoint.Checkpoint.open(found)


def at(what: str, place: int, value: float) -> Callable[[Any], Any]:
    """Set one value of the first fragment of a kind."""

    def change(trainer: Any) -> None:
        next(f.values for f in trainer.optimizer.state() if f.what == what)[place] = value

    return change


def another_scalar(trainer: Any) -> None:
    """Of the first run of parameters."""
    next(iter(trainer.optimizer.inner.state.values()))["step"].fill_(9)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (at("master", 0, 1.0), at("master", 0, 2.0), r"\|master: 1 of [\d,]+ values differ, first at .*: 1.0 and 2.0"),
        (at("exp_avg_sq", -1, 1.0), at("exp_avg_sq", -1, 2.0), r"\|exp_avg_sq: 1 of [\d,]+ values differ, first at"),
        (at("exp_avg", 5, 0.0), at("exp_avg", 5, -0.0), r"\|exp_avg: 1 of .*: 0.0 and -0.0"),
        (at("exp_avg", 5, 0.0), at("exp_avg", 5, float("nan")), r"\|exp_avg: 1 of .*: 0.0 and nan"),
        (at("exp_avg", 5, float("nan")), at("exp_avg", 5, float("nan")), None),
        (another_scalar, at("exp_avg", 5, 0.0), r"\|step: 9.0 and 1.0|\|exp_avg: 1 of"),
    ],
)
@pytest.mark.parametrize("rows", [1, 1 << 20])
def test_every_bit_counts_and_what_differs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: Any, other: Any, expected: str | None, rows: int
) -> None:
    """Also where a tensor is read in many parts; NaN is what it is."""
    monkeypatch.setattr(sys.modules["zero.checkpoint.compare"], "_BOX", rows)
    found = checkpoint.compare(saved(tmp_path / "a", one), saved(tmp_path / "b", other))
    assert found.tensors == 3 * found.parameters > 0
    assert bool(found.differences) == (expected is not None), found.differences
    assert all(re.search(expected or "", line) for line in found.differences), found.differences


def test_the_first_place_that_differs_is_told_as_an_index(tmp_path: Path) -> None:
    def change(trainer: Any) -> None:
        (values,) = (f.values for f in trainer.optimizer.state() if (f.parameter, f.what) == (NAME, "master"))
        values.view(97, 24)[95, 7] = values.view(97, 24)[96, 0] = 5.0

    (line,) = checkpoint.compare(saved(tmp_path / "a"), saved(tmp_path / "b", change)).differences
    assert line.startswith(f"{NAME}|master: 2 of 2,328 values differ, first at [95, 7]: ") and line.endswith("and 5.0")


def test_what_only_one_has_and_other_shapes_types_and_steps_are_named(tmp_path: Path) -> None:
    here = saved(tmp_path / "a")
    there = saved(tmp_path / "b", step=2)
    there.manifest = dataclasses.replace(there.manifest, tokens=6)
    del there._held[NAME, "exp_avg"]
    shard = there.shards[OTHER]
    there.shards[OTHER] = dataclasses.replace(shard, shape=(*shard.shape, 1), split=(*shard.split, None))
    lines = checkpoint.compare(here, there).differences
    assert lines[:2] == ("step: 1 and 2", "tokens: 5 and 6")
    assert f"{NAME}|exp_avg: not in {there.folder}" in lines
    assert sum(f"{OTHER}|" in line and "of shape" in line for line in lines) == 3
    assert len(lines) == 6


def test_a_damaged_checkpoint_is_refused_and_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        saved(tmp_path / name)
    path = tmp_path / "b" / "step-00000001" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    words = ["compare", str(tmp_path / "a" / "step-00000001"), str(path.parent)]
    assert main(words) == 2
    assert "rank-00000.safetensors: damaged" in capsys.readouterr().err
    data[-3] ^= 1
    path.write_bytes(data)
    assert main(words) == 0
    assert "EQUAL, bit for bit" in capsys.readouterr().out
