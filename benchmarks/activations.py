"""Bytes that a rank keeps for backward: one device, tp and tp with sequence parallelism, by recomputation.

    python benchmarks/activations.py [--precision bf16 --tp 2,4 --json FILE]

One process runs the forward pass and the loss as rank 0 of a mesh that does not exist (Mesh.fake). What is kept is found
in two ways: every tensor that passes torch's saved_tensors_hooks, and every tensor that a node of the autograd graph holds
beside them. Storages are counted once, parameters and the batch not at all. A layer is the difference between a model
of two layers and one of one layer.

The published account (arXiv 2205.05198, equations 1, 2 and 4) is of a layer with dropout, GELU and stored
attention scores, in 2-byte elements: sbh (34 + 5as/h) on one device, sbh (10 + 24/t + 5as/(ht)) with tensor parallelism,
sbh/t (34 + 5as/h) with sequence parallelism besides. Ours has no dropout (no masks), norms that keep their input and one
float32 a token, flash attention (q, k, v, output and one float32 a token and head instead of the scores) and a SwiGLU that
keeps only its input. With T tokens, elements of e bytes, N query and K key-value heads of size H:

    R = 4 T D e + 2 T 4                          inputs of two norms and of two projections, and the norms' scales
    M = T ((2 N + 2 K) H + 3 F) e + 4 T N        q, k, v, attention output, its log-sum-exp, gate and up, input of down
    one device R + M;    tp R + M / t;    tp with sequence parallelism (R + M) / t

Selective recomputation, where it helps, drops the log-sum-exp and the output of the attention core that are formed again; the
output stays as the input of the projection. Full recomputation keeps the input of the layer, T D e, cut with the
residual under sequence parallelism.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import workload
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

from parallel.mesh import Layout, Mesh
from parallel.models.build import Build
from parallel.models.decoder import Decoder, build_model
from report import Claim, add_report_options, finish, table

TOKENS = 2048
RECOMPUTE = ("none", "selective", "full")
TOLERANCE = 0.1


def kept(layout: Layout, layers: int, precision: str, recompute: Any) -> dict[str, int]:
    """Bytes kept between forward and backward: ``activations``, and ``weight_gradients`` that forward already formed."""
    mesh = Mesh.fake(layout, 0)
    build = Build(mesh=mesh, dtype=workload.DTYPES[precision], recompute=recompute)
    model = build_model(workload.config(layers), build).train()
    batch = workload.batch(workload.documents())
    storages: dict[int, tuple[int, bool]] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor, weight_gradient: bool = False) -> None:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        storages.setdefault(storage.data_ptr(), (storage.nbytes(), weight_gradient))

    def pack(tensor: Tensor) -> Tensor:
        keep(tensor.detach())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        total = model.loss(batch, scale=1 / TOKENS).total
    shapes = {tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim > 1}
    for tensor in stashed(total.grad_fn):
        keep(tensor, weight_gradient=tuple(tensor.shape) in shapes)
    for given in _given(model, [getattr(batch, field.name) for field in dataclasses.fields(batch)]):
        storages.pop(given.untyped_storage().data_ptr(), None)
    found = {"activations": 0, "weight_gradients": 0}
    for size, weight_gradient in storages.values():
        found["weight_gradients" if weight_gradient else "activations"] += size
    return found


def _given(model: Decoder, batch: Iterable[Any]) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from (value for value in batch if isinstance(value, Tensor))


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


def formula(layout: Layout, precision: str, recompute: str) -> float:
    """Bytes that a layer is expected to keep, see the head of this file."""
    c, e, t = workload.CONFIG, workload.DTYPES[precision].itemsize, layout.tp
    residual_share = t if layout.sequence_parallel else 1
    if recompute == "full":
        return TOKENS * c.hidden * e / residual_share
    residual = 4 * TOKENS * c.hidden * e + 2 * TOKENS * 4
    heads = (2 * c.heads + 2 * c.kv_heads) * c.head_size
    inner = TOKENS * (heads + 3 * c.feed_forward) * e
    if recompute == "none":
        inner += 4 * TOKENS * c.heads
    return residual / residual_share + inner / t


def measure(layout: Layout, precision: str, recompute: str) -> dict[str, Any]:
    """One row: a layer, the whole model, and the formula."""
    one, two, whole = (kept(layout, layers, precision, recompute) for layers in (1, 2, workload.CONFIG.layers))
    return {
        "precision": precision,
        "tp": layout.tp,
        "sequence_parallel": layout.sequence_parallel and layout.tp > 1,
        "recompute": recompute,
        "layer": two["activations"] - one["activations"],
        "formula": formula(layout, precision, recompute),
        "model": whole["activations"],
        "weight_gradients": whole["weight_gradients"],
    }


def main() -> int:
    """Measure, compare, print."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--precision", default="bf16", help="fp32, bf16 or both")
    parser.add_argument("--tp", default="2,4", help="degrees of tensor parallelism")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    add_report_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    cells: list[tuple[object, ...]] = []
    for precision in args.precision.split(","):
        for recompute in RECOMPUTE:
            single = measure(Layout(), precision, recompute)
            layouts = [Layout(tp=int(tp), sequence_parallel=s) for tp in args.tp.split(",") for s in (False, True)]
            for row in [single, *(measure(layout, precision, recompute) for layout in layouts)]:
                rows.append(row)
                cells.append(_cells(row, single))
                if row["sequence_parallel"]:
                    claims.append(_claim(row, single))
    print("Bytes kept for backward by a rank (* t: times tp and over one device; 1 is a perfect cut)\n")
    header = ("", "a layer", "formula", "/ formula", "* t", "model", "* t", "weight gradients")
    print(table(header, cells))
    return finish(args, claims, rows)


def _name(row: dict[str, Any]) -> str:
    layout = "one device" if row["tp"] == 1 else f"tp={row['tp']}" + " sp" * row["sequence_parallel"]
    return f"{row['precision']}, recompute {row['recompute']}, {layout}"


def _share(row: dict[str, Any], single: dict[str, Any], what: str) -> float:
    return row[what] * row["tp"] / single[what]


def _cells(row: dict[str, Any], single: dict[str, Any]) -> tuple[object, ...]:
    layer, model = (f"{_share(row, single, what):.3f}" for what in ("layer", "model"))
    ratio = f"{row['layer'] / row['formula']:.3f}"
    formula_text = f"{row['formula']:,.0f}"
    gradients = f"{row['weight_gradients']:,}"
    return _name(row), f"{row['layer']:,}", formula_text, ratio, layer, f"{row['model']:,}", model, gradients


def _claim(row: dict[str, Any], single: dict[str, Any]) -> Claim:
    share = _share(row, single, "model")
    met = abs(share - 1) <= TOLERANCE
    text = f"activations of a rank * tp / one device, {_name(row)}"
    return Claim(text, share, f"1 +- {TOLERANCE}", met, f"a layer alone {_share(row, single, 'layer'):.3f}")


if __name__ == "__main__":
    sys.exit(main())
