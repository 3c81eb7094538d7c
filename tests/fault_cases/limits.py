"""T25 and T26: memory that ends on one rank, and a rank that is slow."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from fault_cases.losses import LAYOUTS
from fault_cases.processes import lockstep, timed, world
from fault_cases.runs import assert_loads, lines, recipe, start
from fault_cases.suite import case
from zero.memory import NotEnoughMemory

__all__: list[str] = []

KINDS = ("parameters", "gradients", "master", "state", "all else")


@case(
    "T25 memory ends on rank 1,",
    *[("dp2", f"step.{point}") for point in ("forward", "backward", "update")],
    ("dp2-zero3", "step.forward"),
    ("tp2", "step.forward"),
    ("pp2", "step.forward"),
    every=3,
)
def memory_ends(folder: Path, layout: str, point: str) -> dict[str, float]:
    """That rank says what needs how much and which options need less; no other rank waits for it."""
    run, told = folder / "run", folder / "told"
    degrees, zero = LAYOUTS[layout]

    def work() -> None:
        trainer = start(run, degrees, zero=zero, fault=f"oom@1,3,{point}")
        try:
            trainer.run()
        except NotEnoughMemory as error:
            told.write_text(str(error))
            os._exit(3)

    codes, detect = timed(2, folder, work)
    assert codes[1] == 3 and codes[0] not in (0, -9), codes
    text = told.read_text()
    assert text.startswith("not enough memory for a step with training state of "), text
    assert all(f"{kind}" in text for kind in KINDS) and text.count(" MiB") == len(KINDS), text
    assert all(knob in text for knob in ('recompute = "full"', "batch.microbatches", "zero.offload")), text
    assert ("zero.stage = 1" in text) == (layout == "dp2") and f"injected at {point}" in text, text
    assert assert_loads(run) == 2
    return {"detect": detect}


@case("T25 memory ends on rank 1 of the launcher", short=False)
def memory_ends_under_the_launcher(folder: Path) -> dict[str, float]:
    """The first thing shown is which rank and why, with the knobs; the exit code is 1, and no rank is left."""
    run = folder / "run"
    flags = ["train", recipe(folder), "--out", run, "--layout.dp", 2, "--zero.stage", 1, "--steps", 1000]
    program = lockstep(folder, *flags, "--trainer.fault", "oom@1,3,step.backward")
    while not (run / "checkpoints" / "latest").exists() and program.process.poll() is None:
        time.sleep(0.01)
    began = time.monotonic()
    assert program.end() == 1, program.shown
    seconds = time.monotonic() - began
    first = next(line for line in program.shown.splitlines() if line.startswith("rank "))
    assert first.startswith("rank 1 failed (exit code 1): zero.memory.NotEnoughMemory: not enough memory for a"), first
    assert "zero.stage = 2 (it is 1, on 2 data ranks)" in program.shown, program.shown
    assert assert_loads(run) == 2
    return {"detect": seconds}


@case("T26 rank 1 is slow,", ("dp2",), ("dp2-zero3",), ("tp2",), ("pp2",), every=4)
def slow_rank(folder: Path, layout: str) -> dict[str, float]:
    """It takes three times as long from step 8 on: named within 20 steps, and more often than who waits for it."""
    run = folder / "run"
    degrees, zero = LAYOUTS[layout]
    seen: dict[int, float] = {}

    def work() -> None:
        note = lambda metrics: seen.update({metrics.step: time.monotonic()})  # noqa: E731
        fault = "slow@1,8,step.backward"
        start(run, degrees, zero=zero, steps=28, save_every=0, fault=fault, report=note).run()
        if seen:
            (folder / "seen").write_text(json.dumps(seen))

    assert world(2, folder, work) == [0, 0]
    named = [(line["step"], rank) for line in lines(run) for rank in line.get("slow_ranks", ())]
    steps = [step for step, rank in named if rank == "1"]
    assert len(steps) > sum(rank == "0" for _, rank in named), named
    first = next(step for step in steps if step >= 8)
    times = json.loads((folder / "seen").read_text())
    return {"detect": times[str(first)] - times["7"]}
