"""Bytes that one training step communicates, by our ledger, against the published formulas: equal to the byte.

    python benchmarks/traffic.py [--precision fp32,bf16 --tp 2,4,8 --dp 2,4,8 --places --json FILE]

One process runs Trainer.step as rank 0 of a mesh that does not exist (Mesh.fake): every collective is recorded, none
takes place. A layer is the difference between a model of two layers and one of one layer. With A = tokens * hidden *
bytes of an element, the formulas are those of arXiv 2205.05198, sections 4.2.2 and 4.3:

    sequence parallel      forward  2 all-gathers + 2 reduce-scatters of A
                           backward 2 all-gathers + 2 reduce-scatters of A,
                                    and 2 all-gathers of the inputs that are kept cut
    not sequence parallel  forward  2 all-reduces of A, backward 2 all-reduces of A

To these a layer of a whole step adds what the paper leaves out: float32 gradients of its two norm weights (all-reduced
under sequence parallelism, where each rank sees a part of the tokens), and those of key and value heads that several
ranks hold. Data parallelism all-reduces every gradient once, in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import Any

import workload
from report import Claim, add_report_options, finish, table

from parallel.ledger import Ledger
from parallel.mesh import Layout, Mesh
from parallel.models.build import Build
from parallel.models.decoder import build_model
from zero import Trainer, ZeroOptimizer

TOKENS_SHAPE = (8, 256)
TOKENS = TOKENS_SHAPE[0] * TOKENS_SHAPE[1]
OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce")
Traffic = Counter[tuple[str, str]]
"""Payload bytes by (operation, axis)."""


def step(layout: Layout, layers: int, precision: str) -> tuple[Ledger, int, int]:
    """The ledger of one Trainer.step of rank 0, the number of its parameters, and of their buckets."""
    mesh = Mesh.fake(layout, 0)
    model = build_model(workload.config(layers), Build(mesh=mesh, dtype=workload.DTYPES[precision]))
    optimizer = ZeroOptimizer(model, mesh)
    trainer = Trainer(model, optimizer, mesh, steps=2)
    tokens_BS = workload.documents(*TOKENS_SHAPE).chunk(layout.dp)[0]
    mesh.ledger.reset()
    trainer.step([workload.batch(tokens_BS)])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return mesh.ledger, parameters, len(optimizer.buckets.buckets)


def axes(layout: Layout) -> list[str]:
    """The axes that a step may use, runs of neighbours included."""
    runs = [f"tp/{size}" for size in range(2, layout.tp) if layout.tp % size == 0]
    return ["tp", "dp", "data", "cp", "pp", "world", *runs]


def payload(ledger: Ledger, layout: Layout) -> Traffic:
    """What was recorded; everything, or this raises."""
    found: Traffic = Counter()
    for operation in OPERATIONS:
        for axis in axes(layout):
            if size := ledger.payload(operation, axis):
                found[operation, axis] = size
    if sum(found.values()) != ledger.payload():
        raise AssertionError(f"collectives that this benchmark does not know:\n{ledger.table()}")
    return found


def layer_formula(layout: Layout, precision: str) -> Traffic:
    """What one layer adds to a step."""
    c, tp = workload.CONFIG, layout.tp
    a = TOKENS * c.hidden * workload.DTYPES[precision].itemsize
    if not layout.sequence_parallel:
        expected: Traffic = Counter({("all_reduce", "tp"): (2 + 2) * a})
    else:
        expected = Counter({("all_gather", "tp"): (2 + 2 + 2) * a, ("reduce_scatter", "tp"): (2 + 2) * a})
        expected["all_reduce", "tp"] = 2 * c.hidden * 4
    if tp > c.kv_heads:
        # The key head and the value head of this rank, whose rows tp / kv_heads ranks hold.
        share = tp // c.kv_heads
        expected["all_reduce", "tp" if share == tp else f"tp/{share}"] += 2 * c.head_size * c.hidden * 4
    return expected


def rest_formula(layout: Layout, precision: str) -> Traffic:
    """What a step communicates outside the layers: embedding, head and loss, the last norm, the gradient norm."""
    c = workload.CONFIG
    a = TOKENS * c.hidden * workload.DTYPES[precision].itemsize
    loss = 3 * TOKENS * 4
    gradient_norm = 8
    if not layout.sequence_parallel:
        return Counter({("all_reduce", "tp"): 2 * a + loss + gradient_norm})
    return Counter(
        {
            ("all_gather", "tp"): 2 * a,
            ("reduce_scatter", "tp"): 2 * a,
            ("all_reduce", "tp"): c.hidden * 4 + loss + gradient_norm,
        }
    )


def tensor_parallel(tp: int, sequence: bool, precision: str, places: bool) -> list[dict[str, Any]]:
    """One row for a layer and one for what is outside the layers."""
    layout = Layout(tp=tp, sequence_parallel=sequence)
    (one, *_), (two, *_) = step(layout, 1, precision), step(layout, 2, precision)
    if places:
        print(f"\n{precision} tp={tp} sequence_parallel={sequence}, one layer\n{one.table()}\n")
    layer = Counter(payload(two, layout))
    layer.subtract(payload(one, layout))
    rest = Counter(payload(one, layout))
    rest.subtract(layer)
    name = f"{precision} tp={tp}" + " sp" * sequence
    sent = two.sent() - one.sent()
    return [
        _row(f"{name}: a layer", _clean(layer), layer_formula(layout, precision), sent),
        _row(f"{name}: the rest", _clean(rest), rest_formula(layout, precision), one.sent() - sent),
    ]


def data_parallel(dp: int, precision: str, places: bool) -> dict[str, Any]:
    """One row for all gradients of a step."""
    layout = Layout(dp=dp)
    ledger, parameters, buckets = step(layout, 2, precision)
    if places:
        print(f"\n{precision} dp={dp}, two layers\n{ledger.table()}\n")
    scalars = 8 + 8 + buckets  # labels, loss, and a byte a bucket that says whether any of its gradients are late
    expected: Traffic = Counter({("all_reduce", "data"): 4 * parameters + scalars})
    return _row(f"{precision} dp={dp}: a step", payload(ledger, layout), expected, ledger.sent())


def _clean(traffic: Traffic) -> Traffic:
    return Counter({key: size for key, size in traffic.items() if size})


def _row(name: str, measured: Traffic, expected: Traffic, sent: int) -> dict[str, Any]:
    joined = {"measured": measured, "formula": expected}
    text = {which: {f"{op} {axis}": size for (op, axis), size in sorted(t.items())} for which, t in joined.items()}
    return {"what": name, **text, "sent": sent, "equal": measured == expected}


def _total(row: dict[str, Any], which: str, operation: str) -> str:
    return f"{sum(size for name, size in row[which].items() if name.split()[0] == operation):,}"


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> int:
    """Count, compare, print."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--precision", default="fp32,bf16", help="fp32, bf16 or both")
    parser.add_argument("--tp", type=_numbers, default=[2, 4, 8], help="degrees of tensor parallelism")
    parser.add_argument("--dp", type=_numbers, default=[2, 4, 8], help="degrees of data parallelism")
    parser.add_argument("--places", action="store_true", help="also print the ledger: which line of code sent what")
    add_report_options(parser)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for precision in args.precision.split(","):
        for sequence in (True, False):
            for tp in args.tp:
                rows += tensor_parallel(tp, sequence, precision, args.places)
        rows += [data_parallel(dp, precision, args.places) for dp in args.dp]
    cells = [
        (
            row["what"],
            *(_total(row, "measured", operation) for operation in OPERATIONS),
            f"{row['sent']:,}",
            "equal" if row["equal"] else "DIFFERS",
        )
        for row in rows
    ]
    print("Bytes a step (payload: the gathered result, the scattered input, the reduced tensor; sent: by a ring)\n")
    print(table(("what", *OPERATIONS, "sent by a rank", "formula"), cells))
    for row in rows:
        if not row["equal"]:
            print(f"\n{row['what']}\n  measured {row['measured']}\n  formula  {row['formula']}")
    equal = sum(row["equal"] for row in rows)
    claim = "share of traffic rows equal to the formula, to the byte"
    note = f"{equal} of {len(rows)}"
    return finish(args, [Claim(claim, equal / len(rows), "= 1", equal == len(rows), note)], rows)


if __name__ == "__main__":
    sys.exit(main())
