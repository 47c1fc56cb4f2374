"""Typed calls to other processes, and the cache of channels by address."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Generic, Self, TypeVar

import anyio
from anyio.abc import TaskGroup

from covey.codec.methods import BidiStream, ClientStream, Method, ServerStream, Unary
from covey.errors import CoveyError, DeadlineExceeded, Overloaded, PayloadTooLarge
from covey.net.call import AUTHORIZATION, MESSAGE_BYTES_MAX, Token, checked_timeout, outgoing_headers
from covey.net.grpc_transport import GrpcTransport
from covey.net.tasks import background_tasks
from covey.net.transport import Transport, WireCall

Q = TypeVar("Q")
R = TypeVar("R")

CHANNELS_MAX = 256


class Channel:
    """Calls to one address. Every call fails with a `CoveyError`, or with what the server's handler raised.

    `timeout_s` is relative: the server sees what is left of it in `Call.remaining_s()`. The id of the request
    being served in this task and the trace context travel along.
    """

    def __init__(
        self, transport: Transport, *, token: Token | None = None, message_bytes_max: int = MESSAGE_BYTES_MAX
    ) -> None:
        self._transport = transport
        self._token = token
        self._message_bytes_max = message_bytes_max
        self._calls = 0

    @classmethod
    @asynccontextmanager
    async def open(
        cls, address: str, *, token: Token | None = None, message_bytes_max: int = MESSAGE_BYTES_MAX
    ) -> AsyncIterator[Self]:
        """Own a gRPC channel for a block; it connects at the first call and reconnects by itself."""
        transport = GrpcTransport(address, message_bytes_max=message_bytes_max)
        channel = cls(transport, token=token, message_bytes_max=message_bytes_max)
        try:
            yield channel
        finally:
            with anyio.CancelScope(shield=True):
                await channel.aclose()

    @property
    def address(self) -> str:
        return self._transport.address

    @property
    def token(self) -> Token | None:
        """What its calls authenticate with, for other channels to the same mesh."""
        return self._token

    @property
    def calls(self) -> int:
        """Calls that are open now."""
        return self._calls

    async def aclose(self) -> None:
        """Close the connection; open calls end as `Unavailable`."""
        await self._transport.aclose()

    async def call(
        self, method: Unary[Q, R], request: Q, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> R:
        """Send a request and return its reply."""
        data = self._encoded(method, request)
        with self._counted():
            timeout_s_left = checked_timeout(timeout_s, method.path)
            reply = await self._transport.unary(
                method.path, data, timeout_s=timeout_s_left, headers=self._headers(headers)
            )
        return method.decode_reply(reply)

    @asynccontextmanager
    async def stream(
        self,
        method: ServerStream[Q, R],
        request: Q,
        *,
        timeout_s: float | None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Replies[R]]:
        """Send a request and iterate over its replies; leaving the block cancels what still runs."""
        data = self._encoded(method, request)
        timeout_s = checked_timeout(timeout_s, method.path)
        with self._counted():
            wire = self._transport.stream(method.path, data, timeout_s=timeout_s, headers=self._headers(headers))
            try:
                yield Replies(method, wire)
            finally:
                wire.cancel()

    async def upload(
        self,
        method: ClientStream[Q, R],
        requests: AsyncIterable[Q],
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> R:
        """Send all requests, then return the one reply; `requests` is closed whatever happens."""
        timeout_s_left = checked_timeout(timeout_s, method.path)
        with self._counted():
            wire = self._transport.exchange(method.path, timeout_s=timeout_s_left, headers=self._headers(headers))
            try:
                with anyio.move_on_after(timeout_s_left):
                    async with _closing(requests):
                        return await self._upload(method, requests, wire)
                raise DeadlineExceeded(f"{method.path.removeprefix('/')}: not done in {timeout_s:g} s")
            finally:
                wire.cancel()

    async def _upload(self, method: ClientStream[Q, R], requests: AsyncIterable[Q], wire: WireCall) -> R:
        async for request in requests:
            await wire.send(self._encoded(method, request))
        await wire.done_sending()
        reply = await wire.receive()
        assert reply is not None, "a server answers an upload or fails it"
        result = method.decode_reply(reply)
        await wire.receive()  # the status after the reply
        return result

    @asynccontextmanager
    async def exchange(
        self,
        method: BidiStream[Q, R],
        outgoing: AsyncIterable[Q],
        *,
        timeout_s: float | None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Replies[R]]:
        """Send `outgoing` while iterating over the replies; leaving the block cancels both and closes `outgoing`.

        What `outgoing` raises leaves the block.
        """
        timeout_s = checked_timeout(timeout_s, method.path)
        with self._counted():
            wire = self._transport.exchange(method.path, timeout_s=timeout_s, headers=self._headers(headers))
            try:
                async with background_tasks() as tg:
                    tg.start_soon(self._send_all, method, outgoing, wire)
                    yield Replies(method, wire)
            finally:
                wire.cancel()

    async def _send_all(self, method: Method[Q, Any], outgoing: AsyncIterable[Q], wire: WireCall) -> None:
        async with _closing(outgoing):
            async for item in outgoing:
                data = self._encoded(method, item)
                try:
                    await wire.send(data)
                except CoveyError:
                    return  # the call is over: whoever reads the replies learns why
            with suppress(CoveyError):
                await wire.done_sending()

    def _encoded(self, method: Method[Q, Any], request: Q) -> bytes:
        data = method.encode_request(request)
        if len(data) > self._message_bytes_max:
            raise PayloadTooLarge(
                f"a request of {method.service}.{method.name} is {len(data)} bytes, at most "
                f"{self._message_bytes_max} are carried"
            )
        return data

    def _headers(self, extra: Mapping[str, str] | None) -> dict[str, str]:
        headers = outgoing_headers(extra)
        if self._token is not None:
            headers[AUTHORIZATION] = self._token.bearer()
        return headers

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1


class Replies(Generic[R]):
    """The replies of one call, in order; iterate once."""

    def __init__(self, method: Method[Any, R], wire: WireCall) -> None:
        self._method = method
        self._wire = wire

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> R:
        data = await self._wire.receive()
        if data is None:
            raise StopAsyncIteration
        return self._method.decode_reply(data)


@asynccontextmanager
async def _closing(items: AsyncIterable[Any]) -> AsyncIterator[None]:
    """Close an async generator on every exit; other iterables are left alone."""
    try:
        yield
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            with anyio.CancelScope(shield=True):
                await close()


class Channels:
    """One channel an address, opened at first use; at most `CHANNELS_MAX`, the idle ones are closed for new ones."""

    def __init__(self, tg: TaskGroup, make: Callable[[str], Channel]) -> None:
        self._tg = tg
        self._make = make
        self._channels: OrderedDict[str, Channel] = OrderedDict()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        *,
        token: Token | None = None,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
        transport: Callable[[str], Transport] | None = None,
    ) -> AsyncIterator[Self]:
        """Own channels for a block. `transport` replaces gRPC, for example by `MemoryNetwork.transport`."""

        def make(address: str) -> Channel:
            wire = transport(address) if transport else GrpcTransport(address, message_bytes_max=message_bytes_max)
            return Channel(wire, token=token, message_bytes_max=message_bytes_max)

        async with background_tasks() as tg:
            channels = cls(tg, make)
            try:
                yield channels
            finally:
                with anyio.CancelScope(shield=True):
                    await channels.aclose()

    def to(self, address: str) -> Channel:
        """Return the channel to an address.

        Raises:
            Overloaded: calls are open on `CHANNELS_MAX` other channels.
        """
        channel = self._channels.get(address)
        if channel is None:
            self._make_room()
            channel = self._channels[address] = self._make(address)
        self._channels.move_to_end(address)
        return channel

    async def aclose(self) -> None:
        """Close all channels."""
        while self._channels:
            _, channel = self._channels.popitem()
            await channel.aclose()

    def _make_room(self) -> None:
        if len(self._channels) < CHANNELS_MAX:
            return
        idle = next((address for address, channel in self._channels.items() if not channel.calls), None)
        if idle is None:
            raise Overloaded(f"calls are open to {CHANNELS_MAX} addresses already", retry_after_ms=1000)
        self._tg.start_soon(self._channels.pop(idle).aclose)
