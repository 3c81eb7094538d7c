"""What the handlers of a server share."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from starlette.types import Receive, Scope, Send

from infer.constrain.checker import Checker
from infer.params import SamplingParams
from infer.request import RequestError
from infer.server.bodies import Body, SamplingBody, parse
from infer.server.codec import Codec
from infer.server.config import ServerConfig
from infer.server.dialect import Dialect
from infer.server.engine import EngineGone, ModelInfo, ServedEngine
from infer.server.errors import ApiError, of_problems
from infer.server.exchange import Exchange, Left
from infer.server.flight import Ended, Flight
from infer.server.limits import Admission
from infer.server.metrics import Metrics
from parallel.errors import DataError

__all__ = ["Endpoint", "Handler", "Server"]

B = TypeVar("B", bound=Body)
_FORMS_WAITING = 32


class Server:
    """A model, its engine, and what is under way.

    Args:
        engine: continues prompts.
        model: that it serves.
        codec: of the model.
        config: limits.

    Attributes:
        admission: what waits.
        metrics: what was done.
        dialect: how the model writes calls and reasoning.
        draining: no more requests are taken.
        failed: called with each exception that nobody expected; its message may hold what a client sent.
    """

    def __init__(self, engine: ServedEngine, model: ModelInfo, codec: Codec, config: ServerConfig) -> None:
        self.engine, self.model, self.codec, self.config = engine, model, codec, config
        self.admission = Admission(config.queue_requests, config.queue_tokens, config.retry_s)
        self.metrics = Metrics()
        self.forms = Checker(codec.tokenizer, model.vocabulary, seconds=config.form_s, memory=config.form_mib << 20)
        self.dialect = Dialect.of(codec.template, config.tool_parser, config.reasoning_parser)
        self.draining = self._over = False
        self.failed: Callable[[BaseException], None] = lambda _error: None
        self._flights: set[Flight] = set()
        self._answering = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ping: asyncio.Task[bool] | None = None

    @property
    def in_flight(self) -> int:
        """Requests that are being answered."""
        return self._answering

    def drain(self) -> None:
        """Take no more requests, from now on; those that are being answered go on."""
        self.draining = True

    async def drained(self) -> None:
        """Wait until nothing is being answered."""
        await self._idle.wait()

    def abort(self) -> None:
        """End all that is under way, with the finish reason ``abort``; while draining, nothing begins after it."""
        self._over = self.draining
        for flight in list(self._flights):
            flight.end("abort")

    async def ready(self) -> bool:
        """Whether the engine makes steps, and requests are taken."""
        if self.draining:
            return False
        if self._ping is None or self._ping.done():  # however many ask, the engine is asked once
            self._ping = asyncio.create_task(self._alive())
        return await asyncio.shield(self._ping) and not self.draining

    def refuse_new(self) -> None:
        """Refuse what could only wait, before it is read.

        Raises:
            ApiError: 503 while draining; 429.
        """
        if self.draining:
            raise self.unavailable("the server is shutting down", "draining")
        self.admission.check()

    async def read(self, exchange: Exchange, kind: type[B]) -> B:
        """The body of a request.

        Raises:
            ApiError: it is not honoured as it is.
        """
        value = await exchange.body(self.config.body_bytes, self.config.body_s)
        body = parse(kind, value)
        name = getattr(body, "model", None)
        if name is not None and name not in self.model.names:
            raise self.no_model()
        if isinstance(body, SamplingBody):
            exchange.names = {"constraint": body.form_field}
        return body

    async def check_forms(self, params: Sequence[SamplingParams]) -> None:
        """Try the forms that completions are to keep, where that can do no harm.

        Raises:
            RequestError: they cannot be kept.
            ApiError: 429, too many wait to be tried.
        """
        for constraint in dict.fromkeys(own.constraint for own in params if own.constraint is not None):
            if self.forms.waiting >= _FORMS_WAITING:
                raise ApiError(429, "too many forms wait to be compiled; try again later", headers=self._retry())
            if problem := await self.forms.problem(constraint):
                raise RequestError(f"constraint: {problem}")

    def flight(self, exchange: Exchange) -> Flight:
        """What bounds a request that is under way.

        Raises:
            ApiError: 503, it comes too late.
        """
        if self._over:
            raise self.unavailable("the server is shutting down", "draining")
        return Flight(
            exchange.receive,
            queue_s=self.config.queue_s,
            deadline_s=self.config.deadline_s,
            among=self._flights,
        )

    def unavailable(self, message: str, code: str | None = None) -> ApiError:
        """503, and when to come back."""
        return ApiError(503, message, code=code, headers=self._retry())

    def no_model(self) -> ApiError:
        """404, with the names that there are."""
        names = ", ".join(f'"{name}"' for name in self.model.names[:5])
        told = f"model: there is no model of this name; this server has {names}"
        return ApiError(404, told, param="model", code="model_not_found")

    def _retry(self) -> dict[str, str]:
        return {"retry-after": str(self.config.retry_s)}

    def begin(self) -> None:
        """A request has come."""
        self._answering += 1
        self._idle.clear()

    def end(self) -> None:
        """It has been answered."""
        self._answering -= 1
        if not self._answering:
            self._idle.set()

    async def _alive(self) -> bool:
        try:
            async with asyncio.timeout(self.config.ping_s):
                return await self.engine.ping(self.config.ping_s)
        except TimeoutError:
            return False
        except Exception as error:  # noqa: BLE001 - an engine that cannot be asked is not ready
            self.failed(error)
            return False


Handler = Callable[[Server, Exchange], Awaitable[None]]


class Endpoint:
    """A route: a handler, and an answer whatever it raises.

    Args:
        server: that it belongs to.
        handler: answers.
        route: its name in the metrics.
        works: whether it is refused while the server drains, and counts as being answered.
    """

    def __init__(self, server: Server, handler: Handler, route: str, *, works: bool = True) -> None:
        self.server, self.handler, self.route, self.works = server, handler, route, works

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        write_s = self.server.config.write_s
        await self.serve(Exchange(scope, receive, send, id=secrets.token_hex(12), write_s=write_s))

    async def serve(self, exchange: Exchange) -> None:
        """Answer one request, however it came."""
        server = self.server
        began = time.monotonic()
        if self.works:
            server.begin()
        try:
            await self._guarded(exchange)
        finally:
            if self.works:
                server.end()
            outcome = exchange.outcome or ("" if exchange.began else "gone")
            server.metrics.count(self.route, exchange.status, outcome)
            if self.route in ("completions", "chat", "responses", "embeddings"):
                server.metrics.whole.observe(time.monotonic() - began)

    async def _guarded(self, exchange: Exchange) -> None:
        try:
            try:
                if self.works and self.server.draining:
                    raise self.server.unavailable("the server is shutting down", "draining")
                await self.handler(self.server, exchange)
            except (Left, Ended):
                raise
            except Exception as error:  # noqa: BLE001 - every request gets an answer
                await exchange.fail(self._error(exchange, error))
        except (Left, Ended):
            exchange.outcome = "gone"

    def _error(self, exchange: Exchange, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            exchange.outcome = exchange.outcome or ("failed" if exchange.began else "")
            return error
        if isinstance(error, RequestError | DataError):
            return of_problems(error.problems, exchange.names)
        exchange.outcome = "failed"
        if isinstance(error, EngineGone):
            return self.server.unavailable("the engine is not there", "engine_gone")
        self.server.failed(error)
        return ApiError(500, "an internal error")
