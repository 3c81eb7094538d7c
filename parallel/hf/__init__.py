"""Hugging Face folders and our shards: read box by box, written a parameter at a time, every tensor accounted for."""

from __future__ import annotations

from parallel.hf.folder import check_folder, read_config
from parallel.hf.load import load_model
from parallel.hf.save import save_model, write_folder

__all__ = ["check_folder", "load_model", "read_config", "save_model", "write_folder"]
