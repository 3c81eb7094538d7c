"""DeepSpeed's configuration: every key is honoured, changes nothing, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.recipe import load_recipe
from parallel.config import parse_flags, resolve
from parallel.errors import ConfigError
from zero.deepspeed import read_deepspeed, translate
from zero.schedule import ScheduleConfig

DOCUMENT = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.7,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": 5e6,
        "overlap_comm": True,
        "stage3_prefetch_bucket_size": "auto",
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "zero_quantized_weights": False,
    },
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 1e-3, "betas": [0.8, 0.99], "eps": 1e-7, "weight_decay": 0.03, "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": 1e-4,
            "warmup_max_lr": 2e-3,
            "warmup_num_steps": 5,
            "warmup_type": "linear",
            "total_num_steps": 560,
        },
    },
    "activation_checkpointing": {"partition_activations": True},
    "tensorboard": {"enabled": True, "output_path": "x"},
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
}


def recipe(tmp_path: Path, document: Any, *flags: str) -> Any:
    """``tiny`` with a configuration of DeepSpeed and flags."""
    (tmp_path / "ds.json").write_text(json.dumps(document))
    _, overrides, problems = parse_flags(["--zero.deepspeed", str(tmp_path / "ds.json"), *flags])
    return load_recipe("tiny", overrides, problems)


def test_what_maps_is_mapped(tmp_path: Path) -> None:
    found = recipe(tmp_path, DOCUMENT, "--layout.dp", "4")
    assert (found.batch.sequences, found.batch.microbatches, found.precision) == (32, 2, "bf16")
    assert (found.zero.stage, found.zero.shard_size) == (3, 0)
    o = found.optimizer
    assert (o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.clip) == (2e-3, 0.8, 0.99, 1e-7, 0.03, 0.7)
    assert o.bucket_mb * 2**20 == pytest.approx(4 * 5e6)
    s = found.schedule
    assert (s.kind, s.warmup, s.ramp, s.first, s.floor) == ("warmup-decay", 5, "linear", pytest.approx(0.05), 0.0)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"offload_optimizer": {"device": "cpu"}}, {"offload": "optimizer"}),
        ({"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}, {"offload": "parameters"}),
        ({"zero_hpz_partition_size": 2}, {"secondary": 2}),
        ({"zero_hpz_partition_size": 1}, {"secondary": 0}),
        (
            {"zero_quantized_weights": True, "zero_quantized_gradients": True},
            {"quantize_weights": True, "gradient_bits": 4},
        ),
    ],
)
def test_zero_plus_plus_and_offload(tmp_path: Path, section: dict[str, Any], expected: dict[str, Any]) -> None:
    found = recipe(tmp_path, {"zero_optimization": {"stage": 3} | section}, "--layout.dp", "4")
    assert {name: getattr(found.zero, name) for name in expected} == expected


def leaves(table: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted keys of everything that is no section."""
    found = set()
    for key, value in table.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return found


def test_every_key_is_accounted_for() -> None:
    reading = translate(DOCUMENT, ranks=4, steps=560)
    assert not reading.problems
    assert reading.honoured.keys() | reading.ignored.keys() == leaves(DOCUMENT)
    assert not reading.honoured.keys() & reading.ignored.keys()
    assert len(list(reading.lines())) == len(leaves(DOCUMENT))
    assert reading.ignored["zero_optimization.stage3_prefetch_bucket_size"].startswith("auto")
    assert {"steps_per_print", "tensorboard.output_path", "fp16.loss_scale"} <= reading.ignored.keys()


def test_flags_win_and_auto_is_ours(tmp_path: Path) -> None:
    document = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto", "train_batch_size": "auto"}
    document["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": 0.5}}
    document["bf16"] = {"enabled": "auto"}
    found = recipe(tmp_path, document, "--zero.stage", "1")
    plain = load_recipe("tiny", {})
    assert found.zero.stage == 1
    assert found.optimizer.weight_decay == 0.5
    assert (found.optimizer.lr, found.optimizer.beta2) == (plain.optimizer.lr, plain.optimizer.beta2)
    assert (found.optimizer.clip, found.batch, found.precision) == (plain.optimizer.clip, plain.batch, plain.precision)
    assert recipe(tmp_path, {}).optimizer == plain.optimizer


@pytest.mark.parametrize(
    ("document", "sequences", "microbatches"),
    [
        ({"train_batch_size": 24}, 24, 1),
        ({"train_micro_batch_size_per_gpu": 3}, 12, 1),
        ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}, 24, 2),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 3}, 24, 3),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2}, 24, 3),
        ({"gradient_accumulation_steps": 2}, 16, 2),
    ],
)
def test_two_of_the_three_batch_sizes_give_the_third(
    tmp_path: Path, document: dict[str, int], sequences: int, microbatches: int
) -> None:
    found = recipe(tmp_path, document, "--layout.dp", "4")
    assert (found.batch.sequences, found.batch.microbatches) == (sequences, microbatches)


def test_all_that_is_not_honoured_is_refused_at_once(tmp_path: Path) -> None:
    document = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "zero_optimisation": {"stage": 2},
        "zero_optimization": {"stge": 2, "offload_param": {"device": "nvme"}, "zero_quantized_weights": 3},
        "fp16": {"enabled": True, "loss_scale": 128},
        "communication_data_type": "bf16",
        "curriculum_learning": {"enabled": True, "curriculum_type": "seqlen"},
        "optimizer": {"type": "Lamb", "params": {"lr": 1e-3, "max_coeff": 10}},
        "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1}},
        "gradient_clipping": "much",
    }
    with pytest.raises(ConfigError) as caught:
        recipe(tmp_path, document, "--layout.dp", "4", "--stpes", "3")
    text = str(caught.value)
    for part in (
        "train_batch_size = 32 is not train_micro_batch_size_per_gpu 3 x gradient_accumulation_steps 2 x 4 data ranks",
        "'zero_optimisation.stage' of DeepSpeed's configuration (did you mean 'zero_optimization'?)",
        "'zero_optimization.stge' of DeepSpeed's configuration (did you mean 'zero_optimization.stage'?)",
        'zero_optimization.offload_param.device = "nvme"',
        "zero_optimization.zero_quantized_weights = 3: must be true or false",
        "fp16.enabled = true",
        'communication_data_type = "bf16"',
        "curriculum_learning.enabled = true",
        'optimizer.type = "Lamb"',
        'scheduler.type = "OneCycle"',
        'gradient_clipping = "much": must be a number',
        "did you mean 'steps'?",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("params", "kind", "part"),
    [
        ({"adam_w_mode": False, "weight_decay": 0.1}, "Adam", "adam_w_mode"),
        ({"adam_w_mode": False}, "Adam", ""),
        ({"betas": [0.9]}, "AdamW", "must be two numbers"),
        ({"amsgrad": True}, "Adam", "amsgrad = true"),
        ({"freeze_step": 3}, "Adam", "unknown key 'optimizer.params.freeze_step'"),
    ],
)
def test_optimizer(params: dict[str, Any], kind: str, part: str) -> None:
    problems = translate({"optimizer": {"type": kind, "params": params}}, ranks=1, steps=1).problems
    assert len(problems) == bool(part)
    assert all(part in problem for problem in problems)


def test_its_own_engine_has_nvme_and_is_given_the_rest() -> None:
    section = {"stage": 3, "overlap_comm": True, "offload_optimizer": {"device": "nvme", "nvme_path": "/disk"}}
    document = {"zero_optimization": section, "aio": {"queue_depth": 8}, "tensorboard": {"enabled": True}}
    ours = translate(document, ranks=1, steps=1)
    (problem,) = ours.problems
    assert "--zero.backend deepspeed" in problem
    theirs = translate(document, ranks=1, steps=1, engine=True)
    assert not theirs.problems
    assert theirs.table == {"zero": {"stage": 3}}
    assert {"zero_optimization.overlap_comm", "aio.queue_depth"} <= theirs.honoured.keys() & ours.ignored.keys()
    assert "zero_optimization.overlap_comm: as it says" in theirs.lines()
    del section["offload_optimizer"]["nvme_path"]
    (problem,) = translate(document, ranks=1, steps=1, engine=True).problems
    assert "needs nvme_path" in problem


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1, "a": 2}', '{"zero_optimization": {"stage": 1, "stage": 2}}'])
def test_what_is_no_configuration_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=r"ds\.json"):
        read_deepspeed(tmp_path / "ds.json")
    with pytest.raises(ConfigError, match=r"absent\.json"):
        read_deepspeed(tmp_path / "absent.json")


SCHEDULES = [
    ("WarmupLR", {"warmup_min_lr": 1e-4, "warmup_max_lr": 1e-3, "warmup_num_steps": 6}),
    ("WarmupLR", {"warmup_max_lr": 1e-3, "warmup_num_steps": 1, "warmup_type": "linear"}),
    ("WarmupDecayLR", {"warmup_min_lr": 1e-4, "warmup_num_steps": 4, "total_num_steps": 15, "warmup_type": "linear"}),
    ("WarmupCosineLR", {"warmup_min_ratio": 0.1, "cos_min_ratio": 0.2, "warmup_num_steps": 4, "total_num_steps": 15}),
    ("WarmupCosineLR", {"total_num_steps": 15, "warmup_num_steps": 3, "warmup_type": "linear"}),
]


def expected(kind: str, params: dict[str, Any], steps: int, base: float) -> list[float]:
    """Learning rates by hand: DeepSpeed counts the steps that are done, and its first two steps are alike."""
    import math

    warmup = max(2, params["warmup_num_steps"])
    rates = []
    for step in range(steps):
        done = step - 1
        ramp = done / warmup if params.get("warmup_type") == "linear" else math.log(max(done, 0) + 1) / math.log(warmup)
        if kind == "WarmupCosineLR":
            low, floor = params.get("warmup_min_ratio", 0.0), params.get("cos_min_ratio", 1e-4)
            wave = (1 + math.cos(math.pi * min(1, (done - warmup + 1) / (steps - warmup)))) / 2
            share = low + (1 - low) * ramp if done < warmup else floor + (1 - floor) * wave
            rates.append(0.0 if done < 0 else base * share)
            continue
        low, high = params.get("warmup_min_lr", 0.0), params.get("warmup_max_lr", 1e-3)
        after = 1.0 if kind == "WarmupLR" else max(0.0, (steps - done) / (steps - warmup))
        rates.append(low if done < 0 else low + (high - low) * (ramp if done < warmup else after))
    return rates


@pytest.mark.parametrize(("kind", "params"), SCHEDULES)
def test_learning_rates_step_by_step(kind: str, params: dict[str, Any]) -> None:
    document = {"optimizer": {"params": {"lr": 1e-3}}, "scheduler": {"type": kind, "params": params}}
    reading = translate(document, ranks=1, steps=15)
    assert not reading.problems
    schedule = resolve(ScheduleConfig(), reading.table["schedule"])
    rates = [reading.table["optimizer"]["lr"] * schedule.factor(step, 15) for step in range(15)]
    assert rates == pytest.approx(expected(kind, params, 15, 1e-3), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(("kind", "params"), SCHEDULES)
def test_learning_rates_are_those_of_deepspeed(kind: str, params: dict[str, Any]) -> None:
    schedules = pytest.importorskip("deepspeed.runtime.lr_schedules")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = getattr(schedules, kind)(optimizer, **params)
    rates = []
    for _ in range(15):
        rates.append(optimizer.param_groups[0]["lr"])
        theirs.step()
    assert rates == pytest.approx(expected(kind, params, 15, 1e-3), rel=1e-12, abs=1e-18)


def test_a_decay_over_other_steps_is_refused() -> None:
    document = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 99}}}
    (problem,) = translate(document, ranks=1, steps=15).problems
    assert "give --steps 99" in problem
