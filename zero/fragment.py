<<<<<<< HEAD
"""A run of values of one parameter or of its optimizer state, as one rank holds it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Fragment"]


class Fragment(NamedTuple):
    """Elements ``start`` to ``start + len(values)`` of the row-major flattened local (tensor-parallel) piece.

    Attributes:
        parameter: its name.
        what: ``master`` for the weights, or the name of a state vector.
        start: of the run; 0 and the whole length where state is not cut over the data axis.
        values: a 1-D view, to be read or filled.
=======
"""What a rank holds of a parameter or of its optimizer state: a run of its flattened piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Fragment", "fragments"]


class Fragment(NamedTuple):
    """Elements ``start`` and on of the row-major flattened piece that a tensor-parallel rank has of a tensor.

    Attributes:
        parameter: its name.
        what: ``master`` (the value), or the name of a state vector of the optimizer.
        start: the first element; 0 in a fragment that is the whole piece.
        values: a 1-D view; writing to it changes the state.
>>>>>>> main
    """

    parameter: str
    what: str
    start: int
    values: Tensor
<<<<<<< HEAD
=======

    @property
    def key(self) -> str:
        """The name in a file: ``parameter|what|start``."""
        return f"{self.parameter}|{self.what}|{self.start}"


def fragments(state: Iterable[tuple[Any, ...]]) -> Iterator[Fragment]:
    """``ZeroOptimizer.state()`` as fragments: whole pieces (parameter, what, view) become fragments from 0 on."""
    for entry in state:
        yield entry if isinstance(entry, Fragment) else Fragment(entry[0], entry[1], 0, entry[2].view(-1))
>>>>>>> main
