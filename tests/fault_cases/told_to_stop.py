"""T8 and T9: SIGTERM between steps and during a save, to one process, to a launcher with ranks, under torchrun."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from fault_cases.processes import Program, ended, forked, lockstep, ran, stopped, told, torchrun
from fault_cases.runs import assert_loads, lines, recipe
from fault_cases.suite import case
from launch.cli import main

__all__: list[str] = []


@case("T8 SIGTERM", ("step.forward",), ("step.update",), every=2)
@case("T9 SIGTERM", *[(p,) for p in ("save.write", "save.rename", "save.pointer.rename", "save.prune")], every=2)
def told_to_stop(folder: Path, point: str) -> dict[str, float]:
    """The step and its save are finished, the exit code is 0, and the run goes on from there."""
    path, run = recipe(folder), folder / "run"
    flags = ["train", str(path), "--out", str(run), "--steps", "1000"]
    pid = forked(lambda: main([*flags, "--trainer.fault", f"stop@0,3,{point}"]))
    stopped(pid)
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    assert ended(pid) == 0
    seconds = time.monotonic() - began
    assert_goes_on(run, flags[:-1])
    return {"recover": seconds}


def assert_goes_on(run: Path, flags: list[str]) -> None:
    """Three steps were done and saved; started again, on one rank, it does two more."""
    assert assert_loads(run) == 3
    assert [line["step"] for line in lines(run)] == [1, 2, 3]
    assert ran(lambda: main([*flags, "5"])) == 0
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 5]


@case("T9 SIGTERM twice", ("save.write",), ("save.pointer.rename",), every=2)
def told_to_stop_twice(folder: Path, point: str) -> None:
    """The second one ends it at once; the old or the new checkpoint is whole."""
    path, run = recipe(folder), folder / "run"
    flags = ["train", str(path), "--out", str(run), "--steps", "9", "--trainer.fault", f"stop@0,3,{point}"]
    pid = forked(lambda: main(flags))
    stopped(pid)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    code = ended(pid)
    assert code in (0, -signal.SIGTERM), code
    assert assert_loads(run) in (2, 3)


def two_ranks(folder: Path, start: str, rank: int, point: str) -> tuple[Program, int, list[str]]:
    """Two data ranks, of which one has stopped itself at a point of step 3; its process, and how to go on."""
    path, run = recipe(folder), folder / "run"
    flags = ["train", str(path), "--out", str(run), "--steps", "1000"]
    more = ["--layout.dp", "2", "--zero.stage", "1", "--trainer.fault", f"stop@{rank},3,{point}"]
    program = lockstep(folder, *flags, *more) if start == "launcher" else torchrun(folder, 2, *flags, *more)
    return program, program.rank(rank), flags[:-1]


@case("T8 SIGTERM to the", ("launcher", 1, "step.forward"), ("launcher", 0, "step.update"), every=2)
@case("T9 SIGTERM to the", ("launcher", 1, "save.write"), ("launcher", 0, "save.rename"), short=False)
def ranks_told_to_stop(folder: Path, start: str, rank: int, point: str) -> dict[str, float]:
    """All ranks finish the step and its save, the exit code is 0, and the run goes on from there."""
    program, pid, flags = two_ranks(folder, start, rank, point)
    began = time.monotonic()
    program.process.terminate()
    told(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    assert program.end() == 0, program.shown
    seconds = time.monotonic() - began
    assert "3 of 1000 steps, stopped on request" in program.shown, program.shown
    assert_goes_on(folder / "run", flags)
    return {"recover": seconds}


@case("T8 SIGTERM to", ("torchrun", 1, "step.forward"), ("torchrun and its ranks", 1, "step.forward"), short=False)
@case("T9 SIGTERM to", ("torchrun", 1, "save.write"), short=False)
def torchrun_told_to_stop(folder: Path, to: str, rank: int, point: str) -> dict[str, float]:
    """As with a launcher: torchrun passes the signal on, also where its ranks have got it too, as SLURM sends it.

    torchrun itself has an exit code of its own, whatever its ranks do.
    """
    program, pid, flags = two_ranks(folder, "torchrun", rank, point)
    began = time.monotonic()
    for other in program.ranks().values() if to != "torchrun" else ():
        os.kill(other, signal.SIGTERM)
    program.process.terminate()
    told(pid, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(pid, signal.SIGCONT)
    program.end()
    seconds = time.monotonic() - began
    assert [(folder / f"exit-{number}").read_text() for number in range(2)] == ["0", "0"], program.shown
    assert_goes_on(folder / "run", flags)
    return {"recover": seconds}


@case("T8 SIGTERM twice to the", ("launcher", 1, "step.forward"), short=False)
@case("T9 SIGTERM twice to the", ("launcher", 1, "save.write"), ("launcher", 0, "save.pointer.rename"), short=False)
def ranks_told_to_stop_twice(folder: Path, start: str, rank: int, point: str) -> dict[str, float]:
    """The second one ends all of them at once, one that does not answer too; the old or the new checkpoint is whole."""
    program, pid, _ = two_ranks(folder, start, rank, point)
    program.process.terminate()
    told(pid, signal.SIGTERM)
    began = time.monotonic()
    program.process.terminate()
    code = program.end()
    seconds = time.monotonic() - began
    assert code == 128 + signal.SIGKILL and seconds < 10, (code, seconds)
    assert "killed rank 0, 1: signalled again" in program.shown, program.shown
    assert assert_loads(folder / "run") == 2
    return {"recover": seconds}
