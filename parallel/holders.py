"""Which pipeline ranks hold each parameter."""

from __future__ import annotations

from collections.abc import Iterable

from parallel import comm
from parallel.mesh import Mesh

__all__ = ["holders"]


def holders(names: Iterable[str], mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """Parameter -> the ranks of ``mesh.pp`` that hold it, for the parameters of all stages.

    A tied embedding is held by the first and the last stage, everything twice where a schedule has two copies of the
    model. Such a gradient is summed over its holders, and counts once. Every rank of ``mesh.pp`` calls this.

    Args:
        names: of the parameters of this rank.
    """
    table: dict[str, tuple[int, ...]] = {}
    for rank, held in enumerate(comm.gather_json(list(names), mesh.pp)):
        for name in held:
            table[name] = (*table.get(name, ()), rank)
    return table
