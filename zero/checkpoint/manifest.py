"""``manifest.json``: what a checkpoint holds and where, with the hash of every file and of itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError, ShardError
from parallel.mesh import Layout
from parallel.shard import Section, Shard
from zero.spikes import Past

__all__ = ["FORMAT", "FileEntry", "Manifest"]

FORMAT = 3
RANDOMNESS = "every random number is a function of the seed and of global indices; there is no state to restore"

_NAME = re.compile(r"rank-\d{5,}(\.\d+)?\.safetensors")
_PICKLED = (
    (".metadata", "a torch distributed checkpoint: its metadata is a pickle"),
    ("*.distcp", "a torch distributed checkpoint: its metadata is a pickle"),
    ("*_model_states.pt", "a DeepSpeed checkpoint: its files are pickles"),
    ("global_step*", "a folder of DeepSpeed checkpoints: their files are pickles"),
    ("*.pt", "a folder of pickles"),
)
_INSTEAD = "which can run any code when read, and is not; `lockstep import` makes a model folder of it, for --init"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: of which rank, how long, its SHA-256, and (parameter, what, start, length) of each fragment."""

    name: str
    rank: int
    bytes: int
    sha256: str
    fragments: tuple[tuple[str, str, int, int], ...]

    @staticmethod
    def parse(data: Mapping[str, Any]) -> FileEntry:
        """From JSON.

        Raises:
            ValueError, KeyError, TypeError: it is not an entry.
        """
        if not _NAME.fullmatch(data["name"]):
            raise ValueError(f"file {data['name']!r}: not a name of ours")
        held = tuple(
            (str(name), str(what), _count(start), _count(length)) for name, what, start, length in data["fragments"]
        )
        return FileEntry(data["name"], _count(data["rank"]), _count(data["bytes"]), str(data["sha256"]), held)

    def problems(self, layout: Layout, shards: Mapping[str, Shard]) -> Iterator[str]:
        """Fragments of parameters that are not there, or longer than the piece that the rank had."""
        place = layout.place(self.rank)
        for name, what, start, length in self.fragments:
            if name not in shards:
                yield f"file {self.name}: parameter {name} is not in the shard table"
            elif start + length > (size := math.prod(shards[name].local_shape(place))):
                yield f"file {self.name}: {name}|{what} from {start} on: {length} of {size} values"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: optimizer steps done; the position in the data is a function of it and of what is passed over.
        tokens: labels learned from so far.
        layout: of the ranks that wrote it.
        zero_stage: at which they held their state.
        scalars: ``parameter|what`` -> state that is one number.
        shards: how every parameter is cut.
        files: of all ranks.
        about: the effective configuration, as nested values; the seed is in it.
        past: of the steps before, what decides those to come.
    """

    step: int
    tokens: int
    layout: Layout
    zero_stage: int = 0
    scalars: dict[str, float]
    shards: dict[str, Shard]
    files: tuple[FileEntry, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    past: Past = Past()

    def to_bytes(self) -> bytes:
        """The text of ``manifest.json``."""
        data: dict[str, Any] = {
            "format": FORMAT,
            "step": self.step,
            "tokens": self.tokens,
            "data_position": self.step,
            "past": self.past._asdict(),
            "seed": self.about.get("seed"),
            "random_state": RANDOMNESS,
            "layout": dataclasses.asdict(self.layout),
            "zero_stage": self.zero_stage,
            "config": self.about,
            "scalars": self.scalars,
            "shards": Manifest.table(self.shards),
            "files": [dataclasses.asdict(entry) for entry in self.files],
        }
        data = json.loads(json.dumps(data))
        return (json.dumps({"sha256": _digest(data), **data}, indent=1) + "\n").encode()

    @staticmethod
    def table(shards: Mapping[str, Shard]) -> dict[str, Any]:
        """A shard table as JSON values."""
        return {name: dataclasses.asdict(shard) for name, shard in shards.items()}

    @staticmethod
    def shards_of(table: Mapping[str, Any]) -> dict[str, Shard]:
        """The inverse of :meth:`table`.

        Raises:
            ValueError, KeyError, TypeError, ShardError: it is not one.
        """
        return {name: _shard(entry) for name, entry in table.items()}

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            CheckpointError: it is absent, damaged, of another format, or not one of ours.
        """
        path = folder / "manifest.json"
        try:
            data = json.loads(path.read_bytes())
            if data["format"] != FORMAT:
                raise CheckpointError(f"{path}: format {data['format']}, this version reads {FORMAT}")
            if data.pop("sha256") != _digest(data):
                raise CheckpointError(f"{path}: damaged (its SHA-256 is not the one it records)")
            return Manifest._parse(data)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing{_foreign(folder)}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ShardError, RecursionError) as error:
            raise CheckpointError(f"{path}: {type(error).__name__}: {error}") from None

    @staticmethod
    def _parse(data: Mapping[str, Any]) -> Manifest:
        layout = Layout(**data["layout"])
        files = tuple(FileEntry.parse(entry) for entry in data["files"])
        shards = Manifest.shards_of(data["shards"])
        problems = [*layout.problems()]
        problems += [f"file {entry.name}: of no rank of the layout" for entry in files if entry.rank >= layout.world]
        problems += [problem for entry in files if not problems for problem in entry.problems(layout, shards)]
        if problems:
            raise ValueError("; ".join(problems))
        return Manifest(
            step=_count(data["step"]),
            tokens=_count(data["tokens"]),
            layout=layout,
            zero_stage=_count(data["zero_stage"]),
            scalars={name: float(value) for name, value in data["scalars"].items()},
            shards=shards,
            files=files,
            about=data["config"],
            past=_past(**data.get("past", {})),
        )


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r}: must be a whole number")
    return value


def _past(losses: Any = (), passed_over: Any = ()) -> Past:
    return Past(tuple(map(float, losses)), tuple(map(_count, passed_over)))


def _shard(entry: Mapping[str, Any]) -> Shard:
    sections = tuple(Section(**section) for section in entry["sections"])
    lists = {key: tuple(entry[key]) for key in ("shape", "split", "partial")}
    return Shard(**{**entry, **lists, "sections": sections})


def _foreign(folder: Path) -> str:
    """What a folder holds that we do not read, and why."""
    for pattern, what in _PICKLED:
        if folder.is_dir() and any(folder.glob(pattern)):
            return f"; it looks like {what}, {_INSTEAD}"
    return ""
