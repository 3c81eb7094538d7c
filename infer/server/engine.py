"""What the server needs of an engine, and what it is told about the model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from infer.params import SamplingParams
from parallel.errors import LockstepError

if TYPE_CHECKING:  # these import torch, which a process that only answers clients does not need
    from infer.completion import Event
    from infer.scheduler import Stats

__all__ = ["AtOnce", "Embeds", "EngineGone", "ModelInfo", "ServedEngine"]

AtOnce = Callable[["Event"], bool]
"""Deals with an event without waiting for anything, or returns False and does nothing."""


class EngineGone(LockstepError):
    """The engine that continued a prompt has ended, or there is none."""


class ServedEngine(Protocol):
    """Continues prompts; in this process or in another one."""

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: bytes = b"",
        at_once: AtOnce | None = None,
    ) -> AsyncIterator[Event]:
        """Continue a prompt, piece by piece; the last event has the whole. Closing the iterator ends the request.

        Args:
            prompt, params, priority, salt: of :meth:`infer.engine.Engine.add`.
            at_once: may be called, on the event loop, with an event that is not the first, while the iterator is being
                waited for; one for which it returns True is not given by the iterator.

        Raises:
            RequestError: it cannot be continued, with every reason; before the first event.
            EngineGone: there is no engine, or it ended.
        """
        ...

    async def ping(self, timeout_s: float) -> bool:
        """Whether the engine made a step when it was asked to."""
        ...

    def stats(self) -> Stats | None:
        """Of the scheduler; None: they are not known."""
        ...


@runtime_checkable
class Embeds(Protocol):
    """An engine that also makes vectors."""

    async def embed(self, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[float]]:
        """One vector for each prompt.

        Raises:
            RequestError, DataError: a prompt has none, with every reason.
            EngineGone: there is no engine, or it ended.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What clients are told about the model.

    Attributes:
        names: by which it is asked for; the first is the one that answers carry.
        context: most tokens of a text, prompt included.
        vocabulary: of the model.
        created: seconds since 1970.
        version: of the program that serves it.
        generates: it continues prompts (an encoder does not).
        width: numbers of a vector; 0: not known.
        sizes: to which its vectors may be cut.
        unit: its vectors have the length 1, and so have the cut ones.
    """

    names: tuple[str, ...]
    context: int
    vocabulary: int
    created: int
    version: str
    generates: bool = True
    width: int = 0
    sizes: Sequence[int] = ()
    unit: bool = False
