"""C kernels of inference against torch in float64, on odd shapes; bits by rows and threads; what torch still does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.kernels import inference
from parallel.kernels.inference import panels, panels_product
from parallel.kernels.norm import rms_norm, rms_norm_reference
from parallel.kernels.product import pack, packed_product
from parallel.kernels.rotary import rotary_, rotary_reference
from parallel.kernels.swiglu import swiglu, swiglu_reference
from parallel.native import CompileError
from parallel.tp.method import Packed

DTYPES = [torch.float32, torch.bfloat16]
ROWS = (1, 2, 3, 5, 6, 7, 13, 17, 24, 25, 63, 64, 70, 97, 193)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compiled() -> None:
    if inference.kernels() is None:
        pytest.skip("no compiler, or none with torch's threads")


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """In bfloat16 two roundings, in float32 a few, with the cancellation of a rotation."""
    assert got.dtype == dtype
    close = {"rtol": 0.016, "atol": 0.016} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(got.double(), want, **close)


def turned(x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    size = 2 * cos.shape[1]
    y = x.view(x.shape[0], -1, size)
    first = rotary_reference(y[:, :heads], cos.to(x.dtype).to(y.dtype), sin.to(x.dtype).to(y.dtype))
    return torch.cat([first, y[:, heads:]], 1).view(x.shape)


def rows_of(kind: str, size: int, dtype: torch.dtype) -> tuple[Callable[..., Tensor], Callable[..., Tensor], int]:
    """A kernel of rows, the same in float64, and the columns of its input."""
    weight, turns = tensor(size, seed=1).to(dtype), 9 * tensor(max(ROWS), size, seed=2)
    cos, sin = turns.cos(), turns.sin()
    if kind == "norm":
        return lambda x: rms_norm(x, weight, 1e-5), lambda x: rms_norm_reference(x, weight.double(), 1e-5), size
    if kind == "swiglu":
        return swiglu, swiglu_reference, 2 * size

    def exact(x: Tensor) -> Tensor:
        n = len(x)
        return turned(x, 3, cos[:n].to(dtype).double(), sin[:n].to(dtype).double())

    return lambda x: rotary_(x.clone(), 3, cos[: len(x)], sin[: len(x)]), exact, 10 * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["norm", "swiglu", "rotary"])
@pytest.mark.parametrize("size", [1, 5, 16, 33, 64, 123])
def test_rows(kind: str, size: int, dtype: torch.dtype, compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, exact, columns = rows_of(kind, size, dtype)
    x = (3 * tensor(max(ROWS), columns)).to(dtype)
    with torch.inference_mode():
        got = kernel(x)
        for rows in ROWS:
            torch.set_num_threads(1 + rows % 2)
            assert torch.equal(kernel(x[:rows]), got[:rows])
    near(got, exact(x.double()), dtype)
    with monkeypatch.context() as patch:
        patch.setattr(inference, "kernels", lambda: None)
        with torch.inference_mode():
            torch_form = kernel(x)
    if dtype == torch.bfloat16 and kind != "swiglu":
        assert (torch_form != got).double().mean() < 1e-3  # where a float lies between two, the sums' order may decide
    else:
        near(got, torch_form.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 16, 17, 48, 211, 8195])
def test_first_largest(size: int, dtype: torch.dtype, compiled: None) -> None:
    x = tensor(23, size).mul(4).round().to(dtype)  # many equals
    x[1], x[2, size // 2 :], x[3, -1], x[4, 0] = -torch.inf, -torch.inf, torch.inf, torch.nan
    x[5, size // 3], x[5, -1], x[6, -1], x[7] = torch.nan, torch.nan, torch.nan, 0.0
    x[7, ::2] = -0.0
    want = [(max(row, key=lambda v: (v != v, v)), row) for row in x.tolist()]
    with torch.inference_mode():
        found = inference.first_largest(x)
        assert found is not None
        assert inference.first_largest(x.double()) is None
        assert inference.first_largest(x.t()[:, :20]) is None or size == 1
    assert inference.first_largest(x) is None, "gradients may be recorded"
    for value, place, (largest, row) in zip(*(part.tolist() for part in found), want, strict=True):
        first = next(i for i, v in enumerate(row) if v == largest or (v != v and largest != largest))
        assert place == first and (value == largest or value != value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_extremes(dtype: torch.dtype, compiled: None) -> None:
    gate = torch.tensor([0.0, -0.0, 200, -200, 1e30, -1e30, -86, 88, 1e-30, float("inf"), float("nan")]).to(dtype)
    x = torch.cat([gate, torch.ones_like(gate)])[None]
    with torch.inference_mode():
        got = swiglu(x)
    want = swiglu_reference(x.double())
    torch.testing.assert_close(got.double(), want, rtol=0.01, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out,in_", [(1, 1), (5, 3), (64, 16), (97, 33), (130, 705), (200, 1500), (31, 2817)])
def test_product(out: int, in_: int, dtype: torch.dtype, compiled: None) -> None:
    weight, bias = tensor(out, in_, seed=1).to(dtype), tensor(out, seed=2).to(dtype)
    x, held = tensor(max(ROWS), in_).to(dtype), panels(weight)
    if held is None:
        pytest.skip("left to oneDNN on this processor")
    whole, plain = panels_product(x, held, bias), panels_product(x, held)
    for got, b in ((whole, bias), (plain, torch.zeros_like(bias))):
        want = F.linear(x.double(), weight.double(), b.double())
        terms = x.double().abs() @ weight.double().abs().t() + b.double().abs()
        bound = terms * 2**-21 + (want.abs() * 2**-8 if dtype == torch.bfloat16 else 0)
        assert got.dtype == dtype
        assert ((got.double() - want).abs() <= bound).all()
    for rows in ROWS:
        torch.set_num_threads(1 + rows % 2)
        assert torch.equal(panels_product(x[:rows], held, bias), whole[:rows])
        assert torch.equal(panels_product(x[-rows:], held, bias), whole[-rows:])
    assert torch.equal(panels_product(x.t().contiguous().t(), held), plain)
    assert torch.equal(panels_product(x[:12].view(3, 4, in_), held), plain[:12].view(3, 4, out))
    assert panels_product(x[:0], held).shape == (0, out)


def test_a_product_does_not_read_past_its_rows(compiled: None) -> None:
    """An odd number of bfloat16 inputs: the pair that the last one begins ends in the next row."""
    weight, x = tensor(7, 5).bfloat16(), tensor(3, 5, seed=1).bfloat16()
    held = panels(weight)
    if held is None:
        pytest.skip("left to oneDNN on this processor")
    x[1] = float("nan")
    got = panels_product(x, held)
    assert got[1].isnan().all()
    assert not got[::2].isnan().any()


def test_a_product_refuses_what_does_not_fit(compiled: None) -> None:
    held = panels(tensor(7, 6))
    if held is None:
        pytest.skip("left to oneDNN on this processor")
    for x, bias in (
        (tensor(2, 5), None),
        (tensor(2, 6).double(), None),
        (tensor(2, 6), tensor(6)),
        (tensor(2, 6), tensor(7).bfloat16()),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            panels_product(x, held, bias)
    assert panels(tensor(7, 6).double()) is None
    assert panels(torch.empty(7, 6, device="meta")) is None


def test_gradients_are_recorded_where_asked(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(inference, "kernels", never)
    x, weight = tensor(3, 8).requires_grad_(), tensor(8, seed=1).requires_grad_()
    turns = tensor(3, 2, seed=2)
    for y in (rms_norm(x, weight, 1e-5), swiglu(x), rotary_(x * 1, 2, turns.cos(), turns.sin())):
        y.sum().backward()
    assert x.grad is not None and weight.grad is not None
    with torch.no_grad():  # a forward that is done again for its gradient has the same bits
        assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x.detach().requires_grad_(), weight, 1e-5))


def test_what_is_left_to_torch(compiled: None) -> None:
    x, weight, turns = tensor(4, 16), tensor(16, seed=1), tensor(4, 2, seed=2)
    with torch.inference_mode():
        assert inference.norm(x.double(), weight.double(), 1e-5) is None
        assert inference.norm(x, weight.bfloat16(), 1e-5) is None
        assert inference.norm(x.t(), weight[:4], 1e-5) is None
        assert inference.norm(x, weight[:8], 1e-5) is None
        assert inference.swiglu_rows(x.t()) is None
        assert not inference.rotate_(x, 4, turns.double().cos(), turns.double().sin())
        assert not inference.rotate_(x, 5, turns.cos(), turns.sin())
        assert not inference.rotate_(x, 4, turns[:1].cos(), turns[:1].sin())
        assert inference.norm(x, weight, 1e-5) is not None


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise CompileError("none")

    monkeypatch.setattr(inference, "compiled", refused)
    inference.kernels.cache_clear()
    try:
        weight, x, turns = tensor(8, 6), tensor(3, 6, seed=1), tensor(3, 3, seed=2)
        assert panels(weight) is None
        method, held = Packed(), torch.nn.Parameter(weight.clone())
        method.finish(held, keep=True)
        with torch.inference_mode():
            near(method.product(x, held, None), F.linear(x.double(), weight.double()), torch.float32)
            near(rms_norm(x, weight[0], 1e-5), rms_norm_reference(x.double(), weight[0].double(), 1e-5), torch.float32)
            near(swiglu(x), swiglu_reference(x.double()), torch.float32)
            want = turned(x.double(), 1, turns.double().cos(), turns.double().sin())
            near(rotary_(x.clone(), 1, turns.cos(), turns.sin()), want, torch.float32)
    finally:
        inference.kernels.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_packed_multiplies(dtype: torch.dtype) -> None:
    weight, x = tensor(40, 24).to(dtype), tensor(3, 24, seed=1).to(dtype)
    packed = pack(weight)
    if packed is not None:
        got = packed_product(x, packed)
        torch.testing.assert_close(got, F.linear(x, weight), rtol=0.016, atol=1e-3)


def test_the_compiler_is_found() -> None:
    assert shutil.which("cc") is None or inference.kernels() is not None


THREADS = """
import os, time, torch
from parallel.native import let_go_of_threads
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(5)
x = torch.randn(300, 300)
before, want = count(), x @ x
during = count()
let_go_of_threads()
for _ in range(200):
    if count() == before: break
    time.sleep(0.01)
print(before, during, count(), torch.equal(x @ x, want))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_threads_that_wait_for_a_thread_are_let_go(compiled: None) -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    before, during, after, same = done.stdout.split()
    assert int(during) >= int(before) + 4
    assert after == before
    assert same == "True"


FEWER = """
import torch
from launch.ranks import on_ranks
from parallel.kernels.product import linear_product
from parallel.mesh import Layout

torch.set_num_threads(4)
def wrong(dtype):
    x, weight = torch.randn(64, 256, dtype=dtype), torch.randn(512, 256, dtype=dtype)
    got, want = linear_product(x, weight).double(), x.double() @ weight.double().T
    return not (got - want).abs().max() < 1
print(wrong(torch.float32), on_ranks([], Layout(), "cpu", lambda mesh: torch.get_num_threads()), wrong(torch.bfloat16))
"""


def test_numbers_are_right_where_openmp_gives_fewer_threads_than_torch_wants() -> None:
    environ = {**os.environ, "OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "2"}
    done = subprocess.run([sys.executable, "-c", FEWER], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.split() == ["False", "2", "False"]
