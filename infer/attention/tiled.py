"""Paged attention in plain torch without gathering whole contexts: tile by tile of keys, for many requests at once."""

from __future__ import annotations

import torch
from torch import Tensor

from infer.attention import Pages
from infer.attention.quantize import dequantize, wide, write
from infer.batch import StepBatch

__all__ = ["TiledAttention"]

_KEYS = 256
_QUERIES = 64
_WORKSPACE = 1 << 23
"""Numbers of keys that are gathered at a time, over all requests."""


class TiledAttention:
    """Where no kernel can be had; any device, any type. Its workspace does not grow with the cache."""

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None: it always can."""
        return None

    def __call__(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        pages: Pages,
        step: StepBatch,
        group: int,
        window: int | None,
    ) -> Tensor:
        """As :class:`~infer.attention.Backend` says."""
        write(pages, k_TKH, v_TKH, step.slots_T[group])
        out = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
        contexts = step.context_R.tolist()
        blocks: dict[int, list[tuple[int, int, int, int]]] = {1: [], _QUERIES: []}
        for request, context in enumerate(contexts):
            start, stop = step.boundaries[request], step.boundaries[request + 1]
            width = 1 if stop - start == 1 else _QUERIES
            for first in range(start, stop, width):
                blocks[width].append((context - stop + first, first, min(first + width, stop), request))
        kv_heads, size = pages.k_PKSH.shape[1], pages.k_PKSH.shape[3]
        at_once = max(1, _WORKSPACE // (_KEYS * kv_heads * size))
        for width, rows in blocks.items():
            rows.sort(reverse=True)  # alike contexts together
            for chosen in range(0, len(rows), at_once):
                _attend(q_TNH, out, pages, step.table[group], rows[chosen : chosen + at_once], width, window)
        return out


def _attend(
    q_TNH: Tensor,
    out_TNH: Tensor,
    pages: Pages,
    table_RP: Tensor,
    blocks: list[tuple[int, int, int, int]],
    width: int,
    window: int | None,
) -> None:
    """Attention of some blocks of at most ``width`` queries: (first position, first token, end, request) of each."""
    device, dtype = q_TNH.device, wide(q_TNH.dtype)
    kv_heads, page, size = pages.k_PKSH.shape[1:]
    described = torch.tensor(blocks, device=device)
    seen_B, first_B, stop_B, request_B = described.unbind(1)
    token_BW = (first_B[:, None] + torch.arange(width, device=device)).minimum(stop_B[:, None] - 1)
    position_BW = seen_B[:, None] + token_BW - first_B[:, None]
    q = q_TNH[token_BW].to(dtype).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4) * size**-0.5  # (B, K, G, W, H)
    most = q.new_full(q.shape[:-1], -1e30)
    weight, sums = torch.zeros_like(most), torch.zeros_like(q)
    span = page * max(1, _KEYS // page)
    low_B = (seen_B - window + 1).clamp(min=0) if window is not None else torch.zeros_like(seen_B)
    high_B = seen_B + stop_B - first_B
    for tile in range(int(low_B.min()) // span, -(-int(high_B.max()) // span)):
        active = ((low_B < (tile + 1) * span) & (high_B > tile * span)).nonzero()[:, 0]
        if not len(active):
            continue
        key = torch.arange(tile * span, (tile + 1) * span, device=device)
        held = (key >= low_B[active, None]) & (key < high_B[active, None])
        k, v = _tile(pages, table_RP[request_B[active]], tile * span // page, span // page, held, dtype)
        at = position_BW[active, :, None]
        seen = (key <= at) & held[:, None]
        if window is not None:
            seen &= key > at - window
        scores = (q[active].flatten(2, 3) @ k.mT).unflatten(2, (-1, width))
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        top = torch.maximum(most[active], scores.amax(-1))
        p, fade = (scores - top[..., None]).exp(), (most[active] - top).exp()
        added = (p.flatten(2, 3) @ v).unflatten(2, (-1, width))
        weight[active] = weight[active] * fade + p.sum(-1)
        sums[active] = sums[active] * fade[..., None] + added
        most[active] = top
    result = (sums / weight[..., None]).permute(0, 3, 1, 2, 4).flatten(2, 3).to(out_TNH.dtype)
    real = torch.arange(width, device=device) < (stop_B - first_B)[:, None]
    out_TNH[token_BW[real]] = result[real]


def _tile(
    pages: Pages, table_BP: Tensor, first: int, count: int, held_BC: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of pages ``first`` to ``first + count`` of each block, (B, K, tokens, H); 0 where not held."""
    chosen = table_BP[:, first : first + count].long()
    chosen = torch.nn.functional.pad(chosen, (0, count - chosen.shape[1]), value=-1)
    needed = held_BC.unflatten(1, (count, -1)).any(-1)
    if bool((needed & ((chosen < 0) | (chosen >= pages.k_PKSH.shape[0]))).any()):
        raise IndexError(f"a page table names a page outside 0 to {pages.k_PKSH.shape[0] - 1}")
    chosen = chosen.clamp(min=0, max=pages.k_PKSH.shape[0] - 1)

    def side(values: Tensor, scales: Tensor | None) -> Tensor:
        picked = values.view(torch.uint8)[chosen].view(values.dtype) if scales is not None else values[chosen]
        whole = dequantize(picked, None if scales is None else scales[chosen], dtype)
        return whole.transpose(1, 2).flatten(2, 3).masked_fill(~held_BC[:, None, :, None], 0)

    return side(pages.k_PKSH, pages.k_scale_PKS), side(pages.v_PKSH, pages.v_scale_PKS)
