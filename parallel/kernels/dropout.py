"""Dropout whose mask depends on global indices only."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel import rng

__all__ = ["dropout"]


def dropout(x_TD: Tensor, drop: float, index_T: Tensor, draw: int) -> Tensor:
    """Zero each feature with probability ``drop``, rescale the rest.

    Args:
        x_TD: activations.
        drop: probability; 0 returns ``x_TD`` itself.
        index_T: global index of each token.
        draw: :func:`parallel.rng.key` of the step and of the place in the model.
    """
    if drop == 0:
        return x_TD
    keep = rng.keep_mask(draw, index_T[:, None], torch.arange(x_TD.shape[1], device=x_TD.device), drop)
    return x_TD * keep * (1 / (1 - drop))
