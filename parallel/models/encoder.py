"""The encoder: one definition for the BERT families, of the parallel layers that the decoder is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel import rng
from parallel.errors import ConfigError, DataError, refuse
from parallel.kernels.bidirectional import bidirectional_attention, bidirectional_attention_reference
from parallel.models.batch import Batch
from parallel.models.block import MLP, Attention, Dropout, norm
from parallel.models.build import Build, PackedAttention
from parallel.models.config import DecoderConfig
from parallel.models.encoder_config import EncoderConfig
from parallel.shard import Shard, allocate, initialize
from parallel.sp import gather_tokens, local_tokens
from parallel.tp import VocabParallelEmbedding

__all__ = ["BidirectionalAttention", "Encoder", "build_encoder", "empty_encoder"]


class BidirectionalAttention:
    """The attention core of an encoder; arguments as for :class:`~parallel.models.build.PackedAttention`."""

    def __init__(self, config: DecoderConfig, layer: int, build: Build) -> None:
        self.drop = config.attention_dropout
        self.layer, self.seed = layer, build.seed
        self.first_head = build.mesh.tp.rank * (config.heads // build.mesh.tp.size)

    def __call__(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: Batch, training: bool) -> Tensor:
        if not (self.drop and training):
            return bidirectional_attention(q_TNH, k_TKH, v_TKH, batch.boundaries)
        assert batch.index_T is not None, "dropout needs Batch.index_T"
        heads = range(self.first_head, self.first_head + q_TNH.shape[1])
        draws = [rng.key(self.seed, batch.key, "attention", self.layer, head) for head in heads]
        row, column = batch.index_T[:, None], batch.positions_T
        keep_NTT = torch.stack([rng.keep_mask(draw, row, column, self.drop) for draw in draws])
        return bidirectional_attention_reference(q_TNH, k_TKH, v_TKH, batch.boundaries, keep_NTT, self.drop)


class Table(nn.Module):
    """A small table whose rows are added to the embedding (positions, token types); whole on every rank.

    Args:
        what: a row stands for, in messages.
        rows: that may be asked for.
        first: rows before those.
    """

    def __init__(self, what: str, rows: int, config: EncoderConfig, build: Build, first: int = 0) -> None:
        super().__init__()
        self.what, self.rows, self.first, self.std = what, rows, first, config.std
        self.axis = build.mesh.tp if build.sequence_parallel else None
        self.partial = build.partial
        self.weight = nn.Parameter(torch.empty(first + rows, config.hidden, dtype=build.dtype, device="meta"))

    def shards(self) -> dict[str, Shard]:
        """``weight`` (rows, D), whole."""
        return {"weight": Shard(shape=tuple(self.weight.shape), partial=self.partial, std=self.std)}

    def forward(self, index_T: Tensor) -> Tensor:
        """(T) -> (T, D) of our tokens.

        Raises:
            DataError: a row that is not there (checked where the indices are on the CPU).
        """
        if index_T.device.type == "cpu" and index_T.numel():
            low, high = (int(bound) for bound in index_T.aminmax())
            if low < 0 or high >= self.rows:
                raise DataError(f"{self.what} {low if low < 0 else high} is outside the {self.rows} of the model")
        if self.axis is not None:
            index_T = local_tokens(index_T, self.axis)
        return nn.functional.embedding(index_T + self.first, self.weight)


class EncoderBlock(nn.Module):
    """``x = norm(x + attention(x))``, then ``x = norm(x + mlp(x))`` (arXiv 1706.03762, section 3.1)."""

    def __init__(self, config: DecoderConfig, build: Build, layer: int) -> None:
        super().__init__()
        name = f"layers.{layer}"
        self.attention = Attention(config, build, f"{name}.attention", layer)
        self.attention_norm = norm(config, build)
        self.mlp = MLP(config, build, f"{name}.mlp")
        self.mlp_norm = norm(config, build)
        self.attention_dropout = Dropout(f"{name}.attention", config.residual_dropout, build)
        self.mlp_dropout = Dropout(f"{name}.mlp", config.residual_dropout, build)
        self.recompute = build.recompute == "full"

    def forward(self, x_TD: Tensor, batch: Batch, wanted_R: Tensor | None = None) -> Tensor:
        """(T, D) -> (T, D), our tokens of each; (R, D) if only some are wanted, which needs all tokens here."""
        if self.recompute and self.training:
            result = checkpoint(self._forward, x_TD, batch, wanted_R, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(result, Tensor)
            return result
        return self._forward(x_TD, batch, wanted_R)

    def _forward(self, x_TD: Tensor, batch: Batch, wanted_R: Tensor | None) -> Tensor:
        added = self.attention(x_TD, batch, None, wanted_R)
        if wanted_R is not None:
            x_TD = x_TD[wanted_R]
        x_TD = self.attention_norm(x_TD + self.attention_dropout(added, batch))
        return self.mlp_norm(x_TD + self.mlp_dropout(self.mlp(x_TD, batch), batch))


class Encoder(nn.Module):
    """A transformer encoder over packed tokens: every token attends to all tokens of its document.

    It gives hidden states; heads and poolers of folders are not part of it.
    """

    def __init__(self, config: EncoderConfig, build: Build) -> None:
        super().__init__()
        self.config = config
        self.sequence_parallel = build.sequence_parallel
        layers = config.shared().resolved()
        build = dataclasses.replace(build, attention=BidirectionalAttention)
        self.embedding = VocabParallelEmbedding(
            config.vocabulary,
            config.hidden,
            build.mesh.tp,
            sequence_parallel=self.sequence_parallel,
            std=config.std,
            dtype=build.dtype,
            device="meta",
        )
        self.positions = Table("position", config.max_positions, config, build, config.first_position)
        self.types = Table("token type", config.token_types, config, build)
        self.norm = norm(layers, build)
        self.embedding_dropout = Dropout("embedding", config.dropout, build)
        self.layers = nn.ModuleDict({str(layer): EncoderBlock(layers, build, layer) for layer in range(config.layers)})

    def hidden(self, batch: Batch, types_T: Tensor | None = None) -> Tensor:
        """The last hidden states (T, D); under sequence parallelism this rank's piece of the tokens.

        They have the rows ``batch.wanted_R`` alone, if some are wanted and tokens are not cut over tp.

        Args:
            batch: labels are not looked at.
            types_T: the type of each token; None: all are 0.

        Raises:
            DataError: a token id, position or type that the model does not have (checked on the CPU).
        """
        types_T = torch.zeros_like(batch.tokens_T) if types_T is None else types_T
        x_TD = self.embedding(batch.tokens_T) + self.positions(batch.positions_T) + self.types(types_T)
        x_TD = self.embedding_dropout(self.norm(x_TD), batch)
        wanted_R = None if self.sequence_parallel else batch.wanted_R
        for place, block in enumerate(self.layers.values(), 1 - len(self.layers)):
            x_TD = block(x_TD, batch, None if place else wanted_R)
        return x_TD

    def forward(self, batch: Batch, types_T: Tensor | None = None) -> Tensor:
        """The last hidden states of every token (T, D), or of those wanted (R, D), whole on every rank.

        What follows must be computed alike on every rank. Arguments as for :meth:`hidden`.
        """
        x_TD = self.hidden(batch, types_T)
        if not self.sequence_parallel:
            return x_TD
        x_TD = gather_tokens(x_TD, self.embedding.axis, len(batch), replicated=True)
        return x_TD if batch.wanted_R is None else x_TD[batch.wanted_R]


def _problems(config: EncoderConfig, build: Build) -> Iterator[str]:
    yield from config.problems()
    layout = build.mesh.layout
    for name, degree in (("pp", layout.pp), ("cp", layout.cp)):
        if degree > 1:
            yield f"layout.{name} = {degree}: an encoder is shared over tp and dp only"
    if build.cuts is not None:
        yield "Build.cuts: an encoder is not cut into stages"
    if build.attention is not PackedAttention:
        yield "Build.attention: an encoder has its own attention, and no cache"


def empty_encoder(config: EncoderConfig, build: Build) -> Encoder:
    """The model with memory for its parameters, which hold nothing yet.

    Raises:
        ConfigError: the model cannot be, or the layout or build cannot have it.
    """
    refuse(ConfigError, _problems(config, build))
    refuse(ConfigError, config.layout_problems(build.mesh.tp.size))
    return allocate(Encoder(config.resolved(), build), build.mesh.device)


def build_encoder(config: EncoderConfig, build: Build, seed: int = 0) -> Encoder:
    """The model with its initial weights: the same at every layout, bit for bit.

    Raises:
        ConfigError: the model cannot be, or the layout or build cannot have it.
    """
    model = empty_encoder(config, build)
    initialize(model, build.mesh.place, seed)
    return model
