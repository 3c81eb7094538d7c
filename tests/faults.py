"""The fault suite: every case on a tiny model, in processes of its own, ending in "nothing lost".

``python tests/faults.py [--short] [NAME ...]`` runs the cases whose names contain one of the words (default: all), and
prints one line a case and the score. Each case is forked from this process, which has imported torch once and computed
nothing; the cases are in ``fault_cases/``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parent.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch
from fault_cases import CASES, Outcome, run_cases
from fault_cases.runs import start

__all__ = ["main"]


def main(words: list[str]) -> int:
    """Run and print; ``--short`` leaves out variants."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        start(Path(folder))  # imports what every case would import anew
    chosen = [one for one in CASES if one.short or "--short" not in words]
    words = [word for word in words if word != "--short"]
    chosen = [one for one in chosen if not words or any(word in one.name for word in words)]
    chosen.sort(key=lambda one: int(one.name[1:].split()[0]))
    began = time.monotonic()

    def show(name: str, outcome: Outcome) -> None:
        print(outcome.row(name), flush=True)
        if outcome.problem:
            print("    " + outcome.problem.replace("\n", "\n    "), flush=True)

    outcomes = run_cases(chosen, show)
    survived = sum(not outcome.problem for outcome in outcomes.values())
    detect = max((outcome.detect_s or 0.0 for outcome in outcomes.values()), default=0.0)
    recover = max((outcome.recover_s or 0.0 for outcome in outcomes.values()), default=0.0)
    print(
        f"faults {survived}/{len(outcomes)} survived, worst detect/recover {detect:.1f}/{recover:.1f} s "
        f"({time.monotonic() - began:.0f} s)"
    )
    return survived != len(outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
