"""Moving parameters between layouts, piece by piece, among live ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel import comm
from parallel.mesh import Axis, Layout, Place
from parallel.shard import Box, Piece, Shard, count, overlap

__all__ = ["reshard"]


def reshard(local: Tensor, shard: Shard, old: Layout, new: Layout, world: Axis) -> Tensor:
    """Move one parameter from its piece under ``old`` to its piece under ``new``, among the ranks of ``world``.

    Each rank sends only what the others lack, and never holds more than its two pieces and the message. A layout of
    fewer ranks than ``world`` uses the first ones. Parameters that live on one pipeline stage only are not moved across
    stages here.
    """
    places = [(_place(old, rank), _place(new, rank)) for rank in range(world.size)]
    held = [shard.pieces(source) if source else [] for source, _ in places]
    wanted = [shard.pieces(target) if target else [] for _, target in places]

    def sends(source: int, target: int) -> list[tuple[Piece, Piece, Box]]:
        return _meets(_given(held, source, target), wanted[target])

    outgoing = [_flat([local[p.inside(box)] for p, _, box in sends(world.rank, r)]) for r in range(world.size)]
    send = [0 if part is None else part.numel() for part in outgoing]
    receive = [sum(count(box) for _, _, box in sends(rank, world.rank)) for rank in range(world.size)]
    message = _flat([part for part in outgoing if part is not None])
    message = local.new_empty(0) if message is None else message
    arrived = comm.all_to_all(message, world, send, receive).split(receive)
    target = places[world.rank][1]
    result = local.new_zeros(shard.local_shape(target) if target else (0,))
    for rank, values in enumerate(arrived):
        for _, piece, box in sends(rank, world.rank):
            part, values = values[: count(box)], values[count(box) :]
            result[piece.inside(box)] = part.view([run.stop - run.start for run in box])
    return result


def _place(layout: Layout, rank: int) -> Place | None:
    return layout.place(rank) if rank < layout.world else None


def _given(held: list[list[Piece]], source: int, target: int) -> list[Piece]:
    """The pieces that ``target`` takes from ``source``: its own, and what it lacks from the first who holds it."""
    if source == target:
        return held[source]
    own = [piece.full for piece in held[target]]
    return [piece for piece in held[source] if piece.first and piece.full not in own]


def _meets(held: list[Piece], wanted: list[Piece]) -> list[tuple[Piece, Piece, Box]]:
    """What ``held`` has for ``wanted``: both pieces, and the box of the whole that they share."""
    pairs = [(piece, want, overlap(piece.full, want.full)) for piece in held for want in wanted]
    return [(piece, want, box) for piece, want, box in pairs if box is not None]


def _flat(parts: list[Tensor]) -> Tensor | None:
    return torch.cat([part.reshape(-1) for part in parts]) if parts else None
