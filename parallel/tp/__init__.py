"""Tensor parallelism: linear layers, embedding and loss cut over one axis."""

from parallel.tp.embedding import ParallelLMHead, VocabParallelEmbedding
from parallel.tp.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from parallel.tp.loss import LossSum, vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from parallel.tp.method import Dense, LinearMethod

__all__ = [
    "ColumnParallelLinear",
    "Dense",
    "LinearMethod",
    "LossSum",
    "MergedColumnParallelLinear",
    "ParallelLMHead",
    "QKVParallelLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
