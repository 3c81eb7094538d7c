"""The sequence-parallel region of a layer: norm, dropout and residual on 1/tp of the tokens (arXiv 2205.05198)."""

from __future__ import annotations

from torch import Tensor

from parallel import comm
from parallel.mesh import Axis

__all__ = ["gather_tokens", "local_tokens", "split_tokens"]


def split_tokens(x_TD: Tensor, axis: Axis) -> Tensor:
    """Enter the region with tokens that every rank has: this rank's piece. Backward gathers."""
    return comm.split(x_TD, axis)


def gather_tokens(x_TD: Tensor, axis: Axis, tokens: int | None = None, *, replicated: bool = False) -> Tensor:
    """Leave the region: all tokens.

    Args:
        x_TD: this rank's piece.
        tokens: how many there are on all ranks, where the axis does not divide them.
        replicated: what follows is computed alike on every rank, so that each already has the whole gradient;
            otherwise the ranks' gradients are summed.
    """
    return comm.all_gather(x_TD, axis, total=tokens, grad="replicated" if replicated else "partial")


def local_tokens(value_T: Tensor, axis: Axis) -> Tensor:
    """This rank's piece of something that is known for all tokens (positions, indices); outside autograd."""
    return value_T[comm.chunk(value_T.shape[0], axis)]
