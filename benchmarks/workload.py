"""The work of all benchmarks: one 32M-parameter Llama and one step of 2,048 random tokens in 8 documents."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from parallel.models.batch import IGNORE, Batch
from parallel.models.config import DecoderConfig

__all__ = ["CONFIG", "DTYPES", "WEIGHT_SEED", "batch", "config", "documents", "targets"]

CONFIG = DecoderConfig(
    vocabulary=8192, hidden=512, layers=8, heads=8, kv_heads=4, head_size=64, feed_forward=1408, norm_eps=1e-6
)
WEIGHT_SEED = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config(layers: int = CONFIG.layers) -> DecoderConfig:
    """The model, with another number of layers if asked for."""
    return replace(CONFIG, layers=layers)


def documents(count: int = 8, length: int = 256, seed: int = 0) -> Tensor:
    """(documents, length) random tokens, always the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG.vocabulary, (count, length), generator=generator)


def targets(tokens_BS: Tensor) -> Tensor:
    """The token after each; none after the last of a document."""
    return torch.cat([tokens_BS[:, 1:], torch.full_like(tokens_BS[:, :1], IGNORE)], dim=1)


def batch(tokens_BS: Tensor, first_index: int = 0) -> Batch:
    """The same documents as a packed batch."""
    return Batch.pack(list(tokens_BS), list(targets(tokens_BS)), first_index=first_index)
