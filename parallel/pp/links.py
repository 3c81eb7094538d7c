"""Messages between the ranks of a pipeline, under way while they compute."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable

from torch import Tensor

from parallel import comm
from parallel.mesh import Axis, Mesh

__all__ = ["Links", "Message"]


class Message:
    """One message; :meth:`wait` returns when it is there (CUDA: when the current stream may use it)."""

    def __init__(self, tensor: Tensor | None, pending: comm.Pending | None = None) -> None:
        self.tensor = tensor
        self.pending = pending
        self.error: BaseException | None = None
        self.done = threading.Event()

    def there(self, patience_s: float) -> bool:
        """Whether it is there within so many seconds.

        Raises:
            RuntimeError: of the transport, where the other end is gone.
        """
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
            self.done.set()
        if not self.done.wait(patience_s):
            return False
        if self.error is not None:
            raise self.error
        return True

    def has_left(self) -> bool:
        """Whether what it holds may be let go, without waiting for it."""
        return self.done.is_set() or (self.pending is not None and self.pending.is_done())


class Links:
    """The links of one rank.

    With gloo a thread for each link waits for its messages one after the other, so that nothing is waited for twice and
    a wait can be given up; with NCCL each direction of a link is a communicator with its own stream.

    Args:
        mesh: messages go over ``mesh.pp``.
        delay_s: every message leaves so much later: a slow link, for experiments.
    """

    def __init__(self, mesh: Mesh, delay_s: float = 0.0) -> None:
        self.mesh, self.delay_s = mesh, delay_s
        self.streams = mesh.device.type == "cuda"
        self._queues: dict[tuple[str, int], queue.SimpleQueue[Callable[[], None] | None]] = {}
        self._sent: list[Message] = []
        weakref.finalize(self, _close, self._queues)

    def connect(self, links: list[tuple[int, int]]) -> None:
        """Make the communicators of all directed links of a schedule; every rank of ``mesh.pp`` calls it."""
        for source, target in sorted(links) if self.streams else ():
            if self.mesh.pp.rank in (source, target):
                self._axis(source, target)

    def send(self, x: Tensor, to: int, tag: int) -> None:
        """Send ``x``, which is let go when it has left."""
        axis, place = self._axis(self.mesh.pp.rank, to)
        message = Message(x)
        if self.streams:
            message.pending = comm.start_send(x, axis, place, tag)
            self._sent = [sent for sent in self._sent if not sent.has_left()]
        elif self.delay_s:
            due = time.monotonic() + self.delay_s
            self._later("send", to, message, lambda: _at(due, lambda: comm.start_send(x, axis, place, tag)))
        else:
            pending = comm.start_send(x, axis, place, tag)
            self._later("send", to, message, lambda: pending)
        self._sent.append(message)

    def receive(self, buffer: Tensor, source: int, tag: int) -> Message:
        """Begin to fill ``buffer``."""
        axis, place = self._axis(source, self.mesh.pp.rank, other=source)
        pending = comm.start_receive(buffer, axis, place, tag)
        if self.streams:
            return Message(buffer, pending)
        message = Message(buffer)
        self._later("receive", source, message, lambda: pending)
        return message

    def leaving(self) -> list[Message]:
        """Messages that have not left yet; what has is forgotten."""
        self._sent = [message for message in self._sent if not message.has_left()]
        return self._sent

    def _axis(self, source: int, target: int, other: int | None = None) -> tuple[Axis, int]:
        """The axis of a directed link, and the rank of the other end on it."""
        other = target if other is None else other
        if not self.streams:
            return self.mesh.pp, other
        pair = sorted((source, target))
        return self.mesh.among("pp", pair, f"{source}>{target}"), pair.index(other)

    def _later(self, direction: str, peer: int, message: Message, start: Callable[[], comm.Pending]) -> None:
        """Have the thread of a link wait for a message."""
        key = (direction, peer)
        if key not in self._queues:
            self._queues[key] = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._queues[key],), daemon=True).start()
        self._queues[key].put(lambda: _complete(message, start, direction == "send"))


def _at(due: float, start: Callable[[], comm.Pending]) -> comm.Pending:
    time.sleep(max(0.0, due - time.monotonic()))
    return start()


def _complete(message: Message, start: Callable[[], comm.Pending], sent: bool) -> None:
    try:
        start().wait()
        if sent:
            message.tensor = None
    except Exception as error:  # noqa: BLE001 - raised where the message is waited for
        message.error = error
    message.done.set()


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job


def _close(queues: dict[tuple[str, int], queue.SimpleQueue[Callable[[], None] | None]]) -> None:
    for jobs in queues.values():
        jobs.put(None)
