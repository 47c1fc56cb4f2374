"""One HTTP request and its response: who asks, what came, what was sent so far."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import msgspec
from opentelemetry.trace import Tracer
from starlette.types import Receive, Scope, Send

from covey.auth import ApiKeys, Principal
from covey.errors import Cancelled, CoveyError, Internal, PayloadTooLarge
from covey.net.call import extracted
from covey.net.spans import served
from covey.net.tasks import background_tasks

from .body import parse, read_body
from .errors import error_body, error_headers

log = logging.getLogger(__name__)

T = TypeVar("T")

SEND_S = 30.0
"""A client that takes nothing for so long is disconnected."""
REQUEST_ID_CHARS_MAX = 64
LINGER_S = 2.0
"""How long a refused body is still taken and thrown away."""

_encoder = msgspec.json.Encoder()


class Exchange:
    """A request being served. Handlers answer once, by `reply` or by a stream."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, body_bytes_max: int) -> None:
        self.scope = scope
        self.headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        self.request_id = _request_id(self.headers.get("x-request-id", ""))
        self.is_started = False
        self.is_gone = False
        self._receive = receive
        self._send = send
        self._body_bytes_max = body_bytes_max

    async def json(self, cls: type[T]) -> T:
        """The body as `cls`. Raises InvalidArgument and PayloadTooLarge; see `body`."""
        return parse(await read_body(self.scope, self._receive, self._body_bytes_max), cls)

    async def reply(self, value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Answer with JSON."""
        await self.reply_bytes(_encoder.encode(value), "application/json", status=status, headers=headers)

    async def reply_bytes(
        self, data: bytes, content_type: str, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with bytes."""
        length = {"content-length": str(len(data))}
        await self.start(content_type, status=status, headers={**(headers or {}), **length})
        await self.send_body(data, more=False)

    async def start(self, content_type: str, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send status and headers."""
        self.is_started = True
        sent = {"content-type": content_type, "x-request-id": self.request_id, **(headers or {})}
        pairs = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in sent.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def send_body(self, data: bytes, *, more: bool) -> None:
        """Send a piece of the body. Raises Cancelled when the client takes nothing for `SEND_S`."""
        try:
            with anyio.fail_after(SEND_S):
                await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError as error:
            raise Cancelled("the client stopped reading") from error

    @asynccontextmanager
    async def while_connected(self) -> AsyncIterator[None]:
        """Cancel the block when the client goes away; use it after the body was read."""
        async with background_tasks() as tg:
            tg.start_soon(self._watch, tg.cancel_scope)
            yield

    async def _watch(self, scope: anyio.CancelScope) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        scope.cancel()

    async def fail(self, error: CoveyError) -> None:
        """Answer with an error, if nothing was answered yet."""
        if self.is_started or self.is_gone or isinstance(error, Cancelled):
            return
        if isinstance(error, PayloadTooLarge):
            await self._refuse_body(error)
        else:
            await self.reply(error_body(error), status=error.http, headers=error_headers(error))

    async def _refuse_body(self, error: PayloadTooLarge) -> None:
        """Answer at once, then discard for a while: a connection closed on unread data loses the answer too."""
        data = _encoder.encode(error_body(error))
        headers = error_headers(error) | {"content-length": str(len(data)), "connection": "close"}
        await self.start("application/json", status=error.http, headers=headers)
        await self.send_body(data, more=True)
        with anyio.move_on_after(LINGER_S):
            while (message := await self._receive())["type"] == "http.request":
                if not message.get("more_body", False):
                    break
        await self.send_body(b"", more=False)


class Guarded:
    """An ASGI endpoint around a handler: trace context, errors in OpenAI's shape, nothing internal leaks."""

    def __init__(self, handler: Callable[[Exchange], Awaitable[None]], body_bytes_max: int) -> None:
        self._handler = handler
        self._body_bytes_max = body_bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        x = Exchange(scope, receive, send, self._body_bytes_max)
        with extracted(x.headers):
            try:
                await self._handler(x)
            except CoveyError as error:
                await x.fail(error)
            except Exception as error:
                reference = secrets.token_hex(6)
                log.error("http failed path=%s reference=%s", scope["path"], reference, exc_info=error)
                await x.fail(Internal(f"internal error, reference {reference}"))


def authenticated(
    keys: ApiKeys, handler: Callable[[Exchange, Principal], Awaitable[None]]
) -> Callable[[Exchange], Awaitable[None]]:
    """A handler that only callers with an API key reach."""

    async def check(x: Exchange) -> None:
        await handler(x, keys.authenticate(x.headers.get("authorization")))

    return check


def traced(
    tracer: Tracer, name: str, handler: Callable[[Exchange], Awaitable[None]]
) -> Callable[[Exchange], Awaitable[None]]:
    """A handler whose every request is a span."""

    async def trace(x: Exchange) -> None:
        with served(tracer, name, **{"covey.request_id": x.request_id}):
            await handler(x)

    return trace


def _request_id(given: str) -> str:
    usable = given and len(given) <= REQUEST_ID_CHARS_MAX and given.isascii() and given.isprintable()
    return given if usable else f"req-{secrets.token_hex(12)}"
