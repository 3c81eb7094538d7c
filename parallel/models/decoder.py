"""The decoder: one definition for every family, for training and for serving."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parallel.errors import ConfigError, refuse
from parallel.models.batch import Batch
from parallel.models.block import Block, Dropout, norm
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.rope import angles
from parallel.shard import Shard, initialize
from parallel.sp import local_tokens
from parallel.tp import LossSum, ParallelLMHead, VocabParallelEmbedding

__all__ = ["Decoder", "LearnedPositions", "build_model", "empty_model"]


class LearnedPositions(nn.Module):
    """A table of positions that is added to the embedding (GPT-2); whole on every rank."""

    def __init__(self, config: DecoderConfig, build: Build) -> None:
        super().__init__()
        self.size, self.hidden, self.std = config.max_positions, config.hidden, config.std
        self.axis = build.mesh.tp if build.sequence_parallel else None
        self.partial = build.partial
        self.weight = nn.Parameter(torch.empty(self.size, self.hidden, dtype=build.dtype, device="meta"))

    def shards(self) -> dict[str, Shard]:
        """``weight`` (positions, D), whole."""
        return {"weight": Shard(shape=(self.size, self.hidden), partial=self.partial, std=self.std)}

    def forward(self, positions_T: Tensor) -> Tensor:
        """(T) -> (T, D) of our tokens."""
        if self.axis is not None:
            positions_T = local_tokens(positions_T, self.axis)
        return nn.functional.embedding(positions_T, self.weight)


class Decoder(nn.Module):
    """A decoder-only transformer over packed tokens.

    It holds no phase and no cache: what it attends to is the attention core's affair.
    """

    def __init__(self, config: DecoderConfig, build: Build) -> None:
        super().__init__()
        self.config = config
        axis, options = build.mesh.tp, {"dtype": build.dtype, "device": "meta", "std": config.std}
        sequence = build.sequence_parallel
        self.embedding = VocabParallelEmbedding(
            config.vocabulary, config.hidden, axis, sequence_parallel=sequence, **options
        )
        self.positions = LearnedPositions(config, build) if config.positions == "learned" else None
        self.embedding_dropout = Dropout("embedding", config.embedding_dropout, build)
        self.layers = nn.ModuleDict({str(layer): Block(config, build, layer) for layer in range(config.layers)})
        self.norm = norm(config, build)
        self.head = ParallelLMHead(
            config.vocabulary,
            config.hidden,
            axis,
            sequence_parallel=sequence,
            method=build.linear("head"),
            **options,
        )
        self.tie()

    def tie(self) -> None:
        """Make head and embedding one parameter, where the family does."""
        if self.config.tied:
            self.head.weight = self.embedding.weight

    def hidden(self, batch: Batch) -> Tensor:
        """(T, D) after the last norm; under sequence parallelism this rank's piece of the tokens."""
        x_TD = self.embedding(batch.tokens_T)
        if self.positions is not None:
            x_TD = x_TD + self.positions(batch.positions_T)
        x_TD = self.embedding_dropout(x_TD, batch)
        turns = angles(self.config, batch) if self.config.positions == "rotary" else None
        for block in self.layers.values():
            x_TD = block(x_TD, batch, turns)
        return self.norm(x_TD)

    def forward(self, batch: Batch) -> Tensor:
        """The logits of every token (T, V), whole on every rank."""
        return self.head(self.hidden(batch), len(batch))

    def loss(self, batch: Batch, **options: Any) -> LossSum:
        """The loss summed over the tokens of the batch; options as for
        :func:`~parallel.tp.loss.vocab_parallel_linear_cross_entropy`."""
        assert batch.labels_T is not None, "a loss needs Batch.labels_T"
        return self.head.loss(self.hidden(batch), batch.labels_T, **options)


def empty_model(config: DecoderConfig, build: Build) -> Decoder:
    """The model with memory for its parameters, which hold nothing yet.

    Raises:
        ConfigError: the model cannot be, or the layout cannot share it.
    """
    refuse(ConfigError, [*config.problems(), *config.layout_problems(build.mesh.tp.size)])
    model = Decoder(config.resolved(), build).to_empty(device=build.mesh.device)
    model.tie()
    return model


def build_model(config: DecoderConfig, build: Build, seed: int = 0) -> Decoder:
    """The model with its initial weights: the same at every layout, bit for bit.

    Raises:
        ConfigError: the model cannot be, or the layout cannot share it.
    """
    model = empty_model(config, build)
    initialize(model, build.mesh.place, seed)
    return model
