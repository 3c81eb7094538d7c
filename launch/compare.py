"""``compare ONE OTHER``: are two checkpoints the same, bit for bit, whatever layouts wrote them?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.cli import positionals
from parallel.config import parse_flags
from parallel.errors import CheckpointError, ConfigError, refuse
from zero.checkpoint import Checkpoint, compare, latest

__all__ = ["main", "opened"]

USAGE = """lockstep compare ONE OTHER

Each is a run folder, of which the latest checkpoint is meant, or the folder of one checkpoint. Compared are weights,
optimizer state, step and tokens, and not how they are cut. Exit code 0: the same, bit for bit; 1: not."""
SHOWN = 20


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :data:`launch.cli.USAGE`. Exit code 1 where the two are not the same."""
    given, overrides, problems = parse_flags(arguments)
    if "help" in overrides:
        print(USAGE)
        return 0
    problems += [f"--{name}: compare has no options" for name in overrides]
    names = positionals(["ONE", "OTHER"], given, problems)
    refuse(ConfigError, problems)
    one, two = (opened(Path(name)) for name in names)
    refuse(CheckpointError, [*one.problems(), *two.problems()])
    for checkpoint in (one, two):
        layout = checkpoint.layout
        print(
            f"{checkpoint.folder}: pp={layout.pp} dp={layout.dp} cp={layout.cp} tp={layout.tp} "
            f"zero={checkpoint.manifest.zero_stage}, step {checkpoint.step}"
        )
    found = compare(one, two)
    print(*found.differences[:SHOWN], sep="\n", end="\n" if found.differences else "")
    if len(found.differences) > SHOWN:
        print(f"... and {len(found.differences) - SHOWN} more differences")
    print(
        f"{'NOT EQUAL' if found.differences else 'EQUAL, bit for bit'}: {found.parameters:,} parameters, "
        f"{found.tensors:,} tensors of weights and optimizer state, {found.values:,} values, {found.scalars:,} scalars"
    )
    return int(bool(found.differences))


def opened(folder: Path) -> Checkpoint:
    """A checkpoint, or the latest one of a run.

    Raises:
        CheckpointError: there is none, or its manifest cannot be read.
    """
    if (folder / "manifest.json").is_file():
        return Checkpoint.open(folder)
    found = latest(folder / "checkpoints")
    if found is None:
        raise CheckpointError(f"{folder}: neither a checkpoint nor a run that has one")
    return Checkpoint.open(found)
