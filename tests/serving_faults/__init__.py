"""The cases of the fault and security suite of the server, which ``python tests/serve_faults.py`` runs."""

from serving_faults import bodies, costly, doors, edges, endings, engines, lives, shapes, strangers

__all__ = ["GROUPS"]

GROUPS = (edges, bodies, costly, doors, lives, engines, endings, shapes, strangers)
"""The modules whose cases are registered."""
