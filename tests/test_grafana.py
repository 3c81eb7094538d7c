"""The dashboard, the documentation and /metrics speak of the same numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from served import Served, load, write_model

DOCS = Path(__file__).parent.parent / "docs"
DASHBOARD = json.loads((DOCS / "grafana" / "lockstep.json").read_text())
FUNCTIONS = {"sum", "min", "max", "rate", "resets", "histogram_quantile", "clamp_min", "by", "label_values"}
"""Of PromQL, as far as the dashboard uses it, and one of Grafana's variables."""


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, set[str]]]:
    """Type and labels of every family that a server tells after it has answered."""
    with Served(load(write_model(tmp_path_factory.mktemp("grafana") / "tiny"))) as served:
        body = {"model": "tiny", "prompt": "tea", "max_tokens": 3, "ignore_eos": True}
        assert httpx2.post(served.url + "/v1/completions", json=body).status_code == 200
        text = httpx2.get(served.url + "/metrics").text
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    found = {}
    for name, kind in kinds.items():
        suffix = "_bucket" if kind == "histogram" else ""
        labels = re.findall(rf"^{name}{suffix}(?:\{{(.*)\}})? ", text, re.MULTILINE)
        assert labels, f"{name} has no sample"
        found[name] = kind, {label for line in labels for label in re.findall(r"(\w+)=", line)}
    return found


def queries() -> Iterator[str]:
    """Every expression in the dashboard."""
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (item["expr"] for item in DASHBOARD["annotations"]["list"] if "expr" in item)
    yield from (item["definition"] for item in DASHBOARD["templating"]["list"] if "definition" in item)


def own(name: str, families: dict[str, tuple[str, set[str]]]) -> tuple[str, str, set[str]]:
    """Family, type (of a part of a histogram: that part) and labels of a series."""
    if name in families:
        return name, *families[name]
    family, _, part = name.rpartition("_")
    kind, labels = families.get(family, ("", set()))
    assert kind == "histogram" and part in ("bucket", "sum", "count"), f"{name} is not in /metrics"
    return family, part, labels if part == "bucket" else labels - {"le"}


def test_every_query_asks_for_what_there_is(families: dict[str, tuple[str, set[str]]]) -> None:
    found = list(queries())
    assert len(found) > 25
    for query in found:
        for one, other in ("()", "{}", "[]"):
            assert query.count(one) == query.count(other), query
        plain = re.sub(r'"[^"]*"', '""', query)
        assert set(re.findall(r"([a-z_]+)\s*\(", plain)) <= FUNCTIONS, query
        series = re.findall(r"\b(lockstep_\w+)(?:\{([^}]*)\})?(\[[^\]]*\])?", plain)
        assert series, query
        used: set[str] = set()
        for name, selector, window in series:
            _, kind, labels = own(name, families)
            assert bool(window) == (kind in ("counter", "bucket", "sum", "count")), f"{name} is a {kind}: {query}"
            assert set(re.findall(r"(\w+)\s*=", selector)) <= labels | {"instance"}, query
            used |= labels
        for group in re.findall(r"by \(([^)]*)\)", plain):
            assert {label.strip() for label in group.split(",")} <= used, query
        if "histogram_quantile" in query:
            assert "by (le)" in query and series[0][0].endswith("_bucket")


def test_every_outcome_route_and_state_that_is_asked_for_exists() -> None:
    from infer.server.metrics import OUTCOMES, ROUTES

    known = {"outcome": set(OUTCOMES), "route": set(ROUTES), "state": {"free", "cached", "used"}}
    for query in queries():
        for label, values in re.findall(r'(\w+)=~?"([^"]*)"', query):
            if label in known:
                assert set(values.split("|")) <= known[label], query


def test_panels_do_not_overlap_and_every_family_is_drawn(families: dict[str, tuple[str, set[str]]]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    drawn = {own(name, families)[0] for query in queries() for name in re.findall(r"\blockstep_\w+", query)}
    assert set(families) - drawn <= {"lockstep_generated_tokens_total", "lockstep_draining"}


def test_every_family_is_documented(families: dict[str, tuple[str, set[str]]]) -> None:
    text = (DOCS / "server.md").read_text()
    section = text[text.index("## Metrics") :]
    told = set(re.findall(r"`(lockstep_\w+)`", section.split("\n## ")[0]))
    assert told == set(families)
