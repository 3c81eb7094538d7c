"""The short form of the fault suite; ``python tests/faults.py`` is the whole of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fault_cases import CASES, GROUPS

from zero.faults import KINDS, POINTS

ROOT = Path(__file__).parent.parent


def test_every_fault_is_survived_with_nothing_lost() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCKSTEP_")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "tests" / "faults.py"), "--short"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    count = sum(case.short for case in CASES)
    assert f"faults {count}/{count} survived" in done.stdout.splitlines()[-1]


def test_every_case_has_a_name_of_its_own_and_every_fault_a_case() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 160
    driven = {argument for case in CASES for argument in case.arguments}
    assert {point for point in POINTS if point.startswith("save.")} <= driven
    source = "".join(Path(str(group.__file__)).read_text() for group in GROUPS)
    assert all(f"{kind}@" in source or f'"{kind}"' in source for kind in KINDS if kind != "exit")
    for number in (*range(8, 21), *range(22, 27)):
        assert any(case.short and case.name.startswith(f"T{number} ") for case in CASES), number
