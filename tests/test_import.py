"""Pickles are read as data: nothing in them runs, and whatever is wrong with them has a name."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from parallel.errors import CheckpointError
from zero.foreign import files, open_foreign
from zero.foreign.stream import Call, Stored, Symbol, Table, read_stream, shown

CANARY = "import pathlib; pathlib.Path({!r}).touch()"


class Bomb:
    """What runs code when a pickle is loaded."""

    def __init__(self, path: Path, inside: Any = None) -> None:
        self.path, self.inside = path, inside

    def __reduce__(self) -> Any:
        return exec, (CANARY.format(str(self.path)),)


def test_the_bomb_goes_off_where_pickles_are_loaded(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def plain(value: Any) -> Any:
    """What was read, in the types that were written."""
    if isinstance(value, Table):
        return {plain(key): plain(entry) for key, entry in value.pairs}
    return [*map(plain, value)] if isinstance(value, list) else value


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner).map(list),
    max_leaves=20,
)


@given(value=VALUES, protocol=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_values_are_read_as_pickle_wrote_them(value: Any, protocol: int) -> None:
    assert plain(read_stream(pickle.dumps(value, protocol), "x")) == value


@pytest.mark.parametrize("value", [b"abc", b"", b"x" * 1000, bytearray(b"abc")])
def test_bytes_are_read(value: Any) -> None:
    assert read_stream(pickle.dumps(value, 5), "x") == value
    assert read_stream(pickle.dumps(bytes(value), 3), "x") == value


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_imported_called_or_filled(tmp_path: Path, protocol: int) -> None:
    canary = tmp_path / "canary"
    value = {"a": Bomb(canary), "b": [os.system, defaultdict(list, x=1)], "c": OrderedDict(y=Bomb(canary))}
    found = read_stream(pickle.dumps(value, protocol), "x").named()
    call = found["a"]
    assert isinstance(call, Call) and call.path in ("builtins.exec", "__builtin__.exec")
    assert call.arguments == (CANARY.format(str(canary)),)
    system, table = found["b"]
    assert isinstance(system, Symbol) and system.name == "system"
    assert isinstance(table, Call) and table.items == [("x", 1)]
    assert not canary.exists()


def test_objects_keep_what_was_to_be_put_into_them() -> None:
    class_ = read_stream(b"\x80\x02cnowhere\nThing\n)\x81}q\x00X\x01\x00\x00\x00kK\x05sb.", "x")
    assert isinstance(class_, Call)
    assert (class_.path, class_.arguments) == ("nowhere.Thing", ())
    assert (class_.attribute("k"), class_.attribute("l", 3)) == (5, 3)
    assert isinstance(read_stream(b"(inowhere\nThing\np0\n.", "x"), Call)
    assert isinstance(read_stream(b"(cnowhere\nThing\nK\x01o.", "x"), Call)
    assert isinstance(read_stream(b"\x80\x02X\x01\x00\x00\x00kQ.", "x"), Stored)
    assert shown(class_) == "'nowhere.Thing(...)'"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"N",
        b"NN.",
        b"(N.",
        b"N.N",
        b"t.",
        b"h\x05.",
        b"\x80\x06N.",
        b"\x80\x02\x82\x01.",
        b"X\xff\xff\xff\xffabc.",
        b"]K\x01K\x02s.",
        b"(K\x01d.",
        b"K\x01K\x02\x93.",
        b"K\x01}b.",
        b"}K\x01a.",
        b"I" + b"9" * 5000 + b"\n.",
        b"\x85.",
        b"\x80\x05\x97.",
        b"(" * 5000 + b"N.",
        b"\xff",
    ],
)
def test_streams_that_are_none_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^where: not a pickle that can be read as data"):
        read_stream(data, "where")


def test_random_streams_are_read_or_refused() -> None:
    import pickletools

    codes = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
    generator = random.Random(1)
    outcomes = [0, 0]
    for _ in range(4000):
        parts = [
            generator.choice(codes) + generator.randbytes(generator.choice((0, 0, 0, 1, 2, 4)))
            for _ in range(generator.randrange(1, 40))
        ]
        try:
            read_stream(b"".join(parts) + b".", "x")
            outcomes[0] += 1
        except CheckpointError:
            outcomes[1] += 1
    assert outcomes[0] > 5 and outcomes[1] > 20


def tensors() -> dict[str, Tensor]:
    """Every type, and every way to stand in a storage."""
    torch.manual_seed(1)
    base = torch.randn(6, 8)
    floats = (torch.float64, torch.float16, torch.bfloat16)
    kinds = (*floats, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    return {
        "parameter": nn.Parameter(torch.randn(3, 4)),
        "transposed": base.t(),
        "rows": base[1:3],
        "columns": base[:, 2:5],
        "strided": base[::2, ::3],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "one": torch.randn(1, 5, 1),
        "bool": torch.randn(5) > 0,
        **{str(kind): (torch.randn(7) * 50).to(kind) for kind in kinds},
    }


def test_tensors_are_read_bit_for_bit(tmp_path: Path) -> None:
    saved = tensors()
    torch.save({"deep": {"er": saved}, "number": 3, "list": [1]}, tmp_path / "x.pt")
    source = open_foreign(tmp_path / "x.pt")
    assert source.entries.keys() == {f"deep.er.{name}" for name in saved}
    assert source.others == ("number", "list")
    for name, tensor in saved.items():
        found = source.read(f"deep.er.{name}")
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(found, tensor.detach()), name
        assert source.entries[f"deep.er.{name}"].shape == tuple(tensor.shape)


def test_checksums_are_compared_unless_there_are_none(tmp_path: Path) -> None:
    x = torch.arange(100.0)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": x}, tmp_path / "none.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(open_foreign(tmp_path / "none.pt").read("x"), x)
    torch.save({"x": x}, tmp_path / "sums.pt")
    data = bytearray((tmp_path / "sums.pt").read_bytes())
    data[data.index(x.numpy().tobytes()) + 100] ^= 1
    (tmp_path / "sums.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"sums\.pt: damaged: 'sums/data/0' does not have its checksum"):
        open_foreign(tmp_path / "sums.pt").read("x")


def rezipped(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """A copy of an archive with other contents."""
    target = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            if (data := change(name, old.read(name))) is not None:
                new.writestr(name, data)
    return target


ARCHIVES: dict[str, tuple[Callable[[str, bytes], bytes | None], int]] = {
    "compressed": (lambda name, data: data, zipfile.ZIP_DEFLATED),
    "not one of torch.save": (lambda name, data: None if "pkl" in name else data, 0),
    "another byte order": (lambda name, data: b"big" if "order" in name else data, 0),
    "storage '0' is not in the file": (lambda name, data: None if name.endswith("/0") else data, 0),
    "4 values up to 4 of a storage of 3": (lambda name, data: data[:12] if name.endswith("/0") else data, 0),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_archives_that_are_not_torchs_are_refused(tmp_path: Path, what: str) -> None:
    torch.save({"x": torch.zeros(4)}, tmp_path / "x.pt")
    path = rezipped(tmp_path / "x.pt", *ARCHIVES[what])
    with pytest.raises(CheckpointError) as caught:
        open_foreign(path)
    assert what in str(caught.value) and "changed.pt" in str(caught.value)


@pytest.mark.parametrize(
    ("size", "stride", "problem"),
    [
        ((1 << 40, 1 << 40), (0, 0), "values up to 1 of a storage of 4"),
        ((2, 3), (3, 1), "6 values up to 6 of a storage of 4"),
        ((4,), (1 << 40,), "of a storage of 4"),
        ((-1,), (1,), "holds 1 values"),
    ],
)
def test_tensors_that_reach_out_of_their_storage_are_refused(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], problem: str
) -> None:
    class Liar:
        def __reduce__(self) -> Any:
            storage = torch.storage.TypedStorage(
                wrap_storage=torch.zeros(4).untyped_storage(), dtype=torch.float32, _internal=True
            )
            return torch._utils._rebuild_tensor_v2, (storage, 0, size, stride, False, OrderedDict())

    torch.save({"x": Liar()}, tmp_path / "x.pt")
    try:
        source = open_foreign(tmp_path / "x.pt")
        assert source.entries == {} and source.others == ("x",)  # no tensor at all
    except CheckpointError as error:
        assert problem in str(error)


def test_dictionaries_in_one_another_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOST", 1000)
    inner: dict[str, Any] = {}
    for _ in range(14):
        inner = {str(key): inner for key in range(20)}
    torch.save(inner, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="names"):
        open_foreign(tmp_path / "x.pt")
    inner["me"] = inner
    torch.save(inner, tmp_path / "x.pt")
    with pytest.raises(CheckpointError):
        open_foreign(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "."])
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path, name: str) -> None:
    if name != ".":
        (tmp_path / name).write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError) as caught:
        open_foreign(tmp_path / name)
    assert str(tmp_path) in str(caught.value)
    torch.save([torch.zeros(1)], tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match=r"y\.pt: holds TensorRecord|y\.pt: holds"):
        open_foreign(tmp_path / "y.pt")
    torch.save({"x": torch.zeros(1)}, tmp_path / "z.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"z\.pt: not a whole zip of torch\.save"):
        open_foreign(tmp_path / "z.pt")


def test_flipped_bits_and_short_files_are_refused_or_change_nothing(tmp_path: Path) -> None:
    saved = {"a": torch.randn(5, 3), "b": torch.randn(40).bfloat16()}
    torch.save(saved, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    generator = random.Random(2)
    spoiled = [whole[: generator.randrange(len(whole))] for _ in range(40)]
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(generator.choice((1, 1, 3))):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        spoiled.append(bytes(data))
    refused = 0
    for data in spoiled:
        (tmp_path / "x.pt").write_bytes(data)
        try:
            source = open_foreign(tmp_path / "x.pt")
            for name in source.entries:
                assert torch.equal(source.read(name), saved[name])
        except CheckpointError as error:
            assert "x.pt" in str(error)
            refused += 1
    assert refused > 100
