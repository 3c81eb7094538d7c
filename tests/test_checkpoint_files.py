"""Files of checkpoints: written and hashed side by side past the page cache, and read without being mapped."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from parallel.errors import CheckpointError
from zero.checkpoint import buffers, writer
from zero.checkpoint.buffers import Buffers
from zero.checkpoint.image import DTYPES, Image, divided
from zero.checkpoint.tensors import TensorFile
from zero.checkpoint.writer import write_images
from zero.faults import Injector
from zero.fragment import Fragment

PAGE = 4096


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() <= before


def fragments(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Fragment]:
    generator = torch.Generator().manual_seed(3)
    return [Fragment(f"p{i}", "master", 3, torch.randn(n, generator=generator).to(dtype)) for i, n in enumerate(sizes)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Many chunks in a few kilobytes."""
    for module in (writer, buffers):
        monkeypatch.setattr(module, "CHUNK", 2 * PAGE)
    return 2 * PAGE


def written(folder: Path, parts: list[list[Fragment]], memory: Buffers, **options: Any) -> None:
    """Write files, and find them whole, with the hashes that were told."""
    images = [(folder / f"{number}.safetensors", Image(part)) for number, part in enumerate(parts)]
    told = write_images(images, memory, Injector(), 1, **options)
    for (path, _), part, (size, digest) in zip(images, parts, told, strict=True):
        assert (size, digest) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        read = load_file(path)
        assert read.keys() == {fragment.key for fragment in part}
        assert all(torch.equal(read[fragment.key], fragment.values) for fragment in part)


def test_files_are_what_the_library_reads_with_the_hash_of_what_was_written(tmp_path: Path) -> None:
    held = [
        Fragment("a.weight", "master", 0, torch.randn(1000, dtype=torch.bfloat16)),
        Fragment("a.weight", "exp_avg", 5, torch.randn(3, 7).t().reshape(-1)),
        Fragment("strided", "master", 0, torch.arange(20.0)[::2]),
        *(Fragment(str(dtype), "x", 0, torch.arange(9).to(dtype)) for dtype in DTYPES),
        Fragment("big", "master", 2, torch.arange(3 << 20, dtype=torch.float64)),
    ]
    written(tmp_path, [held], Buffers(pinned=False))
    path = tmp_path / "0.safetensors"
    with safe_open(path, "pt") as file:
        assert file.get_slice("big|master|2").get_shape() == [3 << 20]
        assert file.get_tensor("a.weight|master|0").dtype == torch.bfloat16
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("repeat", range(3))
def test_many_chunks_of_many_files_at_once(tmp_path: Path, small_chunks: int, repeat: int) -> None:
    """Memory goes round: a chunk that came back too early would spoil a file or its hash."""
    parts = [fragments(30_000 + 111 * k, 1, 7777 * k + repeat) for k in range(1, 6)]
    memory = Buffers(pinned=False)
    for _ in range(3):
        written(tmp_path, parts, memory)
    assert len(memory._free) <= 4 * len(parts), "four chunks a file, kept for the next time"
    assert len({chunk.data_ptr() for chunk in memory._free}) == len(memory._free)
    assert all(chunk.data_ptr() % PAGE == 0 for chunk in memory._free)


def test_behind_the_training_all_is_copied_before_anything_need_be_written(tmp_path: Path, small_chunks: int) -> None:
    gate = threading.Event()

    class Held(Injector):
        def at(self, point: str, step: int | None = None) -> None:
            assert gate.wait(20)

    held, memory = fragments(50_000), Buffers(pinned=False)
    expected, image = held[0].values.clone(), Image(held)
    copied = threading.Event()
    worker = threading.Thread(
        target=lambda: write_images([(tmp_path / "x", image)], memory, Held(), 1, copied.set), daemon=True
    )
    worker.start()
    assert copied.wait(20)
    held[0].values.fill_(7)
    gate.set()
    worker.join(20)
    assert torch.equal(load_file(tmp_path / "x")["p0|master|3"], expected)
    assert len(memory._free) in (most := -(-image.bytes // small_chunks), most - 1), (
        "one may be written before the gate"
    )


def refusing(number: int, when: Callable[[int], bool], call: Callable[..., Any]) -> Callable[..., Any]:
    """A call of the system that fails if ``when`` says so of the descriptor's, or its own, flags."""
    import fcntl

    def do(first: Any, second: Any, *rest: Any) -> Any:
        flags = second if isinstance(first, (str, Path)) else fcntl.fcntl(first, fcntl.F_GETFL)
        if when(flags):
            raise OSError(number, os.strerror(number))
        return call(first, second, *rest)

    return do


@pytest.mark.parametrize("name", ["open", "pwrite"])
def test_where_the_page_cache_cannot_be_passed_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: int, name: str
) -> None:
    """File systems refuse it with the file, or with the first write."""
    direct = lambda flags: bool(flags & os.O_DIRECT)  # noqa: E731
    monkeypatch.setattr(os, name, refusing(errno.EINVAL, direct, getattr(os, name)))
    written(tmp_path, [fragments(30_001), fragments(5)], Buffers(pinned=False))


@pytest.mark.parametrize("behind", [False, True])
def test_a_disk_that_fails_on_the_way_is_told_and_nothing_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: int, behind: bool
) -> None:
    calls = iter(range(1000))
    monkeypatch.setattr(os, "pwrite", refusing(errno.ENOSPC, lambda _: next(calls) >= 3, os.pwrite))
    images = [(tmp_path / str(number), Image(fragments(200_000))) for number in range(2)]
    memory = Buffers(pinned=False)
    copied: list[int] = []
    with pytest.raises(OSError, match="No space left"):
        write_images(images, memory, Injector(), 1, (lambda: copied.append(1)) if behind else None)
    taken = len(memory._free)
    assert len({chunk.data_ptr() for chunk in memory._free}) == taken > 0


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_parts_are_alike_in_size_and_hold_every_value_once(sizes: list[int], files: int) -> None:
    held = fragments(*sizes)
    parts = list(divided(held, files))
    assert len(parts) == files
    found: dict[str, list[torch.Tensor]] = {f.parameter: [] for f in held}
    for part in parts:
        for fragment in part:
            before = found[fragment.parameter]
            assert fragment.start == 3 + sum(map(len, before)) and len(fragment.values)
            before.append(fragment.values)
        assert abs(4 * sum(len(f.values) for f in part) - 4 * sum(sizes) / files) < 8
    for fragment in held:
        assert torch.equal(torch.cat(found[fragment.parameter]), fragment.values)


# Reading


@pytest.mark.parametrize("target", [torch.float32, torch.float64, torch.bfloat16])
def test_runs_are_read_where_they_belong(tmp_path: Path, target: torch.dtype) -> None:
    values = torch.randn(1000)
    save_file({"a": torch.arange(5), "b": values}, tmp_path / "x")
    file, into = TensorFile(tmp_path / "x"), torch.full((100,), 7, dtype=target)
    assert file.dtype("b") == torch.float32
    assert file.read("b", into, [(990, 0, 10), (3, 50, 20)]) == 120
    expected = torch.full((100,), 7, dtype=target)
    expected[:10], expected[50:70] = values[990:].to(target), values[3:23].to(target)
    assert torch.equal(into, expected)
    for name, runs in (("b", [(991, 0, 10)]), ("c", [(0, 0, 1)])):
        with pytest.raises(CheckpointError, match=str(tmp_path / "x")):
            file.read(name, into, runs)
    os.truncate(tmp_path / "x", 500)
    with pytest.raises(CheckpointError, match="the file ends"):
        file.read("b", into, [(900, 0, 10)])
    file.close()


def headers() -> Iterator[tuple[str, bytes]]:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for name, change in {
        "beyond the end": {"data_offsets": [8, 16]},
        "before the beginning": {"data_offsets": [-8, 0]},
        "another length": {"shape": [3]},
        "two dims": {"shape": [1, 2]},
        "no number": {"shape": ["2"]},
        "another type": {"dtype": "F31"},
        "no offsets": {"data_offsets": None},
    }.items():
        text = json.dumps({"a": entry | change}).encode()
        yield name, len(text).to_bytes(8, "little") + text + bytes(8)
    yield "a list", (2).to_bytes(8, "little") + b"[]" + bytes(8)
    yield "no JSON", (2).to_bytes(8, "little") + b"{]" + bytes(8)
    yield "nested", (100_000).to_bytes(8, "little") + b"[" * 100_000
    yield "too long", (1 << 60).to_bytes(8, "little") + b"{}"
    yield "empty", b""
    yield "short", b"abc"


@pytest.mark.parametrize(("name", "data"), [*headers()])
def test_a_header_that_lies_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        TensorFile(tmp_path / "x")
    with pytest.raises(CheckpointError, match="No such file"):
        TensorFile(tmp_path / "y")
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_read_takes_no_memory_but_its_own(tmp_path: Path) -> None:
    """Mapped pages would count, and be in the way of whoever is short of memory."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    held = [Fragment("a", "master", 0, torch.randn(16 << 20))]
    write_images([(tmp_path / "x", Image(held))], Buffers(pinned=False), Injector(), 1)
    into, file = held[0].values, TensorFile(tmp_path / "x")
    before = resident()
    file.read("a|master|0", into, [(start, start, 1 << 20) for start in range(0, 16 << 20, 1 << 20)])
    assert resident() - before < 4 << 20
    file.close()
