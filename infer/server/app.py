"""The application: routes, and what stands before them."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute

from infer.server.auth import OPEN, PAGE, Keys, RequireKey
from infer.server.chat import chat
from infer.server.codec import Codec
from infer.server.completions import completions
from infer.server.config import ServerConfig
from infer.server.engine import ModelInfo, ServedEngine
from infer.server.errors import ApiError
from infer.server.exchange import Exchange, encode, send_json
from infer.server.openapi import document
from infer.server.page import Page, render
from infer.server.responses import responses
from infer.server.server import Endpoint, Handler, Server
from infer.server.texts import detokenize, embeddings, tokenize
from infer.server.websocket import WebSockets
from parallel.errors import ConfigError, refuse

__all__ = ["create_app", "create_metrics_app", "metrics", "unrouted"]

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def create_app(engine: ServedEngine, model: ModelInfo, codec: Codec, config: ServerConfig | None = None) -> Starlette:
    """An ASGI application that answers clients of OpenAI's interface.

    Args:
        engine: continues prompts; it embeds texts as well if it has ``embed``.
        model: that it serves.
        codec: of the model.
        config: limits.

    Returns:
        the application. ``app.state.server`` is its :class:`~infer.server.server.Server`; ``app.state.drain()`` takes
        no more requests from now on, ``await app.state.drained()`` waits for those under way, ``app.state.abort()``
        ends them.

    Raises:
        ConfigError: limits that cannot be.
    """
    config = ServerConfig() if config is None else config
    problems = list(config.problems())
    if config.queue_tokens < model.context:
        problems.append(f"queue_tokens = {config.queue_tokens}: fewer than the context of {model.context}")
    if not model.names:
        problems.append("names: a model needs one")
    refuse(ConfigError, problems)
    server = Server(engine, model, codec, config)
    app = Starlette(
        routes=list(_routes(server)),
        middleware=[Middleware(RequireKey, keys=Keys(config.keys), page=config.page == "open", hosts=config.hosts)],
        exception_handlers={HTTPException: partial(unrouted, server, listed="; /openapi.json lists them")},
    )
    app.router.redirect_slashes = False
    app.state.server = server
    app.state.drain, app.state.drained, app.state.abort = server.drain, server.drained, server.abort
    return app


def create_metrics_app(server: Server) -> Starlette:
    """An application with nothing but /metrics, for an address of its own."""
    endpoint = Endpoint(server, metrics, "other", works=False)
    handlers = {HTTPException: partial(unrouted, server)}
    return Starlette(routes=[Route("/metrics", endpoint, methods=["GET"])], exception_handlers=handlers)


def _routes(server: Server) -> list[Route | WebSocketRoute]:
    def route(path: str, handler: Handler, name: str, method: str = "GET", *, works: bool = True) -> Route:
        return Route(path, Endpoint(server, handler, name, works=works), methods=[method])

    works = {
        "completions": Endpoint(server, completions, "completions"),
        "chat.completions": Endpoint(server, chat, "chat"),
        "responses": Endpoint(server, responses, "responses"),
    }
    routes: list[Route | WebSocketRoute] = [
        route("/v1/models", _models, "models"),
        route("/v1/models/{name:path}", _model, "models"),
        route("/v1/completions", completions, "completions", "POST"),
        route("/v1/chat/completions", chat, "chat", "POST"),
        route("/v1/responses", responses, "responses", "POST"),
        route("/v1/embeddings", embeddings, "embeddings", "POST"),
        route("/tokenize", tokenize, "tokenize", "POST"),
        route("/detokenize", detokenize, "detokenize", "POST"),
        route("/v1/stream", _upgrade, "other"),
        WebSocketRoute("/v1/stream", WebSockets(server, works)),
        route(OPEN, _live, "health", works=False),
        route("/health/ready", _ready, "health", works=False),
        route("/health", _ready, "health", works=False),
        route("/version", _version, "other"),
        route("/openapi.json", _openapi, "other"),
    ]
    if server.config.metrics:
        routes.append(route("/metrics", metrics, "other", works=False))
    if server.config.page != "off" and not server.model.generates:
        routes.append(route(PAGE, _no_page, "other", works=False))
    elif server.config.page != "off":
        page = render(keys=bool(server.config.keys), pictures=server.config.metrics)
        routes.append(route(PAGE, partial(_page, page), "other", works=False))
    return routes


async def _page(page: Page, server: Server, exchange: Exchange) -> None:
    exchange.status = 200
    await send_json(exchange.write, 200, page.body, page.headers, b"text/html; charset=utf-8")


async def _no_page(server: Server, exchange: Exchange) -> None:
    raise ApiError(404, "the page talks with models; this one makes vectors, of what is sent to embeddings")


async def _models(server: Server, exchange: Exchange) -> None:
    await exchange.json({"object": "list", "data": [_card(server, name) for name in server.model.names]})


async def _model(server: Server, exchange: Exchange) -> None:
    name = exchange.scope["path_params"]["name"]
    if name not in server.model.names:
        raise server.no_model()
    await exchange.json(_card(server, name))


def _card(server: Server, name: str) -> dict[str, Any]:
    model = server.model
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "lockstep",
        "max_model_len": model.context,
        "chat_template": server.codec.template is not None,
    }


async def _upgrade(server: Server, exchange: Exchange) -> None:
    raise ApiError(426, "this route speaks WebSocket", code="upgrade_required", headers={"upgrade": "websocket"})


async def _live(server: Server, exchange: Exchange) -> None:
    await exchange.json({"status": "ok"})


async def _ready(server: Server, exchange: Exchange) -> None:
    if server.draining:
        raise server.unavailable("the server is shutting down", "draining")
    if not await server.ready():
        raise server.unavailable("the engine makes no steps", "not_ready")
    await exchange.json({"status": "ok"})


async def _version(server: Server, exchange: Exchange) -> None:
    await exchange.json({"version": server.model.version})


async def _openapi(server: Server, exchange: Exchange) -> None:
    config = server.config
    await exchange.json(
        document(
            server.model.version,
            keys=bool(config.keys),
            metrics=config.metrics,
            page=config.page,
            generates=server.model.generates,
        )
    )


async def metrics(server: Server, exchange: Exchange) -> None:
    """GET /metrics."""
    lines = server.metrics.lines(
        server.engine.stats(), server.admission, in_flight=server.in_flight, draining=server.draining
    )
    await exchange.text("\n".join(lines) + "\n", PROMETHEUS)


async def unrouted(server: Server, request: Request, error: Exception, *, listed: str = "") -> Response:
    """What is no route, or not by this method; ``listed``: where one finds them."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    allowed = dict(getattr(error, "headers", None) or {})
    other = f"this route has other methods: {allowed.get('Allow', 'not this')}"
    messages = {404: f"there is no such route{listed}", 405: other}
    answer = ApiError(status, messages.get(status, "an error"))
    server.metrics.count("other", status, "")
    return Response(encode(answer.body()), status, headers=allowed, media_type="application/json")
