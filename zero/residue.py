"""What top-k has not sent yet: state of each data rank alone, of which the sum over the ranks is what counts."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["residue", "summands"]

_NAME = re.compile(r"residue-(\d+)-of-(\d+)")


def residue(rank: int, ranks: int) -> str:
    """The name of what a data rank has kept back."""
    return f"residue-{rank}-of-{ranks}"


def summands(what: str, held: Iterable[str]) -> list[str]:
    """The names under which a checkpoint has a state vector: its sum is to be loaded.

    That is one name, but for residues. Of n saved ones each goes to one of m ranks: i to i modulo m. So with m = n
    every rank has its own back, and with any other m nothing of the gradient is lost. A checkpoint that was saved
    without residues gives none: nothing was kept.

    Args:
        what: of the state vector that is to be filled.
        held: what the checkpoint has of the same parameter.
    """
    own = _NAME.fullmatch(what)
    if own is None:
        return [what]
    rank, ranks = map(int, own.groups())
    saved = {int(found[2]) for name in held if (found := _NAME.fullmatch(name))}
    return [residue(i, n) for n in saved for i in range(rank, n, ranks)]
