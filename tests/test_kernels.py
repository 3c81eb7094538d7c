"""Kernels against their plain references, on odd shapes, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from parallel import rng
from parallel.kernels.attention import packed_attention, packed_attention_reference
from parallel.kernels.dropout import dropout
from parallel.kernels.norm import rms_norm, rms_norm_reference
from parallel.kernels.rotary import rotary, rotary_reference
from parallel.kernels.swiglu import swiglu, swiglu_reference

CLOSE = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.bfloat16: {"rtol": 0.02, "atol": 0.05}}


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check(kernel: Callable[..., Tensor], reference: Callable[..., Tensor], dtype: torch.dtype, *inputs: Tensor) -> None:
    """Values and gradients equal those of the reference in float64; inputs may be strided views."""
    theirs = [x.to(dtype).double().clone().requires_grad_() for x in inputs]
    bases = [torch.stack([x.to(dtype)] * 2, -1).requires_grad_() for x in inputs]
    expected, got = reference(*theirs), kernel(*(base[..., 1] for base in bases))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected.detach(), **CLOSE[dtype])
    g = tensor(*expected.shape, seed=9).to(dtype)
    expected.backward(g.double())
    got.backward(g.mT.contiguous().mT if g.dim() > 1 else g)
    for base, theirs_ in zip(bases, theirs, strict=True):
        assert base.grad is not None
        assert theirs_.grad is not None
        torch.testing.assert_close(base.grad[..., 1].double(), theirs_.grad, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (13, 3, 7), (0, 4)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (shape[-1],), weight, 1e-5)

    x, weight = tensor(*shape), tensor(shape[-1], seed=1)
    check(lambda x, w: rms_norm(x, w, 1e-5), plain, dtype, x, weight)
    check(lambda x, w: rms_norm_reference(x, w, 1e-5), plain, dtype, x, weight)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(1, 2), (5, 246), (13, 6), (0, 4)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(swiglu, swiglu_reference, dtype, 2 * tensor(*shape))


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 14), (13, 2, 8), (0, 1, 4)])
def test_rotary(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    turns = tensor(shape[0], shape[2] // 2, seed=4)
    cos, sin = turns.cos().to(dtype).double(), turns.sin().to(dtype).double()
    x = tensor(*shape)
    check(lambda x: rotary(x, cos, sin), lambda x: rotary_reference(x, cos, sin), dtype, x)
    pairs = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1).contiguous())
    turned = torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).unbind(-1)
    torch.testing.assert_close(rotary_reference(x, cos, sin), torch.cat(turned, -1), **CLOSE[torch.float64])


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, boundaries: list[int], window: int | None) -> Tensor:
    """One token and head at a time."""
    rows = []
    for t in range(q.shape[0]):
        start = max(b for b in boundaries[:-1] if b <= t)
        if window is not None:
            start = max(start, t - window + 1)
        for n in range(q.shape[1]):
            head = n // (q.shape[1] // k.shape[1])
            scores = k[start : t + 1, head] @ q[t, n] / q.shape[2] ** 0.5
            rows.append(scores.softmax(0) @ v[start : t + 1, head])
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("boundaries", [[0, 1], [0, 13], [0, 5, 11, 13], [0, 4, 8, 12, 13], [0, 1, 2, 3]])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (4, 4)])
def test_packed_attention(heads: tuple[int, int], boundaries: list[int], window: int | None) -> None:
    tokens, size = boundaries[-1], 6
    inputs = (
        tensor(tokens, heads[0], size),
        tensor(tokens, heads[1], size, seed=1),
        tensor(tokens, heads[1], size, seed=2),
    )
    for kernel in (packed_attention, packed_attention_reference):
        check(
            lambda q, k, v, kernel=kernel: kernel(q, k, v, boundaries, window),
            lambda q, k, v: attention_by_hand(q, k, v, boundaries, window),
            torch.float64,
            *inputs,
        )
    check(
        lambda q, k, v: packed_attention(q, k, v, boundaries, window),
        lambda q, k, v: attention_by_hand(q, k, v, boundaries, window),
        torch.bfloat16,
        *inputs,
    )


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("boundaries", [[0, 64, 65, 193, 321], [0, 130], [0, 33, 600]])
def test_packed_attention_of_long_documents(boundaries: list[int], window: int | None, dtype: torch.dtype) -> None:
    inputs = [tensor(boundaries[-1], heads, 6, seed=heads) for heads in (4, 2, 1)]
    inputs[2] = torch.cat([inputs[2], 2 * inputs[2].roll(1, 0)], 1)
    check(
        lambda q, k, v: packed_attention(q, k, v, boundaries, window),
        lambda q, k, v: packed_attention_reference(q, k, v, boundaries, window),
        dtype,
        *inputs,
    )


def test_attention_with_dropped_probabilities() -> None:
    q, k, v = tensor(5, 2, 4), tensor(5, 1, 4, seed=1), torch.eye(5, dtype=torch.float64)[:, None]
    keep = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(3)) > 0.5
    whole = packed_attention_reference(q, k, v, [0, 3, 5])
    dropped = packed_attention_reference(q, k, v, [0, 3, 5], None, keep, 0.5)
    torch.testing.assert_close(dropped, whole * keep.transpose(0, 1) * 2)


def test_dropout_scales_what_survives() -> None:
    x, index = tensor(7, 33).requires_grad_(), torch.tensor([3, 1, 4, 100, 5, 9, 2**40])
    assert dropout(x, 0.0, index, 5) is x
    y = dropout(x, 0.25, index, 5)
    keep = rng.keep_mask(5, index[:, None], torch.arange(33), 0.25)
    torch.testing.assert_close(y, torch.where(keep, x / 0.75, 0.0))
    y.sum().backward()
    torch.testing.assert_close(x.grad, keep / torch.tensor(0.75, dtype=torch.float64))
    assert torch.equal(dropout(x[2:4], 0.25, index[2:4], 5), y[2:4])
