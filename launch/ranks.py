"""From a command to its ranks: start them here, or be one of them."""

from __future__ import annotations

import os
import signal
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from launch.env import Placement, connect, detect, disconnect
from launch.local import run_local
from launch.memory import keep_freed_memory
from parallel.errors import ConfigError
from parallel.mesh import Layout, Mesh

__all__ = ["Stop", "choose_device", "first_of_all", "on_ranks", "stop_signals"]


def on_ranks(
    command: Sequence[str], layout: Layout, device: str, body: Callable[[Mesh], int], *, grace_s: float = 10.0
) -> int:
    """Run ``body`` on every rank of a layout.

    Started bare with a layout of one rank, this process is it. Started bare with a larger one, this process starts
    ``python -m launch command`` once a rank and waits. Started by torchrun, MPI, SLURM or ourselves, it is one rank.

    Raises:
        ConfigError: the starter's world is not the layout's.
    """
    place = detect(os.environ)
    if place is None and layout.world > 1:
        return run_local([sys.executable, "-m", "launch", *command], layout.world, environ=os.environ, grace_s=grace_s)
    if place is not None and place.world != layout.world:
        raise ConfigError(
            f"{place.source} started {place.world} ranks, but layout pp={layout.pp} dp={layout.dp} cp={layout.cp} "
            f"tp={layout.tp} needs {layout.world}; the nearest layout that works has dp={_nearest_dp(layout, place)}"
        )
    keep_freed_memory()
    chosen = choose_device(device, place.local_rank if place else 0)
    if place is None or place.world == 1:
        return body(Mesh.build(layout, chosen))
    connect(place, chosen)
    result = body(Mesh.build(layout, chosen))
    disconnect()
    return result


def _nearest_dp(layout: Layout, place: Placement) -> str:
    rest = layout.world // layout.dp
    return str(place.world // rest) if place.world % rest == 0 else f"1 and {place.world} ranks shared by tp"


def first_of_all() -> bool:
    """Whether this process is the one that prepares what all ranks use: rank 0, or one that was started bare."""
    place = detect(os.environ)
    return place is None or place.rank == 0


def choose_device(name: str, local_rank: int) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device of this rank.

    Raises:
        ConfigError: CUDA is asked for and absent.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch sees no CUDA device; use device = 'cpu'")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"local rank {local_rank} has no GPU of its own: there are {torch.cuda.device_count()}")
    return torch.device("cuda", local_rank)


@dataclass
class Stop:
    """Whether SIGINT or SIGTERM has asked this process to stop."""

    asked: bool = False

    def __call__(self) -> bool:
        return self.asked


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into a request; the second does what it always did."""
    stop = Stop()
    previous: dict[int, object] = {}

    def note(number: int, frame: types.FrameType | None) -> None:
        stop.asked = True
        for signum, handler in previous.items():
            signal.signal(signum, handler)  # pyright: ignore[reportArgumentType]

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)  # pyright: ignore[reportArgumentType]
