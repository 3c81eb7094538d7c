"""A benchmark that is one program on several gloo ranks of this machine, and reports one JSON value."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contest import ContestError

from launch.env import detect
from launch.local import run_local, run_rank
from launch.meeting import connect, disconnect
from launch.memory import keep_freed_memory

__all__ = ["add_rank_options", "on_ranks"]


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """``--threads``, and what a rank is told by :func:`on_ranks`."""
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each rank")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)


def on_ranks(args: argparse.Namespace, world: int, measure: Callable[[], Any], *more: str) -> Any:
    """What ``measure`` returns on rank 0 of ``world`` ranks, each this script again; a rank itself ends here.

    Args:
        more: arguments that the ranks get beside this script's own.

    Raises:
        ContestError: a rank failed.
    """
    if args.report is not None:
        sys.exit(run_rank(lambda: _be_rank(args, measure)))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, str(Path(sys.argv[0]).resolve()), *sys.argv[1:], *more, "--report", str(report)]
        path = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        code = run_local(command, world, environ=environ, threads_per_rank=args.threads, grace_s=2.0)
        if code:
            raise ContestError(f"the ranks ended with exit code {code}")
        return json.loads(report.read_text())


def _be_rank(args: argparse.Namespace, measure: Callable[[], Any]) -> int:
    keep_freed_memory()
    import torch

    place = detect(os.environ)
    assert place is not None
    torch.set_num_threads(args.threads)
    connect(place, "cpu", 120.0)
    found = measure()
    if place.rank == 0:
        args.report.write_text(json.dumps(found))
    disconnect()
    return 0
