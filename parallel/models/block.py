"""One block of a decoder: attention and MLP, each behind a norm and added to the residual."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel import rng
from parallel.kernels.dropout import dropout
from parallel.kernels.rotary import rotary, rotary_
from parallel.kernels.swiglu import swiglu
from parallel.models.batch import Batch
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.norm import LayerNorm, RMSNorm
from parallel.models.rope import Angles
from parallel.sp import local_tokens
from parallel.tp import ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

__all__ = ["MLP", "Attention", "Block", "Dropout", "norm"]


def norm(config: DecoderConfig, build: Build) -> RMSNorm | LayerNorm:
    """The family's norm over the residual stream."""
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(config.hidden, config.norm_eps, build.partial, build.dtype, "meta")


class Dropout(nn.Module):
    """Dropout of this rank's tokens, keyed by their global indices.

    Args:
        name: of the place in the model.
        drop: probability.
        build: gives the seed, and how tokens are cut.
    """

    def __init__(self, name: str, drop: float, build: Build) -> None:
        super().__init__()
        self.name, self.drop, self.seed = name, drop, build.seed
        self.axis = build.mesh.tp if build.sequence_parallel else None

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        """(T, D) of our tokens; the identity in evaluation."""
        if not (self.training and self.drop):
            return x_TD
        assert batch.index_T is not None, "dropout needs Batch.index_T"
        index_T = batch.index_T if self.axis is None else local_tokens(batch.index_T, self.axis)
        return dropout(x_TD, self.drop, index_T, rng.key(self.seed, batch.key, self.name))


class Attention(nn.Module):
    """Projections around an attention core."""

    def __init__(self, config: DecoderConfig, build: Build, name: str, layer: int) -> None:
        super().__init__()
        axis, size = build.mesh.tp, config.head_size
        self.qkv = QKVParallelLinear(
            config.hidden,
            size,
            config.heads,
            config.kv_heads,
            axis,
            bias=config.qkv_bias,
            std=config.std,
            **build.linear_options(f"{name}.qkv"),
        )
        self.out = RowParallelLinear(
            config.heads * size,
            config.hidden,
            axis,
            bias=config.out_bias,
            unit=size,
            std=config.std / (2 * config.layers) ** 0.5,
            **build.linear_options(f"{name}.out"),
        )
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            # Each rank norms its own heads only, so these gradients are partial whether or not tokens are cut.
            self.q_norm = RMSNorm(size, config.norm_eps, ("tp",), build.dtype, "meta")
            self.k_norm = RMSNorm(size, config.norm_eps, ("tp",), build.dtype, "meta")
        self.core = build.attention(config, layer, build)
        self.recompute = build.recompute == "selective"

    def forward(self, x_TD: Tensor, batch: Batch, angles: Angles | None, wanted_R: Tensor | None = None) -> Tensor:
        """(T, D) -> (T, D), our tokens of each; (R, D) if only some are wanted."""
        qkv, heads, kv_heads = self.qkv(x_TD, len(batch)), self.qkv.local_heads, self.qkv.local_kv_heads
        normed = True
        if self.q_norm is not None and self.k_norm is not None:
            normed = self.q_norm.heads_(qkv, 0, heads) and self.k_norm.heads_(qkv, heads, kv_heads)
        if angles is not None and normed:
            qkv = rotary_(qkv, heads + kv_heads, *angles)
        q, k, v = self.qkv.split_heads(qkv)
        if self.q_norm is not None and self.k_norm is not None and not normed:
            q, k = self.q_norm(q), self.k_norm(k)
            if angles is not None:
                q, k = rotary(q, *angles), rotary(k, *angles)
        if self.recompute and self.training:
            out = _recomputed(self.core, q, k, v, batch, self.training)
        else:
            out = self.core(q, k, v, batch, self.training)
        return self.out(out.flatten(1) if wanted_R is None else out.flatten(1)[wanted_R])


class MLP(nn.Module):
    """Two or three projections around an activation."""

    def __init__(self, config: DecoderConfig, build: Build, name: str) -> None:
        super().__init__()
        axis, inner = build.mesh.tp, config.feed_forward
        self.gated = config.gated
        if config.gated:
            options = build.linear_options(f"{name}.gate_up")
            self.gate_up = MergedColumnParallelLinear(
                config.hidden,
                [inner, inner],
                axis,
                names=["gate", "up"],
                bias=config.mlp_bias,
                std=config.std,
                **options,
            )
        else:
            options = build.linear_options(f"{name}.up")
            self.up = ColumnParallelLinear(config.hidden, inner, axis, bias=config.mlp_bias, std=config.std, **options)
        self.down = RowParallelLinear(
            inner,
            config.hidden,
            axis,
            bias=config.mlp_bias,
            std=config.std / (2 * config.layers) ** 0.5,
            **build.linear_options(f"{name}.down"),
        )
        self.activation = _activation(config.activation)
        self.swiglu = config.gated and config.activation == "silu"

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        """(T, D) -> (T, D), our tokens of each."""
        if self.swiglu:
            return self.down(swiglu(self.gate_up(x_TD, len(batch))))
        if self.gated:
            gate, up = self.gate_up(x_TD, len(batch)).chunk(2, dim=-1)
            return self.down(self.activation(gate) * up)
        return self.down(self.activation(self.up(x_TD, len(batch))))


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name == "silu":
        return nn.functional.silu
    approximate = "tanh" if name == "gelu_tanh" else "none"
    return lambda x: nn.functional.gelu(x, approximate=approximate)


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: DecoderConfig, build: Build, layer: int) -> None:
        super().__init__()
        name = f"layers.{layer}"
        self.attention_norm = norm(config, build)
        self.attention = Attention(config, build, f"{name}.attention", layer)
        self.mlp_norm = norm(config, build)
        self.mlp = MLP(config, build, f"{name}.mlp")
        self.attention_dropout = Dropout(f"{name}.attention", config.residual_dropout, build)
        self.mlp_dropout = Dropout(f"{name}.mlp", config.residual_dropout, build)
        self.recompute = build.recompute == "full"

    def forward(self, x_TD: Tensor, batch: Batch, angles: Angles | None, wanted_R: Tensor | None = None) -> Tensor:
        """(T, D) -> (T, D), our tokens of each; (R, D) if only some are wanted, which needs all tokens here."""
        if self.recompute and self.training:
            return _recomputed(self._forward, x_TD, batch, angles, wanted_R)
        return self._forward(x_TD, batch, angles, wanted_R)

    def _forward(self, x_TD: Tensor, batch: Batch, angles: Angles | None, wanted_R: Tensor | None) -> Tensor:
        added = self.attention(self.attention_norm(x_TD), batch, angles, wanted_R)
        if wanted_R is not None:
            x_TD = x_TD[wanted_R]
        x_TD = x_TD + self.attention_dropout(added, batch)
        return x_TD + self.mlp_dropout(self.mlp(self.mlp_norm(x_TD), batch), batch)


def _recomputed(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """``function(*arguments)``, formed again in backward; dropout draws the same numbers without saved state."""
    result = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result
