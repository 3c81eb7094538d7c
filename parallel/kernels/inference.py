"""Layers of a model where no gradient is recorded, by a small C file (``inference.c``): same row, same bits."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallel.errors import ConfigError
from parallel.native import CompileError, compiled

__all__ = [
    "Op",
    "Panels",
    "Program",
    "first_largest",
    "kernels",
    "norm",
    "norm_heads_",
    "panels",
    "panels_product",
    "rotate_",
    "swiglu_rows",
]

_SOURCE = Path(__file__).with_name("inference.c")
_FLAGS = (("-march=native", "-fopenmp", "-ffp-contract=off"),)
_DTYPES = (torch.float32, torch.bfloat16)
_NORM, _ROTATE, _SWIGLU, _PRODUCT, _GATED, _EMBED, _LARGEST, _CALL = range(8)


class Op(ctypes.Structure):
    """One thing to be done with every row: ``Op`` of inference.c."""

    _fields_ = [
        ("kind", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "more", "out")),
        *((name, ctypes.c_int64) for name in ("width", "n", "count")),
        ("eps", ctypes.c_double),
        ("call", ctypes.c_void_p),
        ("next", ctypes.c_int64),
    ]


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The library; None where it cannot be compiled with torch's own threads: then the torch forms go on."""
    try:
        library = compiled(_SOURCE, _FLAGS)
    except CompileError:
        return None
    number = ctypes.c_int64
    library.inference_run.argtypes = [ctypes.POINTER(Op), number, number, number, number]
    library.inference_run.restype = ctypes.c_int
    library.inference_panel.argtypes, library.inference_panel.restype = [number], number
    return library


def _library(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, if it is for these: contiguous, all of one precision, on the CPU, in inference mode.

    Not merely without gradients: what is computed a second time for its gradient must come out the same.
    """
    if not torch.is_inference_mode_enabled():
        return None
    dtype = tensors[0].dtype
    if dtype not in _DTYPES:
        return None
    for x in tensors:
        if x.dtype != dtype or x.device.type != "cpu" or not x.is_contiguous():
            return None
    return kernels()


def _run(library: ctypes.CDLL, op: Op, rows: int, dtype: torch.dtype, alone: bool = False) -> None:
    """One op; ``alone``: there is too little to do for more than one thread."""
    threads = 1 if alone else torch.get_num_threads()
    library.inference_run(ctypes.byref(op), 1, rows, dtype == torch.bfloat16, threads)


def norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor | None:
    """RMSNorm of the last dim; None where the torch form is to do it."""
    library = _library(x_TD, weight_D)
    size = x_TD.shape[-1]
    if library is None or weight_D.shape != (size,) or not size:
        return None
    out = torch.empty_like(x_TD)
    op = _norm(x_TD, weight_D, out, eps)
    _run(library, op, x_TD.numel() // size, x_TD.dtype, alone=x_TD.numel() <= 32768)
    return out


def _norm(x_TD: Tensor, weight_D: Tensor, out_TD: Tensor, eps: float) -> Op:
    x, weight, out, size = x_TD.data_ptr(), weight_D.data_ptr(), out_TD.data_ptr(), x_TD.shape[-1]
    return Op(kind=_NORM, x=x, weight=weight, out=out, width=size, n=size, count=1, eps=eps)


def norm_heads_(x_TO: Tensor, first: int, heads: int, weight_H: Tensor, eps: float) -> bool:
    """RMSNorm of some heads of (T, heads x H), each by itself, in place; False, and nothing done: torch is to do it."""
    library = _library(x_TO, weight_H)
    if library is None or (first + heads) * len(weight_H) > x_TO.shape[1]:
        return False
    op, work = _norm_heads(x_TO, first, heads, weight_H, eps), x_TO.shape[0] * heads * len(weight_H)
    _run(library, op, x_TO.shape[0], x_TO.dtype, alone=work <= 32768)
    return True


def _norm_heads(x_TO: Tensor, first: int, heads: int, weight_H: Tensor, eps: float) -> Op:
    size, weight = len(weight_H), weight_H.data_ptr()
    x = x_TO.data_ptr() + first * size * x_TO.element_size()
    return Op(kind=_NORM, x=x, out=x, weight=weight, width=x_TO.shape[1], n=size, count=heads, eps=eps)


def first_largest(x_RV: Tensor) -> tuple[Tensor, Tensor] | None:
    """The largest value of each row, in float32, and the first place where it stands; None: torch is to do it."""
    library = _library(x_RV)
    if library is None or x_RV.dim() != 2 or not x_RV.shape[1]:
        return None
    (rows, size), kind = x_RV.shape, torch.float32
    values, places = x_RV.new_empty(rows, dtype=kind), x_RV.new_empty(rows, dtype=torch.int64)
    op = Op(kind=_LARGEST, x=x_RV.data_ptr(), out=values.data_ptr(), more=places.data_ptr(), width=size, n=size)
    _run(library, op, rows, x_RV.dtype, alone=x_RV.numel() <= 65536)
    return values, places


def rotate_(x_TO: Tensor, heads: int, cos_TH: Tensor, sin_TH: Tensor) -> bool:
    """Rotate the first heads of (T, heads and more x H) in place; False, and nothing done, where torch is to do it."""
    library = _library(x_TO)
    if library is None or _library(cos_TH, sin_TH) is None or cos_TH.dtype != torch.float32:
        return False
    (rows, width), half_size = x_TO.shape, cos_TH.shape[1]
    if cos_TH.shape != (rows, half_size) or sin_TH.shape != cos_TH.shape or 2 * heads * half_size > width:
        return False
    _run(library, _rotate(x_TO, heads, cos_TH, sin_TH), rows, x_TO.dtype, alone=rows * heads * half_size <= 16384)
    return True


def _rotate(x_TO: Tensor, heads: int, cos_TH: Tensor, sin_TH: Tensor) -> Op:
    cos, sin, out = cos_TH.data_ptr(), sin_TH.data_ptr(), x_TO.data_ptr()
    return Op(kind=_ROTATE, x=cos, more=sin, out=out, width=x_TO.shape[1], n=cos_TH.shape[1], count=heads)


def swiglu_rows(gate_up_TF: Tensor) -> Tensor | None:
    """(T, 2F) to (T, F); None where the torch form is to do it."""
    library = _library(gate_up_TF)
    size = gate_up_TF.shape[-1] // 2
    if library is None or gate_up_TF.shape[-1] % 2 or not size:
        return None
    out = gate_up_TF.new_empty(*gate_up_TF.shape[:-1], size)
    _run(library, _swiglu(gate_up_TF, out), out.numel() // size, out.dtype, alone=out.numel() <= 8192)
    return out


def _swiglu(gate_up_TF: Tensor, out_TF: Tensor) -> Op:
    size = out_TF.shape[-1]
    return Op(kind=_SWIGLU, x=gate_up_TF.data_ptr(), out=out_TF.data_ptr(), width=2 * size, n=size)


@dataclass(frozen=True, slots=True)
class Panels:
    """A weight (out, in) as panels of some columns of its transpose, each of which one thread reads from end to end.

    Args:
        data: (panels, steps, columns, values a step): a step is one input in float32, two in bfloat16; padded with 0.
    """

    data: Tensor
    out: int
    in_: int


def panels(weight_OI: Tensor) -> Panels | None:
    """The weight for :func:`panels_product`; None where that cannot be had, or where oneDNN is likely to be faster."""
    if weight_OI.device.type != "cpu" or weight_OI.dtype not in _DTYPES or not weight_OI.numel():
        return None
    pair = 2 if weight_OI.dtype == torch.bfloat16 else 1
    library = kernels()
    columns = library.inference_panel(pair == 2) if library is not None else 0
    if not columns:
        return None
    out, in_ = weight_OI.shape
    whole = pad(weight_OI.detach(), (0, -in_ % pair, 0, -out % columns))
    data = whole.view(-1, columns, (in_ + pair - 1) // pair, pair).transpose(1, 2).contiguous()
    return Panels(data, out, in_)


def panels_product(x_TI: Tensor, weight: Panels, bias_O: Tensor | None = None) -> Tensor:
    """``x W^T + b``, (T, out); a row's bits depend neither on how many rows there are nor on the threads.

    Raises:
        ValueError: the inputs or the bias have another size or precision than the weight.
    """
    dtype = weight.data.dtype
    for given, size in ((x_TI, weight.in_), (bias_O, weight.out)):
        if given is not None and (given.shape[-1] != size or given.dtype != dtype or given.device.type != "cpu"):
            raise ValueError(f"{tuple(given.shape)} in {given.dtype} does not fit a weight of {size} in {dtype}")
    _, steps, _, pair = weight.data.shape
    x = (pad(x_TI, (0, 1)) if steps * pair > weight.in_ else x_TI).contiguous()
    bias = bias_O.contiguous() if bias_O is not None else None
    out = x.new_empty(*x.shape[:-1], weight.out)
    library = kernels()
    assert library is not None
    _run(library, _product(x, weight, bias, out), out.numel() // weight.out, dtype)
    return out


def _product(x_TI: Tensor, weight: Panels, bias_O: Tensor | None, out_TO: Tensor, add: bool = False) -> Op:
    places = {"x": x_TI.data_ptr(), "weight": weight.data.data_ptr(), "out": out_TO.data_ptr()}
    more = None if bias_O is None else bias_O.data_ptr()
    return Op(kind=_PRODUCT, **places, more=more, width=weight.out, n=weight.data.shape[1], count=add)


class Program:
    """Ops one after the other, on memory of their own, for any number of rows up to some: one call does them all.

    They have the bits of the functions above. A program is for one thread at a time. It holds on to the memory that it
    was given, so a parameter whose data is replaced afterwards has to be given again.

    Args:
        dtype: of all values.
        rows: the most that there may be.

    Raises:
        ConfigError: the C file cannot be had here, or does not compute in this precision.
    """

    def __init__(self, dtype: torch.dtype, rows: int) -> None:
        library = kernels()
        if library is None or dtype not in _DTYPES:
            raise ConfigError(f"no compiled kernels of inference in {dtype}")
        self.dtype, self.rows, self._library = dtype, rows, library
        self._scratch: dict[int, Tensor] = {}
        self._ops: list[Op] = []
        self._kept: list[object] = []
        self._array: ctypes.Array[Op] | None = None

    def memory(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """(rows, width), for ops to read and write."""
        return torch.empty(self.rows, width, dtype=self.dtype if dtype is None else dtype)

    def _add(self, op: Op, *kept: object) -> None:
        self._ops.append(op)
        self._kept += [one.detach() if isinstance(one, Tensor) else one for one in kept]
        self._array = None

    def norm(self, x_TD: Tensor, weight_D: Tensor, out_TD: Tensor, eps: float) -> None:
        """RMSNorm."""
        self._add(_norm(x_TD, weight_D, out_TD, eps), x_TD, weight_D, out_TD)

    def norm_heads(self, x_TO: Tensor, first: int, heads: int, weight_H: Tensor, eps: float) -> None:
        """RMSNorm of some heads, each by itself, in place."""
        self._add(_norm_heads(x_TO, first, heads, weight_H, eps), x_TO, weight_H)

    def rotate(self, x_TO: Tensor, heads: int, cos_TH: Tensor, sin_TH: Tensor) -> None:
        """Rotate the first heads in place; cos and sin in float32."""
        self._add(_rotate(x_TO, heads, cos_TH, sin_TH), x_TO, cos_TH, sin_TH)

    def swiglu(self, gate_up_TF: Tensor, out_TF: Tensor) -> None:
        """(T, 2F) to (T, F)."""
        self._add(_swiglu(gate_up_TF, out_TF), gate_up_TF, out_TF)

    def product(
        self, x_TI: Tensor, weight: Panels, out_TO: Tensor, bias_O: Tensor | None = None, *, add: bool = False
    ) -> None:
        """``x W^T + b``, which becomes ``out`` or is added to it.

        Raises:
            ConfigError: in bfloat16 an odd number of inputs would have to be padded.
            ValueError: something has another size or precision than the weight.
        """
        self._check(x_TI, weight, out_TO, weight.out)
        if bias_O is not None and (bias_O.shape != (weight.out,) or bias_O.dtype != self.dtype):
            raise ValueError(f"a bias {tuple(bias_O.shape)} in {bias_O.dtype} for {weight.out} in {self.dtype}")
        self._add(_product(x_TI, weight, bias_O, out_TO, add), x_TI, weight, out_TO, bias_O)

    def _check(self, x_TI: Tensor, weight: Panels, out_TO: Tensor, out: int) -> None:
        """Raise what :meth:`product` raises."""
        if weight.data.shape[1] * weight.data.shape[3] != weight.in_:
            raise ConfigError(f"a product of {weight.in_} inputs in {self.dtype} needs padding")
        for given, size in ((x_TI, weight.in_), (out_TO, out)):
            if given.shape[1] != size or len(given) < self.rows or not given.is_contiguous():
                raise ValueError(f"{tuple(given.shape)} does not fit {self.rows} rows of {size}")
        if not x_TI.dtype == out_TO.dtype == weight.data.dtype == self.dtype:
            raise ValueError(f"{x_TI.dtype}, {weight.data.dtype} and {out_TO.dtype} in a program in {self.dtype}")

    def gated(self, x_TI: Tensor, weight: Panels, out_TF: Tensor) -> None:
        """:meth:`product` with a weight of gates (F, in) before ups (F, in), and :meth:`swiglu`, as one.

        Raises:
            ConfigError, ValueError: as there.
        """
        columns, size = weight.data.shape[2], weight.out // 2
        self._check(x_TI, weight, out_TF, size)
        if size % columns:
            if weight.out not in self._scratch:
                self._scratch[weight.out] = self.memory(weight.out)
            self.product(x_TI, weight, self._scratch[weight.out])
            self.swiglu(self._scratch[weight.out], out_TF)
        else:
            op = _product(x_TI, weight, None, out_TF)
            op.kind, op.width = _GATED, size
            self._add(op, x_TI, weight, out_TF)

    def embed(self, rows_T: Tensor, table_VD: Tensor, out_TD: Tensor) -> None:
        """Rows of a table by their numbers, int64; where there is no such row, ``out`` is left as it was."""
        places = {"x": rows_T.data_ptr(), "weight": table_VD.data_ptr(), "out": out_TD.data_ptr()}
        count, size = table_VD.shape
        self._add(Op(kind=_EMBED, **places, width=size, n=size, count=count), rows_T, table_VD, out_TD)

    def call(self, function: object, argument: ctypes.Structure) -> None:
        """``int function(argument)`` of another C library; anything but 0 ends the run."""
        address = ctypes.cast(function, ctypes.c_void_p).value  # pyright: ignore[reportArgumentType]
        self._add(Op(kind=_CALL, x=ctypes.addressof(argument), call=address), function, argument)

    def run(self, rows: int) -> int:
        """Do everything with the first ``rows`` rows; 0, or what a call returned.

        Raises:
            ValueError: there are not so many rows.
        """
        if not 0 <= rows <= self.rows:
            raise ValueError(f"{rows} rows of {self.rows}")
        if self._array is None:
            self._array = (Op * len(self._ops))(*self._ops)
        half, threads = self.dtype == torch.bfloat16, torch.get_num_threads()
        return self._library.inference_run(self._array, len(self._ops), rows, half, threads)
