"""What every foreign checkpoint is to us: tensors by name, with their shapes, read one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from parallel.errors import CheckpointError, refuse

__all__ = ["Entry", "Foreign", "by_name", "printable"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor: the file that names it, its shape, its type."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Foreign(ABC):
    """A checkpoint that others wrote.

    Attributes:
        path: where.
        kind: what it is, in a few words.
        entries: name -> tensor, for the weights and whatever else was saved beside them.
        states: vectors of the optimizer's state that every trained weight has.
        others: names of what is there and is no tensor.
    """

    path: Path
    kind: str
    entries: Mapping[str, Entry]
    states: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @abstractmethod
    def read(self, name: str, what: str = "master") -> Tensor:
        """A whole tensor, on the CPU; or, if ``what`` is one of ``states``, that vector of a weight, in its shape.

        In memory are the tensor, once more the largest of the pieces that it is put together from, and a few megabytes.

        Raises:
            CheckpointError: it is not there, or its bytes are damaged.
        """


def by_name(path: Path, found: Iterable[tuple[str, Entry]]) -> dict[str, Entry]:
    """Entries by name.

    Raises:
        CheckpointError: a name that is there twice, or that cannot be printed.
    """
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for name, entry in found:
        if not name.isprintable() or len(name) > 1000:
            problems.append(f"{entry.file}: {name[:80]!a} is no name of a tensor")
        elif name in entries:
            problems.append(f"{path}: {name} is there twice, in {entries[name].file} and {entry.file}")
        entries[name] = entry
    refuse(CheckpointError, problems)
    return entries


def printable(names: Iterable[str]) -> tuple[str, ...]:
    """Names that need no more than be shown."""
    return tuple(name if name.isprintable() else ascii(name) for name in names)
