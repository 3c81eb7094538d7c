"""What a rank holds of a parameter or of its optimizer state: a run of its flattened piece."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Fragment"]


class Fragment(NamedTuple):
    """Elements ``start`` and on of the row-major flattened piece that a tensor-parallel rank has of a tensor.

    Attributes:
        parameter: its name.
        what: ``master`` (the value), the name of a state vector of the optimizer, or of a residue.
        start: the first element; 0 in a fragment that is the whole piece.
        values: a 1-D view; writing to it changes the state.
    """

    parameter: str
    what: str
    start: int
    values: Tensor

    @property
    def key(self) -> str:
        """The name in a file: ``parameter|what|start``."""
        return f"{self.parameter}|{self.what}|{self.start}"
