"""The HTTP application: which path reaches which handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from opentelemetry.trace import Tracer
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from covey.auth import ApiKeys, Principal
from covey.errors import NotFound

from .exchange import Exchange, Guarded, authenticated, traced
from .generations import Generations
from .operations import Operations

Open = Callable[[Exchange], Awaitable[None]]
Keyed = Callable[[Exchange, Principal], Awaitable[None]]


def build_app(
    generations: Generations, operations: Operations, keys: ApiKeys, body_bytes_max: int, tracer: Tracer
) -> ASGIApp:
    """The ASGI application. Health, version, metrics and the description need no key and leave no span; the rest do."""
    keyed: dict[tuple[str, str], Keyed] = {
        ("POST", "/v1/chat/completions"): generations.chat,
        ("POST", "/v1/completions"): generations.complete,
        ("POST", "/v1/embeddings"): operations.embeddings,
        ("GET", "/v1/models"): operations.models,
        ("GET", "/v1/models/{model:path}"): operations.model,
        ("POST", "/tokenize"): operations.tokenize,
    }
    unkeyed: dict[tuple[str, str], Open] = {
        ("GET", "/health"): operations.readyz,
        ("GET", "/livez"): operations.livez,
        ("GET", "/readyz"): operations.readyz,
        ("GET", "/version"): operations.version,
        ("GET", "/metrics"): operations.metrics,
        ("GET", "/openapi.json"): operations.openapi,
    }
    handlers = unkeyed | {
        (method, path): traced(tracer, f"{method} {path}", authenticated(keys, handler))
        for (method, path), handler in keyed.items()
    }
    routes = [
        Route(path, _Only(method, Guarded(handler, body_bytes_max), body_bytes_max))
        for (method, path), handler in handlers.items()
    ]
    return Router(routes=routes, redirect_slashes=False, default=Guarded(_nowhere, body_bytes_max))


class _Only:
    """Lets one HTTP method through (and HEAD where GET goes)."""

    def __init__(self, method: str, app: ASGIApp, body_bytes_max: int) -> None:
        self._method = method
        self._app = app
        self._body_bytes_max = body_bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == self._method or (scope["method"], self._method) == ("HEAD", "GET"):
            await self._app(scope, receive, send)
            return
        x = Exchange(scope, receive, send, self._body_bytes_max)
        error = {"message": f"use {self._method}", "type": "invalid_request_error", "param": None}
        await x.reply({"error": error | {"code": "method_not_allowed"}}, status=405, headers={"allow": self._method})


async def _nowhere(x: Exchange) -> None:
    raise NotFound(f"there is no {x.scope['path']} here; /openapi.json lists what there is")
