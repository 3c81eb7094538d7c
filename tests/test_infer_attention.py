"""Paged attention: every backend against plain attention in float64, on odd shapes; bits, bounds and bad pages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from infer.attention import BACKENDS, Backend, Pages, choose
from infer.attention.cpu import CpuAttention
from infer.attention.quantize import LARGEST, dequantize, quantize
from infer.batch import StepBatch
from parallel.errors import ConfigError
from parallel.native import CompileError, compiled

CPU = torch.device("cpu")
NAMES = [name for name in BACKENDS if BACKENDS[name]().refusal(CPU, torch.float32) is None]
STORED = {"model": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# (tokens in the cache after the step, new ones)
MIXED = ((1, 1), (5, 5), (101, 1), (33, 33), (64, 1), (100, 33), (40, 9), (2, 1), (17, 16), (32, 32))
SHAPES = [(6, 2, 5, 1), (6, 2, 24, 4), (4, 4, 64, 16), (8, 1, 80, 32), (8, 4, 64, 16), (3, 3, 16, 7), (70, 1, 8, 4)]


@dataclass
class Case:
    """A step over shuffled pages, and the same keys and values in plain order."""

    q: Tensor
    k: Tensor
    v: Tensor
    pages: Pages
    step: StepBatch
    plain: list[tuple[Tensor, Tensor]]  # of each request, (tokens, K, H), as the cache holds them

    def attend(self, backend: Backend, window: int | None = None) -> Tensor:
        """The pages stay as they were."""
        copies = [None if x is None else x.clone() for x in vars_of(self.pages)]
        return backend(self.q, self.k, self.v, Pages(*copies), self.step, 0, window)

    def expected(self, window: int | None = None) -> Tensor:
        """Plain attention in float64, request by request."""
        outputs = []
        for (start, stop), (k, v) in zip(pairwise(self.step.boundaries), self.plain, strict=True):
            total = k.shape[0]
            at, key = torch.arange(total - (stop - start), total)[:, None], torch.arange(total)
            mask = key <= at
            if window is not None:
                mask &= key > at - window
            q, k, v = (x.double().transpose(0, 1)[None] for x in (self.q[start:stop], k, v))
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outputs)


def vars_of(pages: Pages) -> tuple[Tensor | None, ...]:
    return pages.k_PKSH, pages.v_PKSH, pages.k_scale_PKS, pages.v_scale_PKS


@cache
def make(
    runs: tuple[tuple[int, int], ...],
    shape: tuple[int, int, int, int] = (8, 4, 64, 16),
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    *,
    window: int | None = None,
    junk: float = 0.0,
    seeds: tuple[int, ...] | None = None,
) -> Case:
    """A case that tests share; the numbers of a request depend on its seed and on nothing else.

    Args:
        runs: (context, new tokens) of each request.
        shape: query heads, key-value heads, size, page size.
        dtype: of activations.
        stored: of the pages.
        window: pages before it are NO_PAGE.
        junk: fills whatever no token has.
        seeds: of the requests.
    """
    heads, kv_heads, size, page = shape
    seeds = tuple(range(len(runs))) if seeds is None else seeds
    counts = [-(-context // page) for context, _ in runs]
    order = np.random.default_rng(sum(counts)).permutation(sum(counts) + 5)
    table = np.full((len(runs), max(counts)), -1, np.int32)
    kind = dtype if stored is None else stored
    filled = torch.full((len(order), kv_heads, page, size), junk, dtype=dtype).to(kind)
    pages = Pages(filled.clone(), filled.clone())
    if stored is not None:
        scales = torch.full((len(order), kv_heads, page), junk)
        pages = replace(pages, k_scale_PKS=scales.clone(), v_scale_PKS=scales.clone())
    new: list[list[Tensor]] = [[], [], []]
    plain, used = [], 0
    for row, ((context, fresh), count, seed) in enumerate(zip(runs, counts, seeds, strict=True)):
        own = order[used : used + count]
        used += count
        draw = torch.randn(context, heads + 2 * kv_heads, size, generator=torch.Generator().manual_seed(seed))
        q, k, v = draw.to(dtype).split([heads, kv_heads, kv_heads], 1)
        low = 0 if window is None else max(0, context - fresh - window + 1)
        old = np.arange(low // page * page, context - fresh)
        place(pages, own[old // page], old % page, k[old], v[old])
        table[row, low // page : count] = own[low // page :]
        plain.append((held(k, stored), held(v, stored)))
        for into, x in zip(new, (q, k, v), strict=True):
            into.append(x[context - fresh :])
    stops = np.array([context for context, _ in runs])
    starts = stops - np.array([fresh for _, fresh in runs])
    step = StepBatch.build(np.zeros((len(runs), stops.max())), [table], starts, stops, page_size=page)
    fused = torch.cat([torch.cat(x) for x in new], 1)  # strided views, as the model gives them
    return Case(*fused.split([heads, kv_heads, kv_heads], 1), pages, step, plain)


def place(pages: Pages, page_T: np.ndarray, offset_T: np.ndarray, k: Tensor, v: Tensor) -> None:
    page, offset = torch.from_numpy(page_T), torch.from_numpy(offset_T)
    sides = ((k, pages.k_PKSH, pages.k_scale_PKS), (v, pages.v_PKSH, pages.v_scale_PKS))
    for row, into, scales in sides:
        if scales is None:
            into[page, :, offset] = row
        else:
            values, scale = quantize(row, into.dtype)
            into.view(torch.uint8)[page, :, offset] = values.view(torch.uint8)
            scales[page, :, offset] = scale


def held(x: Tensor, stored: torch.dtype | None) -> Tensor:
    return x if stored is None else dequantize(*quantize(x, stored), torch.float64)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 7, 40])
def test_in_float64_it_is_plain_attention(name: str, shape: tuple[int, int, int, int], window: int | None) -> None:
    case = make(MIXED, shape, torch.float64, window=window, junk=float("nan"))
    backend = choose(name, CPU, torch.float64)[1]
    torch.testing.assert_close(case.attend(backend, window), case.expected(window), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window", [None, 300])
def test_contexts_longer_than_a_split(name: str, window: int | None) -> None:
    runs = ((1300, 1), (513, 1), (512, 1), (1040, 70), (1025, 1025), (700, 5), (3, 1))
    case = make(runs, (4, 2, 8, 16), torch.float64, window=window, junk=float("nan"))
    backend = choose(name, CPU, torch.float64)[1]
    torch.testing.assert_close(case.attend(backend, window), case.expected(window), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_and_bfloat16_err_by_rounding_alone(name: str, stored: str, shape: tuple[int, int, int, int]) -> None:
    """float32: 2e-6. bfloat16: ours rounds the result alone, to 8 bits; torch also weights and dequantized numbers."""
    half = (2.0**-8, 2e-6) if name != "torch" else (0.02, 0.03)
    for dtype, bound in ((torch.float32, (0, 2e-6)), (torch.bfloat16, half)):
        case = make(MIXED, shape, dtype, STORED[stored], junk=float("nan"))
        backend = choose(name, CPU, dtype)[1]
        got = case.attend(backend)
        assert got.dtype == dtype and got.is_contiguous()
        torch.testing.assert_close(got.double(), case.expected(), rtol=bound[0], atol=bound[1])


def test_what_int8_and_fp8_cost() -> None:
    """Of random numbers with deviation 1: the result moves by less than 0.04 in int8 and 0.15 in fp8."""
    exact = make(MIXED).expected()
    for stored, bound in ((torch.int8, 0.04), (torch.float8_e4m3fn, 0.15)):
        case = make(MIXED, stored=stored)
        error = (case.attend(CpuAttention()).double() - exact).abs().max()
        assert bound / 20 < error < bound


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_slots_of_new_tokens_are_written(name: str, stored: str, shape: tuple[int, int, int, int]) -> None:
    case = make(MIXED, shape, torch.bfloat16, STORED[stored], junk=-3.0)
    page, written = shape[3], Pages(*(None if x is None else x.clone() for x in vars_of(case.pages)))
    wanted = Pages(*(None if x is None else x.clone() for x in vars_of(case.pages)))
    slots = case.step.slots_T[0].numpy()
    place(wanted, slots // page, slots % page, case.k, case.v)
    choose(name, CPU, torch.bfloat16)[1](case.q, case.k, case.v, written, case.step, 0, None)
    for got, want in zip(vars_of(written), vars_of(wanted), strict=True):
        assert (got is None and want is None) or same_bits(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("window", [None, 33])
def test_bits_do_not_depend_on_company_chunks_pages_or_threads(
    dtype: torch.dtype, stored: str, window: int | None
) -> None:
    """The same for a request of 1,100 tokens whose last 70 are computed: alone, among others, one by one, ..."""
    total, last, backend = 1100, 70, CpuAttention()

    def run(runs: tuple[tuple[int, int], ...], which: int, page: int = 16) -> Tensor:
        seeds = tuple(0 if index == which else 10 + index for index in range(len(runs)))
        case = make(runs, (6, 2, 40, page), dtype, STORED[stored], window=window, seeds=seeds)
        return case.attend(backend, window)[case.step.boundaries[which] : case.step.boundaries[which + 1]]

    want = run(((total, last),), 0)
    for page in (1, 7, 32):
        assert same_bits(run(((total, last),), 0, page), want)
    for size, pieces in ((1, 3), (13, 5), (64, 1)):
        ends = [total - size * piece for piece in range(pieces)]
        got = torch.cat([run(((end, size), (5, 1)), 0) for end in reversed(ends)])
        assert same_bits(got, want[-len(got) :])
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert same_bits(run(((total, last),), 0), want)
        assert same_bits(run(((700, 1), (total, last), (3, 3), (600, 600)), 1), want)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_the_kernel_quantizes_like_torch(stored: torch.dtype) -> None:
    """All e4m3 values and what lies halfway between two, scaled by 1; then rows of every magnitude; zeros."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.nextafter(codes, torch.tensor(0.0))])
    ties = torch.cat([ties, -ties, torch.zeros(-len(ties) * 2 % 63)]).view(-1, 63)
    ties = torch.cat([ties, torch.full((len(ties), 1), LARGEST[stored])], 1)
    exponents = torch.arange(-120, 120, 3.0)[:, None]
    many = torch.randn(80, 64, generator=torch.Generator().manual_seed(0)) * 2.0**exponents
    rows = torch.cat([ties, many, torch.zeros(1, 64)])[:, None]
    count = len(rows)
    step = StepBatch.build(
        np.zeros((1, count)), [np.arange(count)[None]], np.array([0]), np.array([count]), page_size=1
    )
    pages = Pages(*(torch.zeros(count, 1, 1, 64).to(stored) for _ in "kv"), *(torch.zeros(count, 1, 1) for _ in "kv"))
    CpuAttention()(rows, rows, rows.flip(0), pages, step, 0, None)
    for x, values, scales in ((rows, pages.k_PKSH, pages.k_scale_PKS), (rows.flip(0), pages.v_PKSH, pages.v_scale_PKS)):
        want, scale = quantize(x, stored)
        assert same_bits(values.flatten(), want.flatten())
        assert scales is not None and same_bits(scales.flatten(), scale.flatten())


def test_the_kernel_reads_every_fp8_number() -> None:
    """A single key has weight 1: the result is its value."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[127] = codes[255] = 0  # not numbers
    want = codes.view(torch.float8_e4m3fn)
    pages = Pages(*(torch.zeros(2, 1, 1, 256).to(want.dtype) for _ in "kv"), *(torch.ones(2, 1, 1) for _ in "kv"))
    step = StepBatch.build(np.zeros((1, 1)), [np.array([[1]])], np.array([0]), np.array([1]), page_size=1)
    row = want.float()[None, None]
    got = CpuAttention()(torch.zeros_like(row), row, row, pages, step, 0, None)
    assert torch.equal(got.flatten(), want.float())
    assert same_bits(pages.v_PKSH[1].flatten(), want)


@pytest.mark.parametrize(
    ("stored", "share", "floor"), [(torch.int8, 0.0, 1 / 254), (torch.float8_e4m3fn, 1 / 16, 1 / 458752)]
)
def test_quantization_keeps_its_bounds(stored: torch.dtype, share: float, floor: float) -> None:
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 5
    error = (dequantize(*quantize(x, stored), torch.float64) - x).abs()
    largest = x.abs().amax(-1, keepdim=True)
    bound = torch.maximum(share * x.abs(), floor * largest) * (1 + 1e-5)
    assert bool((error <= bound).all())
    assert bool((error > 0.9 * bound).any())
    assert not bool(quantize(torch.zeros(1, 64), stored)[0].float().any())


@pytest.mark.parametrize("name", NAMES)
def test_a_page_that_there_is_not_is_named(name: str) -> None:
    backend = choose(name, CPU, torch.float32)[1]
    for bad in (-1, 10_000):
        case = make(((40, 1), (20, 3)))
        table, slots_T = case.step.table[0].clone(), case.step.slots_T[0].clone()
        table[0, 1], slots_T[2] = bad, bad * 16
        for step in (replace(case.step, table=(table,)), replace(case.step, slots_T=(slots_T,))):
            with pytest.raises(IndexError, match="page"):
                replace(case, step=step).attend(backend)


def test_not_a_number_stays_with_its_request() -> None:
    clean = make(((40, 1), (300, 7), (20, 20)))
    case = replace(clean, k=clean.k.clone())
    case.k[3] = float("nan")  # of the second request
    for name in NAMES:
        backend = choose(name, CPU, torch.float32)[1]
        got, want = case.attend(backend), clean.attend(backend)
        assert bool(got[7].isnan().all())
        assert same_bits(got[:1], want[:1]) and same_bits(got[8:], want[8:])


def test_without_a_compiler_plain_torch_takes_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    compiled.cache_clear()
    name, _, passed = choose("auto", CPU, torch.float32)
    assert name == "torch"
    assert "no C compiler" in passed[0]
    with pytest.raises(ConfigError, match="no C compiler"):
        choose("cpu", CPU, torch.float32)
    (tmp_path / "cc").write_text("#!/bin/sh\necho it does not work >&2\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    compiled.cache_clear()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert "it does not work" in str(CpuAttention(tmp_path / "kept").refusal(CPU, torch.float32))
    compiled.cache_clear()


def test_a_broken_library_is_compiled_again(tmp_path: Path) -> None:
    case = make(((40, 1), (20, 3)))
    compiled.cache_clear()
    assert CpuAttention(tmp_path / "good").refusal(CPU, torch.float32) is None
    (good,) = (tmp_path / "good").iterdir()
    for content in (b"", b"broken"):
        compiled.cache_clear()
        folder = tmp_path / f"broken{len(content)}"
        folder.mkdir(0o700)
        (folder / good.name).write_bytes(content)
        backend = CpuAttention(folder)
        torch.testing.assert_close(case.attend(backend).double(), case.expected(), rtol=0, atol=2e-6)
        assert [path.stat().st_size for path in folder.iterdir()] == [good.stat().st_size]
    compiled.cache_clear()


def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    compiled.cache_clear()
    assert CpuAttention(tmp_path).refusal(CPU, torch.float32) is None
    assert not list(tmp_path.iterdir())
    compiled.cache_clear()


def test_it_runs_without_openmp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("parallel.native._shares_openmp", lambda: False)
    case = make(MIXED, dtype=torch.bfloat16)
    want = case.attend(CpuAttention())
    compiled.cache_clear()
    for threads in (1, 4):
        torch.set_num_threads(threads)
        assert same_bits(case.attend(CpuAttention(tmp_path)), want)
    compiled.cache_clear()


def check_triton() -> None:
    backend = BACKENDS["triton"]()
    for stored in STORED.values():
        for shape, runs, window in (((6, 2, 5, 1), MIXED, 7), ((8, 1, 24, 16), ((70, 1), (3, 1)), None)):
            case = make(runs, shape, torch.float32, stored, window=window, junk=float("nan"))
            torch.testing.assert_close(case.attend(backend, window).double(), case.expected(window), rtol=0, atol=2e-6)


def test_triton_interpreted_on_the_cpu() -> None:
    """Its results; that it compiles for a GPU, only a GPU shows. Triton must be told before it is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-c", "from test_infer_attention import check_triton; check_triton()"]
    subprocess.run(command, check=True, cwd=Path(__file__).parent, env={**os.environ, "TRITON_INTERPRET": "1"})


def test_unknown_names_and_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cpu'"):
        choose("cpus", CPU, torch.float32)
    assert "for the CPU" in str(CpuAttention().refusal(torch.device("meta"), torch.float32))
    assert "float16" in str(CpuAttention().refusal(CPU, torch.float16))
    with pytest.raises(CompileError):
        compiled(Path(__file__), compilers=("no-such-compiler",))
