"""Attention of a step's queries to keys and values in pages: one protocol, and the backends that speak it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from infer.batch import StepBatch
from parallel.errors import ConfigError
from parallel.registry import Registry

__all__ = ["BACKENDS", "Backend", "Pages", "choose"]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Pages:
    """The pages of one layer: P pages of S tokens of K key-value heads of size H. Views into a cache.

    Attributes:
        k_PKSH, v_PKSH: keys and values in the model's precision, int8 or float8_e4m3fn; the last two dims are dense.
        k_scale_PKS, v_scale_PKS: for int8 and fp8, what each row is to be multiplied by, float32.
    """

    k_PKSH: Tensor
    v_PKSH: Tensor
    k_scale_PKS: Tensor | None = None
    v_scale_PKS: Tensor | None = None


class Backend(Protocol):
    """Writes the step's new keys and values into their slots, then attends from its queries to all of each request."""

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot serve activations of ``dtype`` on ``device``; None: it can."""
        ...

    def __call__(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        pages: Pages,
        step: StepBatch,
        group: int,
        window: int | None,
    ) -> Tensor:
        """Attention out (T, N, H).

        Args:
            q_TNH: queries.
            k_TKH, v_TKH: keys and values of the same tokens; N / K query heads share one.
            pages: of this layer; those that the step's slots name are written.
            step: which requests the tokens continue, and where their pages are.
            group: which of the step's page tables is meant.
            window: tokens seen, the token itself included; None: all. Pages that lie wholly before the window of a
                request's first new token are not looked at.

        Raises:
            IndexError: a table or a slot names a page that there is not.
        """
        ...


BACKENDS: Registry[type[Backend]] = Registry(
    "attention backend",
    {
        "cpu": "infer.attention.cpu:CpuAttention",
        "triton": "infer.attention.triton:TritonAttention",
        "torch": "infer.attention.fused:FusedAttention",
        "reference": "infer.attention.reference:ReferenceAttention",
    },
)
_AUTO = ("cpu", "triton", "torch")


def choose(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Backend, tuple[str, ...]]:
    """A backend for activations of ``dtype`` on ``device``.

    Args:
        name: of the registry, or ``auto``: the fastest that can.
        device: where the model is.
        dtype: of its activations.

    Returns:
        its name, itself, and why faster ones were passed over, one sentence each.

    Raises:
        ConfigError: there is no such backend, or it cannot serve.
    """
    passed: list[str] = []
    for candidate in _AUTO if name == "auto" else (name,):
        backend = BACKENDS[candidate]()
        reason = backend.refusal(device, dtype)
        if reason is None:
            return candidate, backend, tuple(passed)
        passed.append(f"attention {candidate!r} was passed over: {reason}")
    raise ConfigError(passed)
