"""What training state needs, and an error that says so when there is not enough memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from parallel.errors import LockstepError
from zero.plan import wide
from zero.sharing import Sharing

__all__ = ["Needs", "NotEnoughMemory", "explained"]


class NotEnoughMemory(LockstepError):
    """Training state does not fit this rank; the message says what needs how much, and which options need less."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes on one rank between two steps (arXiv 1910.02054, figure 1, with gradients in the optimizer's precision)."""

    parameters: int
    gradients: int
    master: int
    state: int

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
        )

    def lines(self, offload: str) -> Iterator[str]:
        """One for each kind."""
        there = {"none": (), "optimizer": ("master", "state"), "parameters": ("parameters", "master", "state")}[offload]
        for name in ("parameters", "gradients", "master", "state"):
            where = ", in CPU memory" if name in there else ""
            yield f"{name} {getattr(self, name) / (1 << 20):,.1f} MiB{where}"


def _knobs(sharing: Sharing, data: int) -> Iterator[str]:
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
    yield 'recompute = "full", if it is activations that fill the memory'


@contextmanager
def explained(parameters: Sequence[nn.Parameter], sharing: Sharing, data: int) -> Iterator[None]:
    """Say what training state needs if memory ends inside.

    Args:
        data: ranks of the data axis.

    Raises:
        NotEnoughMemory: it ended.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        ended = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text
        if not ended:
            raise
        needs, text = Needs.of(parameters, sharing), text.partition("\n")[0]
        raise NotEnoughMemory(
            f"not enough memory for training state of {sum(p.numel() for p in parameters):,} parameters "
            f"(ZeRO stage {sharing.stage}): {'; '.join(needs.lines(sharing.offload))} (state: of AdamW). "
            f"What needs less: {'; '.join(_knobs(sharing, data))}. ({text or 'out of memory'})"
        ) from error
