"""From a model folder to an engine on this rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from infer.cache import CacheConfig, KVCache
from infer.constrain.forms import Forms
from infer.embedder import Embedder
from infer.engine import Engine
from infer.graphs import Graphs
from infer.limits import Limits
from infer.lowered import Lowered
from infer.policy import PageGroup, SchedulerConfig
from infer.runner import Runner
from infer.sampling import Sampler
from infer.scheduler import Scheduler
from infer.sizing import Sizing
from infer.text import Detokenizer
from parallel import comm
from parallel.config import option
from parallel.errors import ConfigError, refuse
from parallel.hf import load_model, read_config
from parallel.mesh import Mesh
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import Decoder
from parallel.pp import Cut, partition
from parallel.tokenizer import load_tokenizer
from parallel.tp.method import Packed

__all__ = ["EngineConfig", "build_engine", "load_text", "records_graphs", "stage_of"]

_WANTED = 256
"""Rows of logits, at least, for which there is memory where steps are lowered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine works."""

    cache: CacheConfig = option(CacheConfig(), "of keys and values")
    scheduler: SchedulerConfig = option(SchedulerConfig(), "what is computed when")
    context: int = option(0, "most tokens of a text, prompt included (0: what the model was made for)")
    overlap: Literal["auto", "on", "off"] = option(
        "auto", "plan the next step while one is computed; auto: on a GPU, as a CPU has no time to spare"
    )
    graphs: Literal["auto", "on", "off"] = option(
        "auto", "decoding steps as CUDA graphs, or on a CPU as one call of C; auto: where that can be"
    )
    microbatches: int = option(0, "of a step in a pipeline (0: as many as stages)")
    disk: str = option("", "folder for cached pages; scheduler.disk_pages says how many")

    def problems(self) -> Iterator[str]:
        """Why there can be no such engine."""
        yield from self.cache.problems()
        yield from self.scheduler.problems()
        for name in ("context", "microbatches"):
            if getattr(self, name) < 0:
                yield f"{name} = {getattr(self, name)}: must not be negative"
        if bool(self.disk) != bool(self.scheduler.disk_pages):
            yield f"disk = {self.disk!r} and scheduler.disk_pages = {self.scheduler.disk_pages}: give both or neither"


def build_engine(
    folder: Path,
    mesh: Mesh,
    dtype: torch.dtype,
    config: EngineConfig,
    *,
    tokenizer: Tokenizer | None,
    ranks: int = 1,
) -> tuple[Engine, Sizing]:
    """Load a model and take memory for its pages; every rank of the mesh calls it.

    Args:
        folder: a Hugging Face model folder.
        mesh: the ranks of one replica, or of several.
        dtype: of weights and activations.
        config: of the engine.
        tokenizer: None: there is no text.
        ranks: processes that share this device's memory.

    Returns:
        the engine, and the arithmetic of its memory.

    Raises:
        ModelFolderError: every problem of the folder.
        ConfigError: the mesh cannot share the model, or there is not enough memory for one sequence.
    """
    refuse(ConfigError, config.problems())
    model_config = read_config(folder).resolved()
    cut = stage_of(model_config, mesh)
    page_size, layers = config.scheduler.page_size, list(cut.layers)
    cache = KVCache(model_config, mesh, dtype=dtype, page_size=page_size, config=config.cache, layers=layers)
    recording = records_graphs(config, cache, mesh)
    build = Build(mesh=mesh, dtype=dtype, attention=cache.core, linear=_packed, cuts=(cut,))
    model = load_model(folder, build).eval()
    finish(model)
    limits = Limits.of(folder, model_config, context=config.context, text=tokenizer is not None)
    sizing = cache.size(longest=limits.context, chunk=config.scheduler.longest_chunk, ranks=ranks)
    pages = [_least(count, mesh) for count in sizing.pages]
    host_pages = [_least(count, mesh) for count in sizing.host_pages]
    cache.allocate(pages, host_pages)
    if recording:
        pages = [count - 1 for count in pages]  # the last is nobody's
    graphs = _graphs(model, config, limits, pages, mesh) if recording else _lowered(model, config)
    groups = [
        PageGroup(group.window, count, host, cost=_cost(cache.bytes_per_page(index), model))
        for index, (group, count, host) in enumerate(zip(cache.groups, pages, host_pages, strict=True))
    ]
    forms = Forms(tokenizer, model_config.vocabulary, limits.ends)
    sampler = Sampler(model_config.vocabulary, ends=limits.ends, device=mesh.device, forms=forms)
    disk = _shared(cache.open_folder(config.disk, str(folder.resolve())), mesh) if config.disk else []
    runner = Runner(model, mesh, cache, sampler, microbatches=config.microbatches, graphs=graphs)
    detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
    overlap = config.overlap == "on" or (config.overlap == "auto" and mesh.device.type == "cuda")
    scheduler = Scheduler(config.scheduler, groups, disk)
    embedder = Embedder(folder, model, tokenizer)
    engine = Engine(scheduler, runner, limits, detokenizer, overlap=overlap, embedder=embedder, forms=forms)
    return engine, sizing


def _graphs(model: Decoder, config: EngineConfig, limits: Limits, scratch: list[int], mesh: Mesh) -> Graphs:
    page_size = config.scheduler.page_size
    return Graphs(
        model,
        most=config.scheduler.requests,
        columns=[-(-limits.context // page_size)] * len(scratch),
        scratch=scratch,
        page_size=page_size,
        device=mesh.device,
    )


def _lowered(model: Decoder, config: EngineConfig) -> Lowered | None:
    try:
        plan = config.scheduler
        return None if config.graphs == "off" else Lowered(model, plan.budget, max(_WANTED, plan.requests))
    except ConfigError as error:
        if config.graphs == "on":
            raise ConfigError([f"graphs = on: {problem}" for problem in error.problems]) from None
        return None


def records_graphs(config: EngineConfig, cache: KVCache, mesh: Mesh) -> bool:
    """Whether decoding steps are recorded, on a GPU.

    Raises:
        ConfigError: they are to be, and cannot.
    """
    reason = None
    if mesh.device.type == "cpu":
        return False
    if cache.backend != "triton":
        reason = f"attention {cache.backend!r} asks the host in every step"
    elif mesh.tp.size * mesh.pp.size > 1:
        reason = "the model is shared by several ranks"
    elif cache.model.rope.scaling == "dynamic":
        reason = "dynamic rotary scaling asks the host for lengths"
    if config.graphs == "on" and reason:
        raise ConfigError(f"graphs = on: {reason}")
    return config.graphs != "off" and reason is None


def stage_of(config: DecoderConfig, mesh: Mesh) -> Cut:
    """The stage of this rank; the head counts as the blocks that multiply as much."""
    block = config.hidden * (2 * config.heads + 2 * config.kv_heads) * config.head_size
    block += (3 if config.gated else 2) * config.hidden * config.feed_forward
    head = config.vocabulary * config.hidden / block
    return partition(config.layers, mesh.pp.size, ends=(0.0, head))[mesh.pp.rank]


def finish(model: Decoder) -> None:
    """The weights are there and stay: put them in the order in which they are multiplied."""
    for module in model.modules():
        method = getattr(module, "method", None)
        if isinstance(method, Packed):
            tied = module is model.head and model.config.tied
            method.finish(module.weight, keep=tied)  # pyright: ignore[reportArgumentType]


def _packed(name: str) -> Packed:
    return Packed()


def _least(count: int, mesh: Mesh) -> int:
    """Of all ranks that make the same steps."""
    value = torch.tensor(count, device=mesh.device)
    for axis in (mesh.tp, mesh.pp):
        comm.sum_(value, axis, "min")
    return int(value)


def _shared(keys: list[tuple[int, bytes]], mesh: Mesh) -> list[tuple[int, bytes]]:
    """The pages that every rank has on disk, in the order of the first."""
    for axis in (mesh.tp, mesh.pp):
        if axis.size > 1:
            told = comm.gather_json([[group, key.hex()] for group, key in keys], axis)
            common = set.intersection(*(set(map(tuple, own)) for own in told))
            keys = [(group, bytes.fromhex(key)) for group, key in told[0] if (group, key) in common]
    return keys


def _cost(page_bytes: int, model: Decoder) -> float:
    """Tokens that could be computed while a page goes to CPU memory and back.

    A processor that computes c operations a second moves some c / 50 bytes to its host: that holds within a factor of
    a few from desktop CPUs to the largest GPUs.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters()) or 1
    return 2 * page_bytes * 50 / (2 * parameters)


def load_text(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder; None if there is nothing that one could be read from."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return load_tokenizer(folder) if any((folder / name).exists() for name in names) else None
