"""The cache of keys and values: pages of every layer, and the attention core that a model is built with."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from infer.attention import BACKENDS, Backend, Pages, choose
from infer.batch import StepBatch
from infer.pagefile import PageFolder
from infer.sizing import GroupNeed, Sizing, free_memory, in_units, size_pages
from infer.step import Moves
from parallel.config import option
from parallel.errors import ConfigError, nearest, refuse
from parallel.mesh import Mesh
from parallel.models.batch import Batch
from parallel.models.build import AttentionCore, Build, PackedAttention
from parallel.models.config import DecoderConfig

__all__ = ["CacheConfig", "KVCache", "LayerGroup", "PagedCore", "StepBatch"]

_GIB = 1 << 30
_LINE = 64
"""Pages and what is in them begin at multiples of this many bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """How keys and values are kept."""

    precision: Literal["model", "int8", "fp8"] = option("model", "of cached keys and values; int8, fp8: with scales")
    attention: str = option("auto", "attention backend: auto, cpu, triton, torch, reference")
    memory_gib: float = option(0.0, "for pages (0: a share of what is free)")
    share: float = option(0.0, "of the free memory for pages (0: 0.9 of a GPU's, 0.25 of the CPU's)")
    host_gib: float = option(0.0, "host memory for pages that are swapped out")

    def problems(self) -> Iterator[str]:
        """Why there can be no such cache."""
        if self.attention != "auto" and self.attention not in BACKENDS:
            known = ["auto", *BACKENDS]
            yield f"attention = {self.attention!r}: there are {', '.join(known)}{nearest(self.attention, known)}"
        for name in ("memory_gib", "host_gib"):
            if getattr(self, name) < 0:
                yield f"{name} = {getattr(self, name)}: must not be negative"
        if not 0 <= self.share < 1:
            yield f"share = {self.share}: must be at least 0 and below 1"


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that see the same tokens, and so share page tables.

    Attributes:
        window: tokens seen, the token itself included; None: all.
        layers: of the whole model.
        held: those of them that are on this rank.
    """

    window: int | None
    layers: tuple[int, ...]
    held: tuple[int, ...]


class PagedCore:
    """Attention of one layer, to its pages; what a model that serves is built with. A plain batch leaves no trace."""

    def __init__(self, backend: Backend, group: int, window: int | None, plain: AttentionCore) -> None:
        self.pages: Pages | None = None
        self.backend, self.group, self.window, self._plain = backend, group, window, plain

    def __call__(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: Batch, training: bool) -> Tensor:
        """As :class:`~parallel.models.build.AttentionCore` says."""
        if not isinstance(batch, StepBatch):
            return self._plain(q_TNH, k_TKH, v_TKH, batch, training)
        assert self.pages is not None, "allocate the cache first"
        return self.backend(q_TNH, k_TKH, v_TKH, self.pages, batch, self.group, self.window)


class KVCache:
    """Pages of keys and values, for the layers and heads of this rank.

    A page holds the tokens of one request in all layers of a group: ``raw[group][page]`` is one run of bytes, first
    (layers, k and v, K, S, H) in the cache's precision, then the scales (layers, k and v, K, S) of int8 and fp8. So a
    page is copied, swapped or stored by one move, whatever is in it.

    Args:
        model: the model.
        mesh: tells which heads are ours, and where they live.
        dtype: of the model's activations.
        page_size: tokens a page.
        config: how keys and values are kept.
        layers: those on this rank (a pipeline stage has some); None: all.

    Raises:
        ConfigError: the configuration cannot be, or no attention backend can serve it.

    Attributes:
        groups: layers by window, the same on every rank.
        backend: the name of the attention backend.
        notes: why faster backends were passed over.
        raw: for each group the bytes of its pages, (pages, bytes a page).
        host: the same in host memory.
    """

    def __init__(
        self,
        model: DecoderConfig,
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        page_size: int = 16,
        config: CacheConfig | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.config = CacheConfig() if config is None else config
        refuse(ConfigError, self.config.problems())
        self.model, self.mesh, self.dtype, self.page_size = model.resolved(), mesh, dtype, page_size
        self.kv_heads = max(1, self.model.kv_heads // mesh.tp.size)
        self.groups = _groups(self.model, range(self.model.layers) if layers is None else layers)
        self.backend, self._attend, self.notes = choose(self.config.attention, mesh.device, dtype)
        self._cores: dict[int, PagedCore] = {}
        self.raw: tuple[Tensor, ...] = ()
        self.host: tuple[Tensor, ...] = ()
        self._folder: PageFolder | None = None
        self._disk: ThreadPoolExecutor | None = None
        self._under_way: list[tuple[tuple[int, bytes], Future[bool]]] = []

    @property
    def page_dtype(self) -> torch.dtype:
        """What keys and values are stored as."""
        kinds = {"model": self.dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
        return kinds[self.config.precision]

    def core(self, config: DecoderConfig, layer: int, build: Build) -> PagedCore:
        """The attention core of a layer: give this method as ``Build.attention``."""
        group = next(index for index, group in enumerate(self.groups) if layer in group.layers)
        if layer not in self.groups[group].held or build.dtype != self.dtype:
            raise ConfigError(f"layer {layer} in {build.dtype}: the cache was made for {self.groups} in {self.dtype}")
        self._cores[layer] = PagedCore(
            self._attend, group, self.groups[group].window, PackedAttention(config, layer, build)
        )
        if self.raw:
            self._point(group)
        return self._cores[layer]

    def bytes_per_page(self, group: int) -> int:
        """Of a page in all layers of the group that this rank has."""
        values, scales = self._sizes(group)
        return values + scales

    def need(self, group: int) -> GroupNeed:
        """What the group asks for, with the arithmetic."""
        layers, size = len(self.groups[group].held), self.page_size
        each = f"{layers} layers x 2 (k, v) x {self.kv_heads} heads x {size} tokens"
        kind = str(self.page_dtype).removeprefix("torch.")
        text = f"{each} x {self.model.head_size} x {self.page_dtype.itemsize} bytes ({kind})"
        if self.config.precision != "model":
            text += f" + {each} x 4 bytes of scales"
        total = self.bytes_per_page(group)
        return GroupNeed(window=self.groups[group].window, page_bytes=total, arithmetic=f"{text} = {in_units(total)}")

    def size(self, *, longest: int, chunk: int, ranks: int = 1) -> Sizing:
        """How many pages fit into memory as it is now; call it when the model is loaded.

        Args:
            longest: most tokens of a request.
            chunk: most tokens of a step.
            ranks: processes that share this device's memory.

        Raises:
            ConfigError: not one request fits; with the numbers.
        """
        config, device = self.config, self.mesh.device
        if config.memory_gib:
            memory, origin = int(config.memory_gib * _GIB), f"{config.memory_gib} GiB as given"
        else:
            free, share = free_memory(device), config.share or (0.25 if device.type == "cpu" else 0.9)
            memory, origin = int(free * share / ranks), f"{in_units(free)} free x {share:g}"
            origin += f" / {ranks} ranks" if ranks > 1 else ""
        needs = [self.need(group) for group in range(len(self.groups))]
        host = int(config.host_gib * _GIB / ranks)
        options = {"longest": longest, "chunk": chunk, "memory": memory, "origin": origin, "host_memory": host}
        sizing = size_pages(needs, page_size=self.page_size, **options)
        return dataclasses.replace(sizing, lines=(f"attention: {self.backend}", *self.notes, *sizing.lines))

    def allocate(self, pages: Sequence[int], host_pages: Sequence[int] | None = None) -> None:
        """Take memory for so many pages of each group; they hold zeros. Host pages are pinned where there is a GPU.

        On a CPU the system gives a page of it when that is first written to.
        """
        device, counts = self.mesh.device, tuple(host_pages) if host_pages else (0,) * len(self.groups)
        if len(pages) != len(self.groups) or len(counts) != len(self.groups):
            raise ConfigError(f"pages of {len(self.groups)} groups are to be given, not {list(pages)}, {list(counts)}")
        sizes = [self.bytes_per_page(group) for group in range(len(self.groups))]
        cuda = device.type == "cuda"
        make = functools.partial(torch.zeros, dtype=torch.uint8, device=device) if cuda else _untouched
        self.raw = tuple(make(n, size) for n, size in zip(pages, sizes, strict=True))
        make = functools.partial(torch.zeros, dtype=torch.uint8, pin_memory=True) if cuda else _untouched
        self.host = tuple(make(n, size) for n, size in zip(counts, sizes, strict=True))
        for group in range(len(self.groups)):
            self._point(group)

    def carry_out(self, moves: Moves) -> None:
        """Move pages as a step says, before it is computed; on a GPU that is queued on the current stream.

        What concerns the disk goes on beside the computation, until :meth:`settle`.
        """
        for group, key in moves.drop:
            self._begin(group, key, None, "drop")
        for group, key, page in moves.save:
            self._begin(group, key, self.host[group][page].clone(), "store")
        for group, source, target in moves.out:
            self.host[group][target].copy_(self.raw[group][source], non_blocking=True)
        for group, key, page in moves.load:
            self._begin(group, key, self.host[group][page], "load")
        for group, source, target in moves.back:
            self.raw[group][target].copy_(self.host[group][source], non_blocking=True)
        for group, source, target in moves.copies:
            self.raw[group][target].copy_(self.raw[group][source])

    def settle(self) -> list[tuple[int, bytes]]:
        """Wait for the disk; (group, key) of the pages whose file could not be written, or is not good.

        Ranks may differ: a page is lost if any of them lost it.
        """
        lost = [place for place, done in self._under_way if not done.result()]
        self._under_way.clear()
        return lost

    def open_folder(self, folder: Path | str, weights: str) -> list[tuple[int, bytes]]:
        """Have a third tier of pages; (group, key) of those that are there, the one used longest ago first.

        Args:
            folder: made if it is not there; may be shared by ranks, layouts and models.
            weights: names the weights, and whatever else the keys of pages do not.
        """
        self._folder = PageFolder(folder, self.identity(weights))
        self._disk = ThreadPoolExecutor(1, "pages")  # one: what is said of a page is done in the order it was said
        return self._folder.keys()

    def _begin(self, group: int, key: bytes, page_B: Tensor | None, action: str) -> None:
        assert self._folder is not None and self._disk is not None, "open_folder first"
        arguments = (group, key) if page_B is None else (group, key, page_B)
        done = self._disk.submit(getattr(self._folder, action), *arguments)
        self._under_way.append(((group, key), done))

    def identity(self, weights: str) -> str:
        """What tells pages of this rank from any others with the same keys.

        Args:
            weights: names the weights, and whatever else the keys of pages do not.
        """
        told = {
            "weights": weights,
            "model": dataclasses.asdict(self.model),
            "layers": [group.held for group in self.groups],
            "page": [self.page_size, str(self.page_dtype), str(self.dtype)],
            "tp": [self.mesh.tp.rank, self.mesh.tp.size],
        }
        return json.dumps(told, sort_keys=True)

    def _sizes(self, group: int) -> tuple[int, int]:
        """Bytes of a page's keys and values, and of its scales."""
        rows = len(self.groups[group].held) * 2 * self.kv_heads * self.page_size
        values = rows * self.model.head_size * self.page_dtype.itemsize
        scales = 0 if self.config.precision == "model" else rows * 4
        return -(-values // _LINE) * _LINE, -(-scales // _LINE) * _LINE

    def _point(self, group: int) -> None:
        """Give each core of a group its views."""
        held, raw = self.groups[group].held, self.raw[group]
        if not held:
            return  # another pipeline stage has these layers
        shape = (len(held), 2, self.kv_heads, self.page_size)
        rows, (first, _) = shape[0] * shape[1] * shape[2] * shape[3], self._sizes(group)
        ends = rows * self.model.head_size * self.page_dtype.itemsize, first + rows * 4
        values = raw[:, : ends[0]].view(self.page_dtype).unflatten(1, (*shape, self.model.head_size))
        scales = None
        if self.config.precision != "model":
            scales = raw[:, first : ends[1]].view(torch.float32).unflatten(1, shape)
        for index, layer in enumerate(held):
            if layer in self._cores:
                k_scale, v_scale = (None, None) if scales is None else (scales[:, index, 0], scales[:, index, 1])
                self._cores[layer].pages = Pages(values[:, index, 0], values[:, index, 1], k_scale, v_scale)


def _untouched(count: int, size: int) -> Tensor:
    """Zeros (count, size) in bytes that the system has only promised."""
    if not count * size or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(count, size, dtype=torch.uint8)
    memory = mmap.mmap(-1, count * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(count, size)


def _groups(model: DecoderConfig, held: Iterable[int]) -> tuple[LayerGroup, ...]:
    windows = [model.window_of(layer) for layer in range(model.layers)]
    here = set(held)
    groups = []
    for window in dict.fromkeys(windows):
        layers = tuple(layer for layer in range(model.layers) if windows[layer] == window)
        groups.append(LayerGroup(window, layers, tuple(layer for layer in layers if layer in here)))
    return tuple(groups)
