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
from parallel.pp.partition import Cut, partition
from parallel.shard import Shard, allocate, initialize
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

    It holds no phase and no cache: what it attends to is the attention core's affair. As a part of a pipeline it holds
    the blocks and ends of its stages (``build.cuts``) under the names that they have in the whole model; what is absent
    lets the residual stream pass.
    """

    def __init__(self, config: DecoderConfig, build: Build) -> None:
        super().__init__()
        self.config, self.deferral = config, build.deferral
        self.cuts = partition(config.layers, 1) if build.cuts is None else build.cuts
        axis, options = build.mesh.tp, {"dtype": build.dtype, "device": "meta", "std": config.std}
        sequence = self.sequence_parallel = build.sequence_parallel
        first, last = any(cut.first for cut in self.cuts), any(cut.last for cut in self.cuts)
        self.embedding = self.positions = self.norm = self.head = None
        if first or (last and config.tied):
            self.embedding = VocabParallelEmbedding(
                config.vocabulary, config.hidden, axis, sequence_parallel=sequence, **options
            )
        if first and config.positions == "learned":
            self.positions = LearnedPositions(config, build)
        self.embedding_dropout = Dropout("embedding", config.embedding_dropout, build)
        held = sorted(layer for cut in self.cuts for layer in cut.layers)
        self.layers = nn.ModuleDict({str(layer): Block(config, build, layer) for layer in held})
        if last:
            self.norm = norm(config, build)
            self.head = ParallelLMHead(
                config.vocabulary,
                config.hidden,
                axis,
                sequence_parallel=sequence,
                method=build.linear("head"),
                deferral=build.deferral,
                **options,
            )
        self.tie()

    def tie(self) -> None:
        """Make head and embedding one parameter, where the family does."""
        if self.config.tied and self.head is not None and self.embedding is not None:
            self.head.weight = self.embedding.weight

    def hidden(self, batch: Batch, x_TD: Tensor | None = None, cut: Cut | None = None) -> Tensor:
        """The residual stream (T, D) behind one stage, or behind all; behind the last it is normed.

        There it has the rows ``batch.wanted_R`` alone, if some are wanted and tokens are not cut over tp.

        Args:
            batch: the same on every stage.
            x_TD: what the stage before gave; None on the first. Under sequence parallelism, as the result, this rank's
                piece of the tokens.
            cut: the stage; None: all that this rank holds.
        """
        stream = self._embedded(batch) if x_TD is None else x_TD
        blocks = [self.layers[str(layer)] for layer in cut.layers] if cut is not None else self.layers.values()
        turns = angles(self.config, batch) if self.config.positions == "rotary" and blocks else None
        last = self.norm is not None and (cut is None or cut.last)
        wanted_R = batch.wanted_R if last and not self.sequence_parallel else None
        if wanted_R is not None and not blocks:
            stream = stream[wanted_R]
        for place, block in enumerate(blocks, 1 - len(blocks)):
            stream = block(stream, batch, turns, None if place else wanted_R)
        return self.norm(stream) if self.norm is not None and last else stream

    def _embedded(self, batch: Batch) -> Tensor:
        assert self.embedding is not None, "the first stage is elsewhere: give x_TD"
        x_TD = self.embedding(batch.tokens_T)
        if self.positions is not None:
            x_TD = x_TD + self.positions(batch.positions_T)
        return self.embedding_dropout(x_TD, batch)

    def forward(self, batch: Batch, x_TD: Tensor | None = None, cut: Cut | None = None) -> Tensor:
        """The logits of every token (T, V), or of those wanted (R, V), whole on every rank.

        Arguments as for :meth:`hidden`.
        """
        assert self.head is not None, "the last stage is elsewhere"
        rows_R = batch.wanted_R if self.sequence_parallel else None
        return self.head(self.hidden(batch, x_TD, cut), len(batch), rows_R)

    def loss(self, batch: Batch, x_TD: Tensor | None = None, cut: Cut | None = None, **options: Any) -> LossSum:
        """The loss summed over the tokens of the batch.

        Arguments as for :meth:`hidden`; options as for :func:`~parallel.tp.loss.vocab_parallel_linear_cross_entropy`.
        """
        assert self.head is not None, "the last stage is elsewhere"
        assert batch.labels_T is not None, "a loss needs Batch.labels_T"
        return self.head(self.hidden(batch, x_TD, cut), labels_T=batch.labels_T, **options)

    def stage_parameters(self, cut: Cut) -> list[nn.Parameter]:
        """The parameters that a stage uses."""
        modules: list[nn.Module | None] = [self.layers[str(layer)] for layer in cut.layers]
        modules += [self.embedding, self.positions] if cut.first else []
        modules += [self.norm, self.head] if cut.last else []
        return list(dict.fromkeys(p for module in modules if module is not None for p in module.parameters()))


def empty_model(config: DecoderConfig, build: Build) -> Decoder:
    """The model with memory for its parameters, which hold nothing yet.

    Raises:
        ConfigError: the model cannot be, or the layout cannot share it.
    """
    refuse(ConfigError, [*config.problems(), *config.layout_problems(build.mesh.tp.size)])
    model = allocate(Decoder(config.resolved(), build), build.mesh.device)
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
