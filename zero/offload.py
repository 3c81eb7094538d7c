"""Training state in CPU memory (arXiv 2101.06840): how it comes and goes, and an update that overlaps the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

__all__ = ["Landing", "Lane", "Offload", "hosted", "overlapped"]

Offload = Literal["none", "optimizer", "parameters"]
_Item = TypeVar("_Item")


def hosted(values: Tensor) -> Tensor:
    """A copy in CPU memory; pinned where the values are on a CUDA device, so that copies need not wait."""
    return _room(values).copy_(values)


def _room(values: Tensor) -> Tensor:
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)


class Lane:
    """Copies between a device and CPU memory; on CUDA beside what the device computes.

    Args:
        device: where the model is. On the CPU everything is copied all the same, at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None

    def beside(self) -> AbstractContextManager[Any]:
        """What is given to the device inside runs beside the rest, after all that was given to it before."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        self._stream = self._stream or torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def join(self) -> None:
        """What is given to the device from here on runs after all that was given to it beside."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def up(self, values: Tensor) -> Tensor:
        """A copy on the device, in the order of the stream that is current."""
        return torch.empty_like(values, device=self.device, pin_memory=False).copy_(values, non_blocking=True)

    def down(self, source: Tensor, target: Tensor) -> Callable[[], None]:
        """Begin to copy from the device into CPU memory; call the result, from any thread, before reading."""
        with self.beside():
            target.copy_(source, non_blocking=True)
            if self._stream is None:
                return _nothing
            source.record_stream(self._stream)
            event = torch.cuda.Event()
            event.record(self._stream)
            return event.synchronize


class Landing:
    """A sum in CPU memory of what comes from a device, one summand after the other, while the device computes.

    Args:
        total: in CPU memory; to be read after :meth:`done`.
        lane: by which summands come.
    """

    def __init__(self, total: Tensor, lane: Lane) -> None:
        self.total, self._lane = total, lane
        self._count = 0
        self._second: Tensor | None = None
        self._arrived: Callable[[], None] | None = None

    def begin(self) -> None:
        """Forget the last sum."""
        self._join()
        self._count = 0

    def add(self, summand: Tensor) -> None:
        """Begin to bring a summand; the first goes where the sum is, the others beside it."""
        self._join()
        if self._count and self._second is None:
            self._second = _room(summand)
        target = self._second if self._count and self._second is not None else self.total
        self._arrived = self._lane.down(summand, target)
        self._count += 1

    def done(self) -> Tensor:
        """The sum, once every summand is in it."""
        self._join()
        return self.total if self._count else self.total.zero_()

    def _join(self) -> None:
        if self._arrived is not None:
            self._arrived()
            self._arrived = None
            if self._count > 1 and self._second is not None:
                self.total.add_(self._second)


def _nothing() -> None:
    return None


def overlapped(
    items: Iterable[_Item],
    start: Callable[[_Item], Callable[[], None]],
    update: Callable[[_Item], None],
    publish: Callable[[_Item], None],
) -> None:
    """One item after the other: ``start`` its way here, ``update`` it in a thread when it is here, ``publish`` it.

    While one is updated, those after it arrive and those before it leave.

    Args:
        start: gives what waits until the item is here.
    """

    def work(item: _Item, arrived: Callable[[], None]) -> None:
        arrived()
        with torch.no_grad():
            update(item)

    with ThreadPoolExecutor(1, thread_name_prefix="update") as worker:
        updates = [(item, worker.submit(work, item, start(item))) for item in items]
        for item, done in updates:
            done.result()
            publish(item)
