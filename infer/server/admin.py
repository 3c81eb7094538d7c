"""What only those who run a server may do: an application of its own, for an address of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from infer.server.app import metrics, unrouted
from infer.server.auth import Keys, RequireKey
from infer.server.errors import ApiError
from infer.server.exchange import Exchange
from infer.server.server import Endpoint, Server

__all__ = ["Kept", "create_admin_app"]


class Kept(Protocol):
    """An engine and whoever keeps it alive."""

    @property
    def there(self) -> bool:
        """Whether it takes prompts."""
        ...

    @property
    def works(self) -> bool:
        """Whether it made a step when it was last asked to."""
        ...

    @property
    def restarts(self) -> int:
        """How often it was started again."""
        ...

    def stats(self) -> Any:
        """Of its scheduler; None: not known."""
        ...

    def restart(self) -> None:
        """End it by force; it is started again."""
        ...


def create_admin_app(server: Server, engines: Sequence[Kept], key: str, leave: Callable[[], None]) -> Starlette:
    """Routes that belong on an address that only this machine reaches; every one asks for the key.

    ``GET /metrics``, ``GET /engines``, ``POST /engines/{index}/restart``, ``POST /drain``.

    Args:
        server: that answers clients.
        engines: that it routes to.
        key: of those who run it.
        leave: as if the server had got SIGTERM.
    """

    async def told(server: Server, exchange: Exchange) -> None:
        rows = []
        for engine in engines:
            stats = engine.stats()
            row = {"there": engine.there, "works": engine.works, "restarts": engine.restarts}
            rows.append({**row, "stats": None if stats is None else asdict(stats)})
        await exchange.json({"engines": rows, "draining": server.draining, "in_flight": server.in_flight})

    async def restart(server: Server, exchange: Exchange) -> None:
        index = exchange.scope["path_params"]["index"]
        if index >= len(engines):
            raise ApiError(404, f"there are {len(engines)} engines")
        engines[index].restart()
        await exchange.json({"status": "ok"})

    async def drain(server: Server, exchange: Exchange) -> None:
        leave()
        await exchange.json({"status": "ok"})

    def route(path: str, handler: Any, method: str) -> Route:
        return Route(path, Endpoint(server, handler, "other", works=False), methods=[method])

    routes = [
        route("/metrics", metrics, "GET"),
        route("/engines", told, "GET"),
        route("/engines/{index:int}/restart", restart, "POST"),
        route("/drain", drain, "POST"),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(RequireKey, keys=Keys([key]))],
        exception_handlers={HTTPException: partial(unrouted, server)},
    )
    app.router.redirect_slashes = False
    return app
