"""Memory of a rank between two steps at every stage of ZeRO, counted and resident, against the published formulas.

    python benchmarks/zero_memory.py [--ranks 2,4 --precision bf16,fp32 --layers 8 --hidden 1024 --json FILE]

Each stage trains a Llama of about 111M parameters for two steps in processes of its own. Counted are the bytes of all
storages that hold parameters, gradients, master weights and optimizer state. Resident is what the process has grown by
since before the model was built, after one of a single block was trained and dropped, with freed memory given back.

The formulas are those of docs/zero.md (arXiv 1910.02054, section 3, with fp32 gradients). With P parameters, N ranks, w
bytes of a weight and M = 4 bytes of a master where weights are smaller, else 0:

    stage 0   w P + 4 P   + (M + 8) P           stage 2   w P   + (4 + M + 8) P/N
    stage 1   w P + 4 P   + (M + 8) P/N         stage 3   (w + 4 + M + 8) P/N
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import contest
from on_ranks import add_rank_options, on_ranks
from report import Claim, add_report_options, finish, table

STAGES = (0, 1, 2, 3)
TOLERANCE = 0.03
MIB = 1 << 20


def config(args: argparse.Namespace) -> Any:
    """The model."""
    import workload

    heads = args.hidden // 64
    wide = {
        "hidden": args.hidden,
        "heads": heads,
        "kv_heads": max(1, heads // 2),
        "feed_forward": 11 * args.hidden // 4,
    }
    return replace(workload.CONFIG, layers=args.layers, **wide)


def trained(model_config: Any, precision: str, stage: int, tokens: int) -> Any:
    """An optimizer after two steps."""
    import workload

    from parallel.mesh import Mesh
    from parallel.models.build import Build
    from parallel.models.decoder import build_model
    from zero import Trainer, ZeroConfig, ZeroOptimizer

    mesh = Mesh.build()
    model = build_model(model_config, Build(mesh=mesh, dtype=workload.DTYPES[precision]), workload.WEIGHT_SEED)
    optimizer = ZeroOptimizer(model, mesh, zero=ZeroConfig(stage=stage))
    trainer = Trainer(model, optimizer, mesh, steps=2)
    for seed in range(2):
        trainer.step([workload.batch(workload.documents(1, tokens, seed))])
    return optimizer


def resident() -> int:
    """Bytes of this process that are in memory, after what is free was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem")) << 10


def counted(optimizer: Any) -> int:
    """Bytes of all storages of training state, each once."""
    buckets = optimizer.buckets.buckets
    tensors = [t for b in buckets for t in (b.values, b.run, b.master, b.gradient, b.reduced)]
    tensors += [value for state in optimizer.inner.state.values() for value in state.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    storages.pop(0, None)
    return sum(storages.values())


def formula(parameters: int, ranks: int, precision: str, stage: int) -> float:
    """Bytes of a rank."""
    weight, master = (2, 4) if precision == "bf16" else (4, 0)
    parts = ((3, weight), (2, 4), (1, master + 8))
    return sum(parameters * size / (ranks if stage >= least else 1) for least, size in parts)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """On a rank: one case."""
    import torch

    from parallel import comm
    from parallel.mesh import Mesh

    precision, stage = args.case.split(",")
    optimizer = trained(replace(config(args), layers=1), precision, int(stage), args.tokens)
    del optimizer
    before = resident()
    optimizer = trained(config(args), precision, int(stage), args.tokens)
    found = torch.tensor([counted(optimizer), resident() - before])
    buckets = optimizer.buckets.buckets
    most = comm.sum_(found, Mesh.build().world, "max").tolist()
    return {
        "counted": most[0],
        "resident": most[1],
        "parameters": sum(slot.parameter.numel() for bucket in buckets for slot in bucket.slots),
        "bucket": max(bucket.length for bucket in buckets) * 4,
    }


def claims_of(rows: list[dict[str, Any]]) -> list[Claim]:
    """The worst of each kind: how far from the formula it is, less one bucket."""
    claims = []
    for kind in ("counted", "resident"):
        apart = {
            n: max(0, abs(row[kind] - row["formula"]) - row["bucket"]) / row["formula"] for n, row in enumerate(rows)
        }
        worst = max(apart, key=lambda n: apart[n])
        row = rows[worst]
        note = f"{row['precision']}, {row['ranks']} ranks, stage {row['stage']}"
        text = f"{kind} bytes off the formula by more than one bucket"
        claims.append(Claim(text, apart[worst], f"<= {TOLERANCE:.0%}", apart[worst] <= TOLERANCE, note))
    return claims


def main() -> int:
    """Measure, print."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ranks", default="2,4", help="worlds to measure")
    parser.add_argument("--precision", default="bf16,fp32", help="of the weights")
    parser.add_argument("--stages", default="0,1,2,3", help="of ZeRO")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model, a multiple of 128")
    parser.add_argument("--tokens", type=int, default=64, help="of a rank and step")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    add_rank_options(parser)
    add_report_options(parser)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for precision in args.precision.split(","):
        for ranks in map(int, args.ranks.split(",")):
            for stage in map(int, args.stages.split(",")):
                found = on_ranks(args, ranks, lambda: measure(args), "--case", f"{precision},{stage}")
                expected = formula(found["parameters"], ranks, precision, stage)
                rows.append({"precision": precision, "ranks": ranks, "stage": stage, "formula": expected, **found})
    cells = [
        (
            f"{row['precision']}, {row['ranks']} ranks, stage {row['stage']}",
            *(f"{row[kind] / MIB:,.0f}" for kind in ("formula", "counted", "resident", "bucket")),
            *(f"{row[kind] / row['formula']:.3f}" for kind in ("counted", "resident")),
        )
        for row in rows
    ]
    print(f"{rows[0]['parameters'] / 1e6:.1f}M parameters; MiB a rank, the largest of all ranks\n")
    print(table(("case", "formula", "counted", "resident", "one bucket", "counted / f", "resident / f"), cells))
    return finish(args, claims_of(rows), rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except contest.ContestError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
