"""Checkpoints that others wrote, read without running anything that is in them.

They are pickles, which are programs; here a pickle is data that is looked at (``stream``), and only what stands for
tensors, shapes and dictionaries is made anything of. Tensors are read from their files one at a time.
"""

from __future__ import annotations

from pathlib import Path

from parallel.errors import CheckpointError
from zero.foreign.deepspeed import DeepSpeedCheckpoint
from zero.foreign.distributed import Distributed
from zero.foreign.files import INDEX, SINGLE, SUFFIXES, TorchFiles
from zero.foreign.source import Entry, Foreign

__all__ = ["Entry", "Foreign", "open_foreign"]


def open_foreign(path: Path) -> Foreign:
    """The checkpoint at a path, whoever wrote it.

    Args:
        path: a folder of torch.distributed.checkpoint or of DeepSpeed, a Hugging Face folder of .bin files, or a file
            of torch.save.

    Raises:
        CheckpointError: it is none of them; or it is damaged, with all that is found wrong.
    """
    if path.is_file() and path.suffix in SUFFIXES:
        return TorchFiles(path)
    if (path / ".metadata").is_file():
        return Distributed(path)
    if (path / "latest").is_file() or any(path.glob("*_model_states.pt")):
        return DeepSpeedCheckpoint(path)
    if (path / SINGLE).is_file() or (path / INDEX).is_file():
        return TorchFiles(path)
    kinds = f".metadata (torch), latest or *_model_states.pt (DeepSpeed), {SINGLE}; or a file {', '.join(SUFFIXES)}"
    raise CheckpointError(f"{path}: no checkpoint of others that is known: a folder with {kinds}")
