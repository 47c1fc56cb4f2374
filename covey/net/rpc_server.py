"""The gRPC server: health and reflection beside the handlers, drained on exit."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import grpc
from grpc import aio
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer
from opentelemetry.trace import Tracer

from covey.codec.methods import Unary
from covey.errors import CoveyError, Unavailable
from covey.net.call import (
    ERROR_MESSAGE_CHARS_MAX,
    ERROR_TRAILER,
    Gatekeeper,
    Handlers,
    Token,
    encode_error,
    services_of,
)
from covey.net.dispatcher import Dispatcher
from covey.net.grpc_transport import PING_OPTIONS, WINDOW_OPTIONS, limit_options
from covey.net.health import HEALTH_SERVICE, Health

CALLS_MAX: Final = 4096
"""Calls in flight on one server; more are refused by gRPC as `Overloaded`."""
REFLECTION_SERVICE: Final = "grpc.reflection.v1alpha.ServerReflection"
CANCELLED_GRACE_S: Final = 1.0
"""What cancelled handlers get to run their `finally` blocks once the grace period is over."""
SERVER_OPTIONS: Final = (
    *PING_OPTIONS,
    *WINDOW_OPTIONS,
    # Our clients ping each second: without these a server answers with GOAWAY "too many pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 250),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 250),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)


class GrpcServer:
    """A listening server. `address` is `host:port` with the port that was bound."""

    def __init__(self, address: str, health: Health) -> None:
        self.address = address
        self._health = health

    def set_serving(self, serving: bool) -> None:
        """Tell health checks and watchers whether to send work here."""
        self._health.set_serving(serving)


@asynccontextmanager
async def serve_grpc(
    address: str,
    handlers: Handlers,
    *,
    token: Token | Gatekeeper | None,
    grace_s: float,
    message_bytes_max: int,
    tracer: Tracer | None = None,
) -> AsyncIterator[GrpcServer]:
    """Serve for a block; on leaving it: NOT_SERVING, no new calls, `grace_s` for those in flight, then cancel them.

    Raises:
        Unavailable: the address cannot be bound.
    """
    dispatcher = Dispatcher(handlers, token=token, message_bytes_max=message_bytes_max, tracer=tracer)
    health = Health(services_of(handlers))
    server = aio.server(options=(*SERVER_OPTIONS, *limit_options(message_bytes_max)), maximum_concurrent_rpcs=CALLS_MAX)
    server.add_generic_rpc_handlers((_Paths(dispatcher, health, services_of(handlers)),))
    host = _host(address)
    try:
        port = server.add_insecure_port(f"{host}:{address.rpartition(':')[2]}")
    except RuntimeError as error:
        raise Unavailable(f"cannot listen on {address}: is the port taken?", field="listen") from error
    await server.start()
    try:
        yield GrpcServer(f"{host}:{port}", health)
    finally:
        with anyio.CancelScope(shield=True):
            await _drain(server, dispatcher, health, grace_s)


async def _drain(server: aio.Server, dispatcher: Dispatcher, health: Health, grace_s: float) -> None:
    health.set_serving(False)
    async with anyio.create_task_group() as tg:
        tg.start_soon(server.stop, grace_s)
        with anyio.move_on_after(grace_s):
            await dispatcher.until_idle()
        health.close()  # or its watchers would use up the whole grace period
    with anyio.move_on_after(CANCELLED_GRACE_S):
        await dispatcher.until_idle()


def _host(address: str) -> str:
    return address.rpartition(":")[0] or "127.0.0.1"


class _Paths(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc ships no types
    """Finds the handler of a path; every path has one, so that refusals are ours and typed."""

    def __init__(self, dispatcher: Dispatcher, health: Health, services: tuple[str, ...]) -> None:
        self._dispatcher = dispatcher
        self._health = health.handlers()
        self._reflection = ReflectionServicer((*services, HEALTH_SERVICE, REFLECTION_SERVICE))

    def service(self, details: Any) -> Any:
        path: str = details.method
        if path in self._health:
            return self._health[path]
        if path == f"/{REFLECTION_SERVICE}/ServerReflectionInfo":
            return self._reflect()
        if isinstance(self._dispatcher.method(path), Unary):
            return grpc.unary_unary_rpc_method_handler(self._unary(path))
        return grpc.stream_stream_rpc_method_handler(self._streaming(path))

    def _unary(self, path: str) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def behaviour(request: bytes, context: Any) -> bytes:
            call = _UnaryCall(request, context)
            try:
                await self._dispatcher.run(path, call)
            except CoveyError as error:
                await _abort(context, error)
            return call.reply

        return behaviour

    def _streaming(self, path: str) -> Callable[[Any, Any], Awaitable[None]]:
        async def behaviour(_requests: Any, context: Any) -> None:
            try:
                await self._dispatcher.run(path, _StreamingCall(context))
            except CoveyError as error:
                await _abort(context, error)

        return behaviour

    def _reflect(self) -> Any:
        async def behaviour(requests: Any, context: Any) -> None:
            try:
                self._dispatcher.admit(_headers(context))
            except CoveyError as error:
                await _abort(context, error)
            async for reply in self._reflection.ServerReflectionInfo(requests, context):
                await context.write(reply)

        return grpc.stream_stream_rpc_method_handler(
            behaviour,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )


def _headers(context: Any) -> Mapping[str, str]:
    return {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}


async def _abort(context: Any, error: CoveyError) -> None:
    await context.abort(
        grpc.StatusCode[error.grpc],
        error.message[:ERROR_MESSAGE_CHARS_MAX],
        trailing_metadata=((ERROR_TRAILER, encode_error(error)),),
    )


class _IncomingCall:
    def __init__(self, context: Any) -> None:
        self.headers = _headers(context)
        self._context = context

    @property
    def peer(self) -> str:
        peer: str = self._context.peer()
        return peer

    def remaining_s(self) -> float:
        remaining: float | None = self._context.time_remaining()
        return math.inf if remaining is None else remaining


class _UnaryCall(_IncomingCall):
    def __init__(self, request: bytes, context: Any) -> None:
        super().__init__(context)
        self._request = request
        self.reply = b""

    async def receive(self) -> bytes | None:
        return self._request

    async def send(self, data: bytes) -> None:
        self.reply = data


class _StreamingCall(_IncomingCall):
    async def receive(self) -> bytes | None:
        message = await self._context.read()
        return None if message is aio.EOF else message

    async def send(self, data: bytes) -> None:
        await self._context.write(data)
