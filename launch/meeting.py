"""From a rank's place into the process group: the store where all meet, the roll call, and the way out."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store

from launch.env import Placement
from parallel.errors import RankError

__all__ = ["connect", "disconnect", "meet"]

_REACH_S = 20.0
"""Until rank 0 listens; with the start of Python before it, an address that is wrong is told within half a minute."""


def meet(placement: Placement, timeout_s: float = 30.0) -> Store:
    """The store that all ranks share, once every one of them is there.

    Args:
        placement: this rank's place.
        timeout_s: how long ranks wait for one another.

    Raises:
        RankError: the meeting place cannot be reached, its port is taken, a rank is missing or there twice.
    """
    deadline = time.monotonic() + timeout_s
    store = dist.PrefixStore(f"lockstep/{placement.round}", _open_store(placement, timeout_s))
    _roll_call(store, placement, deadline)
    return store


def connect(
    placement: Placement, device: torch.device | str, timeout_s: float = 30.0, *, collective_timeout_s: float = 1800.0
) -> None:
    """Join the default process group: gloo on the CPU; on CUDA, NCCL beside it.

    Args:
        placement: this rank's place.
        device: where this rank computes; a CUDA device without an index is the one of the local rank.
        timeout_s: how long ranks wait for one another here.
        collective_timeout_s: how long a collective of the group may take.

    Raises:
        RankError: as :func:`meet`.
    """
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(placement.local_rank if where.index is None else where.index)
    store = meet(placement, timeout_s)
    dist.init_process_group(
        "gloo" if where.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore("group", store),
        rank=placement.rank,
        world_size=placement.world,
        timeout=timedelta(seconds=collective_timeout_s),
    )


def disconnect() -> None:
    """Leave the default process group, rank 0 (which may hold the store) not before the others, if they still live."""
    if not dist.is_initialized():
        return
    with contextlib.suppress(RuntimeError):
        work = dist.barrier(async_op=True)
        if work is not None:
            work.wait(timedelta(seconds=10))
    dist.destroy_process_group()


def _open_store(placement: Placement, timeout_s: float) -> Store:
    """The store at the meeting place: served by rank 0 unless the starter serves it."""
    timeout = timedelta(seconds=timeout_s)
    host, port = placement.host, placement.port
    if placement.rank > 0 or placement.served:
        _await_listener(placement, timeout_s)
        return dist.TCPStore(host, port, is_master=False, timeout=timeout)
    listen_fd = placement.listen_fd
    try:
        if listen_fd is not None:
            os.set_inheritable(listen_fd, False)
        elif placement.local_world == placement.world:
            # Nobody outside this machine has business with the store, so it listens on no outer interface.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listen_fd = socket.create_server((host, port), family=family).detach()
        return dist.TCPStore(
            host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listen_fd
        )
    except (OSError, RuntimeError) as error:
        raise RankError(
            f"rank 0 cannot listen on {host}:{port}: {_first_line(error)}; set MASTER_PORT to a free port"
        ) from error


def _await_listener(placement: Placement, timeout_s: float) -> None:
    """Wait until something listens at the meeting place: torch's own wait fills the screen with stacks."""
    timeout_s = min(timeout_s, _REACH_S)
    deadline = time.monotonic() + timeout_s
    pause = 0.05
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((placement.host, placement.port), timeout=max(left, 0.01)).close()
            return
        except OSError as error:
            if left <= pause:
                raise RankError(
                    f"rank {placement.rank} of {placement.world} could not reach rank 0 at"
                    f" {placement.host}:{placement.port} within {timeout_s:g} s: {_first_line(error)}"
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _roll_call(store: Store, placement: Placement, deadline: float) -> None:
    """Wait until every rank is there, once each."""
    names = [f"here/{rank}" for rank in range(placement.world)]
    # A store that torchrun serves survives a restart and remembers the ranks of before.
    if store.add(names[placement.rank], 1) > 1 and not placement.served:
        raise RankError(f"rank {placement.rank} was started twice ({placement.source}), or restarted alone")
    try:
        store.wait(names, timedelta(seconds=max(deadline - time.monotonic(), 0.01)))
    except RuntimeError as error:
        missing = [str(rank) for rank, name in enumerate(names[:1000]) if not store.check([name])]
        raise RankError(
            f"rank {placement.rank} waited in vain at {placement.host}:{placement.port} for rank"
            f" {', '.join(missing[:20])} of {placement.world}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
