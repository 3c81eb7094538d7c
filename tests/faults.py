"""The fault suite: every case on a tiny model, in processes of its own, ending in "nothing lost".

``python tests/faults.py [--short] [NAME ...]`` runs the cases whose names contain one of the words (default: all), and
prints one line a case and the score. Each case is forked from this process, which has imported torch once and computed
nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

for folder in (Path(__file__).parent, Path(__file__).parent.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_trainer import batches, deterministic, trainer_on

from launch.cli import main as lockstep
from parallel.errors import CheckpointError, DataError
from parallel.mesh import Layout, Mesh
from zero import checkpoint
from zero.data import DataConfig, Prepared, prepare
from zero.faults import POINTS
from zero.loader import Loader
from zero.run import RunFolder
from zero.trainer import TrainerConfig

__all__ = ["CASES", "Case", "Outcome", "run_cases"]

STEPS = 4
LIMIT_S = 60.0
SAVE_POINTS = [point for point in POINTS if point.startswith("save.") and point != "save.displace"]


@dataclass
class Outcome:
    """How a case went: what is wrong (empty: survived), and seconds until the fault was seen and made good."""

    problem: str = ""
    detect_s: float = 0.0
    recover_s: float = 0.0


@dataclass(frozen=True)
class Case:
    """A fault: its name, what drives it, and its arguments; it is survived if ``drive`` returns."""

    name: str
    drive: Callable[..., dict[str, float] | None]
    arguments: tuple[Any, ...] = ()
    short: bool = True


CASES: list[Case] = []


def case(name: str, *variants: tuple[Any, ...], every: int = 1) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as one case a variant; its first argument is an empty folder.

    Args:
        every: of so many variants one is in the short form of the suite.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for number, variant in enumerate(variants or ((),)):
            words = [str(word) for word in variant if not isinstance(word, bool)] + [
                "async" for word in variant if word is True
            ]
            CASES.append(Case(" ".join([name, *words]), function, variant, number % every == 0))
        return function

    return register


# Processes


def forked(work: Callable[[], int | None]) -> int:
    """Start ``work`` in a process; returns its id. Exit codes: what it returns, 1 if it raises."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    return _become(work)


def _become(work: Callable[[], int | None]) -> NoReturn:
    code = 1
    try:
        code = work() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - there is nobody else to tell
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, limit_s: float = 30.0) -> int:
    """Wait for a process: its exit code, or minus the signal that killed it."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"a process did not end within {limit_s:g} s")


def ran(work: Callable[[], int | None]) -> int:
    """Run in a process and wait for it."""
    return ended(forked(work))


def world(size: int, folder: Path, work: Callable[[], Any]) -> list[int]:
    """``work`` on ranks of a gloo world; how each ended."""
    return timed(size, folder, work)[0]


def timed(size: int, folder: Path, work: Callable[[], Any]) -> tuple[list[int], float]:
    """``work`` on ranks of a gloo world; how each ended, and seconds from the first that failed to the last.

    Ranks that do not notice within five seconds that another one failed are killed.
    """
    store = folder / f"store-{time.monotonic_ns()}"

    def be(rank: int) -> int:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=20)
        )
        work()
        return 0

    pids = [forked(lambda rank=rank: be(rank)) for rank in range(size)]
    codes: dict[int, int] = {}
    deadline, failed_at = time.monotonic() + 40, float("inf")
    while len(codes) < size:
        for rank, pid in enumerate(pids):
            if rank not in codes and (status := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                codes[rank] = os.waitstatus_to_exitcode(status[1])
                if codes[rank]:
                    failed_at = min(failed_at, time.monotonic())
                    deadline = min(deadline, failed_at + 5)
        if time.monotonic() > deadline:
            for rank, pid in enumerate(pids):
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)
    return [codes[rank] for rank in range(size)], max(0.0, time.monotonic() - failed_at)


# A run, and what must be true of it


def train(folder: Path, layout: dict[str, int] | None = None, **loop: Any) -> float:
    """Train to the end, from where the folder is; seconds until the first step was done."""
    folder.mkdir(exist_ok=True)
    mesh = Mesh.build(Layout(**layout)) if layout else Mesh.single()
    seen: list[float] = []
    began = time.monotonic()
    trainer = trainer_on(
        mesh,
        dtype=torch.float32,
        steps=STEPS,
        folder=RunFolder(folder),
        loop=TrainerConfig(**{"save_every": 1, "keep": 1, **loop}),
        report=lambda metrics: seen.append(time.monotonic()),
    )
    trainer.resume()
    trainer.run()
    return (seen[0] if seen else time.monotonic()) - began


def resumed(folder: Path, **loop: Any) -> float:
    """Go on in another process, and say how long its first step took from the start of the process."""
    note = folder / "seconds"
    assert ran(lambda: note.write_text(str(train(folder, **loop))) and None) == 0, "the run could not be continued"
    seconds = float(note.read_text())
    note.unlink()
    return seconds


def unbroken(folder: Path) -> Path:
    """A run without faults, made once beside all cases."""
    whole = folder.parent / "unbroken"
    if not whole.exists():
        assert ran(lambda: train(whole) and None) == 0
    return whole


def assert_nothing_lost(folder: Path, whole: Path) -> None:
    """Losses, weights and optimizer state are those of the unbroken run, bit for bit, and no leftovers lie about."""
    ours, theirs = (deterministic(path / "metrics.jsonl") for path in (folder, whole))
    ours = [{key: value for key, value in line.items() if key != "save_failed"} for line in ours]
    assert ours == theirs, "the metrics differ"
    files = [path / "checkpoints" / f"step-{STEPS:08d}" / "rank-00000.safetensors" for path in (folder, whole)]
    one, two = map(load_file, files)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), "the state differs"
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == ["latest", f"step-{STEPS:08d}"], left


def assert_loads(folder: Path) -> int:
    """The latest checkpoint is whole; its step."""
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None, "there is no latest checkpoint"
    opened = checkpoint.Checkpoint.open(found)
    assert not [*opened.problems()], [*opened.problems()]
    return opened.step


# The cases


@case("T10 kill", *itertools.product(SAVE_POINTS, [False, True]), every=3)
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
        trainer = trainer_on(
            Mesh.single(),
            dtype=torch.float32,
            folder=RunFolder(run),
            loop=TrainerConfig(fault=f"kill@0,{STEPS},{point}"),
        )
        trainer.resume()
        trainer.save()

    assert ran(lambda: again()) == -signal.SIGKILL
    assert assert_loads(run) == STEPS
    assert ran(lambda: again()) == -signal.SIGKILL, "what was left over does not stand in the way"
    assert assert_loads(run) == STEPS


@case(
    "T10 kill one of two", ("1", "save.write"), ("1", "save.fsync"), ("0", "save.rename"), ("0", "save.pointer.rename")
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


@case("T17 kill", ("step.forward",), ("step.backward",), ("step.update",))
def killed_in_a_step(folder: Path, point: str) -> dict[str, float]:
    whole, run = unbroken(folder), folder / "run"
    assert ran(lambda: train(run, save_every=2, fault=f"kill@0,4,{point}") and None) == -signal.SIGKILL
    assert assert_loads(run) == 2
    recover = resumed(run, save_every=2)
    assert_nothing_lost(run, whole)
    return {"recover": recover}


def recipe(folder: Path) -> Path:
    """A recipe over a small corpus."""
    (folder / "corpus").mkdir()
    for index in range(8):
        lines = [f"def function_{index}_{line}(x):\n    return x + {line * index}\n" for line in range(20)]
        (folder / "corpus" / f"{index}.txt").write_text("\n".join(lines))
    path = folder / "small.toml"
    path.write_text(
        "[model]\nhidden = 16\nlayers = 1\nheads = 2\nfeed_forward = 24\n"
        f'[data]\nsource = "{folder / "corpus"}"\nvocabulary = 280\nvalidation = 0.3\n'
        "[batch]\nsequence = 15\nsequences = 4\n[trainer]\nsave_every = 1\nkeep = 1\n"
    )
    return path


def stopped(pid: int) -> None:
    """Wait until a process has stopped itself."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if done:
            assert os.WIFSTOPPED(status), f"it ended with {os.waitstatus_to_exitcode(status)}"
            return
        time.sleep(0.005)
    raise AssertionError("it did not come to the point")


@case("T8 SIGTERM", ("step.forward",), ("step.update",))
@case("T9 SIGTERM", *[(point,) for point in ("save.write", "save.rename", "save.pointer.rename", "save.prune")])
def told_to_stop(folder: Path, point: str) -> dict[str, float]:
    """The step and its save are finished, the exit code is 0, and the run goes on from there."""
    path, run = recipe(folder), folder / "run"
    flags = ["train", str(path), "--out", str(run), "--steps", "1000"]
    pid = forked(lambda: lockstep([*flags, "--trainer.fault", f"stop@0,3,{point}"]))
    stopped(pid)
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    assert ended(pid) == 0
    seconds = time.monotonic() - began
    assert assert_loads(run) == 3
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert ran(lambda: lockstep([*flags[:-1], "5"])) == 0
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]
    return {"recover": seconds}


@case("T9 SIGTERM twice", ("save.write",), ("save.pointer.rename",))
def told_to_stop_twice(folder: Path, point: str) -> None:
    """The second one ends it at once; the old or the new checkpoint is whole."""
    path, run = recipe(folder), folder / "run"
    pid = forked(
        lambda: lockstep(
            ["train", str(path), "--out", str(run), "--steps", "9", "--trainer.fault", f"stop@0,3,{point}"]
        )
    )
    stopped(pid)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    code = ended(pid)
    assert code in (0, -signal.SIGTERM), code
    assert assert_loads(run) in (2, 3)


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


@case("T12 writer dies", ("save.write",), ("save.fsync",), ("save.manifest",), ("save.pointer.rename",))
def writer_dies(folder: Path, point: str) -> None:
    """It is heard of with one of the next steps; the next save is there when its step ends; nothing else changes."""
    whole, run = unbroken(folder), folder / "run"
    assert ran(lambda: train(run, save_async=True, fault=f"raise@0,2,{point}") and None) == 0
    assert_failed(run, "InjectedFault", True)
    assert_nothing_lost(run, whole)


def assert_failed(run: Path, reason: str, background: bool = False) -> None:
    """One line of the metrics tells why step 2 could not be saved: the next, or where it was behind, one more on."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    failed = [(line["step"], line["save_failed"]) for line in lines if "save_failed" in line]
    assert len(failed) == 1 and failed[0][0] in ((3, 4) if background else (3,)), failed
    assert "step 2" in failed[0][1] and reason in failed[0][1], failed


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
        trainer = trainer_on(
            Mesh.single(),
            dtype=torch.float32,
            steps=STEPS,
            folder=RunFolder(run),
            loop=TrainerConfig(save_every=1, keep=1, save_async=background, fault=f"{kind}@0,2,{point}"),
            report=lambda m: kept.append((assert_loads(run) if m.step > 2 else 0, names(run / "checkpoints"))),
        )
        trainer.run()
        assert [step for step, _ in kept[2:]] in ([1, 3], [2, 3]) if not background else kept[2][0] in (1, 2), kept
        assert background or not [name for name in kept[2][1] if name.endswith(".tmp")], kept

    run.mkdir()
    assert ran(watched) == 0
    assert_failed(run, {"enospc": "No space left", "eio": "Input/output", "erofs": "Read-only"}[kind], background)
    assert_nothing_lost(run, whole)


def names(folder: Path) -> list[str]:
    """What a folder holds."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@case("T13 the system refuses to write", ())
def file_size_limit(folder: Path) -> None:
    """A real error of the system in a real write: files may not grow beyond 8 KiB while step 2 is saved."""
    whole, run = unbroken(folder), folder / "run"
    run.mkdir()

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        free = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limit(step: int) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, free[1]) if step == 2 else free)

        trainer = trainer_on(
            Mesh.single(),
            dtype=torch.float32,
            steps=STEPS,
            folder=RunFolder(run),
            loop=TrainerConfig(save_every=1, keep=1),
            report=lambda m: limit(m.step),
        )
        trainer.run()

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
            trainer = trainer_on(
                Mesh.single(),
                dtype=torch.float32,
                steps=STEPS,
                folder=RunFolder(disk),
                loop=TrainerConfig(save_every=1, keep=1),
                report=lambda m: fill(filler) if m.step == 2 else filler.unlink(missing_ok=True),
            )
            trainer.run()

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


# Damage


def flip(folder: Path, name: str) -> None:
    """One bit in the middle."""
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 4
    (folder / name).write_bytes(data)


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "flipped bit": ("rank-00000.safetensors", lambda f: flip(f, "rank-00000.safetensors")),
    "truncated": ("rank-00000.safetensors", lambda f: os.truncate(f / "rank-00000.safetensors", 5000)),
    "missing": ("rank-00000.safetensors", lambda f: (f / "rank-00000.safetensors").unlink()),
    "extra": (
        "rank-00001.safetensors",
        lambda f: shutil.copy(f / "rank-00000.safetensors", f / "rank-00001.safetensors"),
    ),
    "manifest flipped": ("manifest.json", lambda f: flip(f, "manifest.json")),
    "manifest cut": ("manifest.json", lambda f: os.truncate(f / "manifest.json", 100)),
    "manifest missing": ("", lambda f: (f / "manifest.json").unlink()),
    "all missing": ("", lambda f: shutil.rmtree(f)),
}


@case("T14", *[(name,) for name in DAMAGE], every=2)
def damaged(folder: Path, name: str) -> dict[str, float]:
    """Refused by name, the one before offered; taken if that is asked for, and then nothing is lost."""
    whole, run = unbroken(folder), folder / "run"
    assert ran(lambda: train(run, keep=2, fault="kill@0,4,step.forward") and None) == -signal.SIGKILL
    file, damage = DAMAGE[name]
    damage(run / "checkpoints" / "step-00000003")
    try:
        trainer_on(Mesh.single(), dtype=torch.float32, folder=RunFolder(run)).resume()
    except CheckpointError as error:
        assert f"step-00000003/{file}" in str(error) if file else "step-00000003" in str(error), error
        assert "step-00000002 is whole: give --trainer.fall_back true" in str(error), error
    else:
        raise AssertionError("it was not refused")
    recover = resumed(run, fall_back=True, keep=1)
    assert_nothing_lost(run, whole)
    return {"recover": recover}


@case("T14 all are damaged", ())
def all_damaged(folder: Path) -> None:
    run = folder / "run"
    assert ran(lambda: train(run, keep=2) and None) == 0
    for path in (run / "checkpoints").glob("step-*"):
        flip(path, "rank-00000.safetensors")
    for fall_back in (False, True):
        try:
            loop = TrainerConfig(fall_back=fall_back)
            trainer_on(Mesh.single(), dtype=torch.float32, folder=RunFolder(run), loop=loop).resume()
        except CheckpointError as error:
            assert "no other checkpoint is whole" in str(error)
        else:
            raise AssertionError("it was not refused")


class Payload:
    """Leaves a canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@case("T15 pickle", ("rank-00000.safetensors",), ("manifest.json",), (".metadata",), ("optimizer.pt",), ("../latest",))
def pickled(folder: Path, name: str) -> None:
    """Nothing of it is ever executed, even where the manifest vouches for it."""
    run, canary = folder / "run", folder / "canary"
    assert ran(lambda: train(run) and None) == 0
    there = run / "checkpoints" / f"step-{STEPS:08d}"
    payload = pickle.dumps(Payload(canary))
    pickle.loads(payload)
    assert canary.exists(), "the payload works"
    canary.unlink()
    (there / name).write_bytes(payload)
    for vouched in (False, True):
        if vouched and name == "rank-00000.safetensors":
            vouch(there, name)
        try:
            trainer_on(Mesh.single(), dtype=torch.float32, folder=RunFolder(run)).resume()
        except CheckpointError as error:
            assert Path(name).name in str(error), error
        else:
            raise AssertionError("it was not refused")
    assert not canary.exists(), "the payload was executed"


def vouch(folder: Path, name: str) -> None:
    """Make the manifest agree with a file."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    data = (folder / name).read_bytes()
    manifest["files"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"sha256": digest, **manifest}))


# Other layouts, other data


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


@case("T22", ("broken row",), ("empty file",), ("id beyond the vocabulary",), ("vanished shard",))
def bad_data(folder: Path, what: str) -> None:
    """Named by file and line, or skipped and counted."""
    lines = ['{"text": "fine and good, and long enough"}', '{"text": ', '{"text": "also fine, and just as long"}'] * 3
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines))
    if what == "broken row":
        config = DataConfig(source=str(path), vocabulary=270)
        refused(lambda: prepare(config, folder / "a"), f"{path}:2")
        tolerant = DataConfig(source=str(path), vocabulary=270, skip_broken=True)
        assert prepare(tolerant, folder / "b").skipped["broken"] == 3
        return
    if what == "empty file":
        path.write_text("")
        refused(lambda: prepare(DataConfig(source=str(path), vocabulary=270), folder / "a"), "rows.jsonl")
        return
    prepared = prepare(DataConfig(source=str(path), vocabulary=270, skip_broken=True, validation=0.0), folder / "a")
    tokens = folder / "a" / "train.tokens"
    if what == "vanished shard":
        tokens.unlink()
        refused(lambda: Prepared.load(folder / "a"), "train.tokens: missing")
        return
    data = bytearray(tokens.read_bytes())
    data[6:8] = b"\xff\xff"
    tokens.write_bytes(data)
    packed = prepared.open("train")
    refused(lambda: packed.window(0, 8), "token 3 (byte 6): id 65535 is outside the vocabulary")


def refused(work: Callable[[], Any], expected: str) -> None:
    """It raises a DataError that says this."""
    try:
        work()
    except DataError as error:
        assert expected in str(error), error
    else:
        raise AssertionError("it was not refused")


@case("T24 options that cannot be", ())
def bad_options(folder: Path) -> None:
    """All of them at once, with the nearest names, before a rank starts; exit code 2."""
    shown = folder / "shown"
    flags = {
        "--stpes": "3",
        "--precision": "bf61",
        "--seed": "x",
        "--layout.tp": "5",
        "--trainer.keep": "0",
        "--trainer.fault": "kil@0,1,save.fsink",
    }

    def go() -> int:
        with shown.open("w") as file:
            os.dup2(file.fileno(), 2)
        words = [word for pair in flags.items() for word in pair]
        return lockstep(["train", str(recipe(folder)), "--out", str(folder / "run"), *words])

    began = time.monotonic()
    assert ran(go) == 2
    assert time.monotonic() - began < 5
    text = shown.read_text()
    for expected in ("'steps'", "'bf16'", "seed = 'x'", "layout.tp = 5", "keep = 0", "'kill'", "'save.fsync'"):
        assert expected in text, text
    assert not (folder / "run").exists()


# The driver


def run_cases(cases: list[Case], show: Callable[[str, Outcome], None]) -> dict[str, Outcome]:
    """Run cases one after the other, each in a process of its own."""
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        for number, one in enumerate(cases):
            place = Path(root) / f"{number:03d}"
            place.mkdir()
            outcomes[one.name] = _run(one, place)
            show(one.name, outcomes[one.name])
            shutil.rmtree(place, ignore_errors=True)
    return outcomes


def _run(one: Case, place: Path) -> Outcome:
    output, report = place / "output", place / "report.json"

    def work() -> None:
        os.setsid()
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        seconds = one.drive(_within(place), *one.arguments)
        report.write_text(json.dumps(seconds or {}))

    pid = forked(work)
    try:
        code = ended(pid, LIMIT_S)
    except AssertionError as error:
        code, problem = -1, str(error)
    else:
        problem = ""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    if code == 0:
        seconds = json.loads(report.read_text())
        return Outcome("", seconds.get("detect", 0.0), seconds.get("recover", 0.0))
    return Outcome(f"{problem or f'exit code {code}'}\n{output.read_text()[-3000:] if output.exists() else ''}")


def _within(place: Path) -> Path:
    """The folder of a case, beside that of the unbroken run."""
    inside = place.parent / f"case-{place.name}"
    inside.mkdir()
    return inside


def main(words: list[str]) -> int:
    """Run and print; ``--short`` leaves out variants."""
    torch.set_num_threads(1)
    trainer_on(Mesh.single())  # imports what every case would import anew
    chosen = [one for one in CASES if one.short or "--short" not in words]
    words = [word for word in words if word != "--short"]
    chosen = [one for one in chosen if not words or any(word in one.name for word in words)]
    began = time.monotonic()

    def show(name: str, outcome: Outcome) -> None:
        print(f"{'FAILED ' if outcome.problem else 'ok     '}{name}", flush=True)
        if outcome.problem:
            print("    " + outcome.problem.replace("\n", "\n    "), flush=True)

    outcomes = run_cases(chosen, show)
    survived = sum(not outcome.problem for outcome in outcomes.values())
    detect, recover = (max((getattr(o, k) for o in outcomes.values()), default=0.0) for k in ("detect_s", "recover_s"))
    print(
        f"faults {survived}/{len(outcomes)} survived, worst detect/recover {detect:.1f}/{recover:.1f} s "
        f"({time.monotonic() - began:.0f} s)"
    )
    return survived != len(outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
