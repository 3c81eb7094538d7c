"""Layers of a model where no gradient is recorded, by a small C file (``inference.c``): same row, same bits."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallel.native import CompileError, compiled

__all__ = ["Panels", "kernels", "norm", "panels", "panels_product", "rotate_", "swiglu_rows"]

_SOURCE = Path(__file__).with_name("inference.c")
_FLAGS = (("-march=native", "-fopenmp", "-ffp-contract=off"),)
_DTYPES = (torch.float32, torch.bfloat16)
_ARGUMENTS = {  # pointers, then whole numbers
    "inference_rotate": (3, 6),
    "inference_swiglu": (2, 4),
    "inference_product": (4, 5),
}


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The library; None where it cannot be compiled with torch's own threads: then the torch forms go on."""
    try:
        library = compiled(_SOURCE, _FLAGS)
    except CompileError:
        return None
    for name, (pointers, numbers) in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * numbers
        function.restype = None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.inference_norm.argtypes = [*[pointer] * 3, number, number, ctypes.c_float, number, number]
    library.inference_norm.restype = None
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


def norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor | None:
    """RMSNorm of the last dim; None where the torch form is to do it."""
    library = _library(x_TD, weight_D)
    size = x_TD.shape[-1]
    if library is None or weight_D.shape != (size,) or not size:
        return None
    out = torch.empty_like(x_TD)
    half, threads = x_TD.dtype == torch.bfloat16, torch.get_num_threads()
    places = x_TD.data_ptr(), weight_D.data_ptr(), out.data_ptr()
    library.inference_norm(*places, x_TD.numel() // size, size, eps, half, threads)
    return out


def rotate_(x_TO: Tensor, heads: int, cos_TH: Tensor, sin_TH: Tensor) -> bool:
    """Rotate the first heads of (T, heads and more x H) in place; False, and nothing done, where torch is to do it."""
    library = _library(x_TO)
    if library is None or _library(cos_TH, sin_TH) is None or cos_TH.dtype != torch.float32:
        return False
    (rows, width), half_size = x_TO.shape, cos_TH.shape[1]
    if cos_TH.shape != (rows, half_size) or sin_TH.shape != cos_TH.shape or 2 * heads * half_size > width:
        return False
    places = x_TO.data_ptr(), cos_TH.data_ptr(), sin_TH.data_ptr()
    half, threads = x_TO.dtype == torch.bfloat16, torch.get_num_threads()
    library.inference_rotate(*places, rows, width, heads, half_size, half, threads)
    return True


def swiglu_rows(gate_up_TF: Tensor) -> Tensor | None:
    """(T, 2F) to (T, F); None where the torch form is to do it."""
    library = _library(gate_up_TF)
    size = gate_up_TF.shape[-1] // 2
    if library is None or gate_up_TF.shape[-1] % 2 or not size:
        return None
    out = gate_up_TF.new_empty(*gate_up_TF.shape[:-1], size)
    half, threads = gate_up_TF.dtype == torch.bfloat16, torch.get_num_threads()
    library.inference_swiglu(gate_up_TF.data_ptr(), out.data_ptr(), out.numel() // size, size, half, threads)
    return out


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
    places = x.data_ptr(), weight.data.data_ptr(), bias.data_ptr() if bias is not None else None, out.data_ptr()
    numbers = out.numel() // weight.out, steps, weight.out, pair == 2, torch.get_num_threads()
    library.inference_product(*places, *numbers)
    return out
