"""Decoding steps on a CPU, lowered to one call of C: the kernels of the model's layers, without what lies between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infer.attention import Pages
from infer.attention.cpu import CpuAttention, Job, Place
from infer.batch import StepBatch
from infer.cache import PagedCore
from parallel.errors import ConfigError, DataError, refuse
from parallel.kernels.inference import Panels, Program
from parallel.models.block import Block
from parallel.models.decoder import Decoder
from parallel.models.norm import RMSNorm
from parallel.models.rope import KeptAngles
from parallel.tp.method import Packed

__all__ = ["Lowered"]


@dataclass(slots=True)
class _Attention:
    """Of one layer: what its kernel is told, and the pages that it was told of."""

    job: Job
    core: PagedCore
    pages: Pages | None = None

    def aim(self, places: Sequence[Place]) -> None:
        if self.pages is not self.core.pages:
            assert self.core.pages is not None, "allocate the cache first"
            self.job.point(self.core.pages)
            self.pages = self.core.pages
        self.job.at = places[self.core.group]


class Lowered:
    """Computes steps with the bits that the model gives.

    Args:
        model: whole on this rank, its weights packed.
        rows: most tokens of a step.
        wanted: most of them whose logits are wanted. Steps with more of either are the model's.

    Raises:
        ConfigError: the model has something for which there is no kernel, or they cannot be had; every reason.
    """

    def __init__(self, model: Decoder, rows: int, wanted: int) -> None:
        refuse(ConfigError, _problems(model))
        assert model.embedding is not None and model.norm is not None and model.head is not None
        config, table = model.config, model.embedding.weight.detach()
        self._vocabulary, self._angles = config.vocabulary, KeptAngles(config)
        self._all, self._some = Program(table.dtype, rows), Program(table.dtype, min(rows, wanted))
        self._attentions: list[_Attention] = []
        memory, some, size = self._all.memory, self._some.memory, config.head_size
        self._tokens, self._wanted = memory(1, torch.int64), some(1, torch.int64)
        self._turns = memory(size // 2, torch.float32), memory(size // 2, torch.float32)
        self._stream, self._normed = memory(config.hidden), memory(config.hidden)
        self._qkv, self._seen = memory((config.heads + 2 * config.kv_heads) * size), memory(config.heads * size)
        self._inner = memory(config.feed_forward)
        self._logits = some(config.vocabulary)
        self._all.embed(self._tokens, table, self._stream)
        *blocks, last = (block for block in model.layers.values() if isinstance(block, Block))
        for block in blocks:
            self._attend(block)
            self._pass_on(block, self._all, self._seen, self._stream)
        self._attend(last)
        seen, stream = some(config.heads * size), some(config.hidden)
        self._some.embed(self._wanted, self._seen, seen)
        self._some.embed(self._wanted, self._stream, stream)
        self._pass_on(last, self._some, seen, stream)
        self._norm(self._some, model.norm, stream)
        self._some.product(self._normed, _panels(model.head), self._logits)

    def _attend(self, block: Block) -> None:
        """From the stream to what its attention has seen."""
        program, qkv, core = self._all, block.attention.qkv, block.attention.core
        assert isinstance(core, PagedCore) and isinstance(core.backend, CpuAttention)
        heads, kv_heads = qkv.local_heads, qkv.local_kv_heads
        self._norm(program, block.attention_norm, self._stream)
        program.product(self._normed, _panels(qkv), self._qkv, qkv.bias)
        for norm, first, count in ((block.attention.q_norm, 0, heads), (block.attention.k_norm, heads, kv_heads)):
            if norm is not None:
                program.norm_heads(self._qkv, first, count, norm.weight.detach(), norm.eps)
        program.rotate(self._qkv, heads + kv_heads, *self._turns)
        job = Job()
        job.give(*qkv.split_heads(self._qkv), self._seen.unflatten(1, (heads, -1)), core.window)
        program.call(core.backend.entry(program.dtype), job)
        self._attentions.append(_Attention(job, core))

    def _pass_on(self, block: Block, program: Program, seen: Tensor, stream: Tensor) -> None:
        """What attention has seen, and then the MLP's output, are added to the stream."""
        program.product(seen, _panels(block.attention.out), stream, add=True)
        self._norm(program, block.mlp_norm, stream)
        program.gated(self._normed, _panels(block.mlp.gate_up), self._inner)
        program.product(self._inner, _panels(block.mlp.down), stream, add=True)

    def _norm(self, program: Program, norm: nn.Module, stream: Tensor) -> None:
        assert isinstance(norm, RMSNorm)
        program.norm(stream, norm.weight.detach(), self._normed, norm.eps)

    def __call__(self, batch: StepBatch) -> Tensor | None:
        """The logits of a step, of all tokens or of those wanted, until the next one; None: it is too long.

        Raises:
            DataError: a token outside the vocabulary.
            IndexError: a table or a slot names a page that there is not.
        """
        rows, wanted = len(batch), batch.wanted_R
        count = rows if wanted is None else len(wanted)
        if rows > self._all.rows or count > self._some.rows:
            return None
        low, high = (int(bound) for bound in batch.tokens_T.aminmax())
        if low < 0 or high >= self._vocabulary:
            bad = low if low < 0 else high
            raise DataError(f"token id {bad} is outside the vocabulary of {self._vocabulary}")
        self._tokens[:rows, 0] = batch.tokens_T
        self._wanted[:count, 0] = torch.arange(rows) if wanted is None else wanted
        self._angles.write(batch, batch.longest, self._turns)
        places = [Place.of(batch, group) for group in range(len(batch.table))]
        for attention in self._attentions:
            attention.aim(places)
        if status := self._all.run(rows):
            failed = next(attention for attention in self._attentions if attention.job.failed)
            failed.job.verify(status, failed.core.group)
        self._some.run(count)
        return self._logits[:count]


def _problems(model: Decoder) -> Iterator[str]:
    """What there are no kernels for, or no memory."""
    config = model.config
    embedding, head = model.embedding, model.head
    if embedding is None or head is None or embedding.axis.size > 1 or len(model.layers) < config.layers:
        yield "the model is shared by several ranks"
        return
    if config.norm != "rms":
        yield "the norms are not RMSNorm"
    if config.positions != "rotary":
        yield "positions are learned"
    if not config.gated or config.activation != "silu":
        yield "the activation is not SwiGLU"
    if config.out_bias or config.mlp_bias:
        yield "attention's output or the MLP has a bias"
    cores = [block.attention.core for block in model.layers.values() if isinstance(block, Block)]
    if not all(isinstance(core, PagedCore) and isinstance(core.backend, CpuAttention) for core in cores):
        yield "attention is not the CPU's"
    methods = [module.method for module in model.modules() if hasattr(module, "method")]
    if not all(isinstance(method, Packed) and isinstance(method.packed, Panels) for method in methods):
        yield "weights are not in panels"


def _panels(layer: nn.Module) -> Panels:
    method = getattr(layer, "method", None)
    assert isinstance(method, Packed) and isinstance(method.packed, Panels)
    return method.packed
