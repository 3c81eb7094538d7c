"""Matrix products of linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["linear_product"]

# In float32 torch multiplies with MKL, which on many CPUs does not use the widest vectors; oneDNN does. The operator is
# the one that torch's own compiler emits; where it is missing, nothing is lost but time.
_onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear_product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x W^T + b``, (T, out)."""
    if _onednn is not None and x_TI.dtype == torch.float32 and x_TI.device.type == "cpu" and x_TI.shape[0] > 1:
        return _onednn(x_TI, weight_OI, bias_O, "none", [], "")
    return linear(x_TI, weight_OI, bias_O)
