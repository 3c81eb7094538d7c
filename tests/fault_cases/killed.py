"""T10 and T17: killed while a checkpoint is saved, and in the middle of a step."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

from fault_cases.processes import ran, timed, world
from fault_cases.runs import SAVE_POINTS, STEPS, assert_loads, assert_nothing_lost, resumed, start, train, unbroken
from fault_cases.suite import case
from zero.faults import POINTS

__all__: list[str] = []


@case("T10 kill", *itertools.product(SAVE_POINTS, [False, True]), every=5)
def killed_while_saving(folder: Path, point: str, background: bool) -> dict[str, float]:
    """Whatever point kills the third save, the second or the third is there, and the run goes on as if nothing was."""
    whole, run = unbroken(folder), folder / "run"
    assert ran(lambda: train(run, save_async=background, fault=f"kill@0,3,{point}") and None) == -signal.SIGKILL
    step = assert_loads(run)
    published = POINTS.index(point) >= POINTS.index("save.pointer.folder")
    assert step == (3 if published else 2), f"latest is of step {step}"
    recover = resumed(run, save_async=background)
    assert_nothing_lost(run, whole)
    return {"recover": recover}


@case(
    "T10 saved again, kill",
    *[(point,) for point in ("save.displace", "save.rename", "save.rename.fsync", "save.prune")],
    every=2,
)
def killed_while_saving_a_step_again(folder: Path, point: str) -> None:
    run = folder / "run"
    assert ran(lambda: train(run) and None) == 0

    def again() -> None:
        start(run, keep=2, fault=f"kill@0,{STEPS},{point}").save()

    assert ran(again) == -signal.SIGKILL
    assert assert_loads(run) == STEPS
    assert ran(again) == -signal.SIGKILL, "what was left over does not stand in the way"
    assert assert_loads(run) == STEPS


@case(
    "T10 kill one of two",
    ("1", "save.write"),
    ("1", "save.fsync"),
    ("0", "save.rename"),
    ("0", "save.pointer.rename"),
    every=2,
)
def killed_rank_while_saving(folder: Path, rank: str, point: str) -> dict[str, float]:
    run, layout = folder / "run", {"tp": 2}
    codes, detect = timed(2, folder, lambda: train(run, layout, fault=f"kill@{rank},3,{point}"))
    assert codes[int(rank)] == -signal.SIGKILL and codes[1 - int(rank)] != 0, codes
    step = assert_loads(run)
    assert step == 2, f"latest is of step {step}"
    assert world(2, folder, lambda: train(run, layout)) == [0, 0]
    assert assert_loads(run) == STEPS
    return {"detect": detect}


@case("T17 kill", ("step.forward",), ("step.backward",), ("step.update",), every=2)
def killed_in_a_step(folder: Path, point: str) -> dict[str, float]:
    whole, run = unbroken(folder), folder / "run"
    assert ran(lambda: train(run, save_every=2, fault=f"kill@0,4,{point}") and None) == -signal.SIGKILL
    assert assert_loads(run) == 2
    recover = resumed(run, save_every=2)
    assert_nothing_lost(run, whole)
    return {"recover": recover}
