"""A safetensors file of which one tensor at a time is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["write_file"]

_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""Names of types in the format, of those that weights are stored in."""


def write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write tensors of one type one after the other.

    Args:
        shapes: of all of them, by name, in the order in which they come.
        tensors: each on the CPU and contiguous; the next one is asked for when the last one is in the file.

    Raises:
        ValueError: they do not come as announced.
        OSError: the disk does not allow it.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entry: dict[str, Any] = {"dtype": _KINDS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    left = iter(shapes.items())
    with path.open("wb", buffering=0) as file:
        _write(file, memoryview(len(text).to_bytes(8, "little") + text))
        for name, tensor in tensors:
            if next(left, None) != (name, tuple(tensor.shape)) or tensor.dtype != dtype:
                raise ValueError(f"{path}: {name} {tuple(tensor.shape)} of {tensor.dtype} was not announced here")
            _write(file, tensor.reshape(-1).view(torch.uint8).numpy().data)
        if missing := next(left, None):
            raise ValueError(f"{path}: {missing[0]} was announced and did not come")


def _write(file: FileIO, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]
