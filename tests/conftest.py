"""Fixtures that all tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for folder in (Path(__file__).parent, Path(__file__).parent.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from ranks import Ranks


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Four gloo ranks: ``ranks.run(function, world=2, **arguments)``; started by the first test that runs something."""
    filters = [*request.config.getini("filterwarnings"), *(request.config.getoption("pythonwarnings") or [])]
    pool = Ranks(filters)
    yield pool
    pool.close()
