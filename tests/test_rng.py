"""Counter-based random numbers: pinned values, their distribution, and that nothing but key and index matters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from parallel import rng

N = 1 << 17
MASK = (1 << 64) - 1
KEY = rng.key(1234, "init", "layers.0.attention.qkv.weight")


def splitmix(state: int) -> int:
    """The output function of SplitMix64 in plain whole numbers."""
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_bits_are_those_of_splitmix64() -> None:
    golden = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [int(b) & MASK for b in rng.bits(0, torch.arange(1, 5))] == golden
    indices = [0, 1, 2, 65537, 2**31, 2**32 + 5, 2**40, 2**62, -1]
    for draw in (0, 1, KEY, MASK, 1 << 63):
        got = [int(b) & MASK for b in rng.bits(draw, torch.tensor(indices))]
        assert got == [splitmix(draw + i * 0x9E3779B97F4A7C15) for i in indices]


def test_golden_values() -> None:
    assert rng.key() == GOLDEN["key()"]
    assert rng.key(0, "init", "x") == GOLDEN["key"]
    index = torch.tensor([0, 1, 2, 10**12])
    assert [x.hex() for x in rng.uniform(7, index).tolist()] == GOLDEN["uniform"]
    assert [x.hex() for x in rng.normal(7, index).tolist()] == GOLDEN["normal"]
    rows = rng.keep_mask(7, torch.arange(4)[:, None], torch.arange(16), 0.5)
    assert ["".join("01"[int(x)] for x in row) for row in rows] == GOLDEN["keep"]


def test_keys_tell_their_parts_apart() -> None:
    parts: list[tuple[int | str, ...]] = [(), (1,), ("1",), (1, 1), (11,), ("a", "b"), ("ab",), ("a", "b", ""), (-1,)]
    keys = [rng.key(*p) for p in parts]
    assert len(set(keys)) == len(parts)
    assert all(0 <= key <= MASK for key in keys)
    assert sum(bin(rng.key(a) ^ rng.key(a + 1)).count("1") for a in range(400)) / 400 == pytest.approx(32, abs=1)


def test_uniform_has_the_right_moments_and_is_flat() -> None:
    x = rng.uniform(KEY, torch.arange(N))
    assert 0 <= x.min() < 1e-4
    assert 1 - 1e-4 < x.max() < 1
    for power in range(1, 5):
        spread = (1 / (2 * power + 1) - 1 / (power + 1) ** 2) ** 0.5
        assert abs(x.pow(power).mean() - 1 / (power + 1)) < 5 * spread / N**0.5
    counts = torch.histc(x, 256, 0, 1)
    chi_square = ((counts - N / 256) ** 2 / (N / 256)).sum()
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5
    assert torch.equal(x * 2**53, (x * 2**53).round())


def test_normal_has_the_right_moments() -> None:
    x = rng.normal(KEY, torch.arange(N))
    assert abs(x.mean()) < 5 / N**0.5
    assert abs(x.var() - 1) < 5 * (2 / N) ** 0.5
    assert abs(x.pow(3).mean()) < 5 * (15 / N) ** 0.5
    assert abs(x.pow(4).mean() - 2.9) < 5 * (96 / N) ** 0.5  # twelve uniforms: excess kurtosis -1.2 / 12
    assert x.abs().max() < 6
    for bound in (0.5, 1.0, 2.0, 3.0):
        share = math.erfc(bound / 2**0.5)
        assert abs((x.abs() > bound).double().mean() / share - 1) < (0.2 if bound == 3 else 0.05)


@pytest.mark.parametrize("lag", [1, 2, 3, 255, 256, 1023, 4096, 65537])
def test_neighbours_are_not_correlated(lag: int) -> None:
    for draw in (KEY, 0):
        index = torch.arange(N)
        for x in (rng.uniform(draw, index) - 0.5, rng.normal(draw, index)):
            x = x / x.std()
            assert abs((x[lag:] * x[:-lag]).mean()) < 5 / (N - lag) ** 0.5
    bits = rng.bits(KEY, torch.arange(20_000 + lag))
    flipped = sum(((bits[lag:] ^ bits[:20_000]) >> bit & 1).double().mean() for bit in range(64)) / 64
    assert abs(flipped - 0.5) < 5 * 0.5 / (64 * 20_000) ** 0.5


def test_keys_and_lanes_are_not_correlated() -> None:
    index = torch.arange(N)
    names = [rng.key(3, step, place) for step in (0, 1) for place in ("layers.0.mlp", "layers.1.mlp")]
    draws = [*names, 0, 1, KEY, KEY + 1, *((KEY + lane * 0xD1342543DE82EF95) & MASK for lane in (1, 2))]
    columns = torch.stack([rng.normal(draw, index) for draw in draws])
    correlations = torch.corrcoef(columns) - torch.eye(len(draws))
    assert correlations[8:, 6].abs().max() < 0.7  # these share lanes with KEY, by their construction
    correlations[6:, 6:] = 0
    assert correlations.abs().max() < 5 / N**0.5
    for draw in (KEY, 0):
        z = rng.bits(draw, index)
        lanes = torch.stack([(z >> shift & 0xFFFF).double() for shift in (0, 16, 32, 48)])
        assert (torch.corrcoef(lanes) - torch.eye(4)).abs().max() < 5 / N**0.5


def test_only_the_index_matters() -> None:
    index = torch.arange(100_003)
    shuffled = torch.randperm(index.numel(), generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    for draw in (rng.uniform, rng.normal, rng.bits):
        whole = draw(KEY, index)
        assert torch.equal(torch.cat([draw(KEY, part) for part in index.split(777)]), whole)
        assert torch.equal(draw(KEY, index[shuffled]), whole[shuffled])
        assert torch.equal(draw(KEY, index.view(1, -1, 1))[0, :, 0], whole)
        assert torch.equal(draw(KEY, index[::3]), whole[::3])
        try:
            torch.set_num_threads(2 if threads == 1 else 1)
            assert torch.equal(draw(KEY, index), whole)
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(index, torch.arange(100_003)), "the index was written over"


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.9])
def test_keep_mask_keeps_its_share(drop: float) -> None:
    rows, columns = torch.arange(1000, 2000)[:, None], torch.arange(512)
    keep = rng.keep_mask(KEY, rows, columns, drop)
    assert keep.dtype == torch.bool
    assert keep.shape == (1000, 512)
    spread = 5 * (drop * (1 - drop)) ** 0.5
    assert abs(keep.double().mean() - (1 - drop)) <= spread / keep.numel() ** 0.5
    assert (keep.double().mean(0) - (1 - drop)).abs().max() <= spread / 1000**0.5
    assert (keep.double().mean(1) - (1 - drop)).abs().max() <= spread / 512**0.5
    assert torch.equal(rng.keep_mask(KEY, rows[300:305], columns[7:99], drop), keep[300:305, 7:99])
    for mine, other in ((keep[1:], keep[:-1]), (keep[:, 1:], keep[:, :-1])):
        both = (mine & other).double().mean()
        assert abs(both - (1 - drop) ** 2) <= spread * 2 / mine.numel() ** 0.5


def test_a_lower_probability_drops_a_subset() -> None:
    rows, columns = torch.arange(100)[:, None], torch.arange(64)
    masks = [rng.keep_mask(KEY, rows, columns, drop) for drop in (0.1, 0.3, 0.6)]
    assert torch.equal(masks[1] & masks[0], masks[1])
    assert torch.equal(masks[2] & masks[1], masks[2])
    assert not torch.equal(rng.keep_mask(KEY + 1, rows, columns, 0.3), masks[1])


GOLDEN: dict[str, Any] = {
    "key()": 13020603013274838756,
    "key": 14887001641189676468,
    "uniform": ["0x1.2ae30237b17d8p-4", "0x1.8f2f879164c82p-2", "0x1.130f35fd0f180p-6", "0x1.1df0876dddb1ap-2"],
    "normal": ["-0x1.dbac0000edd60p-1", "0x1.afe00000d7f00p-1", "-0x1.ef280000f7940p-3", "0x1.d3a00000e9d00p-4"],
    "keep": ["0011001001100010", "1000110100001011", "1101101001000110", "1001000001010001"],
}
