"""The short form of the server's fault suite; ``python tests/serve_faults.py`` is the whole of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from serving_faults import GROUPS
from serving_faults.suite import CASES, chosen

ROOT = Path(__file__).parent.parent
SUITE = (*range(1, 15), *range(16, 31), *range(33, 40))
LAUNCH = (1, 2, 5, 7, 10, 13)


def test_every_fault_is_survived_with_nothing_lost() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCKSTEP_")}
    command = [sys.executable, str(ROOT / "tests" / "serve_faults.py"), "--short"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(chosen((), short=True))
    last = done.stdout.splitlines()[-1]
    assert f"faults {count}/{count} survived" in last and "0 crash | lost 0" in last and "not run" not in last, (
        done.stdout
    )


def test_every_case_has_a_name_of_its_own_and_every_fault_a_case() -> None:
    assert len({case.name for case in CASES}) == len(CASES) and len(GROUPS) > 5
    numbers = {case.number.rstrip("bc") for case in CASES}
    assert {*(f"S{number}" for number in SUITE), *(f"L{number}" for number in LAUNCH)} <= numbers
