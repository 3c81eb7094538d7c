"""The cases of the fault suite, which ``python tests/faults.py`` runs."""

from fault_cases import damage, data, disk, killed, layouts, limits, losses, told_to_stop
from fault_cases.suite import CASES, Case, Outcome, run_cases

__all__ = ["CASES", "GROUPS", "Case", "Outcome", "run_cases"]

GROUPS = (told_to_stop, killed, disk, damage, layouts, losses, data, limits)
"""The modules whose cases are registered."""
