"""The bus over a NATS server: reconnects for ever, never keeps what it cannot send, refuses what is too large."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from random import Random
from typing import Any, Final, Self

import anyio
import nats.errors
from anyio.streams.memory import MemoryObjectReceiveStream
from nats.aio.client import Client
from nats.aio.msg import Msg

from covey.errors import Unavailable
from covey.net.bus import BusMessage, check_payload, check_subject
from covey.net.nats_errors import translated
from covey.net.nats_jetstream import NatsBucket, NatsStream
from covey.retry import Backoff

CONNECT_TIMEOUT_S: Final = 5.0
REQUEST_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 2
PING_S: Final = 1
PINGS_OUTSTANDING_MAX: Final = 2
"""A frozen server is given up after about three seconds."""
PENDING_BYTES_MAX: Final = 2 * 1024 * 1024
RECONNECT: Final = Backoff(base_s=0.05, ceiling_s=1.0)

log = logging.getLogger(__name__)


class NatsBus:
    """One connection to NATS, owned by `NatsBus.open`."""

    def __init__(self, client: Client, rng: Random) -> None:
        self._client = client
        self._rng = rng
        self._attempt = 0
        self._closing = False
        self._connections = 0
        self._connected = anyio.Event()

    @classmethod
    @asynccontextmanager
    async def open(
        cls, url: str, *, token: str | None = None, name: str = "", rng: Random | None = None
    ) -> AsyncIterator[Self]:
        """Connect for a block; several URLs of one cluster are joined by commas.

        Raises:
            Unavailable: no server answered within `CONNECT_TIMEOUT_S`.
            Unauthenticated: the server refused the token.
        """
        bus = cls(Client(), rng or Random())  # noqa: S311 - jitter
        try:
            await bus._connect(url.split(","), token, name)
            yield bus
        finally:
            with anyio.CancelScope(shield=True):
                await bus._close()

    @property
    def connected(self) -> bool:
        return self._client.is_connected

    @property
    def connections(self) -> int:
        return self._connections

    async def until_connected(self) -> None:
        while not self.connected:
            await self._connected.wait()

    async def publish(self, subject: str, payload: bytes, *, headers: Mapping[str, str] | None = None) -> None:
        check_payload(payload)
        check_subject(subject)
        self.check_connected()
        if self._client.pending_data_size > PENDING_BYTES_MAX:
            raise Unavailable("too much is waiting to be sent to NATS", retry_after_ms=1000)
        with translated():
            await self._client.publish(subject, payload, headers=dict(headers) if headers else None)

    @asynccontextmanager
    async def subscribe(self, subject: str, *, capacity: int = 1024) -> AsyncIterator[NatsSubscription]:
        check_subject(subject.removeprefix("$KV."), wildcards=True)
        send, receive = anyio.create_memory_object_stream[BusMessage](capacity)
        subscription = NatsSubscription(receive)

        async def deliver(message: Msg) -> None:
            try:
                send.send_nowait(_message(message))
            except anyio.WouldBlock:
                subscription.dropped += 1

        with send, receive, translated():
            inner = await self._client.subscribe(subject, cb=deliver, pending_msgs_limit=max(capacity, 1024))
            try:
                with anyio.move_on_after(REQUEST_TIMEOUT_S):
                    await self._client.flush()  # the server knows of it before anything is published after this
                yield subscription
            finally:
                with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_TIMEOUT_S):
                    await _unsubscribe(inner)

    async def kv(self, bucket: str, *, ttl_s: float | None = None, storage: str = "memory") -> NatsBucket:
        opened = NatsBucket(self, self.jetstream(), bucket, ttl_s=ttl_s, storage=storage)
        await opened.ensure()
        return opened

    async def stream(self, name: str, subjects: tuple[str, ...], *, bytes_max: int) -> NatsStream:
        opened = NatsStream(self, self.jetstream(), name, subjects, bytes_max=bytes_max)
        await opened.ensure()
        return opened

    def jetstream(self) -> Any:
        return self._client.jetstream(timeout=REQUEST_TIMEOUT_S)

    def check_connected(self) -> None:
        """Raise `Unavailable` while there is no connection: nats-py would keep what is published for later."""
        if not self.connected:
            raise Unavailable("not connected to NATS", retry_after_ms=1000)

    async def _connect(self, urls: list[str], token: str | None, name: str) -> None:
        with anyio.move_on_after(CONNECT_TIMEOUT_S), translated():
            await self._client.connect(
                servers=urls,
                token=token,
                name=name or None,
                max_reconnect_attempts=-1,
                reconnect_to_server_handler=self._next_server,
                connect_timeout=2,
                ping_interval=PING_S,
                max_outstanding_pings=PINGS_OUTSTANDING_MAX,
                pending_size=PENDING_BYTES_MAX,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnect,
                reconnected_cb=self._on_connect,
            )
            await self._on_connect()
            return
        raise Unavailable(f"no NATS server answered at {', '.join(_shown(url) for url in urls)}", field="nats")

    async def _close(self) -> None:
        self._closing = True
        with anyio.move_on_after(CLOSE_TIMEOUT_S):
            if self.connected:
                try:
                    await self._client.flush(CLOSE_TIMEOUT_S)
                except nats.errors.Error:
                    log.info("nats: the last messages may not have been sent")
            await self._client.close()

    def _next_server(self, servers: list[Any], _info: dict[str, Any]) -> tuple[Any, float]:
        delay_s = RECONNECT.delay_s(self._attempt, self._rng)
        self._attempt += 1
        return servers[self._attempt % len(servers)], delay_s

    async def _on_connect(self) -> None:
        self._attempt = 0
        self._connections += 1
        log.info("nats connected")
        self._connected.set()
        self._connected = anyio.Event()

    async def _on_disconnect(self) -> None:
        if not self._closing:
            log.warning("nats disconnected")

    async def _on_error(self, error: Exception) -> None:
        log.info("nats: %s", type(error).__name__)


class NatsSubscription:
    """Messages of one subject; iterate while its block is open."""

    def __init__(self, receive: MemoryObjectReceiveStream[BusMessage]) -> None:
        self.dropped = 0
        self._receive = receive

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BusMessage:
        try:
            return await self._receive.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            raise StopAsyncIteration from None


async def _unsubscribe(inner: Any) -> None:
    try:
        await inner.unsubscribe()
    except nats.errors.Error:
        return  # a closed connection has no subscriptions


def _message(message: Msg) -> BusMessage:
    return BusMessage(subject=message.subject, payload=message.data, headers=dict(message.headers or {}))


def _shown(url: str) -> str:
    return url.rpartition("@")[2].removeprefix("nats://")
