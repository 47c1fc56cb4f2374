"""The client's wire over grpc.aio: finds dead peers by pings, reconnects, and fails only with `CoveyError`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import anyio
import grpc
from grpc import aio

from covey.errors import TABLE, CoveyError, Internal, Overloaded, PayloadTooLarge, Unavailable
from covey.net.call import ERROR_TRAILER, decode_error

# A killed peer closes its sockets; pings find the frozen and the cut-off ones within about a second.
# `ping_timeout_ms` is what bounds a frozen peer: without it the default is a minute, whatever keepalive says.
PING_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.ping_timeout_ms", 500),
    ("grpc.http2.max_pings_without_data", 0),
)
# What a receiver lets be on its way to it, on each stream. gRPC's own estimate of what a connection takes (BDP) is off:
# with it blocks of keys and values travel at half the speed.
WINDOW_OPTIONS: Final = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 8 * 1024 * 1024),
)
CLIENT_OPTIONS: Final = (
    *PING_OPTIONS,
    *WINDOW_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

CORE_FAILED: Final = "Internal error from Core"
"""What grpc.aio says when a write fails: the server's own status tells more."""
STATUS_WAIT_S: Final = 1.0
# A status that our own guard did not send says how the connection ended, not what a handler decided: a call that
# we did not cancel ourselves was cut off by the other side.
_BY_STATUS: Final[dict[str, type[CoveyError]]] = {
    **{error.grpc: error for error in reversed(TABLE.values())},
    "RESOURCE_EXHAUSTED": Overloaded,
    "CANCELLED": Unavailable,
}


def limit_options(message_bytes_max: int) -> tuple[tuple[str, int], ...]:
    """Return the options that bound one message in both directions."""
    return (
        ("grpc.max_send_message_length", message_bytes_max),
        ("grpc.max_receive_message_length", message_bytes_max),
    )


class GrpcTransport:
    """One HTTP/2 connection to one address; it reconnects by itself, a call while it is down is `Unavailable`."""

    def __init__(self, address: str, *, message_bytes_max: int) -> None:
        self.address = address
        options = (*CLIENT_OPTIONS, *limit_options(message_bytes_max))
        self._channel = aio.insecure_channel(address, options=options)
        self._stubs: dict[str, Any] = {}  # one per method called: bounded by the methods there are

    async def unary(self, path: str, data: bytes, *, timeout_s: float | None, headers: Mapping[str, str]) -> bytes:
        stub = self._stub(path, self._channel.unary_unary)
        with translated(path, self.address):
            try:
                reply: bytes = await stub(data, timeout=timeout_s, metadata=tuple(headers.items()))
            except asyncio.CancelledError:
                # grpc raises one of its own, which no cancel scope knows: let the scope raise its own, if it is one's.
                await anyio.lowlevel.checkpoint_if_cancelled()
                raise
            return reply

    def stream(self, path: str, data: bytes, *, timeout_s: float | None, headers: Mapping[str, str]) -> GrpcCall:
        stub = self._stub(path, self._channel.unary_stream)
        with translated(path, self.address):
            return GrpcCall(stub(data, timeout=timeout_s, metadata=tuple(headers.items())), path, self.address)

    def exchange(self, path: str, *, timeout_s: float | None, headers: Mapping[str, str]) -> GrpcCall:
        stub = self._stub(path, self._channel.stream_stream)
        with translated(path, self.address):
            return GrpcCall(stub(timeout=timeout_s, metadata=tuple(headers.items())), path, self.address)

    async def aclose(self) -> None:
        await self._channel.close()

    def _stub(self, path: str, make: Any) -> Any:
        stub = self._stubs.get(path)
        if stub is None:
            stub = self._stubs[path] = make(path)
        return stub


class GrpcCall:
    """One open streaming call; remembers the status that the server sent.

    When a write fails because the server has ended the call, grpc.aio puts an error of its own in the place of the
    server's status, before or after that arrives. The done callback sees each of them.
    """

    def __init__(self, call: Any, path: str, address: str) -> None:
        self._call = call
        self._path = path
        self._address = address
        self._status: tuple[grpc.StatusCode, str, Any] | None = None
        self._settled = anyio.Event()
        call.add_done_callback(self._note_status)

    async def send(self, data: bytes) -> None:
        await self._run(self._call.write(data))

    async def done_sending(self) -> None:
        await self._run(self._call.done_writing())

    async def receive(self) -> bytes | None:
        message = await self._run(self._call.read())
        return None if message is aio.EOF else message

    def cancel(self) -> None:
        self._call.cancel()

    async def _run(self, operation: Coroutine[Any, Any, Any]) -> Any:
        with translated(self._path, self._address):
            try:
                return await operation
            except asyncio.CancelledError:
                await anyio.lowlevel.checkpoint_if_cancelled()  # as in `unary`
                raise
            except asyncio.InvalidStateError as error:  # written to a call that has ended
                raise await self._ended() from error
            except aio.AioRpcError as error:
                if error.details() == CORE_FAILED:
                    raise await self._ended() from error
                raise

    async def _ended(self) -> CoveyError:
        with anyio.move_on_after(STATUS_WAIT_S):
            await self._settled.wait()
        if self._status is None or self._status[0] is grpc.StatusCode.OK:
            return Unavailable(f"{self._address} ended {self._path.removeprefix('/')} before all was sent")
        return error_of(*self._status, self._path, self._address)

    def _note_status(self, call: Any) -> None:
        details = _ready(call.details())
        if details != CORE_FAILED:
            self._status = (_ready(call.code()), details, _ready(call.trailing_metadata()))
            self._settled.set()


def _ready(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a call that is done knows its status")


@contextmanager
def translated(path: str, address: str) -> Iterator[None]:
    """Turn what grpc raises into the error that the server raised, or into what happened to the connection."""
    task = asyncio.current_task()
    cancelling = task.cancelling() if task is not None else 0
    try:
        yield
    except aio.AioRpcError as error:
        raise error_of(error.code(), error.details(), error.trailing_metadata(), path, address) from error
    except aio.UsageError as error:
        raise Unavailable(f"the channel to {address} is closed") from error
    except asyncio.CancelledError as error:
        if task is not None and task.cancelling() > cancelling:
            raise
        # Nobody cancelled this task: the channel was closed under the call.
        raise Unavailable(f"the channel to {address} was closed during {path.removeprefix('/')}") from error


def error_of(code: grpc.StatusCode, details: str | None, trailers: Any, path: str, address: str) -> CoveyError:
    """Rebuild what the server raised, or say what became of the connection."""
    for name, value in trailers or ():
        if name == ERROR_TRAILER and isinstance(value, bytes):
            return decode_error(value)
    what = f"{path.removeprefix('/')} at {address}"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than" in (details or ""):
        return PayloadTooLarge(f"{what}: a message is over the limit of its receiver")
    found = _BY_STATUS.get(code.name, Internal)
    return found(f"{what}: {code.name.lower().replace('_', ' ')}")
