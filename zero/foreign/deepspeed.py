"""A checkpoint of DeepSpeed: fp32 weights and the optimizer's state, cut over the data ranks by ZeRO 1, 2 or 3."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.errors import CheckpointError, refuse
from zero.foreign.archive import Archive, TensorRecord, whole_numbers
from zero.foreign.partitions import Run, Shapes, cut_runs, flat_runs
from zero.foreign.source import Entry, Foreign, by_name, printable
from zero.foreign.stream import Table, shown

__all__ = ["DeepSpeedCheckpoint"]

_FILE = re.compile(r"(?:bf16_)?(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{1,6})_(model|optim)_states\.pt")
_FLAT, _CUT = "single_partition_of_fp32_groups", "fp32_flat_groups"


class _Part(NamedTuple):
    """Values ``begin`` and on of a tensor in a file."""

    archive: Archive
    record: TensorRecord
    begin: int
    length: int


_Vector = Sequence[_Part]


class DeepSpeedCheckpoint(Foreign):
    """A folder with ``latest`` and the folder that it names, or that folder.

    Args:
        path: of the folder.

    Raises:
        CheckpointError: files are missing, damaged, or of a kind that cannot be put together.
    """

    def __init__(self, path: Path) -> None:
        self.path = _tagged(path)
        models, optims = _files(self.path)
        self._parts: dict[tuple[str, str], list[_Part]] = {}
        top = Archive(models[0])
        ranks = [Archive(file) for file in optims]
        states = [_table(rank, _table(rank, rank.value).get("optimizer_state_dict")) for rank in ranks]
        cut = bool(states) and states[0].get(_CUT) is not None
        self.kind = f"a DeepSpeed checkpoint ({'ZeRO 3' if cut else 'ZeRO 1 or 2' if ranks else 'no ZeRO'})"
        found = [*self._trained(top, ranks, states, cut)] if ranks else []
        found += self._frozen([top, *(Archive(file) for file in models[1:])]) if cut else []
        self.entries = by_name(self.path, [*found, *self._whole(top, cut)])
        self.entries |= self._second_names(top)
        self.others = printable(sorted(_table(top, top.value).named().keys() - {"module", "optimizer"}))

    def read(self, name: str, what: str = "master") -> Tensor:
        """See :class:`~zero.foreign.source.Foreign`."""
        parts = self._parts.get((name, what))
        if parts is None:
            raise CheckpointError(f"{self.path}: has no {name}{'' if what == 'master' else f'|{what}'}")
        shape, first = self.entries[name].shape, parts[0]
        if len(parts) == 1 and first.length == first.record.count and first.record.shape == shape:
            return first.archive.read(first.record)
        values = torch.empty(math.prod(shape), dtype=first.record.dtype)
        filled = 0
        for part in parts:
            count = min(part.length, len(values) - filled)  # at stage 3 the last share is padded
            values[filled : filled + count] = part.archive.run(part.record, part.begin, count)
            filled += count
        return values.view(shape)

    def _trained(
        self, top: Archive, ranks: Sequence[Archive], states: Sequence[Table], cut: bool
    ) -> Iterator[tuple[str, Entry]]:
        """What the optimizer has, cut over the ranks."""
        _check_ranks(self.path, states)
        masters = [_vectors(rank, state.get(_CUT if cut else _FLAT)) for rank, state in zip(ranks, states, strict=True)]
        groups = _shapes(top, _table(top, top.value).get("param_shapes"))
        vectors = self._arranged(masters, cut)
        lengths = [sum(part.length for part in vector) for vector in vectors]
        try:
            paddings = states[0].get("param_alignment_paddings")
            runs = cut_runs(groups, lengths) if cut else flat_runs(groups, lengths, paddings, len(ranks))
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        self._place("master", runs, vectors)
        moments = [_moments(*of_rank) for of_rank in zip(ranks, states, masters, strict=True)]
        self.states = tuple(sorted(set.intersection(*(set(found) for found in moments))))
        for what in self.states:
            self._place(what, runs, self._arranged([found[what] for found in moments], cut))
        for name, shape in (pair for group in groups for pair in group):
            yield name, Entry(ranks[0].path.name, shape, vectors[0][0].record.dtype)

    def _arranged(self, by_rank: Sequence[_Vector], cut: bool) -> list[_Vector]:
        """The vectors of each rank, one after the other (stage 3), or of each group those of all ranks."""
        if len({len(vectors) for vectors in by_rank}) != 1 or not by_rank[0]:
            raise CheckpointError(f"{self.path}: the ranks have different numbers of groups, or none")
        return [*by_rank] if cut else [[*group] for group in zip(*by_rank, strict=True)]

    def _place(self, what: str, runs: Mapping[str, list[Run]], vectors: Sequence[_Vector]) -> None:
        for name, own in runs.items():
            self._parts[name, what] = [part for run in own for part in _slice(vectors[run.vector], run)]

    def _frozen(self, archives: Sequence[Archive]) -> Iterator[tuple[str, Entry]]:
        """Parameters that are not trained, which stage 3 cuts as well: each rank's share is in its model file."""
        tables = [_table(archive, archive.value) for archive in archives]
        shapes = tables[0].get("frozen_param_shapes")
        for name, shape in _shapes(archives[0], [shapes] if shapes else [])[0] if shapes else ():
            shares = [
                _vectors(archive, [_table(archive, table.get("frozen_param_fragments")).get(name)])[0]
                for archive, table in zip(archives, tables, strict=True)
            ]
            if sum(share.length for share in shares) < math.prod(shape):
                raise CheckpointError(f"{self.path}: {shown(name)}: shares of it are missing")
            self._parts[name, "master"] = shares
            yield name, Entry(archives[0].path.name, shape, shares[0].record.dtype)

    def _whole(self, top: Archive, cut: bool) -> Iterator[tuple[str, Entry]]:
        """What the model file has whole: without ZeRO everything, else what is not trained, at stage 3 buffers only."""
        table = _table(top, top.value)
        buffers, shared = table.get("buffer_names"), table.get("shared_params") or Table()
        again = _table(top, shared).named()
        for name, value in _table(top, table.get("module")).named().items():
            absent = cut and not (isinstance(buffers, list) and name in buffers)
            if not isinstance(value, TensorRecord) or (name, "master") in self._parts or name in again or absent:
                continue
            if problem := top.problem(value):
                raise CheckpointError(f"{top.name}: {shown(name)}: {problem}")
            self._parts[name, "master"] = [_Part(top, value, 0, value.count)]
            yield name, Entry(top.path.name, value.shape, value.dtype)

    def _second_names(self, top: Archive) -> dict[str, Entry]:
        """Parameters that have two names are stored under one."""
        found: dict[str, Entry] = {}
        for name, first in _table(top, _table(top, top.value).get("shared_params") or Table()).named().items():
            if not isinstance(first, str) or first not in self.entries:
                raise CheckpointError(f"{top.name}: {shown(name)} is {shown(first)}, which is not there")
            found[name] = self.entries[first]
            for what in ("master", *self.states):
                if (first, what) in self._parts:
                    self._parts[name, what] = self._parts[first, what]
        return found


def _tagged(path: Path) -> Path:
    """The folder of one checkpoint."""
    if not (path / "latest").is_file():
        return path
    try:
        tag = (path / "latest").read_text().strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'latest'}: cannot be read ({error})") from None
    if not tag.isprintable() or "/" in tag or tag.startswith(".") or not (path / tag).is_dir():
        raise CheckpointError(f"{path / 'latest'} names {shown(tag)}, which is not there")
    return path / tag


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The model files and the optimizer files, each in the order of the data ranks.

    Raises:
        CheckpointError: some are missing, or of tensor-parallel or pipeline ranks.
    """
    kinds: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
    problems: list[str] = []
    for path in sorted(folder.glob("*_states.pt")):
        match = _FILE.fullmatch(path.name)
        if match is None:
            problems.append(f"{path}: pipeline stages and experts are not put together")
        elif int(match[2]):
            problems.append(f"{path}: tensor-parallel ranks are not put together, for it does not say how they cut")
        else:
            kinds[match[3]][int(match[1] or 0)] = path
    for kind, files in kinds.items():
        missing = [rank for rank in range(max(files, default=-1) + 1) if rank not in files]
        problems += [f"{folder}: the {kind}_states.pt of data rank {rank} is missing" for rank in missing[:20]]
    if not kinds["model"]:
        problems.append(f"{folder}: has no *_model_states.pt of tensor-parallel rank 0")
    refuse(CheckpointError, problems)
    models, optims = ([files[rank] for rank in sorted(files)] for files in kinds.values())
    return models, optims


def _check_ranks(folder: Path, states: Sequence[Table]) -> None:
    wanted = states[0].get("partition_count")
    counts = wanted if isinstance(wanted, list) else [wanted]
    if any(count != len(states) for count in counts):
        raise CheckpointError(f"{folder}: {len(states)} *_optim_states.pt, of {shown(wanted)} ranks")
    if any(state.get("ds_zero_partition_groups") is not None for state in states):
        raise CheckpointError(f"{folder}: experts that are cut over ranks of their own are not put together")


def _table(archive: Archive, value: Any) -> Table:
    if not isinstance(value, Table):
        raise CheckpointError(f"{archive.name}: holds {shown(value)} where DeepSpeed has a dictionary")
    return value


def _shapes(archive: Archive, value: Any) -> list[Shapes]:
    """Groups of parameters with their shapes.

    Raises:
        CheckpointError: it is something else, or has a name twice.
    """
    groups = [group.named() for group in value if isinstance(group, Table)] if isinstance(value, list) else []
    shapes = [[(name, whole_numbers(shape)) for name, shape in group.items()] for group in groups]
    names = [name for group in groups for name in group]
    if not isinstance(value, list) or len(groups) < len(value) or len(set(names)) < len(names):
        raise CheckpointError(f"{archive.name}: does not say which parameters it holds")
    if wrong := [name for group in shapes for name, shape in group if shape is None]:
        raise CheckpointError(f"{archive.name}: {shown(wrong[0])} has no shape that can be read")
    return [[(name, shape) for name, shape in group if shape is not None] for group in shapes]


def _vectors(archive: Archive, value: Any) -> list[_Part]:
    """Flat tensors.

    Raises:
        CheckpointError: they are something else, or do not fit the file.
    """
    records = value if isinstance(value, list) else [value]
    for record in records:
        if not isinstance(record, TensorRecord):
            raise CheckpointError(f"{archive.name}: holds {shown(record)} where DeepSpeed has flat tensors")
        if problem := archive.problem(record) or ("" if record.contiguous else "its values do not stand in order"):
            raise CheckpointError(f"{archive.name}: a flat tensor: {problem}")
    return [_Part(archive, record, 0, record.count) for record in records]


def _moments(archive: Archive, state: Table, masters: Sequence[_Part]) -> dict[str, list[_Part]]:
    """The vectors of the optimizer's state that every group has, each as long as the weights or a padding longer."""
    base = state.get("optimizer_state_dict") or state.get("base_optimizer_state")
    inner = base.get("state") if isinstance(base, Table) else None
    tables: list[Any] = base if isinstance(base, list) else []
    if isinstance(inner, Table):
        numbered = {key: value for key, value in inner.pairs if isinstance(key, int)}
        tables = [numbered.get(index) for index in range(len(masters))]
    if len(tables) != len(masters) or not all(isinstance(table, Table) for table in tables):
        return {}
    found: dict[str, list[_Part]] = {}
    for what in tables[0].named():
        records = [table.get(what) for table in tables]
        if all(isinstance(record, TensorRecord) and len(record.shape) == 1 for record in records):
            parts = _vectors(archive, records)
            if all(own.length >= part.length for own, part in zip(parts, masters, strict=True)):
                found[what] = [own._replace(length=part.length) for own, part in zip(parts, masters, strict=True)]
    return found


def _slice(vector: _Vector, run: Run) -> Iterator[_Part]:
    """The parts of a vector that hold a run."""
    begin, end, at = run.begin, run.begin + run.length, 0
    for part in vector:
        first, last = max(begin, at), min(end, at + part.length)
        if first < last:
            yield _Part(part.archive, part.record, part.begin + first - at, last - first)
        at += part.length
