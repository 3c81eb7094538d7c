"""The cases of the fault and security suite of the server, which ``python tests/serve_faults.py`` runs."""

from serving_faults import bodies, doors, edges, endings, engines, lives, strangers

__all__ = ["GROUPS"]

GROUPS = (edges, bodies, doors, lives, engines, endings, strangers)
"""The modules whose cases are registered."""
