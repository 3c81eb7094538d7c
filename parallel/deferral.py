"""Weight gradients that backward may put off: the seam through which a pipeline splits B into I and W."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Deferral", "Kept", "settle"]

Kept = list[tuple[Tensor, Callable[[], Tensor]]]
"""Parameters, and what forms the gradient of each."""


class Deferral:
    """Asked by every linear layer of a model whether the gradient of its weight is wanted now.

    It is, unless backward runs inside :meth:`keep`. The layers of one model share one.
    """

    def __init__(self) -> None:
        self._kept: Kept | None = None

    @property
    def keeps(self) -> bool:
        """Whether gradients are being put off."""
        return self._kept is not None

    def __call__(self, parameter: Tensor, form: Callable[[], Tensor]) -> Tensor | None:
        """The gradient that ``form`` makes; None if that was put off, which only a leaf's can be."""
        if self._kept is None or not parameter.is_leaf:
            return form()
        self._kept.append((parameter, form))
        return None

    @contextmanager
    def keep(self) -> Iterator[Kept]:
        """Put off what is asked inside; what is to be done is in the list, for :func:`settle`."""
        self._kept, outer = [], self._kept
        try:
            yield self._kept
        finally:
            self._kept = outer


def settle(kept: Kept) -> None:
    """Form the gradients that were put off, and accumulate each as backward would have done, hooks included."""
    while kept:
        parameter, form = kept.pop(0)
        with torch.no_grad():
            gradient = form()
        parameter.backward(gradient)
