"""Paged attention on the CPU by a small C kernel (``paged.c``), compiled once by the system's compiler."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from infer.attention import Pages
from infer.batch import StepBatch
from parallel.native import COMPILERS, CompileError, compiled

__all__ = ["CpuAttention"]

_SOURCE = Path(__file__).with_name("paged.c")
_FLAGS = (("-march=native", "-fopenmp"), ("-march=native", "-pthread"), ("-pthread",))
_WIDE = "-DWIDE"
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
_POINTERS = (
    *("q", "k", "v", "out", "keys", "values", "key_scales", "value_scales"),
    *("table", "context", "starts", "slots"),
)
_NUMBERS = (
    *("q_token", "q_head", "k_token", "v_token", "k_head", "v_head"),
    *("page", "page_head", "scale_page", "scale_head", "table_row"),
    *("requests", "tokens", "heads", "kv_heads", "size", "pages", "page_size", "window"),
    *("type", "stored", "threads", "failed"),
)


class _Job(ctypes.Structure):
    """``Job`` of paged.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_double),
    ]


class CpuAttention:
    """float32, bfloat16 and float64 with pages in the same precision, int8 or fp8; computes in float32 or wider.

    The bits of a request do not depend on what else is in the step, on how it was cut into chunks, on the page size or
    on the number of threads, which is ``torch.get_num_threads()``.

    Args:
        folder: where the compiled kernel is kept; None: the user's cache folder.
        compilers: tried in turn.
    """

    def __init__(self, folder: Path | None = None, compilers: tuple[str, ...] = COMPILERS) -> None:
        self._folder, self._compilers = folder, compilers
        self._entries: dict[bool, ctypes._NamedFuncPointer] = {}

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot serve; compiles where that was never done."""
        if device.type != "cpu":
            return f"it is for the CPU, the model is on {device.type}"
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            return f"it does not compute in {dtype}"
        try:
            self._entry(dtype)
        except CompileError as error:
            return str(error)
        return None

    def _entry(self, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
        wide = dtype == torch.float64
        if wide not in self._entries:
            attempts = tuple((*flags, _WIDE) if wide else flags for flags in _FLAGS)
            library = compiled(_SOURCE, attempts, folder=self._folder, compilers=self._compilers)
            self._entries[wide] = library.paged_attention
        return self._entries[wide]

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
        """As :class:`~infer.attention.Backend` says."""
        out = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_TNH, k_TKH, v_TKH))
        keys, values, table = pages.k_PKSH, pages.v_PKSH, step.table[group]
        count, kv_heads, page_size, size = keys.shape
        width = q.element_size()
        job = _Job(
            *(x.data_ptr() for x in (q, k, v, out, keys, values)),
            pages.k_scale_PKS.data_ptr() if pages.k_scale_PKS is not None else None,
            pages.v_scale_PKS.data_ptr() if pages.v_scale_PKS is not None else None,
            *(x.data_ptr() for x in (table, step.context_R, step.starts_R, step.slots_T[group])),
            *(x.stride(dim) * width for x, dim in ((q, 0), (q, 1), (k, 0), (v, 0), (k, 1), (v, 1))),
            keys.stride(0) * keys.element_size(),
            keys.stride(1) * keys.element_size(),
            *((x.stride(0) * 4, x.stride(1) * 4) if (x := pages.k_scale_PKS) is not None else (0, 0)),
            table.stride(0),
            table.shape[0],
            q.shape[0],
            q.shape[1],
            kv_heads,
            size,
            count,
            page_size,
            window or 0,
            _TYPES[q.dtype],
            _TYPES[keys.dtype],
            torch.get_num_threads(),
            0,
            size**-0.5 * 1.4426950408889634,  # the kernel raises 2, not e
        )
        status = self._entry(q.dtype)(ctypes.byref(job))
        if status == 1:
            raise IndexError(f"a page table or a slot of page group {group} names a page outside 0 to {count - 1}")
        if status:
            raise MemoryError("attention: no memory for its workspace")
        return out
