"""What every benchmark prints and writes: tables, claims, and where they were measured."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["Claim", "add_report_options", "environment", "finish", "table"]


@dataclass(frozen=True, slots=True)
class Claim:
    """One figure and the target it is held against.

    Attributes:
        claim: what is measured, in words.
        figure: the number.
        target: in words, with the number.
        met: whether the figure meets it.
        note: spread or conditions.
    """

    claim: str
    figure: float
    target: str
    met: bool
    note: str = ""


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """``--json`` and ``--strict``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write numbers, date, hardware and versions here")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")


def environment() -> dict[str, Any]:
    """Date, hardware and versions."""
    names = ("torch", "transformers", "numpy", "safetensors", "lockstep")
    versions = {name: version for name in names if (version := _version(name))}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "load": list(os.getloadavg()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "versions": {"python": platform.python_version(), **versions},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows in aligned columns, the first to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def finish(args: argparse.Namespace, claims: Sequence[Claim], details: Any) -> int:
    """Print the claims, write ``--json``, and return the exit code."""
    print()
    rows = [(c.claim, f"{c.figure:.3f}", c.target, "yes" if c.met else "NO", c.note) for c in claims]
    print(table(("claim", "figure", "target", "met", "note"), rows), flush=True)
    if args.json is not None:
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
        command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        document = {
            "command": command,
            "environment": environment(),
            "settings": settings,
            "claims": [asdict(claim) for claim in claims],
            "details": details,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return int(args.strict and not all(claim.met for claim in claims))
