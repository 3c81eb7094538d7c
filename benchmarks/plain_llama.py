"""A plain Llama in torch, as one would write it without us, and its published tensor-parallel recipe.

The parameters bear the names of a Hugging Face folder. The recipe is that of the torch tutorial "Large Scale
Transformer model training with Tensor Parallel" and of torchtitan: DTensor plans with sequence parallelism and
``loss_parallel``. :class:`Stage` is a part of the model, as ``torch.distributed.pipelining`` wants it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional

from parallel.models.config import DecoderConfig
from parallel.pp import Cut

__all__ = ["PlainLlama", "Stage", "load_plain", "parallelize"]


class Attention(nn.Module):
    """Grouped-query attention by torch's fused kernel."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.size = config.head_size
        self.q_proj = nn.Linear(config.hidden, config.heads * self.size, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(config.heads * self.size, config.hidden, bias=False)

    def forward(self, x_BSD: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D); the number of heads follows from what the projections return."""
        q, k, v = (
            project(x_BSD).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, cos_SH, sin_SH), _rotate(k, cos_SH, sin_SH)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos_SH.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin_SH.to(x.dtype)


class MLP(nn.Module):
    """The gated MLP."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.down_proj = nn.Linear(config.feed_forward, config.hidden, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.down_proj(functional.silu(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BSD: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), cos_SH, sin_SH)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class PlainLlama(nn.Module):
    """Embedding, blocks, norm, untied head."""

    cos_SH: Tensor
    sin_SH: Tensor

    def __init__(self, config: DecoderConfig, length: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        frequency_H = config.rope.theta ** (-torch.arange(0, config.head_size, 2) / config.head_size)
        angle_SH = torch.outer(torch.arange(length).float(), frequency_H).repeat(1, 2)
        self.register_buffer("cos_SH", angle_SH.cos(), persistent=False)
        self.register_buffer("sin_SH", angle_SH.sin(), persistent=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """(B, S) -> logits (B, S, V)."""
        x_BSD = self.embed_tokens(tokens_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, self.cos_SH, self.sin_SH)
        return self.lm_head(self.norm(x_BSD))


class Stage(nn.Module):
    """One pipeline stage of the model, which keeps only its own parameters alive."""

    cos_SH: Tensor
    sin_SH: Tensor

    def __init__(self, model: PlainLlama, cut: Cut) -> None:
        super().__init__()
        self.embed_tokens = model.embed_tokens if cut.first else None
        self.layers = nn.ModuleList([model.layers[layer] for layer in cut.layers])
        self.norm, self.lm_head = (model.norm, model.lm_head) if cut.last else (None, None)
        self.register_buffer("cos_SH", model.cos_SH, persistent=False)
        self.register_buffer("sin_SH", model.sin_SH, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, S) on the first stage, else (B, S, D); returns logits (B, S, V) on the last, else (B, S, D)."""
        x = x if self.embed_tokens is None else self.embed_tokens(x)
        for layer in self.layers:
            x = layer(x, self.cos_SH, self.sin_SH)
        return x if self.norm is None or self.lm_head is None else self.lm_head(self.norm(x))


def load_plain(config: DecoderConfig, folder: Path, length: int, dtype: torch.dtype) -> PlainLlama:
    """The model with the weights of a Hugging Face folder."""
    model = PlainLlama(config, length)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    return model.to(dtype)


def parallelize(model: PlainLlama, mesh: DeviceMesh) -> None:
    """Cut the model over ``mesh`` in place; outside attention and MLP each rank has a piece of the sequence."""
    whole, cut = Replicate(), Shard(1)
    parallelize_module(
        model,
        mesh,
        {
            "embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=cut),
            "norm": SequenceParallel(),
            "lm_head": ColwiseParallel(input_layouts=cut, output_layouts=Shard(-1), use_local_output=False),
        },
    )
    for block in model.layers:
        parallelize_module(
            block,
            mesh,
            {
                "input_layernorm": SequenceParallel(),
                "self_attn": PrepareModuleInput(
                    input_layouts=(cut, None, None), desired_input_layouts=(whole, None, None)
                ),
                "self_attn.q_proj": ColwiseParallel(),
                "self_attn.k_proj": ColwiseParallel(),
                "self_attn.v_proj": ColwiseParallel(),
                "self_attn.o_proj": RowwiseParallel(output_layouts=cut),
                "post_attention_layernorm": SequenceParallel(),
                "mlp": PrepareModuleInput(input_layouts=(cut,), desired_input_layouts=(whole,)),
                "mlp.gate_proj": ColwiseParallel(),
                "mlp.up_proj": ColwiseParallel(),
                "mlp.down_proj": RowwiseParallel(output_layouts=cut),
            },
        )
