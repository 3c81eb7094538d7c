"""Paged attention on the CPU by a small C kernel (``paged.c``), compiled once by the system's compiler."""

from __future__ import annotations

import ctypes
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from infer.attention import Pages
from infer.batch import StepBatch
from parallel.native import COMPILERS, CompileError, compiled

__all__ = ["CpuAttention", "Job", "Place"]

_SOURCE = Path(__file__).with_name("paged.c")
_FLAGS = (("-march=native", "-fopenmp"), ("-march=native", "-pthread"), ("-pthread",))
_WIDE = "-DWIDE"
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
_POINTERS = ("q", "k", "v", "out", "keys", "values", "key_scales", "value_scales")
_NUMBERS = (
    *("q_token", "q_head", "k_token", "v_token", "k_head", "v_head"),
    *("page", "page_head", "scale_page", "scale_head"),
    *("heads", "kv_heads", "size", "pages", "page_size", "window"),
    *("type", "stored", "failed"),
)


class Place(ctypes.Structure):
    """``Place`` of paged.c: the requests of a step, the same for all layers of a page group."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("table", "context", "starts", "slots")),
        *((name, ctypes.c_int64) for name in ("table_row", "requests", "tokens", "threads")),
    ]

    @staticmethod
    def of(step: StepBatch, group: int) -> Place:
        """The caller keeps the step."""
        table, places = step.table[group], (step.context_R, step.starts_R, step.slots_T[group])
        pointers = table.data_ptr(), *(tensor.data_ptr() for tensor in places)
        return Place(*pointers, table.stride(0), table.shape[0], len(step), torch.get_num_threads())


class Job(ctypes.Structure):
    """``Job`` of paged.c: attention of one layer in one step, whose requests are ``at``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("at", Place),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_double),
    ]

    def point(self, pages: Pages) -> None:
        """To where keys and values are kept; the caller keeps the pages."""
        keys, values = pages.k_PKSH, pages.v_PKSH
        self.keys, self.values, self.stored = keys.data_ptr(), values.data_ptr(), _TYPES[keys.dtype]
        self.pages, self.kv_heads, self.page_size, self.size = keys.shape
        self.page, self.page_head = (keys.stride(dim) * keys.element_size() for dim in (0, 1))
        if pages.k_scale_PKS is not None and pages.v_scale_PKS is not None:
            self.key_scales, self.value_scales = pages.k_scale_PKS.data_ptr(), pages.v_scale_PKS.data_ptr()
            self.scale_page, self.scale_head = (4 * pages.k_scale_PKS.stride(dim) for dim in (0, 1))
        self.scale = self.size**-0.5 * 1.4426950408889634  # the kernel raises 2, not e

    def give(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, out_TNH: Tensor, window: int | None) -> None:
        """What is computed from, and to where; the last dims are dense."""
        self.window = window or 0
        width, self.heads, self.type = q_TNH.element_size(), q_TNH.shape[1], _TYPES[q_TNH.dtype]
        self.q, self.k, self.v, self.out = (x.data_ptr() for x in (q_TNH, k_TKH, v_TKH, out_TNH))
        (self.q_token, self.q_head), (self.k_token, self.k_head), (self.v_token, self.v_head) = (
            (width * token, width * head) for token, head, _ in (x.stride() for x in (q_TNH, k_TKH, v_TKH))
        )

    def verify(self, status: int, group: int) -> None:
        """Look at what the kernel returned."""
        if status == 1:
            raise IndexError(f"a page table or a slot of page group {group} names a page outside 0 to {self.pages - 1}")
        if status:
            raise MemoryError("attention: no memory for its workspace")


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
        self._jobs: WeakKeyDictionary[Pages, Job] = WeakKeyDictionary()

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot serve; compiles where that was never done."""
        if device.type != "cpu":
            return f"it is for the CPU, the model is on {device.type}"
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            return f"it does not compute in {dtype}"
        try:
            self.entry(dtype)
        except CompileError as error:
            return str(error)
        return None

    def entry(self, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
        """The kernel for queries of this precision, which takes a :class:`Job`."""
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
        job = self._jobs.get(pages)
        if job is None:
            job = self._jobs[pages] = Job()
            job.point(pages)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_TNH, k_TKH, v_TKH))
        job.give(q, k, v, out, window)
        job.at = Place.of(step, group)
        job.verify(self.entry(q_TNH.dtype)(ctypes.byref(job)), group)
        return out
