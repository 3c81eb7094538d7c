"""Bytes that a rank keeps for backward: one device, tp and tp with sequence parallelism, by recomputation.

    python benchmarks/activations.py [--precision bf16 --tp 2,4 --length 256 --json FILE]

One process runs the forward pass and the loss as rank 0 of a mesh that does not exist (Mesh.fake). What is kept is
found in two ways: every tensor that passes torch's saved_tensors_hooks, and every tensor that a node of the autograd
graph holds beside them. Storages are counted once, parameters and the batch not at all. A layer is the difference
between a model of two layers and one of one layer.

The published account (arXiv 2205.05198, equations 1, 2 and 4) is of a layer with dropout, GELU and stored attention
scores, in 2-byte elements: sbh (34 + 5as/h) on one device, sbh (10 + 24/t + 5as/(ht)) with tensor parallelism, and
sbh/t (34 + 5as/h) with sequence parallelism besides. Ours has no dropout (no masks), norms that keep their input and
one float32 a token, and a SwiGLU that keeps only its input. With T tokens, elements of e bytes, N query and K key-value
heads of size H:

    R = 4 T D e + 2 T 4               inputs of two norms and of two products, and the norms' scales
    M = T ((2 N + 2 K) H + 3 F) e     q, k, v, attention output, gate and up, input of the down projection
    P = T N (S + 128) / 2 e           documents of S <= 512 tokens: probabilities, without the blocks above the
                                      diagonal (the paper keeps the whole square, and its softmax and mask: 5as/h)
    P = 4 T N                         longer documents, by flash attention: the log-sum-exp
    one device R + M + P;    tp R + (M + P) / t;    tp with sequence parallelism (R + M + P) / t

Selective recomputation (section 5) leaves out P. Full recomputation keeps the input of the layer, T D e, cut with the
residual under sequence parallelism. The gradient of the head's weight, which the fused loss forms in forward, is not an
activation and is counted apart. That of the head's input is one: T D e, whole on every rank until it is
reduce-scattered, which in a model of so few layers is seen beside fully recomputed ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import workload
from report import Claim, add_report_options, finish, table
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

from parallel.mesh import Layout, Mesh
from parallel.models.build import Build
from parallel.models.decoder import build_model

TOKENS = 2048
RECOMPUTE = ("none", "selective", "full")
TOLERANCE = 0.1
SHORT, QUERY_BLOCK = 512, 128
"""Of the attention core: longest document whose probabilities are kept, and queries at a time."""


def kept(layout: Layout, layers: int, precision: str, recompute: Any, length: int, head: bool = False) -> int:
    """Bytes kept between forward and backward; with ``head`` those for the gradient of the head's weight as well."""
    mesh = Mesh.fake(layout, 0)
    build = Build(mesh=mesh, dtype=workload.DTYPES[precision], recompute=recompute)
    model = build_model(workload.config(layers), build).train()
    model.head.weight.requires_grad_(head)
    batch = workload.batch(workload.documents(TOKENS // length, length))
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> None:
        alive.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    def pack(tensor: Tensor) -> Tensor:
        keep(tensor.detach())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        total = model.loss(batch, scale=1 / TOKENS).total
    for tensor in stashed(total.grad_fn):
        keep(tensor)
    for given in (*model.parameters(), *_tensors(getattr(batch, field.name) for field in dataclasses.fields(batch))):
        storages.pop(given.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def stashed(root: Node | None) -> Iterator[Tensor]:
    """Tensors that the nodes of a graph hold as plain attributes, out of sight of the hooks."""
    seen: set[Node] = set()
    waiting = [] if root is None else [root]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions if following is not None]
        yield from _tensors(vars(node).values() if hasattr(node, "__dict__") else ())


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def formula(layout: Layout, precision: str, recompute: str, length: int) -> float:
    """Bytes that a layer is expected to keep, see the head of this file."""
    c, e, t = workload.CONFIG, workload.DTYPES[precision].itemsize, layout.tp
    residual_share = t if layout.sequence_parallel else 1
    if recompute == "full":
        return TOKENS * c.hidden * e / residual_share
    residual = 4 * TOKENS * c.hidden * e + 2 * TOKENS * 4
    heads = (2 * c.heads + 2 * c.kv_heads) * c.head_size
    inner = TOKENS * (heads + 3 * c.feed_forward) * e
    if recompute == "none":
        inner += TOKENS * c.heads * ((length + QUERY_BLOCK) / 2 * e if length <= SHORT else 4)
    return residual / residual_share + inner / t


def measure(layout: Layout, precision: str, recompute: str, length: int) -> dict[str, Any]:
    """One row: a layer, the whole model, and the formula."""
    one, two, whole = (kept(layout, n, precision, recompute, length) for n in (1, 2, workload.CONFIG.layers))
    return {
        "precision": precision,
        "tp": layout.tp,
        "sequence_parallel": layout.sequence_parallel and layout.tp > 1,
        "recompute": recompute,
        "length": length,
        "layer": two - one,
        "formula": formula(layout, precision, recompute, length),
        "model": whole,
        "weight_gradient": kept(layout, 1, precision, recompute, length, head=True) - one,
    }


def main() -> int:
    """Measure, compare, print."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--precision", default="bf16", help="fp32, bf16 or both")
    parser.add_argument("--tp", default="2,4", help="degrees of tensor parallelism")
    parser.add_argument("--length", type=int, choices=(128, 256, 512, 1024, 2048), default=256, help="of a document")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    add_report_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    singles: dict[tuple[str, str], dict[str, Any]] = {}
    cells: list[tuple[object, ...]] = []
    for precision in args.precision.split(","):
        for recompute in RECOMPUTE:
            single = measure(Layout(), precision, recompute, args.length)
            singles[precision, recompute] = single
            layouts = [Layout(tp=int(tp), sequence_parallel=s) for tp in args.tp.split(",") for s in (False, True)]
            for row in [single, *(measure(layout, precision, recompute, args.length) for layout in layouts)]:
                rows.append(row)
                cells.append(_cells(row, single))
    print("Bytes kept for backward by a rank (* t: times tp and over one device; 1 is a perfect cut)\n")
    header = ("", "a layer", "formula", "/ formula", "* t", "model", "* t", "head's weight gradient")
    print(table(header, cells))
    return finish(args, list(_claims(rows, singles)), rows)


def _name(row: dict[str, Any]) -> str:
    layout = "one device" if row["tp"] == 1 else f"tp={row['tp']}" + " sp" * row["sequence_parallel"]
    return f"{row['precision']}, recompute {row['recompute']}, {layout}"


def _share(row: dict[str, Any], single: dict[str, Any], what: str) -> float:
    return row[what] * row["tp"] / single[what]


def _cells(row: dict[str, Any], single: dict[str, Any]) -> tuple[object, ...]:
    layer, model = (f"{_share(row, single, what):.3f}" for what in ("layer", "model"))
    ratio = f"{row['layer'] / row['formula']:.3f}"
    formula_text = f"{row['formula']:,.0f}"
    gradients = f"{row['weight_gradient']:,}"
    return _name(row), f"{row['layer']:,}", formula_text, ratio, layer, f"{row['model']:,}", model, gradients


def _claims(rows: Sequence[dict[str, Any]], singles: dict[tuple[str, str], dict[str, Any]]) -> Iterator[Claim]:
    """For each precision and recomputation, the share farthest from a perfect cut, of a layer and of the model."""
    for (precision, recompute), single in singles.items():
        cut = [
            row
            for row in rows
            if row["sequence_parallel"] and (row["precision"], row["recompute"]) == (precision, recompute)
        ]
        for what in ("layer", "model") if cut else ():
            worst = max(cut, key=lambda row: abs(_share(row, single, what) - 1))
            share = _share(worst, single, what)
            text = f"activations of a {what} on a rank * tp / one device, {precision}, recompute {recompute}"
            note = f"farthest from 1: tp={worst['tp']}"
            yield Claim(text, share, f"1 +- {TOLERANCE}", abs(share - 1) <= TOLERANCE, note)


if __name__ == "__main__":
    sys.exit(main())
