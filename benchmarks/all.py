"""Every benchmark with short settings, and one table of what they claim.

    python benchmarks/all.py [--steps 5 --only traffic,activations --results DIR --strict]

A figure of a few short steps on a busy machine is a hint; run the command beside it for the number.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contest import terminable
from report import environment, table

HERE = Path(__file__).resolve().parent


def commands(steps: int, warmup: int) -> dict[str, list[str]]:
    """Name -> script and options."""
    short = ["--steps", str(steps), "--warmup", str(warmup)]
    return {
        "traffic": ["traffic.py"],
        "activations": ["activations.py"],
        "train_single": ["train_single.py", *short],
        "train_single_tuned": ["train_single.py", *short, "--allocator", "tuned"],
        "train_tp": ["train_tp.py", *short],
        "train_dp": ["train_dp.py", *short],
        "schedules": ["schedules.py"],
        "pipeline": ["pipeline.py", *short],
        "plan": ["plan.py", "--steps", str(max(2, steps)), "--warmup", str(warmup)],
        "zero_bubble": ["zero_bubble.py", *short],
        "train_zero": ["train_zero.py", *short],
        "gathers": ["gathers.py", *short],
        "zero_memory": ["zero_memory.py"],
        "checkpoints": ["checkpoints.py", "--repeat", "3"],
        "scheduler": ["scheduler.py"],
        "attention": ["attention.py"],
        "sampling": ["sampling.py"],
        "prefix": ["prefix.py", "--rounds", str(max(3, steps))],
        "serving": ["serving.py", "--rounds", str(steps)],
        "serve_http": ["serve_http.py", "--rounds", str(steps), "--overload-s", "20"],
    }


def run(words: list[str], report: Path) -> tuple[int, list[dict[str, Any]]]:
    """Run one; its exit code and claims. However this ends, the script and what it started end first."""
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(HERE / words[0]), *words[1:], "--json", str(report)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True)
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    claims = json.loads(report.read_text())["claims"] if code == 0 else []
    return code, claims


def main() -> int:
    """Run, collect, print; 1 if a script failed, or with ``--strict`` if a target was missed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each contender")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--only", help="names, with commas: " + ", ".join(commands(1, 1)))
    parser.add_argument("--results", type=Path, metavar="DIR", help="keep the reports here, as NAME.json")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    args = parser.parse_args()
    chosen = commands(args.steps, args.warmup)
    if args.only:
        names = args.only.split(",")
        if unknown := [name for name in names if name not in chosen]:
            parser.error(f"--only: {unknown[0]!r} is none of {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in names}
    rows: list[tuple[str, ...]] = []
    failed: list[str] = []
    missed = 0
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch, terminable():
        folder = args.results or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name, words in chosen.items():
            line = shlex.join(["python", "benchmarks/" + words[0], *words[1:]])
            print(f"\n=== {line}\n", flush=True)
            started = time.monotonic()
            code, claims = run(words, folder / f"{name}.json")
            print(f"\n({time.monotonic() - started:.0f} s)", flush=True)
            missed += sum(not claim["met"] for claim in claims)
            for c in claims:
                rows.append((c["claim"], f"{c['figure']:.3f}", c["target"], "yes" if c["met"] else "NO", line))
            if code:
                failed.append(name)
                rows.append((f"{name} FAILED with exit code {code}", "", "", "NO", line))
    where = environment()
    print(f"\n=== Summary, {where['date']}, {where['cpu']}, {where['cores']} cores, {where['versions']}\n")
    print(table(("claim", "figure", "target", "met", "command"), rows))
    return int(bool(failed) or (args.strict and missed > 0))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
