"""Trains a small model under DeepSpeed, saves with its own functions, and beside that what they say it holds.

python -m torch.distributed.run --nproc-per-node 2 tests/deepspeed_saver.py FOLDER STAGE[:bf16|:frozen]
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file
from torch import Tensor, nn


class Model(nn.Module):
    """Odd sizes, a buffer, and one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.inner = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor([1.5, 2.5, 3.5]))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        logits = self.head(self.norm(x + self.inner(x)) * self.scale[0])
        return nn.functional.cross_entropy(logits[:-1].float(), tokens[1:])


def main() -> None:
    folder, (stage, _, option) = Path(sys.argv[1]), sys.argv[2].partition(":")
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Model()
    if option == "frozen":
        model.inner[0].weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": int(stage), "sub_group_size": 40, "stage3_param_persistence_threshold": 10},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": option == "bf16"},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if option == "bf16" else {}),
    }
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups, lr=0.01), config=config
    )
    for step in range(3):
        loss = engine((torch.arange(10) * (step + 1) + dist.get_rank()) % 13)
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(folder / "ds"))
    expected = held(model, optimizer, int(stage))
    if dist.get_rank() == 0:
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in expected.items()}, folder / "expected.safetensors"
        )
    dist.barrier()
    dist.destroy_process_group()


def held(model: Model, optimizer: object, stage: int) -> dict[str, Tensor]:
    """What DeepSpeed has, by name, and by name and state."""
    if stage in (1, 2):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    expected: dict[str, Tensor] = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if stage and parameter.requires_grad:
            expected[name] = safe_get_full_fp32_param(parameter)
            for what in ("exp_avg", "exp_avg_sq"):
                expected[f"{name}|{what}"] = safe_get_full_optimizer_state(parameter, what)
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                expected[name] = parameter.detach().clone()
    return expected


if __name__ == "__main__":
    main()
