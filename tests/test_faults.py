"""The short form of the fault suite; ``python tests/faults.py`` is the whole of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from faults import CASES, POINTS

ROOT = Path(__file__).parent.parent


def test_every_fault_is_survived_with_nothing_lost() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCKSTEP_")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "tests" / "faults.py"), "--short"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    count = sum(case.short for case in CASES)
    assert f"faults {count}/{count} survived" in done.stdout.splitlines()[-1]


def test_every_case_has_a_name_of_its_own_and_every_point_a_case() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 90
    driven = {argument for case in CASES for argument in case.arguments}
    assert {point for point in POINTS if point.startswith("save.")} <= driven
    for number in (8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 22, 24):
        assert any(case.short and case.name.startswith(f"T{number} ") for case in CASES), number
