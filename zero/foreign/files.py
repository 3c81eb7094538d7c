"""State dictionaries of ``torch.save``: one file, or a Hugging Face folder of several."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel.errors import CheckpointError, refuse
from zero.foreign.archive import Archive, TensorRecord
from zero.foreign.source import Entry, Foreign, by_name, printable
from zero.foreign.stream import Table, shown

__all__ = ["INDEX", "SINGLE", "SUFFIXES", "TorchFiles"]

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_DEEPEST = 16  # tables in one another
_MOST = 1 << 20  # names
_LONGEST = 1000  # letters of one


class TorchFiles(Foreign):
    """A file of ``torch.save``, or a folder with ``pytorch_model.bin`` or its index.

    Dictionaries in one another are one, with names joined by dots.

    Args:
        path: of the file or folder.

    Raises:
        CheckpointError: files are missing or damaged, hold no dictionary, or a tensor does not fit its file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.kind = path, "a state dictionary of torch.save"
        self._held: dict[str, tuple[Archive, TensorRecord]] = {}
        found: list[tuple[str, Entry]] = []
        problems: list[str] = []
        others: list[str] = []
        for file in _files(path):
            try:
                archive = Archive(file)
            except CheckpointError as error:
                problems += error.problems
                continue
            for name, value in _leaves(archive, archive.value):
                if not isinstance(value, TensorRecord):
                    others.append(name)
                elif problem := archive.problem(value):
                    problems.append(f"{file}: {shown(name)}: {problem}")
                else:
                    found.append((name, Entry(file.name, value.shape, value.dtype)))
                    self._held[name] = archive, value
        refuse(CheckpointError, problems)
        self.entries, self.others = by_name(path, found), printable(others)

    def read(self, name: str, what: str = "master") -> Tensor:
        """See :class:`~zero.foreign.source.Foreign`."""
        if name not in self._held or what != "master":
            raise CheckpointError(f"{self.path}: has no {name}{'' if what == 'master' else f'|{what}'}")
        archive, record = self._held[name]
        return archive.read(record)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if not (path / INDEX).is_file():
        return [path / SINGLE]
    try:
        table = json.loads((path / INDEX).read_bytes())["weight_map"]
        files = sorted({str(file) for file in table.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path / INDEX}: {type(error).__name__}: {error}") from None
    wrong = [file for file in files if not re.fullmatch(r"[\w-][\w.-]*\.bin", file)]
    refuse(CheckpointError, (f"{path / INDEX}: {shown(file)} is not a .bin file in the folder" for file in wrong))
    return [path / file for file in files]


def _leaves(
    archive: Archive, value: Any, prefix: str = "", depth: int = 0, met: Iterator[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """What is no dictionary, with its name.

    Raises:
        CheckpointError: there is no dictionary, or one that no checkpoint has.
    """
    if not isinstance(value, Table) or depth > _DEEPEST:
        raise CheckpointError(f"{archive.name}: holds {shown(value)}, not a dictionary of tensors")
    met = count() if met is None else met  # dictionaries that are empty, too: a few can stand in one another very often
    for key, inner in value.pairs:
        if next(met) > _MOST:
            raise CheckpointError(f"{archive.name}: more than {_MOST} names")
        name = f"{prefix}{key if isinstance(key, str) else shown(key)}"
        if len(name) > _LONGEST:
            raise CheckpointError(f"{archive.name}: a name of {len(name)} letters")
        if isinstance(inner, Table):
            yield from _leaves(archive, inner, f"{name}.", depth + 1, met)
        else:
            yield name, inner
