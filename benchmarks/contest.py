"""A race of contenders that step in turn: A B A B ..., each in processes of its own, on the same work."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from report import add_report_options, table

__all__ = [
    "ContestError",
    "Entrant",
    "Result",
    "check_same_work",
    "details",
    "fastest",
    "options",
    "paired",
    "race",
    "show",
    "specification",
    "terminable",
    "weights",
]

HERE = Path(__file__).resolve().parent
TOKENS = 2048


class ContestError(Exception):
    """A contender failed, or did not do the same work."""


@dataclass(slots=True)
class Result:
    """What a contender did.

    Attributes:
        name, spec: of the contender.
        seconds: of each measured step.
        losses: of every step, warm-up included.
    """

    name: str
    spec: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


class Entrant:
    """A contender's processes, and the pipe to them."""

    def __init__(self, name: str, spec: dict[str, Any], timeout_s: float) -> None:
        self.name, self.timeout_s = name, timeout_s
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "contender.py"), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environ(),
            start_new_session=True,
        )

    def read(self) -> dict[str, Any]:
        """Its next answer.

        Raises:
            ContestError: it ended, or it says nothing for too long.
        """
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], self.timeout_s)[0]:
            raise ContestError(f"{self.name}: no answer within {self.timeout_s:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise ContestError(f"{self.name}: ended with exit code {self.process.wait()}")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        """Let it step once; seconds and loss."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"step\n")
            self.process.stdin.flush()
        return self.read()

    def close(self, wait_s: float) -> None:
        """End it: kindly for ``wait_s``, then by signals."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        for wait, number in ((wait_s, signal.SIGTERM), (5.0, signal.SIGKILL)):
            try:
                self.process.wait(wait)
                break
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, number)
        self.process.wait()
        self.process.stdout.close()


def _environ() -> dict[str, str]:
    """Ours, with the project importable whether or not it is installed."""
    path = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TOKENIZERS_PARALLELISM": "false"}


def options(description: str, *, threads: int, adamw: str) -> argparse.ArgumentParser:
    """The options that all races share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=_positive, default=10, help="measured steps of each contender")
    parser.add_argument("--warmup", type=_positive, default=3, help="steps before them")
    parser.add_argument("--precision", type=_words("fp32", "bf16"), default=["fp32", "bf16"], help="fp32, bf16 or both")
    parser.add_argument(
        "--adamw",
        type=_words("default", "fused"),
        default=adamw.split(","),
        help="AdamW of the peer: default (torch's own choice), fused, or both, of which the faster counts",
    )
    parser.add_argument(
        "--allocator",
        choices=("default", "tuned"),
        default="default",
        help="default: ours as `launch train` sets it and the peer as users run it; tuned: all like ours",
    )
    parser.add_argument("--threads", type=_positive, default=threads, help="torch threads of each rank")
    parser.add_argument("--layers", type=_positive, default=8, help="8 is the published setting")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that a contender may take for a step")
    add_report_options(parser)
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _words(*known: str) -> Any:
    def read(text: str) -> list[str]:
        words = list(dict.fromkeys(text.split(",")))
        if unknown := [word for word in words if word not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return words

    return read


def specification(args: argparse.Namespace, kind: str, precision: str, **more: Any) -> dict[str, Any]:
    """What contender.py is told."""
    base = {"kind": kind, "precision": precision, "world": 1, "layout": {}, "reduce": True, "adamw": "fused"}
    common = {"threads": args.threads, "allocator": args.allocator, "layers": args.layers}
    return {**base, **common, **more}


@contextlib.contextmanager
def weights(layers: int) -> Iterator[str]:
    """A temporary Hugging Face folder with our initial weights, float32."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as parent:
        folder = str(Path(parent) / "model")
        spec = json.dumps({"kind": "weights", "folder": folder, "layers": layers})
        subprocess.run([sys.executable, str(HERE / "contender.py"), spec], env=_environ(), check=True)
        yield folder


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that no contender is left behind."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def race(args: argparse.Namespace, specs: dict[str, dict[str, Any]]) -> list[Result]:
    """Start all contenders, then let them step in turn; results in the order of ``specs``.

    Raises:
        ContestError: a contender failed.
    """
    results = [Result(name, spec) for name, spec in specs.items()]
    entrants: list[Entrant] = []
    patience = 0.0
    try:
        for result in results:
            entrants.append(Entrant(result.name, result.spec, args.timeout))
            entrants[-1].read()
        for turn in range(args.warmup + args.steps):
            _progress(f"step {turn + 1} of {args.warmup + args.steps} of {', '.join(specs)}")
            for entrant, result in zip(entrants, results, strict=True):
                answer = entrant.step()
                result.losses.append(answer["loss"])
                if turn >= args.warmup:
                    result.seconds.append(answer["seconds"])
        patience = 10.0
    finally:
        _progress("")
        for entrant in entrants:
            entrant.close(patience)
    return results


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def check_same_work(results: Sequence[Result], tolerance: float) -> None:
    """The first losses agree, and all losses fall: the same model, data and optimizer.

    Raises:
        ContestError: they do not.
    """
    ours = results[0]
    for result in results:
        difference = abs(result.losses[0] - ours.losses[0]) / ours.losses[0]
        if not difference <= tolerance:
            raise ContestError(
                f"not the same work: first loss {result.losses[0]:.6f} of {result.name}, {ours.losses[0]:.6f} of "
                f"{ours.name}; they differ by {difference:.1e}, more than {tolerance:.0e}"
            )
        if not result.losses[-1] < result.losses[0]:
            raise ContestError(f"{result.name} does not train: loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f}")


def fastest(results: Sequence[Result]) -> Result:
    """The one with the least median."""
    return min(results, key=lambda result: result.median)


def paired(above: Result, below: Result) -> tuple[float, str]:
    """The ratio of the medians, and in words the quartiles of neighbouring steps' ratios and the ratio of the least."""
    ratios = [a / b for a, b in zip(above.seconds, below.seconds, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
    least = min(above.seconds) / min(below.seconds)
    return above.median / below.median, f"quartiles {low:.2f} .. {high:.2f}, of the least {least:.2f}, n={len(ratios)}"


def show(results: Sequence[Result]) -> None:
    """Print a table of the contenders; ratios are to the first one."""
    rows = [
        (
            r.name,
            f"{r.median:.3f}",
            f"{min(r.seconds):.3f}",
            f"{max(r.seconds):.3f}",
            f"{TOKENS / r.median:,.0f}",
            f"{r.median / results[0].median:.2f}",
            f"{r.losses[0]:.5f}",
            f"{r.losses[-1]:.5f}",
        )
        for r in results
    ]
    header = ("contender", "median s", "least", "most", "tokens/s", "/ ours", "first loss", "last loss")
    print(table(header, rows), end="\n\n", flush=True)


def details(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For ``--json``."""
    return [
        {
            "name": r.name,
            "spec": {key: value for key, value in r.spec.items() if key != "weights"},
            "median_s": r.median,
            "seconds": r.seconds,
            "losses": r.losses,
        }
        for r in results
    ]
