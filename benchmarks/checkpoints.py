"""Checkpoints: saves against the disk's own speed, saves behind the training, loading elsewhere, exporting.

    python benchmarks/checkpoints.py [--layers 28 --repeat 7 --only save-1,save-2,behind,load,export --json FILE]

The state is that of a Llama in float32 with Adam: 28 layers of the benchmarks' model are 91M parameters, 1.09 GB.

- save: one rank, and two (dp=2, ZeRO 1: each writes a half), in turn with plain writes and fsync of files of the same
  sizes by as many writers, past the page cache and through it (the faster is what the disk can do), and with
  torch.distributed.checkpoint.
- behind: steps of two ranks with a save behind them until it is durable, against as many steps without; in turn with
  torch.distributed.checkpoint.async_save. Blocked is what the training waits for: the call, and the optimizer for the
  rest of the copy. Where all cores are busy training, hashing and writing cost the steps some time as well: that is
  held against the peer.
- load: written at tp=2 dp=2 ZeRO 1, read by four ranks at dp=4 ZeRO 3; export: the same as a Hugging Face folder.

Files go to ``runs/`` of the checkout, or ``--folder``; that disk is what is measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from checkpoint_parts import PARTS
from contest import ContestError, terminable
from on_ranks import add_rank_options, on_ranks
from report import Claim, add_report_options, finish, table

OF_THE_DISK = 0.8
STALL = 0.05
BEYOND_MIB = 64.0
NEEDED = {"load": ("prepare",), "export": ("prepare",)}
CHOICES = ("save-1", "save-2", "behind", "load", "export")


def median_and_range(values: list[float], unit: float = 1.0) -> str:
    """In words."""
    return f"{statistics.median(values) * unit:.3g} ({min(values) * unit:.3g} .. {max(values) * unit:.3g})"


def claims_of_save(world: int, found: dict[str, Any]) -> list[Claim]:
    """Against the faster way to write, and the faster of the peer's settings."""
    seconds, size = found["seconds"], found["bytes"]
    rows = [
        (n, f"{statistics.median(s):.3f}", f"{min(s):.3f}", f"{max(s):.3f}", speed(size, s)) for n, s in seconds.items()
    ]
    files = ", ".join(f"{one / 1e6:.0f}" for one in found["file_bytes"])
    print(f"\nsave, {world} rank{'s' * (world > 1)}, {size / 1e9:.2f} GB in files of {files} MB")
    print(table(("", "median s", "least", "most", "GB/s"), rows), flush=True)

    def best(prefix: str) -> str:
        return min((n for n in seconds if n.startswith(prefix)), key=lambda name: statistics.median(seconds[name]))

    made = []
    for kind, below, least in (
        ("share of the disk's speed", best("disk"), OF_THE_DISK),
        ("speed / peer", best("torch"), 1.0),
    ):
        ratio = statistics.median(seconds[below]) / statistics.median(seconds["ours"])
        ratios = [other / ours for other, ours in zip(seconds[below], seconds["ours"], strict=True)]
        note = f"{below}; of neighbours {median_and_range(ratios)}, n={len(ratios)}"
        ranks = f"{world} rank{'s' * (world > 1)}"
        made.append(Claim(f"save, {ranks}, {kind}", ratio, f">= {least}", ratio >= least, note))
    return made


def speed(size: int, seconds: list[float]) -> str:
    """GB/s of the median."""
    return f"{size / statistics.median(seconds) / 1e9:.2f}"


def claims_of_behind(found: dict[str, Any]) -> list[Claim]:
    """Time that saves behind the training add to it, as a share of the time of a save that is waited for."""
    plain, whole = statistics.median(found["plain"]), statistics.median(found["waited_for"])
    print(f"\nbehind the training, {found['bytes'] / 1e9:.2f} GB, two ranks; step {median_and_range(found['plain'])} s")
    print(f"a save that is waited for {median_and_range(found['waited_for'])} s")
    rows, shares = [], {}
    for name, saves in found["behind"].items():
        blocked = [one["call"] + one["waited"] for one in saves]
        added = [one["call"] + sum(one["steps"]) - len(one["steps"]) * plain for one in saves]
        shares[name] = [value / whole for value in blocked], [value / whole for value in added]
        steps = statistics.median(len(one["steps"]) for one in saves)
        durable = statistics.median(one["durable_after"] for one in saves)
        rows.append(
            (name, median_and_range(blocked, 1e3), median_and_range(added, 1e3), f"{steps:g}", f"{durable:.2f}")
        )
    print(table(("", "blocked, ms", "added to all steps, ms", "steps until durable", "s"), rows), flush=True)
    made = []
    for index, what in enumerate(("save behind, training blocked", "save behind, all that it costs the steps")):
        medians = {name: statistics.median(values[index]) for name, values in shares.items()}
        ours, theirs = medians.pop("ours"), min(medians, key=lambda name: medians[name])
        spread = median_and_range(shares["ours"][index])
        note = f"{spread}, n={len(shares['ours'][index])}; best peer ({theirs}) {medians[theirs]:.3f}"
        most = medians[theirs] if index else STALL
        target = f"<= {most:.3f}" if index else f"< {STALL}"
        made.append(Claim(f"{what} / save that is waited for", ours, target, ours < most, note))
    return made


def claims_of_load(found: dict[str, Any]) -> list[Claim]:
    """Memory beyond what was loaded, and bytes read."""
    ranks, mib = found["ranks"], 1 << 20
    print(f"\nload at dp=4, ZeRO 3: {median_and_range(found['seconds'])} s")
    rows = [
        (f"rank {i}", *(f"{r[name] / mib:,.1f}" for name in ("needed", "read", "growth", "made", "beyond")))
        for i, r in enumerate(ranks)
    ]
    print(table(("MiB", "needed", "read", "grew by", "state made", "beyond"), rows), flush=True)
    beyond, read = max(r["beyond"] for r in ranks) / mib, max(r["read"] / r["needed"] for r in ranks)
    return [
        Claim("load elsewhere, MiB beyond the state, at the most", beyond, f"<= {BEYOND_MIB:g}", beyond <= BEYOND_MIB),
        Claim("load elsewhere, bytes read / needed", read, "<= 1", read <= 1),
    ]


def claims_of_export(found: dict[str, Any]) -> list[Claim]:
    """Memory."""
    beyond, largest = found["growth"] / (1 << 20), found["largest_parameter"] / (1 << 20)
    limit = BEYOND_MIB + 2 * largest
    note = f"largest parameter {largest:.0f} MiB, written {found['written'] / 1e6:.0f} MB in {found['seconds']:.2f} s"
    return [Claim("export, MiB at the most", beyond, f"<= {limit:.0f}", beyond <= limit, note)]


def main() -> int:
    """Measure, print, and return 0 if all went well."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=28, help="12 bytes of state a parameter")
    parser.add_argument("--documents", type=int, default=4, help="of 256 tokens, a step of the part `behind`")
    parser.add_argument("--repeat", type=int, default=7, help="how often each is measured")
    parser.add_argument(
        "--plain", type=int, default=4, help="steps without a save before each save behind the training"
    )
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--only", default=",".join(CHOICES), help="with commas")
    parser.add_argument("--folder", help="where files go; default: runs/ of the checkout, and they are removed")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)
    add_rank_options(parser)
    add_report_options(parser)
    args = parser.parse_args()
    if args.report is not None:
        on_ranks(args, args.world, lambda: PARTS[args.part][1](args))
    if unknown := set(args.only.split(",")) - set(CHOICES):
        parser.error(f"--only: {unknown.pop()!r} is none of {', '.join(CHOICES)}")
    runs = Path(__file__).resolve().parent.parent / "runs"
    runs.mkdir(exist_ok=True)
    details: dict[str, Any] = {}
    with terminable(), tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.folder or runs) as folder:
        for chosen in args.only.split(","):
            for part in (*NEEDED.get(chosen, ()), chosen):
                if part not in details:
                    world = PARTS[part][0]
                    more = ("--part", part, "--world", str(world), "--folder", folder)
                    details[part] = on_ranks(args, world, lambda: None, *more)
    claims: list[Claim] = []
    for part, found in details.items():
        if part.startswith("save"):
            claims += claims_of_save(PARTS[part][0], found)
        elif part != "prepare":
            claims += {"behind": claims_of_behind, "load": claims_of_load, "export": claims_of_export}[part](found)
    return finish(args, claims, details)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ContestError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
