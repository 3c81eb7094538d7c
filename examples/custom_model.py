"""Your own model from tensor-parallel layers: a character model with a parallel MLP, trained by a plain torch loop.

    python examples/custom_model.py                                   one process
    torchrun --nproc-per-node 2 examples/custom_model.py              tp = 2, the same losses

Nothing of the trainer is used: your module, your loss, your optimizer.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import Axis, Layout, Mesh
from parallel.shard import finalize_gradients
from parallel.tp import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)

TEXT = "the answer does not depend on the layout. " * 64
CONTEXT, HIDDEN = 4, 32


class CharacterModel(nn.Module):
    """The next character from the last four: embedding, MLP, head, each cut over ``axis``."""

    def __init__(self, characters: int, axis: Axis) -> None:
        super().__init__()
        self.axis, self.characters = axis, characters
        self.embedding = VocabParallelEmbedding(characters, HIDDEN, axis)
        self.up = ColumnParallelLinear(CONTEXT * HIDDEN, 4 * HIDDEN, axis)
        self.down = RowParallelLinear(4 * HIDDEN, HIDDEN, axis)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = ColumnParallelLinear(HIDDEN, 32, axis, bias=False)

    def forward(self, context_TC: Tensor, next_T: Tensor) -> Tensor:
        """Mean loss of predicting each next character."""
        x = self.embedding(context_TC.reshape(-1)).view(len(next_T), -1)
        x = self.norm(self.down(torch.relu(self.up(x))))
        return vocab_parallel_cross_entropy(self.head(x), next_T, self.axis).mean()


def main() -> None:
    """Train for 60 steps; print the loss now and then."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    mesh = Mesh.build(Layout(tp=dist.get_world_size() if dist.is_initialized() else 1))
    torch.manual_seed(0)
    alphabet = sorted(set(TEXT))
    ids = torch.tensor([alphabet.index(character) for character in TEXT])
    context, following = ids.unfold(0, CONTEXT, 1)[:-1], ids[CONTEXT:]
    model = CharacterModel(len(alphabet), mesh.tp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        loss = model(context, following)
        optimizer.zero_grad()
        loss.backward()
        finalize_gradients(model, mesh)
        optimizer.step()
        if mesh.rank == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.6f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
