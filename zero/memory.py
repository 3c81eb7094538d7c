"""What training state needs, and an error that says so when there is not enough memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from parallel.errors import LockstepError
from zero.plan import wide
from zero.sharing import Sharing

__all__ = ["Needs", "NotEnoughMemory", "explained"]


_KINDS = ("parameters", "gradients", "master", "state")
_AWAY = {"none": (), "optimizer": ("master", "state"), "parameters": ("parameters", "master", "state")}


class NotEnoughMemory(LockstepError):
    """Training state does not fit this rank; the message says what needs how much, and which options need less."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes on one rank between two steps (arXiv 1910.02054, figure 1, with gradients in the optimizer's precision).

    ``cut``: a rank keeps its own run of the gradients alone; then that is offloaded with the optimizer's state.
    """

    parameters: int
    gradients: int
    master: int
    state: int
    cut: bool

    @staticmethod
    def of(parameters: Sequence[nn.Parameter], sharing: Sharing, vectors: int = 2) -> Needs:
        """Of parameters that are trained; ``vectors``: state of the optimizer, as multiples of the master weights."""
        stage, ways = sharing.stage, sharing.shard.size
        values = sum(p.numel() * p.dtype.itemsize for p in parameters)
        gradients = sum(p.numel() * wide(p.dtype).itemsize for p in parameters)
        same = all(p.dtype == wide(p.dtype) for p in parameters)
        own = gradients // ways
        return Needs(
            parameters=values // ways if stage == 3 else values,
            gradients=own if stage > 1 else gradients,
            master=0 if same and sharing.offload != "optimizer" else own,
            state=vectors * own,
            cut=stage > 1,
        )

    def _away(self, offload: str) -> set[str]:
        return {*_AWAY[offload], *(["gradients"] if self.cut and offload != "none" else [])}

    def total(self, offload: str = "none") -> int:
        """All of them that ``offload`` leaves on the device."""
        return sum(getattr(self, name) for name in _KINDS if name not in self._away(offload))

    def lines(self, offload: str) -> Iterator[str]:
        """One for each kind."""
        for name in _KINDS:
            where = ", in CPU memory" if name in self._away(offload) else ""
            yield f"{name} {getattr(self, name) / (1 << 20):,.1f} MiB{where}"


def _knobs(sharing: Sharing, data: int, step: bool) -> Iterator[str]:
    if step:
        yield 'recompute = "full"'
        yield "more batch.microbatches"
        yield "a shorter batch.sequence"
    if sharing.stage < 3 and data > 1:
        yield f"zero.stage = {sharing.stage + 1} (it is {sharing.stage}, on {data} data ranks)"
    if sharing.stage and sharing.replica.size > 1:
        yield f"zero.shard_size = 0 (it is {sharing.shard.size})"
    if sharing.offload == "none":
        yield 'zero.offload = "optimizer"'
    elif sharing.offload == "optimizer" and sharing.stage == 3:
        yield 'zero.offload = "parameters"'
    yield "more tensor or pipeline ranks (layout.tp, layout.pp)"
    yield "a smaller optimizer.bucket_mb"
    if not step:
        yield 'recompute = "full", if it is activations that fill the memory'


def _end_of_memory(error: BaseException | None) -> BaseException | None:
    """What says that memory ended, among an error and its causes; None too where that is explained already."""
    while error is not None and not isinstance(error, NotEnoughMemory):
        refused = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        if refused or isinstance(error, MemoryError | torch.OutOfMemoryError):
            return error
        error = error.__cause__
    return None


@contextmanager
def explained(
    parameters: Sequence[nn.Parameter], sharing: Sharing, data: int, held: Callable[[], int] | None = None
) -> Iterator[None]:
    """Say what training state needs if memory ends inside.

    Args:
        data: ranks of the data axis.
        held: for what is more than state, as a step is: the most bytes that this rank has held.

    Raises:
        NotEnoughMemory: it ended.
    """
    try:
        yield
    except Exception as error:
        end = _end_of_memory(error)
        if end is None:
            raise
        needs, reason = Needs.of(parameters, sharing), str(end).partition("\n")[0] or "out of memory"
        lines = [*needs.lines(sharing.offload)]
        if held is not None:
            there = sharing.offload if any(p.is_cuda for p in parameters) else "none"
            rest = held() - needs.total(there)
            lines.append(f"all else, activations above all, {rest / (1 << 20):,.1f} MiB at the most so far")
        what = "training state" if held is None else "a step with training state"
        raise NotEnoughMemory(
            f"not enough memory for {what} of {sum(p.numel() for p in parameters):,} parameters "
            f"(ZeRO stage {sharing.stage}): {'; '.join(lines)} (state: of AdamW). "
            f"What needs less: {'; '.join(_knobs(sharing, data, held is not None))}. ({reason})"
        ) from error
