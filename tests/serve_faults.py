"""The fault and security suite of the server: real processes on a tiny model, ending in "nothing lost".

``python tests/serve_faults.py [S7,S24] [--short] [--secure]`` prints one line a case, and the score; the cases are in
``serving_faults/``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parent.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from serving_faults.stage import Stage
from serving_faults.suite import Case, Lost, NotRun, Outcome, Seen, chosen, reason

__all__ = ["main"]


def main(words: list[str]) -> int:
    """Run and print; the exit code."""
    parser = argparse.ArgumentParser(description="The fault and security suite of the server.")
    parser.add_argument("cases", nargs="*", help="numbers, as S7,S24; none: all")
    parser.add_argument("--short", action="store_true", help="the cases, and the parts of cases, that are quick")
    parser.add_argument("--secure", action="store_true", help="those about security, which run under python -O too")
    parser.add_argument("--short-work", action="store_true", help="the quick parts of all cases")
    args = parser.parse_args(words)
    numbers = [number for word in args.cases for number in word.split(",")]
    cases = [one for one in chosen(numbers, short=args.short) if one.secure or not args.secure]
    short = args.short or args.short_work
    began = time.monotonic()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="serve-faults-") as name:
        stage = Stage(Path(name), _model(Path(name)), short=short)
        try:
            if len(cases) > 8:
                stage.begin()
            for one in cases:
                outcomes.append(_run(one, stage))
                print(outcomes[-1].row(), flush=True)
                if outcomes[-1].problem:
                    print("        " + outcomes[-1].problem.replace("\n", "\n        "), flush=True)
        finally:
            wrong = stage.close()
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    return _score(outcomes, wrong, stage.crashes, time.monotonic() - began)


def _model(root: Path) -> Path:
    """A folder with a model, written by another process: this one stays small."""
    import subprocess

    program = "import sys; from pathlib import Path; from served import write_model; write_model(Path(sys.argv[1]))"
    place = root / "tiny"
    place.mkdir()
    subprocess.run([sys.executable, "-c", program, str(place)], check=True, cwd=Path(__file__).parent)
    return place


def _run(one: Case, stage: Stage) -> Outcome:
    began, seen, verdict, problem = time.monotonic(), Seen(), "ok", ""
    try:
        one.drive(stage, seen)
    except NotRun as error:
        verdict = "not run"
        seen.notes[:] = [str(error)]
    except Exception as error:  # noqa: BLE001 - told, and the next case is run
        verdict, problem = "FAILED", reason(error)
        return Outcome(one, time.monotonic() - began, seen, verdict, problem, isinstance(error, Lost))
    return Outcome(one, time.monotonic() - began, seen, verdict, problem)


def _score(outcomes: list[Outcome], wrong: list[str], crashes: int, seconds: float) -> int:
    ran = [outcome for outcome in outcomes if outcome.verdict != "not run"]
    survived = sum(outcome.verdict == "ok" for outcome in ran)
    detect = max((outcome.seen.detect_s or 0.0 for outcome in ran), default=0.0)
    recover = max((outcome.seen.recover_s or 0.0 for outcome in ran), default=0.0)
    inputs = sum(outcome.seen.inputs for outcome in ran)
    lost = sum(outcome.lost for outcome in ran) + len(wrong)
    skipped = ", ".join(outcome.case.number for outcome in outcomes if outcome.verdict == "not run")
    print(
        f"faults {survived}/{len(ran)} survived, worst detect/recover {detect:.1f}/{recover:.1f} s"
        f" | bad inputs {inputs} tried, {crashes} crash | lost {lost}"
        + (f" | not run: {skipped}" if skipped else "")
        + f" ({seconds:.0f} s)"
    )
    return int(survived < len(ran) or bool(lost or crashes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
