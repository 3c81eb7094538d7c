"""``lockstep COMMAND ...`` and ``python -m launch COMMAND ...``: the same program."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from launch.local import run_rank
from launch.spellings import foreign_spellings, take
from parallel.config import Option, parse_flags
from parallel.registry import Registry

__all__ = ["Command", "command_line", "help_text", "in_groups", "main", "missing_folder", "positionals"]

Command = Callable[[Sequence[str]], int]
"""A program: the arguments after its name -> exit code."""

COMMANDS: Registry[Command] = Registry(
    "command",
    {
        "train": "launch.train:main",
        "export": "launch.export:main",
        "import": "launch.foreign:main",
        "reshard": "launch.reshard:main",
        "compare": "launch.compare:main",
        "generate": "launch.generate:main",
        "serve": "launch.serve:main",
        "verify": "launch.verify:main",
        "draw": "launch.draw:main",
        "bench": "launch.bench.command:main",
    },
)

USAGE = """lockstep: train and serve large transformers; the answer does not depend on the layout

  lockstep train RECIPE [--layout.tp 2 --layout.dp 2 --steps 100 --precision bf16 --out DIR ...]
  lockstep export RUN MODEL_DIR            a run's latest checkpoint as a Hugging Face folder
  lockstep import CHECKPOINT MODEL_DIR --config FOLDER     the same from a checkpoint of DeepSpeed or torch
  lockstep reshard RUN NEW_RUN --layout.dp 4 ...    a run's latest checkpoint, written by another layout
  lockstep compare ONE OTHER               are two checkpoints the same, bit for bit?
  lockstep generate MODEL_DIR --prompt TEXT [--layout.tp 2 ...]
  lockstep serve MODEL_DIR [--port 8000 --layout.tp 2 ...]    OpenAI-compatible server
  lockstep verify MODEL_DIR_OR_RECIPE --layout.tp 2 ...    is this layout equal to one device?
  lockstep bench serve URL|MODEL_DIR [--rates 1,2,4 ...]    latency and throughput of a server under load
  lockstep draw SCHEDULE [--stages 4 --microbatches 8 --out x.svg ...]    a pipeline schedule, simulated

RECIPE is a TOML file or the name of a built-in one. Started bare, a layout of several ranks starts them on this
machine; under torchrun, mpirun or srun each process is one rank. `lockstep COMMAND --help` lists every option.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; 2 for input that was refused."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [arguments[1], "--help"]
    if arguments[:1] == ["--version"]:
        print(f"lockstep {version('lockstep')}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2

    def run() -> int:
        try:
            with _importing():
                command = COMMANDS[arguments[0]]
            return command(arguments[1:])
        except BrokenPipeError:  # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE

    return run_rank(run)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Without collections of garbage, a sixth of the time; Ctrl-C just ends the process, as torch may swallow it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with _ended_by_interrupts():
            yield
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def _ended_by_interrupts() -> Iterator[None]:
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def command_line(
    arguments: Sequence[str], config: Any, refused: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, Any], list[str]]:
    """:func:`~parallel.config.parse_flags`, and what of it this program cannot honour, said in its own words.

    Args:
        arguments: after the command's name.
        config: of the program, with its defaults.
        refused: options of ``config`` that this program cannot use, and why; what of them is given is a problem.
    """
    given, table, problems = parse_flags(arguments)
    for name, why in (refused or {}).items():
        if take(table, name) is not None:
            problems.append(f"--{name.replace('_', '-')}: {why}")
    return given, table, problems + foreign_spellings(table, config)


def help_text(usage: str, leaves: Sequence[Option], without: Iterable[str] = ()) -> str:
    """Usage, then one line an option: name, default, documentation; ``without``: options and groups left out."""
    hidden = tuple(without)
    shown = [leaf for leaf in leaves if not in_groups(leaf.name, hidden)]
    lines = [usage, "", "options:"]
    for leaf in shown:
        head = f"  --{leaf.name.replace('_', '-')} {_as_typed(leaf.default) or '...'}"
        choices = get_args(leaf.type) if get_origin(leaf.type) is Literal else ()
        doc = leaf.doc if all(choice in leaf.doc for choice in choices) else f"{leaf.doc} [{' | '.join(choices)}]"
        lines.append(f"{head:<42} {_hyphens(doc, leaves)}")
    return "\n".join(lines)


def in_groups(name: str, groups: Iterable[str]) -> bool:
    """Whether an option is one of these, or in a group that is."""
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def _as_typed(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(map(_as_typed, default))
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)


def _hyphens(doc: str, leaves: Sequence[Option]) -> str:
    """Documentation that speaks of options as they are typed."""
    names = {leaf.name for leaf in leaves} | {leaf.name.rpartition(".")[2] for leaf in leaves}
    spelt = lambda word: word[0].replace("_", "-") if word[0].rpartition(".")[2] in names else word[0]  # noqa: E731
    return re.sub(r"\b[a-z0-9.]+_[a-z0-9_.]*[a-z0-9]", spelt, doc)


def missing_folder(name: str) -> list[str]:
    """A problem, if there is no folder of that name (that none is named is another)."""
    return [f"{name}: no such folder"] if name and not Path(name).is_dir() else []


def positionals(names: Sequence[str], given: Sequence[str], problems: list[str]) -> list[str]:
    """The positional arguments; a problem is noted where their number is wrong."""
    if len(given) != len(names):
        problems.append(f"expected {' '.join(names)}, got {' '.join(given) or 'nothing'}")
    return [*given, *[""] * len(names)][: len(names)]
