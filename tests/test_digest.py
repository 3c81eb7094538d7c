"""SHA-256 of two streams at once, against hashlib."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.native import CompileError
from zero.checkpoint import digest
from zero.checkpoint.digest import Digests, lanes

LENGTHS = st.one_of(st.sampled_from([0, 1, 55, 56, 63, 64, 65, 119, 120, 128]), st.integers(0, 700))


def hashed(streams: list[list[bytes]]) -> list[str]:
    digests = Digests(len(streams))
    for pieces in zip(*streams, strict=True):
        digests.update([memoryview(piece) for piece in pieces])
    return digests.hexdigests()


@given(st.lists(st.tuples(LENGTHS, LENGTHS), max_size=5), st.randoms(use_true_random=False))
def test_two_streams(lengths, random) -> None:
    if lanes() == 1:
        pytest.skip("no compiler, or a processor without SHA instructions")
    streams = [[random.randbytes(pair[index]) for pair in lengths] for index in (0, 1)]
    assert hashed(streams) == [hashlib.sha256(b"".join(pieces)).hexdigest() for pieces in streams]


def test_longer_than_32_bits_of_length() -> None:
    if lanes() == 1:
        pytest.skip("no compiler, or a processor without SHA instructions")
    piece, times = bytes(1 << 26), 9  # 2 ** 32 bits and more
    want = hashlib.sha256()
    for _ in range(times):
        want.update(piece)
    assert hashed([[piece] * times, [b""] * (times - 1) + [b"abc"]]) == [
        want.hexdigest(),
        hashlib.sha256(b"abc").hexdigest(),
    ]


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise CompileError("none")

    monkeypatch.setattr(digest, "compiled", refused)
    digest._kernel.cache_clear()
    try:
        assert lanes() == 1
        assert hashed([[b"ab", b"c"]]) == [hashlib.sha256(b"abc").hexdigest()]
    finally:
        digest._kernel.cache_clear()
