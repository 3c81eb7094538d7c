"""Which tensors of a folder make up each of our parameters, and with which shapes."""

from __future__ import annotations

from typing import NamedTuple

from parallel.mesh import Mesh
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import Decoder
from parallel.models.encoder import Encoder
from parallel.models.encoder_config import EncoderConfig
from parallel.models.families import ENCODERS, FAMILIES, Stored
from parallel.shard import Shard, param_shards

__all__ = ["ModelConfig", "Part", "parts", "whole_shards"]

ModelConfig = DecoderConfig | EncoderConfig


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


def whole_shards(config: ModelConfig) -> dict[str, Shard]:
    """The shard table of the whole model, in the order of its parameters; takes no memory."""
    build = Build(mesh=Mesh.single())
    if isinstance(config, EncoderConfig):
        return param_shards(Encoder(config.resolved(), build))
    return param_shards(Decoder(config.resolved(), build))


def parts(config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    """Our parameter name -> the tensors that hold it, in the order of its rows."""
    shards = whole_shards(config)
    if isinstance(config, EncoderConfig):
        stored = ENCODERS[config.family].stored(config)
    else:
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
