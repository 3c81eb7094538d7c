"""Checkpoints: each rank's fragments in safetensors, one manifest in JSON, published by a rename.

A checkpoint is a folder ``step-00000100`` with ``rank-*.safetensors``, of a rank one to four (1-D tensors
``parameter|what|start``: elements ``start`` and on of the flattened piece that a rank has of a parameter or of its
optimizer state) and ``manifest.json``: step, tokens, configuration, the layout and the shard table that cut the
tensors, the SHA-256 of every file and of itself. The file ``latest`` beside it names the newest complete one. Any
layout can read any other's.
"""

from __future__ import annotations

from zero.checkpoint.compare import Comparison, compare
from zero.checkpoint.publish import latest
from zero.checkpoint.reader import Checkpoint
from zero.checkpoint.resume import Resumed, load, newest_whole, resume
from zero.checkpoint.saver import Saver, save

__all__ = [
    "Checkpoint",
    "Comparison",
    "Resumed",
    "Saver",
    "compare",
    "latest",
    "load",
    "newest_whole",
    "resume",
    "save",
]
