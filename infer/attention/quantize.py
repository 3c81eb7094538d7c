"""Keys and values in int8 and fp8: each row of a head is stored as multiples of a scale of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from infer.attention import Pages

__all__ = ["LARGEST", "dequantize", "history", "quantize", "write"]

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""What the largest magnitude of a row becomes."""


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(..., H) as multiples of (...) scales.

    The error of an element is at most the row's largest magnitude times 1/254 in int8. In fp8 (e4m3) it is at most 1/16
    of the element, or 1/458,752 of the row's largest magnitude where that is more.

    Args:
        x: rows, any float type.
        dtype: int8 or float8_e4m3fn.

    Returns:
        the multiples, and float32 scales.
    """
    rows = x.float()
    scale = rows.abs().amax(-1) / LARGEST[dtype]
    rows = rows / torch.where(scale > 0, scale, 1.0)[..., None]
    return (rows.round() if dtype == torch.int8 else rows).to(dtype), scale


def dequantize(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(..., H) in ``dtype``; ``scale`` None: the values are what they stand for."""
    return values.to(dtype) if scale is None else values.to(dtype) * scale[..., None].to(dtype)


def write(pages: Pages, k_TKH: Tensor, v_TKH: Tensor, slots_T: Tensor) -> None:
    """Put new keys and values into their slots.

    Raises:
        IndexError: a slot is outside the pages.
    """
    count, _, size, _ = pages.k_PKSH.shape
    if slots_T.device.type == "cpu" and bool(((slots_T < 0) | (slots_T >= count * size)).any()):
        raise IndexError(f"a slot names a page outside 0 to {count - 1}")
    page_T, place_T = slots_T // size, slots_T % size
    sides = ((k_TKH, pages.k_PKSH, pages.k_scale_PKS), (v_TKH, pages.v_PKSH, pages.v_scale_PKS))
    for fresh, held, scales in sides:
        if scales is None:
            held[page_T, :, place_T] = fresh
        else:
            values, scale = quantize(fresh, held.dtype)
            held.view(torch.uint8)[page_T, :, place_T] = values.view(torch.uint8)  # fp8 cannot be indexed
            scales[page_T, :, place_T] = scale


def history(pages: Pages, table_P: Tensor, low: int, high: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of tokens ``low`` to ``high`` of one request, each (tokens, K, H).

    Args:
        pages: of a layer.
        table_P: the request's.
        low, high: positions.
        dtype: that they shall have.

    Raises:
        IndexError: the table names a page that there is not.
    """
    count, _, size, _ = pages.k_PKSH.shape
    first = low // size
    chosen = table_P[first : -(-high // size)].long()
    if bool(((chosen < 0) | (chosen >= count)).any()):
        raise IndexError(f"a page table names a page outside 0 to {count - 1}")
    tokens = slice(low - first * size, high - first * size)

    def side(values: Tensor, scales: Tensor | None) -> Tensor:
        picked = values[chosen] if scales is None else values.view(torch.uint8)[chosen].view(values.dtype)
        whole = dequantize(picked, None if scales is None else scales[chosen], dtype)
        return whole.transpose(1, 2).flatten(0, 1)[tokens]

    return side(pages.k_PKSH, pages.k_scale_PKS), side(pages.v_PKSH, pages.v_scale_PKS)
