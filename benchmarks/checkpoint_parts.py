"""What checkpoints.py measures on ranks: the disk, our saves and loads, and torch.distributed.checkpoint's."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import workload
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from parallel import comm
from parallel.hf import write_folder
from parallel.mesh import Layout, Mesh
from parallel.models.build import Build
from parallel.models.decoder import build_model
from zero import Trainer, ZeroConfig, ZeroOptimizer, checkpoint
from zero.checkpoint.buffers import CHUNK, Buffers

__all__ = ["PARTS"]

SAVED = {"tp": 2, "dp": 2}
LOADED = {"dp": 4}


def trainer_on(layout: dict[str, int], stage: int, layers: int) -> Trainer:
    """The model of the benchmarks with so many layers, float32."""
    mesh = Mesh.build(Layout(**layout)) if layout else Mesh.single()
    model = build_model(workload.config(layers), Build(mesh=mesh, dtype=torch.float32), seed=workload.WEIGHT_SEED)
    return Trainer(model, ZeroOptimizer(model, mesh, zero=ZeroConfig(stage=stage)), mesh, steps=1 << 30)


def filled(optimizer: ZeroOptimizer) -> dict[str, Tensor]:
    """The state with a value in every byte, by names that no other rank has, for those who keep no fragments."""
    generator = torch.Generator().manual_seed(optimizer.mesh.rank)
    state = {f"{optimizer.mesh.rank}/{fragment.key}": fragment.values for fragment in optimizer.state()}
    for values in state.values():
        values.normal_(generator=generator)
    return state


def settled(mesh: Mesh) -> None:
    """Nothing of before is on its way to the disk."""
    comm.barrier(mesh.world)
    if mesh.rank == 0:
        os.sync()
        time.sleep(0.5)
    comm.barrier(mesh.world)


def timed(mesh: Mesh, work: Callable[[], Any]) -> float:
    """Seconds until every rank has done it."""
    settled(mesh)
    began = time.perf_counter()
    work()
    comm.barrier(mesh.world)
    return time.perf_counter() - began


def write_plainly(folder: Path, names: dict[str, int], direct: bool) -> None:
    """Files of so many bytes side by side, made durable: what the disk does with the least of a program."""
    memory = Buffers(pinned=False).take()
    memory.random_(256)

    def write(name: str, size: int) -> None:
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0))
        for begin in range(0, size, CHUNK):
            os.pwrite(descriptor, memory.numpy().data[: -(-min(CHUNK, size - begin) // 4096) * 4096], begin)
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
        os.close(descriptor)

    folder.mkdir(parents=True, exist_ok=True)
    threads = [threading.Thread(target=write, args=item) for item in names.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class Torch:
    """torch.distributed.checkpoint, each time into an empty folder.

    Args:
        threads: that write, on each rank.
        staged: how a save behind the training gets its copy: at once, or behind the training as well, into memory that
            is kept; None: at once, into new memory, as it is by default.
    """

    def __init__(self, folder: Path, mesh: Mesh, threads: int = 1, staged: str | None = None) -> None:
        self.folder, self.mesh, self.threads = folder, mesh, threads
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.stager = staged and DefaultStager(StagingOptions(False, False, staged == "behind", False))

    def prepare(self) -> None:
        """Remove what is there."""
        comm.barrier(self.mesh.world)
        if self.mesh.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        comm.barrier(self.mesh.world)

    def save(self, state: dict[str, Tensor]) -> None:
        """Save and wait."""
        writer = dcp.FileSystemWriter(self.folder, thread_count=self.threads)
        dcp.save(state, storage_writer=writer, process_group=self.group, no_dist=self.group is None)

    def save_behind(self, optimizer: ZeroOptimizer) -> Any:
        """Begin to save; what comes back is done when it is durable."""
        state = {f"{self.mesh.rank}/{fragment.key}": fragment.values for fragment in optimizer.state()}
        writer = dcp.FileSystemWriter(self.folder, thread_count=self.threads)
        made: Any = dcp.async_save(state, storage_writer=writer, process_group=self.group, async_stager=self.stager)
        if not hasattr(made, "staging_completion"):
            return made
        optimizer.read_behind(made.staging_completion.result)
        return made.upload_completion


def save(args: argparse.Namespace) -> dict[str, Any] | None:
    """Saves that are waited for, and what the disk does with files of the same sizes."""
    layout = {"dp": args.world} if args.world > 1 else {}
    trainer = trainer_on(layout, 1, args.layers)
    mesh, optimizer, folder = trainer.mesh, trainer.optimizer, Path(args.folder) / f"save-{args.world}"
    state = filled(optimizer)
    saver = checkpoint.Saver(folder / "ours", mesh, optimizer, keep=1)
    saver.save(step=0, tokens=0)
    files = checkpoint.Checkpoint.open(folder / "ours" / "step-00000000").files
    names = {entry.name: entry.bytes for entry in files if entry.rank == mesh.rank}
    peers = {f"torch, {n} thread{'s' * (n > 1)} a rank": Torch(folder / f"torch-{n}", mesh, n) for n in (1, 2)}
    ways: dict[str, Callable[[int], Any]] = {
        "disk, past the page cache": lambda turn: write_plainly(folder / "direct", names, True),
        "disk, page cache and fsync": lambda turn: write_plainly(folder / "cached", names, False),
        "ours": lambda turn: saver.save(step=1 + turn, tokens=0),
        **{name: lambda turn, peer=peer: peer.save(state) for name, peer in peers.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.repeat):
        for name, work in ways.items():
            for old in ("direct", "cached") if mesh.rank == 0 else ():
                shutil.rmtree(folder / old, ignore_errors=True)
            if name in peers:
                peers[name].prepare()
            seconds[name].append(timed(mesh, lambda work=work, turn=turn: work(turn)))
    sizes = [entry.bytes for entry in files]
    return {"bytes": sum(sizes), "file_bytes": sizes, "seconds": seconds}


def behind(args: argparse.Namespace) -> dict[str, Any]:
    """What saves behind the training add to its steps, until what they save is durable."""
    trainer = trainer_on({"dp": 2}, 1, args.layers)
    mesh, optimizer, folder = trainer.mesh, trainer.optimizer, Path(args.folder) / "behind"
    batch = workload.batch(workload.documents(args.documents).chunk(2)[mesh.rank])
    saver, waited = checkpoint.Saver(folder / "ours", mesh, optimizer, keep=1), [0.0]
    settle = optimizer.settle
    peers = {f"torch, copied {how or 'at once, new memory'}": how for how in (None, "at once", "behind")}
    torches = {name: Torch(folder / "torch", mesh, staged=how) for name, how in peers.items()}

    def settle_and_tell() -> None:
        began = time.perf_counter()
        settle()
        waited[0] += time.perf_counter() - began

    optimizer.settle = settle_and_tell

    def step(after: Callable[[], Any] = lambda: None) -> float:
        comm.barrier(mesh.world)
        began = time.perf_counter()
        trainer.step([batch])
        after()
        return time.perf_counter() - began

    def with_save(begin: Callable[[], Any], durable: Callable[[], bool], go_on: Callable[[], Any]) -> dict[str, Any]:
        settled(mesh)
        waited[0], began = 0.0, time.perf_counter()
        begin()
        call, steps = time.perf_counter() - began, []
        while not durable():
            steps.append(step(go_on))
        return {"call": call, "waited": waited[0], "steps": steps, "durable_after": time.perf_counter() - began}

    def ours(number: int) -> dict[str, Any]:
        return with_save(
            lambda: saver.save(step=number, tokens=0, background=True), lambda: saver.durable == number, saver.poll
        )

    def theirs(peer: Torch) -> dict[str, Any]:
        peer.prepare()
        futures: list[Any] = []

        def done() -> bool:
            return bool(comm.sum_(torch.tensor(int(futures[0].done())), mesh.world, "min"))

        return with_save(lambda: futures.append(peer.save_behind(optimizer)), done, lambda: None)

    for _ in range(args.warmup):
        step()
    ways: dict[str, Callable[[int], Any]] = {"ours": lambda turn: ours(2 * turn + 2)}
    ways |= {name: lambda _, peer=peer: theirs(peer) for name, peer in torches.items()}
    found: dict[str, Any] = {"plain": [], "waited_for": [], "behind": {name: [] for name in ways}}
    for turn in range(args.repeat):
        found["waited_for"].append(timed(mesh, lambda turn=turn: saver.save(step=2 * turn + 1, tokens=0)))
        for name, work in ways.items():
            settled(mesh)
            found["plain"] += [step() for _ in range(args.plain)]
            found["behind"][name].append(work(turn))
    return found | {"bytes": sum(e.bytes for e in checkpoint.Checkpoint.open(newest(folder / "ours")).files)}


def newest(folder: Path) -> Path:
    """The latest checkpoint."""
    found = checkpoint.latest(folder)
    assert found is not None
    return found


class Memory:
    """What this process holds, and the most it held since :meth:`begin`; bytes."""

    def begin(self) -> None:
        """Give back what is free, and measure from here."""
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._field("VmRSS")

    @property
    def growth(self) -> int:
        """The most since then, beyond what there was."""
        return self._field("VmHWM") - self.before

    def _field(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


def prepare_load(args: argparse.Namespace) -> dict[str, Any]:
    """Write what is to be loaded."""
    trainer = trainer_on(SAVED, 1, args.layers)
    filled(trainer.optimizer)
    checkpoint.save(Path(args.folder) / "load", trainer.mesh, trainer.optimizer, step=1, tokens=0, keep=1)
    return {"files": [entry.bytes for entry in checkpoint.Checkpoint.open(newest(Path(args.folder) / "load")).files]}


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Load at another layout and stage: time, memory beyond what is loaded, bytes read."""
    trainer = trainer_on(LOADED, 3, args.layers)
    mesh, optimizer, memory = trainer.mesh, trainer.optimizer, Memory()
    folder = newest(Path(args.folder) / "load")
    out_of_cache(sorted(folder.iterdir()))
    found: list[checkpoint.Checkpoint] = []
    memory.begin()
    seconds = [timed(mesh, lambda: found.append(checkpoint.load(folder, mesh, optimizer)))]
    growth = memory.growth
    fragments = list(optimizer.state())
    made = sum(f.values.nbytes for f in fragments if f.what != "master")
    own = {
        "read": found[0].bytes_read,
        "needed": sum(f.values.nbytes for f in fragments),
        "made": made,
        "growth": growth,
        "beyond": growth - made,
    }
    for _ in range(args.repeat - 1):
        out_of_cache(sorted(folder.iterdir()))
        seconds.append(timed(mesh, lambda: checkpoint.load(folder, mesh, optimizer)))
    return {"seconds": seconds, "ranks": comm.gather_json(own, mesh.world)}


def out_of_cache(paths: Sequence[Path]) -> None:
    """Have the disk read them anew."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def export(args: argparse.Namespace) -> dict[str, Any]:
    """A Hugging Face folder from the same checkpoint."""
    opened, memory = checkpoint.Checkpoint.open(newest(Path(args.folder) / "load")), Memory()
    config, target = workload.config(args.layers), Path(args.folder) / "exported"
    memory.begin()
    began = time.perf_counter()
    write_folder(config, opened.whole, target, dtype=torch.float32)
    seconds = time.perf_counter() - began
    written = sum(path.stat().st_size for path in target.iterdir())
    largest = max(4 * torch.Size(shard.shape).numel() for shard in opened.shards.values())
    return {"seconds": seconds, "growth": memory.growth, "written": written, "largest_parameter": largest}


PARTS: dict[str, tuple[int, Callable[[argparse.Namespace], Any]]] = {
    "save-1": (1, save),
    "save-2": (2, save),
    "behind": (2, behind),
    "prepare": (4, prepare_load),
    "load": (4, load),
    "export": (1, export),
}
"""Name -> ranks, and what each of them runs."""
