"""From a command to its ranks: start them here, or be one of them."""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from launch.env import Placement, detect
from launch.local import run_local
from launch.meeting import connect, disconnect
from launch.memory import keep_freed_memory
from parallel import comm
from parallel.errors import ConfigError, RankError, Refusal, refuse
from parallel.mesh import Layout, Mesh
from parallel.native import thread_limit

__all__ = ["Stop", "check_world", "choose_device", "first_alone", "on_ranks", "stop_signals"]

ECHO_S = 2.0


def on_ranks(
    command: Sequence[str], layout: Layout, device: str, body: Callable[[Mesh], int], *, grace_s: float = 10.0
) -> int:
    """Run ``body`` on every rank of a layout.

    Started bare with a layout of one rank, this process is it. Started bare with a larger one, this process starts
    ``python -m launch command`` once a rank and waits. Started by torchrun, MPI, SLURM or ourselves, it is one rank.

    Raises:
        ConfigError: what :func:`check_world` finds.
    """
    place = check_world(layout, device)
    if place is None and layout.world > 1:
        return run_local([sys.executable, "-m", "launch", *command], layout.world, environ=os.environ, grace_s=grace_s)
    keep_freed_memory()
    if 0 < (limit := thread_limit()) < torch.get_num_threads():
        torch.set_num_threads(limit)
    chosen = choose_device(device, place.local_rank if place else 0)
    if place is None or place.world == 1:
        return body(Mesh.build(layout, chosen))
    connect(place, chosen)
    result = body(Mesh.build(layout, chosen))
    disconnect()
    return result


def check_world(layout: Layout, device: str) -> Placement | None:
    """This process's place, after a check that a layout can be had here; None if it was started bare.

    Raises:
        ConfigError: the starter's world is not the layout's, or CUDA is asked for and is not there.
    """
    place, problems = detect(os.environ), list[str]()
    if place is not None and place.world != layout.world:
        problems.append(
            f"{place.source} started {place.world} ranks, but layout pp={layout.pp} dp={layout.dp} cp={layout.cp} "
            f"tp={layout.tp} needs {layout.world}; the nearest layout that works has dp={_nearest_dp(layout, place)}"
        )
    if device == "cuda" and not torch.cuda.is_available():
        problems.append("device = 'cuda': torch sees no CUDA device; use device = 'cpu'")
    local = layout.world if place is None else place.local_world
    if device != "cpu" and torch.cuda.is_available() and local > torch.cuda.device_count():
        problems.append(
            f"{local} ranks on this machine, which has {torch.cuda.device_count()} GPUs; use device = 'cpu'"
        )
    refuse(ConfigError, problems)
    return place


def first_alone(mesh: Mesh, work: Callable[[], None]) -> None:
    """Run ``work`` on rank 0 while the others wait; if it is refused there, every rank ends.

    Raises:
        Refusal: on rank 0, what ``work`` raised; RankError on the others.
    """
    refusal: Refusal | None = None
    if mesh.rank == 0:
        try:
            work()
        except Refusal as error:
            refusal = error
    verdict = comm.gather_json(refusal is None, mesh.world)
    if refusal is not None:
        raise refusal
    if not verdict[0]:
        raise RankError("rank 0 refused the input")


def _nearest_dp(layout: Layout, place: Placement) -> str:
    rest = layout.world // layout.dp
    return str(place.world // rest) if place.world % rest == 0 else f"1 and {place.world} ranks shared by tp"


def choose_device(name: str, local_rank: int) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device of this rank.

    :func:`check_world` has made sure that it is there.
    """
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


@dataclass
class Stop:
    """Whether SIGINT or SIGTERM has asked this process to stop."""

    asked: bool = False

    def __call__(self) -> bool:
        return self.asked


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into a request; the second does what it always did.

    torchrun and its like pass on a signal that their ranks may have got themselves (from a terminal, from SLURM): under
    them a second one counts from two seconds after the first.
    """
    stop, previous, asked_at = Stop(), dict[int, Any](), 0.0
    place = detect(os.environ)
    echo_s = 0.0 if place is None or place.source == "lockstep" else ECHO_S

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def note(number: int, frame: types.FrameType | None) -> None:
        nonlocal asked_at
        if not stop.asked:
            stop.asked, asked_at = True, time.monotonic()
        elif time.monotonic() - asked_at >= echo_s:
            restore()
            os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()
