"""Run the handlers of a server: decode, authenticate, guard; the same whatever carries the call."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

import anyio
from opentelemetry.trace import NoOpTracer, Tracer

from covey.codec.methods import BidiStream, ClientStream, Method, ServerStream, Unary
from covey.errors import CoveyError, Internal, InvalidArgument, PayloadTooLarge, Unauthenticated, Unimplemented
from covey.net.call import AUTHORIZATION, Call, Gatekeeper, Handler, Handlers, Token, enter_request, extracted, sole
from covey.net.spans import served
from covey.net.transport import ServerCall

log = logging.getLogger(__name__)


class Dispatcher:
    """Maps paths to handlers. Nothing but `CoveyError` and cancellation leaves `run`."""

    def __init__(
        self,
        handlers: Handlers,
        *,
        token: Token | Gatekeeper | None,
        message_bytes_max: int,
        tracer: Tracer | None = None,
    ) -> None:
        self._handlers: dict[str, tuple[Method[Any, Any], Handler]] = {m.path: (m, h) for m, h in handlers.items()}
        self._token = token
        self._message_bytes_max = message_bytes_max
        self._tracer = tracer or NoOpTracer()
        self._active = 0
        self._idle = anyio.Event()
        self._idle.set()

    @property
    def active(self) -> int:
        """Calls being served now."""
        return self._active

    async def until_idle(self) -> None:
        """Wait until no call is being served."""
        while self._active:
            await self._idle.wait()

    def method(self, path: str) -> Method[Any, Any] | None:
        found = self._handlers.get(path)
        return found[0] if found else None

    def admit(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return what the handler sees of the headers; raise `Unauthenticated` unless they carry the mesh token.

        A gatekeeper has its own rule instead. The comparison takes constant time.
        """
        if isinstance(self._token, Gatekeeper):
            return self._token.admit(headers)
        if self._token is not None:
            scheme, _, credential = headers.get(AUTHORIZATION, "").partition(" ")
            if scheme.lower() != "bearer" or not self._token.matches(credential):
                raise Unauthenticated("this call needs the mesh token: send `authorization: Bearer …`")
        return {name: value for name, value in headers.items() if name != AUTHORIZATION}

    async def run(self, path: str, wire: ServerCall) -> None:
        """Serve one call to its end.

        Raises:
            CoveyError: what the handler raised, or `Internal` with a reference to the log in place of anything else.
        """
        with self._counted():
            try:
                await self._serve(path, wire)
            except Exception as error:
                raise self._public(path, error) from error

    async def _serve(self, path: str, wire: ServerCall) -> None:
        headers = self.admit(wire.headers)
        found = self._handlers.get(path)
        if found is None:
            raise Unimplemented(f"{path.removeprefix('/')} is not served here")
        method, handler = found
        call = Call(headers=headers, request_id=enter_request(headers), peer=wire.peer, time_left=wire.remaining_s)
        name = path.removeprefix("/")
        with (
            extracted(headers),
            served(self._tracer, name, **{"rpc.system": "grpc", "covey.request_id": call.request_id}),
        ):
            await self._invoke(method, handler, wire, call)

    async def _invoke(self, method: Method[Any, Any], handler: Handler, wire: ServerCall, call: Call) -> None:
        streams_requests = isinstance(method, ClientStream | BidiStream)
        if streams_requests:
            async with aclosing(self._requests(method, wire)) as requests:
                await self._answer(method, handler(requests, call), wire)
        else:
            data = await wire.receive()
            if data is None:
                raise InvalidArgument(f"{method.service}.{method.name} needs a request")
            await self._answer(method, handler(method.decode_request(data), call), wire)

    async def _answer(self, method: Method[Any, Any], outcome: Any, wire: ServerCall) -> None:
        if isinstance(method, Unary | ClientStream):
            await wire.send(self._encoded(method, await outcome))
            return
        assert isinstance(method, ServerStream | BidiStream)
        async with aclosing(outcome):
            async for reply in outcome:
                await wire.send(self._encoded(method, reply))

    async def _requests(self, method: Method[Any, Any], wire: ServerCall) -> AsyncGenerator[Any, None]:
        while (data := await wire.receive()) is not None:
            yield method.decode_request(data)

    def _encoded(self, method: Method[Any, Any], reply: Any) -> bytes:
        data = method.encode_reply(reply)
        if len(data) > self._message_bytes_max:
            raise PayloadTooLarge(
                f"the reply of {method.service}.{method.name} is {len(data)} bytes, at most "
                f"{self._message_bytes_max} are carried"
            )
        return data

    def _public(self, path: str, error: Exception) -> CoveyError:
        cause = sole(error)
        if isinstance(cause, CoveyError):
            return cause
        reference = secrets.token_hex(6)
        log.error("rpc failed path=%s reference=%s", path, reference, exc_info=error)
        return Internal(f"internal error, reference {reference}")

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if not self._active:
            self._idle = anyio.Event()
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()
