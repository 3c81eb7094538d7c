"""What a step reports, what it cost against what the machine can do, and the JSON Lines file it is written to."""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from parallel.models.batch import Batch
from parallel.models.config import DecoderConfig
from zero.loader import Sample

__all__ = ["Metrics", "MetricsLog", "Rewound", "measured_peak", "peak_memory", "training_flops"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewound:
    """A run that has gone back to a checkpoint because of a spike.

    Attributes:
        from_step: the step that had it; its line, and those before it back to the checkpoint, are written anew.
        to_step: of the checkpoint.
        share: of the data that is passed over from now on: that of step ``share + 1`` if nothing else were.
        loss: of the step.
        spike: how many times the median of the losses before.
        samples: what the share is.
    """

    from_step: int
    to_step: int
    share: int
    loss: float
    spike: float
    samples: Sequence[Sample] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """One optimizer step.

    Attributes:
        step: from 1.
        loss: mean over the step's tokens, nats.
        grad_norm: of all gradients before clipping.
        lr: learning rate.
        tokens: labels learned from so far.
        skipped: whether the update was left out because the gradients were not finite.
        not_finite: where they were not, before they were summed: ranks and parameters.
        seconds: of this step, without validation and saving.
        tokens_per_second: of all ranks together.
        mfu: model FLOPs a second over the measured peak of all ranks.
        peak_memory: of this process (CUDA: of its device), bytes.
        validation_loss: nats a token, where it was measured.
        bits_per_byte: of the validation text.
        spike: how many times the median of the losses before this loss is, where it is a spike.
        samples: what the step learned from, where its loss is a spike.
        rewound: why the run has gone back before this step.
        slow_ranks: ranks that computed for longer than their like, and how many times; measured every fifth step.
        save_failed: why a checkpoint could not be written since the step before; the one before it stands.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    skipped: bool
    seconds: float
    tokens_per_second: float
    mfu: float
    peak_memory: int
    validation_loss: float | None = None
    bits_per_byte: float | None = None
    save_failed: str | None = None
    not_finite: str | None = None
    spike: float | None = None
    samples: Sequence[Sample] | None = None
    rewound: Rewound | None = None
    slow_ranks: dict[int, float] | None = None


class MetricsLog:
    """``metrics.jsonl``: one object a step, in order. Steps after ``resume_at`` are cut off when it is opened."""

    def __init__(self, path: Path, resume_at: int) -> None:
        kept: list[bytes] = []
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n") or json.loads(line)["step"] > resume_at:
                    break
                kept.append(line)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def write(self, metrics: Metrics) -> None:
        """Append one step; it is in the file when this returns. A number that is not finite becomes null.

        What the disk does not take is kept, and written with the next step.
        """
        values = {name: value for name, value in asdict(metrics).items() if value is not None}
        finite = {n: v if not isinstance(v, float) or math.isfinite(v) else None for n, v in values.items()}
        self._unwritten += (json.dumps(finite) + "\n").encode()
        self._flush()

    def close(self) -> None:
        """Close the file."""
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError:
            return


def training_flops(config: DecoderConfig, batches: Iterable[Batch]) -> float:
    """Floating-point operations of forward and backward: 6 a weight and token, and causal attention by document."""
    c = config
    attention = c.hidden * c.head_size * (2 * c.heads + 2 * c.kv_heads)
    mlp = c.hidden * c.feed_forward * (3 if c.gated else 2)
    weights = c.layers * (attention + mlp) + c.hidden * c.vocabulary
    total = 0.0
    for batch in batches:
        squares = sum((b - a) ** 2 for a, b in zip(batch.boundaries, batch.boundaries[1:], strict=False))
        total += 6.0 * weights * len(batch) + 6.0 * c.layers * c.heads * c.head_size * squares
    return total


def measured_peak(dtype: torch.dtype, device: torch.device, size: int = 1024, seconds: float = 0.1) -> float:
    """Floating-point operations a second of a square matrix product, the best of those that fit in ``seconds``."""
    size = 8 * size if device.type == "cuda" else size
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    torch.mm(a, b)
    while best == float("inf") or time.perf_counter() < end:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """The most memory this process has held so far, bytes (CUDA: allocated on the device)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
