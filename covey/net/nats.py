"""The bus over a NATS server: reconnects for ever, never keeps what it cannot send, refuses what is too large."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from random import Random
from typing import Any, Final, Self

import anyio
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from covey.errors import CoveyError, Unauthenticated, Unavailable
from covey.net.bus import BusMessage, check_payload, check_subject
from covey.net.call import with_trace
from covey.net.nats_errors import translated
from covey.net.nats_jetstream import NatsBucket, NatsStream
from covey.net.tasks import background_tasks
from covey.retry import Backoff

CONNECT_TIMEOUT_S: Final = 5.0
REQUEST_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 2
PING_S: Final = 1
PINGS_OUTSTANDING_MAX: Final = 2
"""A frozen server is given up after about three seconds."""
PENDING_BYTES_MAX: Final = 2 * 1024 * 1024
PENDING_MESSAGES_MAX: Final = 65536
STREAM_BYTES_MAX: Final = 1024**3
RECONNECT: Final = Backoff(base_s=0.05, ceiling_s=1.0)

log = logging.getLogger(__name__)


class NatsBus:
    """One connection to NATS, owned by `NatsBus.open`."""

    def __init__(self, urls: list[str], *, token: str | None, name: str, rng: Random) -> None:
        self._urls = urls
        self._token = token
        self._name = name
        self._rng = rng
        self._client = Client()
        self._subscriptions: dict[NatsSubscription, Any] = {}
        self._connections = 0
        self._attempt = 0
        self._refused = False
        self._connecting = False
        self._connected = anyio.Event()
        self._closed = anyio.Event()

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
        bus = cls(url.split(","), token=token, name=name, rng=rng or Random())  # noqa: S311 - jitter
        try:
            await bus._connect()
            async with background_tasks() as tg:
                tg.start_soon(bus._revive)
                yield bus
        finally:
            with anyio.CancelScope(shield=True):
                await _close(bus._client)

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
        with self.translated():
            await self._client.publish(subject, payload, headers=with_trace(headers) or None)

    @asynccontextmanager
    async def subscribe(self, subject: str, *, capacity: int = 1024) -> AsyncIterator[NatsSubscription]:
        check_subject(subject.removeprefix("$KV."), wildcards=True)
        subscription = NatsSubscription(subject, capacity)
        self._subscriptions[subscription] = None
        try:
            if self.connected:
                await self._listen(subscription)
                await self._flush()  # what is published after this will be heard
            yield subscription
        finally:
            inner = self._subscriptions.pop(subscription)
            subscription.close()
            with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_TIMEOUT_S):
                await _unsubscribe(inner)

    async def kv(self, bucket: str, *, ttl_s: float | None = None, storage: str = "memory") -> NatsBucket:
        opened = NatsBucket(self, bucket, ttl_s=ttl_s, storage=storage)
        await opened.ensure()
        return opened

    async def stream(self, name: str, subjects: tuple[str, ...], *, bytes_max: int = STREAM_BYTES_MAX) -> NatsStream:
        opened = NatsStream(self, name, subjects, bytes_max=bytes_max)
        await opened.ensure()
        return opened

    @contextmanager
    def translated(self) -> Iterator[Any]:
        """Hand out the JetStream context and turn what nats-py raises into the error tree.

        Raises:
            Unavailable: there is no connection (nats-py would keep what is published for later), or too much is
                waiting to be sent.
        """
        if not self.connected:
            raise Unavailable("not connected to NATS", retry_after_ms=1000)
        if self._client.pending_data_size > PENDING_BYTES_MAX:
            raise Unavailable("too much is waiting to be sent to NATS", retry_after_ms=1000)
        with translated():
            yield self._client.jetstream(timeout=REQUEST_TIMEOUT_S)

    async def _listen(self, subscription: NatsSubscription) -> None:
        with translated():
            self._subscriptions[subscription] = await self._client.subscribe(
                subscription.subject, cb=subscription.deliver, pending_msgs_limit=PENDING_MESSAGES_MAX
            )

    async def _flush(self) -> None:
        """Wait until the server has taken what was sent so far.

        Twice, because nats-py writes a flush's PING ahead of commands that still wait in its buffer: by the first PONG
        the buffer is on its way, the second one says that the server has it.
        """
        try:
            await self._client.flush(CLOSE_TIMEOUT_S)
            await self._client.flush(CLOSE_TIMEOUT_S)
        except (nats.errors.Error, OSError) as error:
            log.info("nats: not flushed: %s", type(error).__name__)  # a reconnect repeats the subscriptions

    async def _connect(self) -> None:
        self._refused, self._connecting = False, True
        with anyio.move_on_after(CONNECT_TIMEOUT_S), self._unless_refused(), translated():
            await self._client.connect(
                servers=self._urls,
                token=self._token,
                name=self._name or None,
                max_reconnect_attempts=-1,
                reconnect_to_server_handler=self._next_server,
                connect_timeout=2,
                ping_interval=PING_S,
                max_outstanding_pings=PINGS_OUTSTANDING_MAX,
                pending_size=2 * PENDING_BYTES_MAX,  # never reached: over it nats-py would wait instead of refusing
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnect,
                reconnected_cb=self._on_connect,
                closed_cb=self._on_close,
            )
            await self._on_connect()
            return
        raise Unavailable(f"no NATS server answered at {', '.join(map(_shown, self._urls))}", field="nats")

    @contextmanager
    def _unless_refused(self) -> Iterator[None]:
        try:
            yield
        except Unavailable as error:
            if self._refused:
                reason = "NATS refused the connection: is the token right?"
                raise Unauthenticated(reason, field="nats_token_file") from error
            raise
        finally:
            self._connecting = False

    async def _revive(self) -> None:
        """Start over with a new client: nats-py gives up for good on some of a server's errors."""
        while True:
            await self._closed.wait()
            self._closed = anyio.Event()
            await _close(self._client)
            self._client = Client()
            try:
                await self._connect()
                for subscription in tuple(self._subscriptions):
                    await self._listen(subscription)
            except CoveyError as error:
                log.warning("nats: %s", error)
                self._closed.set()
                await anyio.sleep(self._delay_s())

    def _delay_s(self) -> float:
        self._attempt += 1
        return RECONNECT.delay_s(self._attempt - 1, self._rng)

    def _next_server(self, servers: list[Any], _info: dict[str, Any]) -> tuple[Any, float]:
        delay_s = self._delay_s()
        return servers[self._attempt % len(servers)], delay_s

    async def _on_connect(self) -> None:
        self._attempt = 0
        self._connections += 1
        log.info("nats connected")
        self._connected.set()
        self._connected = anyio.Event()

    async def _on_disconnect(self) -> None:
        log.info("nats disconnected")

    async def _on_close(self) -> None:
        self._closed.set()

    async def _on_error(self, error: Exception) -> None:
        log.info("nats: %s", type(error).__name__)
        if self._connecting and "authorization violation" in str(error).lower():
            self._refused = True
            self._client.options["allow_reconnect"] = False  # trying again would not help: let `connect` raise


class NatsSubscription:
    """Messages of one subject; iterate while its block is open."""

    def __init__(self, subject: str, capacity: int) -> None:
        self.subject = subject
        self.dropped = 0
        self._send, self._receive = anyio.create_memory_object_stream[BusMessage](capacity)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BusMessage:
        try:
            return await self._receive.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            raise StopAsyncIteration from None

    async def deliver(self, message: Msg) -> None:
        """Take a message in, or drop and count it."""
        try:
            self._send.send_nowait(
                BusMessage(subject=message.subject, payload=message.data, headers=dict(message.headers or {}))
            )
        except anyio.WouldBlock:
            self.dropped += 1
        except anyio.ClosedResourceError:
            return  # its block was left while this was on its way

    def close(self) -> None:
        self._send.close()
        self._receive.close()


async def _close(client: Client) -> None:
    with anyio.move_on_after(CLOSE_TIMEOUT_S):
        if client.is_connected:
            try:
                await client.flush(CLOSE_TIMEOUT_S)
            except nats.errors.Error:
                log.info("nats: the last messages may not have been sent")
        await client.close()


async def _unsubscribe(inner: Any) -> None:
    if inner is None:
        return
    try:
        await inner.unsubscribe()
    except nats.errors.Error:
        return  # a closed connection has no subscriptions


def _shown(url: str) -> str:
    return url.rpartition("@")[2].removeprefix("nats://")
