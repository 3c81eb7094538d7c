"""Which tensors of a folder make up each of our parameters, and with which shapes."""

from __future__ import annotations

from typing import NamedTuple

from parallel.mesh import Mesh
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import Decoder
from parallel.models.families import FAMILIES, Stored
from parallel.shard import Shard, param_shards

__all__ = ["Part", "parts", "whole_shards"]


class Part(NamedTuple):
    """A tensor of a folder and the rows of our parameter that it holds.

    Attributes:
        name: in the folder.
        first, rows: of the parameter's dim 0.
        shape: as stored.
        transposed: stored (in, out).
    """

    name: str
    first: int
    rows: int
    shape: tuple[int, ...]
    transposed: bool


def whole_shards(config: DecoderConfig) -> dict[str, Shard]:
    """The shard table of the whole model, in the order of its parameters; takes no memory."""
    return param_shards(Decoder(config.resolved(), Build(mesh=Mesh.single())))


def parts(config: DecoderConfig) -> dict[str, tuple[Part, ...]]:
    """Our parameter name -> the tensors that hold it, in the order of its rows."""
    shards = whole_shards(config)
    stored = FAMILIES[config.family].stored(config)
    return {name: _parts(shard, stored[name]) for name, shard in shards.items()}


def _parts(shard: Shard, stored: Stored) -> tuple[Part, ...]:
    sizes = [shard.shape[0]] if len(stored.names) == 1 else [section.size for section in shard.sections]
    found: list[Part] = []
    first = 0
    for name, rows in zip(stored.names, sizes, strict=True):
        shape = (rows, *shard.shape[1:])
        found.append(Part(name, first, rows, shape[::-1] if stored.transposed else shape, stored.transposed))
        first += rows
    return tuple(found)
