"""Matrix products of linear layers."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from parallel.kernels.inference import Panels, panels, panels_product
from parallel.native import thread_limit

__all__ = ["linear_product", "pack", "packed_product"]

# In float32 torch multiplies with MKL, which on many CPUs does not use the widest vectors; oneDNN does. The operator is
# the one that torch's own compiler emits; where it is missing, nothing is lost but time.
_onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_most_threads = thread_limit() or sys.maxsize
"""With fewer than torch's own, oneDNN's products are wrong."""


def linear_product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x W^T + b``, (T, out)."""
    single = x_TI.dtype == torch.float32 and x_TI.device.type == "cpu"
    if _onednn is not None and single and x_TI.shape[0] > 1 and torch.get_num_threads() <= _most_threads:
        return _onednn(x_TI, weight_OI, bias_O, "none", [], "")
    return linear(x_TI, weight_OI, bias_O)


_pack: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None) if _onednn is not None else None


def pack(weight_OI: Tensor, rows: int = 32) -> Tensor | Panels | None:
    """The weight in the order in which it is multiplied, for :func:`packed_product`; None where there is no such.

    Args:
        rows: of the inputs for which the order is best, where it is oneDNN's.
    """
    if (ours := panels(weight_OI)) is not None:
        return ours
    if _pack is None or weight_OI.device.type != "cpu" or weight_OI.dtype not in (torch.float32, torch.bfloat16):
        return None
    if torch.get_num_threads() > _most_threads:
        return None
    if weight_OI.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return _pack(weight_OI.detach().contiguous(), rows)


def packed_product(x_TI: Tensor, packed: Tensor | Panels, bias_O: Tensor | None = None) -> Tensor:
    """``x W^T + b``, (T, out), without putting the weight in order first, which costs as much as some ten rows."""
    if isinstance(packed, Panels):
        return panels_product(x_TI, packed, bias_O)
    return _onednn(x_TI, packed, bias_O, "none", [], "")
