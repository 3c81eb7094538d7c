"""T11, T12 and T13: saving behind the training, writers that die, disks that are full or broken."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file
from test_trainer import batches, trainer_on

from fault_cases.processes import ran
from fault_cases.runs import assert_failed, assert_loads, assert_nothing_lost, names, recipe, start, train, unbroken
from fault_cases.suite import case
from launch.cli import main as lockstep
from parallel.mesh import Mesh
from zero.run import RunFolder

__all__: list[str] = []


@case("T11 weights changed after an asynchronous save", ())
def changed_after_saving(folder: Path) -> None:
    run = folder / "run"
    run.mkdir()
    trainer = trainer_on(Mesh.single(), dtype=torch.float32, folder=RunFolder(run))
    trainer.step(batches(0))
    expected = {f.key: f.values.clone() for f in trainer.optimizer.state()}
    trainer.save(background=True)
    for fragment in trainer.optimizer.state():
        fragment.values.fill_(float("nan"))
    saver = trainer._saver
    assert saver is not None
    saver.close()
    assert assert_loads(run) == 1
    read = load_file(run / "checkpoints" / "step-00000001" / "rank-00000.safetensors")
    assert read.keys() == expected.keys() and all(torch.equal(read[key], value) for key, value in expected.items())


@case("T12 writer dies", ("save.write",), ("save.fsync",), ("save.manifest",), ("save.pointer.rename",), every=2)
def writer_dies(folder: Path, point: str) -> None:
    """It is heard of with one of the next steps; the next save is there when its step ends; nothing else changes."""
    whole, run = unbroken(folder), folder / "run"
    assert ran(lambda: train(run, save_async=True, fault=f"raise@0,2,{point}") and None) == 0
    assert_failed(run, "InjectedFault", True)
    assert_nothing_lost(run, whole)


FULL = ["save.begin", "save.write", "save.fsync", "save.manifest", "save.manifest.fsync", "save.rename", "save.pointer"]


@case("T13", *[("enospc", point, mode) for point in FULL for mode in (False, True)], every=3)
@case(
    "T13", *itertools.product(["eio", "erofs"], ["save.write", "save.fsync", "save.pointer.rename"], [False]), every=4
)
def disk_fails(folder: Path, kind: str, point: str, background: bool) -> None:
    """Training goes on, the old checkpoint stays, the draft goes, the metrics tell."""
    whole, run = unbroken(folder), folder / "run"
    kept: list[tuple[int, list[str]]] = []

    def watched() -> None:
        start(
            run,
            save_async=background,
            fault=f"{kind}@0,2,{point}",
            report=lambda m: kept.append((assert_loads(run) if m.step > 2 else 0, names(run / "checkpoints"))),
        ).run()
        assert [step for step, _ in kept[2:]] in ([1, 3], [2, 3]) if not background else kept[2][0] in (1, 2), kept
        assert background or not [name for name in kept[2][1] if name.endswith(".tmp")], kept

    assert ran(watched) == 0
    assert_failed(run, {"enospc": "No space left", "eio": "Input/output", "erofs": "Read-only"}[kind], background)
    assert_nothing_lost(run, whole)


@case("T13 the system refuses to write", ())
def file_size_limit(folder: Path) -> None:
    """A real error of the system in a real write: files may not grow beyond 8 KiB while step 2 is saved."""
    whole, run = unbroken(folder), folder / "run"

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        free = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limit(step: int) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, free[1]) if step == 2 else free)

        start(run, report=lambda m: limit(m.step)).run()

    assert ran(limited) == 0
    assert_failed(run, "File too large")
    assert_nothing_lost(run, whole)


@case("T13 a small tmpfs fills", ())
def small_disk(folder: Path) -> None:
    """A real full disk: room for one checkpoint and a half, later for all."""
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(disk)], capture_output=True).returncode:
        return  # not allowed here; the limit on the size of files stands for it
    try:
        filler = disk / "filler"

        def full() -> None:
            start(disk, report=lambda m: fill(filler) if m.step == 2 else filler.unlink(missing_ok=True)).run()

        assert ran(full) == 0
        assert_failed(disk, "No space left")
        assert_nothing_lost(disk, unbroken(folder))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(path: Path) -> None:
    """Take all the room there is."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)


@case("T13 the last save fails", ())
def last_save_fails(folder: Path) -> None:
    """That is an error: the exit code is 1, and the reason is shown."""
    path, run, shown = recipe(folder), folder / "run", folder / "shown"
    flags = ["train", str(path), "--out", str(run), "--steps", "3", "--trainer.fault", "enospc@0,3,save.fsync"]

    def go() -> int:
        with shown.open("w") as file:
            os.dup2(file.fileno(), 2)
        return lockstep(flags)

    assert ran(go) == 1
    assert "No space left" in shown.read_text()
    assert "step 3 could not be saved" in shown.read_text()
    assert assert_loads(run) == 2
