"""Requests that schemathesis makes of the OpenAPI document: answers are what it says, and none is a 5xx."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from served import Served, load, write_model

schemathesis = pytest.importorskip("schemathesis")

from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

GOOD = {"prompt": "a b", "input": "a b", "messages": [{"role": "user", "content": "a"}], "tokens": [5, 6]}
"""What a body needs to be looked at beyond its first wrong field."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    torch.set_num_threads(1)
    with Served(load(write_model(tmp_path_factory.mktemp("schema") / "tiny"), requests=64)) as running:
        yield running


def check(operation: Any, seen: Counter[tuple[str, int]]) -> None:
    """Some requests of one operation."""

    @seeded(1)
    @settings(
        max_examples=25, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(), keep=st.sets(st.sampled_from(sorted(GOOD))), known=st.booleans())
    def ask(case: Any, keep: set[str], known: bool) -> None:
        body = case.body
        if isinstance(body, dict):
            body.update({name: GOOD[name] for name in set(body) & set(GOOD) - keep})
            if known:
                for name in set(body) - {"model", *GOOD, *sorted(body)[:3]}:
                    del body[name]
                body["model"] = "tiny"
                body.update(dict.fromkeys(set(body) & {"max_tokens", "max_output_tokens"}, 3))
        response = case.call(timeout=30)
        seen[operation.path, response.status_code] += 1
        assert response.status_code < 500, (operation.path, body, response.text)
        case.validate_response(response, checks=CHECKS)

    ask()


def test_every_operation_answers_as_its_document_says(served: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    seen: Counter[tuple[str, int]] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path != "/v1/stream":  # a WebSocket
            check(operation, seen)
    assert not served.errors
    answered = {path for path, status in seen if status == 200}
    posts = {"/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses", "/tokenize", "/detokenize"}
    assert {*posts, "/v1/models", "/metrics"} <= answered, seen
    served.check_empty()
