"""``lockstep COMMAND ...`` and ``python -m launch COMMAND ...``: the same program."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from launch.local import run_rank
from parallel.config import Option
from parallel.registry import Registry

__all__ = ["Command", "help_text", "main", "positionals"]

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
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2

    def run() -> int:
        try:
            with _ended_by_interrupts():
                command = COMMANDS[arguments[0]]
            return command(arguments[1:])
        except BrokenPipeError:  # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE

    return run_rank(run)


@contextlib.contextmanager
def _ended_by_interrupts() -> Iterator[None]:
    """Ctrl-C just ends the process meanwhile: what torch imports may swallow a KeyboardInterrupt."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def help_text(usage: str, leaves: Sequence[Option]) -> str:
    """Usage, then one line an option: name, default, documentation."""
    lines = [usage, "", "options:"]
    for leaf in leaves:
        default = ",".join(map(str, leaf.default)) if isinstance(leaf.default, tuple) else str(leaf.default)
        head = f"  --{leaf.name} {default}" if default else f"  --{leaf.name} ..."
        lines.append(f"{head:<42} {leaf.doc}")
    return "\n".join(lines)


def positionals(names: Sequence[str], given: Sequence[str], problems: list[str]) -> list[str]:
    """The positional arguments; a problem is noted where their number is wrong."""
    if len(given) != len(names):
        problems.append(f"expected {' '.join(names)}, got {' '.join(given) or 'nothing'}")
    return [*given, *[""] * len(names)][: len(names)]
