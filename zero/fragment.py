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
    """

    parameter: str
    what: str
    start: int
    values: Tensor
