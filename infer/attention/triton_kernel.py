"""The kernel of :mod:`infer.attention.triton`; importing this needs Triton."""

# ruff: noqa: ANN001, ANN201
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["paged_kernel"]


@triton.jit
def paged_kernel(
    q,
    k,
    v,
    k_scale,
    v_scale,
    out,
    table,
    context,
    starts,
    block_request,
    block_first,
    q_token,
    q_head,
    out_token,
    out_head,
    page_stride,
    head_stride,
    scale_page,
    scale_head,
    table_row,
    window,
    scale,
    SHARE: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Programs: (blocks of queries, key-value heads). ROWS rows, of which QUERIES x SHARE are used."""
    head = tl.program_id(1)
    request = tl.load(block_request + tl.program_id(0))
    first = tl.load(block_first + tl.program_id(0))
    start = tl.load(starts + request)
    fresh = tl.load(starts + request + 1) - start
    before = tl.load(context + request) - fresh
    row = tl.arange(0, ROWS)
    query = first + row // SHARE
    real = (row < QUERIES * SHARE) & (query < fresh)
    position = before + query
    dim = tl.arange(0, PADDED)
    used = dim < SIZE
    heads = head * SHARE + row % SHARE
    tokens = (start + query).to(tl.int64)
    x = tl.load(q + tokens[:, None] * q_token + heads[:, None] * q_head + dim, mask=real[:, None] & used, other=0.0)
    most = tl.full([ROWS], -1e30, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, PADDED], tl.float32)
    stop = tl.minimum(before + fresh, before + first + QUERIES)
    low = tl.maximum(0, tl.where(window > 0, before + first - window + 1, 0))
    for tile in range(low // KEYS * KEYS, stop, KEYS):
        key = tile + tl.arange(0, KEYS)
        there = (key >= low) & (key < stop)
        page = tl.load(table + request * table_row + key // PAGE, mask=there, other=0).to(tl.int64)
        place = page * page_stride + head * head_stride + (key % PAGE) * SIZE
        held = there[:, None] & used
        keys = tl.load(k + place[:, None] + dim, mask=held, other=0.0)
        values = tl.load(v + place[:, None] + dim, mask=held, other=0.0)
        scores = tl.dot(x, tl.trans(keys.to(x.dtype)), input_precision="ieee") * scale
        if SCALED:
            at = page * scale_page + head * scale_head + key % PAGE
            scores = scores * tl.load(k_scale + at, mask=there, other=0.0)
        seen = there & (key <= position[:, None]) & ((window == 0) | (key > position[:, None] - window))
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(most, tl.max(scores, 1))
        p = tl.exp2(scores - top[:, None])
        fade = tl.exp2(most - top)
        weight = weight * fade + tl.sum(p, 1)
        if SCALED:
            p = p * tl.load(v_scale + at, mask=there, other=0.0)
        sums = sums * fade[:, None] + tl.dot(p.to(x.dtype), values.to(x.dtype), input_precision="ieee")
        most = top
    result = (sums / tl.where(real, weight, 1.0)[:, None]).to(out.dtype.element_ty)
    where = out + tokens[:, None] * out_token + heads[:, None] * out_head + dim
    tl.store(where, result, mask=real[:, None] & used)
