"""``--zero.backend deepspeed``: what DeepSpeed's own engine needs of this machine, and what it is given."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.env import detect
from launch.recipe import Recipe
from parallel.errors import ConfigError, refuse
from parallel.mesh import Mesh
from parallel.models.decoder import Decoder
from zero.deepspeed import read_deepspeed
from zero.deepspeed_document import engine_document, on_disk
from zero.deepspeed_engine import UnderDeepSpeed, load_deepspeed

__all__ = ["check_deepspeed", "deepspeed_optimizer"]

_WANTED = "zero.backend = deepspeed"


def check_deepspeed(recipe: Recipe) -> None:
    """Refuse, before a rank does anything, what cannot be done here; else set what DeepSpeed reads of the environment.

    Raises:
        ConfigError: DeepSpeed or something that it needs is not there.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"{_WANTED}: it is not installed: pip install 'lockstep[deepspeed]'")
    on_cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    beside = Path(sys.executable).parent
    if shutil.which("ninja") is None and (beside / "ninja").exists():  # an environment that is not activated
        os.environ["PATH"] = os.pathsep.join([str(beside), os.environ.get("PATH", os.defpath)])
    disk = [part for part in ("offload_optimizer", "offload_param") if on_disk(_document(recipe), part)]
    problems = [*(_tools() if on_cpu or disk else ())]
    if disk and recipe.zero.stage < 3:
        problems.append(f"zero.stage = {recipe.zero.stage}: DeepSpeed's offload to nvme needs stage 3")
    refuse(ConfigError, problems or (_disk_problems(recipe, disk) if disk else ()))


def _tools() -> Iterator[str]:
    compiler = os.environ.get("CXX", "g++")
    for tool, how in (("ninja", "pip install ninja"), (compiler, "or set CXX to a compiler of C++")):
        if shutil.which(tool) is None:
            yield f"{_WANTED}: it builds an extension first and needs {tool}, which is not here: {how}"


def _disk_problems(recipe: Recipe, parts: Sequence[str]) -> Iterator[str]:
    accelerator = load_deepspeed("deepspeed.accelerator").get_accelerator()
    if "offload_param" in parts and recipe.precision == "fp32" and not accelerator.is_fp16_supported():
        yield (
            f"{_WANTED}: on this device it rounds the parameters that it has on a disk to bf16; the nearest that works "
            "are --precision bf16, and offload_optimizer alone"
        )
    builder = accelerator.create_op_builder("AsyncIOBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        yield f"{_WANTED}: offload to nvme needs libaio: apt-get install libaio-dev, or dnf install libaio-devel"


def deepspeed_optimizer(recipe: Recipe, model: Decoder, mesh: Mesh) -> UnderDeepSpeed:
    """The engine of a recipe, for the trainer; every rank makes it at the same time."""
    place = detect(os.environ)
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank if place else 0))
    if not dist.is_initialized():  # it asks for a group even where one rank is alone
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    document = engine_document(_document(recipe), recipe.zero, recipe.optimizer, recipe.dtype)
    return UnderDeepSpeed(model, mesh, document, microbatches=recipe.microbatches, optimizer=recipe.optimizer)


def _document(recipe: Recipe) -> dict[str, Any]:
    return read_deepspeed(Path(recipe.zero.deepspeed)) if recipe.zero.deepspeed else {}
