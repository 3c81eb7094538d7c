"""The OpenAPI document (3.1), with the schemas of the bodies as they are checked."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from infer.server.bodies import Body, ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody
from infer.server.response_body import ResponsesBody

__all__ = ["document"]

_JSON = "application/json"

_POSTS: dict[str, tuple[type[Body], str, bool]] = {
    "/v1/completions": (CompletionBody, "continue prompts", True),
    "/v1/chat/completions": (ChatBody, "answer a conversation", True),
    "/v1/responses": (ResponsesBody, "answer a conversation with items; nothing is stored", True),
    "/v1/embeddings": (EmbeddingBody, "vectors of texts", False),
    "/tokenize": (TokenizeBody, "token ids of a text or of a conversation", False),
    "/detokenize": (DetokenizeBody, "the text of token ids", False),
}
_GETS = {
    "/v1/models": "the models",
    "/v1/models/{name}": "a model",
    "/health/live": "whether the server answers",
    "/health/ready": "whether the engine makes steps and requests are taken",
    "/health": "the same as /health/ready",
    "/version": "of the program",
    "/openapi.json": "this document",
    "/metrics": "counters, gauges and histograms for Prometheus",
    "/v1/stream": "many requests on one WebSocket",
    "/": "a page: a chat, and pictures of what the server does",
}
_KINDS = {"/metrics": "text/plain", "/": "text/html"}
_ERRORS = {
    "400": "the request is wrong, or asks for what is not honoured",
    "401": "no known API key",
    "404": "no such model or route",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "429": "too many requests wait",
    "500": "the server failed",
    "503": "the engine is not there, or the server is shutting down",
    "504": "no answer within the deadline",
}
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(version: str, *, keys: bool, metrics: bool, page: str = "auto", generates: bool = True) -> dict[str, Any]:
    """The routes.

    Args:
        version: of the program.
        keys: whether an API key is needed.
        metrics: whether /metrics is among the routes.
        page: ``"off"``: there is none at /; ``"open"``: it needs no key.
        generates: the model continues prompts; else the routes that would are left out, as they answer 404.
    """
    kinds = [(kind, "validation") for kind, _, _ in _POSTS.values()]
    _, schema = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # pyright: ignore[reportArgumentType]
    schemas = {**schema.get("$defs", {}), "Error": _ERROR}
    paths: dict[str, Any] = {}
    for path, (kind, summary, streams) in _POSTS.items():
        if streams and not generates:
            continue
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        body = {"required": True, "content": content}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": _responses(streams)}}
    for path, summary in _GETS.items():
        if (path == "/metrics" and not metrics) or (path == "/" and page == "off"):
            continue
        if path in ("/", "/v1/stream") and not generates:
            continue
        get: dict[str, Any] = {"summary": summary, "responses": _responses(False, _KINDS.get(path, _JSON))}
        if "{name}" in path:
            get["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        if path == "/health/live" or (path == "/" and page == "open"):
            get["security"] = []
        if path == "/v1/stream":
            del get["responses"]["200"]
            get["responses"] |= {"101": {"description": "a WebSocket"}, "426": {"description": "only as a WebSocket"}}
        paths[path] = {"get": get}
    value: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Lockstep", "version": version},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if keys:
        value["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        value["security"] = [{"key": []}]
    return value


def _responses(streams: bool, kind: str = _JSON) -> dict[str, Any]:
    content: dict[str, Any] = {kind: {}}
    if streams:
        content["text/event-stream"] = {}
    error = {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    wrong = {status: {"description": why, "content": error} for status, why in _ERRORS.items()}
    return {"200": {"description": "the answer", "content": content}, **wrong}
