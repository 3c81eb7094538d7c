"""Checkpoints: each rank's pieces in safetensors, one manifest in JSON, published by a rename.

A checkpoint is a folder ``step-00000100`` with ``rank-*.safetensors`` (tensors named ``parameter|what``) and
``manifest.json``: step, tokens, the layout and the shard table that cut the tensors, the SHA-256 of every
file. The file ``latest`` beside it names the newest complete one. Any layout can read any other's: a box of a
parameter is put together from the files that hold parts of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parallel import comm
from parallel.errors import CheckpointError, refuse
from parallel.mesh import Layout, Mesh
from parallel.shard import Box, Section, Shard, assemble, meet
from zero.optimizer import ZeroOptimizer

__all__ = ["Checkpoint", "latest", "load", "save"]

FORMAT = 2


def save(folder: Path, mesh: Mesh, optimizer: ZeroOptimizer, *, step: int, tokens: int, keep: int) -> Path:
    """Write a checkpoint of all ranks and make it the latest; every rank calls it.

    Args:
        folder: ``checkpoints`` of the run.
        mesh: ranks that differ only in data-parallel rank hold the same, and pipeline ranks may share parameters; the
            first of them writes.
        optimizer: master weights and state.
        step: steps done.
        tokens: labels learned from so far.
        keep: how many complete checkpoints stay; older ones are removed once this one is durable.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    if mesh.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    comm.barrier(mesh.world)
    entry: dict[str, Any] | None = None
    if mesh.data.rank == 0:
        name = f"rank-{mesh.rank:05d}.safetensors"
        own = {name for name, ranks in optimizer.buckets.holders.items() if ranks[0] == mesh.pp.rank}
        tensors = {f"{parameter}|{what}": view for parameter, what, view in optimizer.state() if parameter in own}
        save_file({key: view.detach().cpu().contiguous() for key, view in tensors.items()}, temporary / name)
        (temporary / name).chmod(0o644)  # safetensors writes for the owner alone
        _sync(temporary / name)
        entry = {
            "name": name,
            "rank": mesh.rank,
            "parameters": sorted(own),
            "shards": {name: _shard_to_json(shard) for name, shard in optimizer.buckets.shards.items()},
            "scalars": optimizer.scalars(),
            **_fingerprint(temporary / name),
        }
    entries = [entry for entry in comm.gather_json(entry, mesh.world) if entry]
    if mesh.rank == 0:
        manifest = {
            "format": FORMAT,
            "step": step,
            "tokens": tokens,
            "layout": dataclasses.asdict(mesh.layout),
            "scalars": {key: value for entry in entries for key, value in entry.pop("scalars").items()},
            "shards": {name: shard for entry in entries for name, shard in entry.pop("shards").items()},
            "files": entries,
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        _sync(temporary / "manifest.json")
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        _point(folder, final.name)
        _prune(folder, final, keep)
    comm.barrier(mesh.world)
    return final


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints; those beyond the newest are of a past that was left."""
    there = sorted(folder.glob("step-*"))
    older = [path for path in there if path.name < newest.name]
    for path in older[: len(older) - keep + 1] + [path for path in there if path.name > newest.name]:
        shutil.rmtree(path, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint under ``folder``, or None.

    Raises:
        CheckpointError: ``latest`` names one that is not there.
    """
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    target = folder / pointer.read_text().strip()
    if not (target / "manifest.json").is_file():
        raise CheckpointError(f"{pointer} names {target.name}, which has no manifest.json")
    return target


def load(folder: Path, mesh: Mesh, optimizer: ZeroOptimizer) -> Checkpoint:
    """Fill the optimizer, and through it the model, from a checkpoint of any layout.

    Raises:
        CheckpointError: a file is missing or damaged, or the checkpoint is of another model.
    """
    checkpoint = Checkpoint.open(folder)
    refuse(CheckpointError, checkpoint.problems())
    refuse(CheckpointError, _mismatches(checkpoint, optimizer))
    optimizer.prepare()
    for name, what, view in optimizer.state():
        shard = optimizer.buckets.shards[name]
        read = lambda box, name=name, what=what: checkpoint.read(name, what, box)  # noqa: E731
        view.copy_(assemble(shard, mesh.place, read, view.dtype, view.device))
    optimizer.restore(checkpoint.scalars)
    return checkpoint


def _mismatches(checkpoint: Checkpoint, optimizer: ZeroOptimizer) -> Iterator[str]:
    ours = {name: shard.shape for name, shard in optimizer.buckets.shards.items()}
    theirs = {name: shard.shape for name, shard in checkpoint.shards.items()}
    elsewhere = optimizer.buckets.holders.keys() - ours.keys()
    for name in sorted((ours.keys() | theirs.keys()) - (elsewhere & theirs.keys())):
        if ours.get(name) != theirs.get(name):
            yield f"{checkpoint.folder}: {name} is {theirs.get(name, 'absent')}, the model has {ours.get(name, 'none')}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint folder, readable at any layout."""

    folder: Path
    step: int
    tokens: int
    layout: Layout
    scalars: dict[str, float]
    shards: dict[str, Shard]
    files: list[dict[str, Any]]
    _open: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Read the manifest.

        Raises:
            CheckpointError: it is absent, broken or of another format.
        """
        path = folder / "manifest.json"
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise CheckpointError(f"{path}: format {data['format']}, this version reads {FORMAT}")
            shards = {name: _shard_from_json(entry) for name, entry in data["shards"].items()}
            layout = Layout(**data["layout"])
            return Checkpoint(folder, data["step"], data["tokens"], layout, data["scalars"], shards, data["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: {type(error).__name__}: {error}") from None

    def problems(self) -> Iterator[str]:
        """Files that are missing, or are not what was written."""
        for entry in self.files:
            path = self.folder / entry["name"]
            if not path.is_file():
                yield f"{path}: missing"
            elif _fingerprint(path) != {"bytes": entry["bytes"], "sha256": entry["sha256"]}:
                yield f"{path}: damaged (size or SHA-256 differs from the manifest)"

    def read(self, name: str, what: str, box: Box) -> Tensor:
        """A box of a parameter (``what`` = master) or of its optimizer state, on the CPU."""
        shard, result = self.shards[name], None
        for entry in self.files:
            if name not in entry["parameters"]:
                continue
            for piece in shard.pieces(self.layout.place(entry["rank"])):
                found = meet(piece, box)
                if found is None:
                    continue
                inside, outside = found
                part = self._slice(entry["name"], f"{name}|{what}", inside)
                if result is None:
                    result = part.new_empty([run.stop - run.start for run in box])
                result[outside] = part
        if result is None:
            raise CheckpointError(f"{self.folder}: no file holds {name}|{what}")
        return result

    def whole(self, name: str, what: str = "master") -> Tensor:
        """The whole of a parameter."""
        return self.read(name, what, tuple(slice(0, size) for size in self.shards[name].shape))

    def _slice(self, file: str, key: str, box: Box) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(self.folder / file), framework="pt")
            return self._open[file].get_slice(key)[box]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: {error}") from None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _shard_to_json(shard: Shard) -> dict[str, Any]:
    return dataclasses.asdict(shard)


def _shard_from_json(entry: dict[str, Any]) -> Shard:
    sections = tuple(Section(**section) for section in entry["sections"])
    lists = {key: tuple(entry[key]) for key in ("shape", "split", "partial")}
    return Shard(**{**entry, **lists, "sections": sections})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point(folder: Path, name: str) -> None:
    temporary = folder / ".latest.tmp"
    temporary.write_text(name + "\n")
    _sync(temporary)
    os.replace(temporary, folder / "latest")
    with contextlib.suppress(OSError):
        _sync(folder)
