"""JetStream's two uses here: buckets in memory that are made again when lost, and journals on disk."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import anyio
import nats.errors
import nats.js.errors
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    KeyValueConfig,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)

from covey.errors import InvalidArgument, Unavailable
from covey.net.bus import BusMessage, Change, KvChange, Record, check_payload, check_subject
from covey.net.call import with_trace

if TYPE_CHECKING:
    from covey.net.nats import NatsBus

BUCKET_BYTES_MAX: Final = 16 * 1024 * 1024
DEDUPE_WINDOW_S: Final = 120.0
FETCH_RECORDS: Final = 256
FETCH_TIMEOUT_S: Final = 5.0
CONSUMER_IDLE_S: Final = 30.0
STORAGES: Final = {"memory": StorageType.MEMORY, "file": StorageType.FILE}


class NatsBucket:
    """A key-value bucket. One in memory is gone after a server restart: the next `put` makes it again.

    A lost bucket cannot be told by its answer: with watchers, which are subscribers of its subjects, a put to it
    is not refused but stays unanswered. So each new connection, and each silence, makes sure of it first.
    """

    def __init__(self, bus: NatsBus, name: str, *, ttl_s: float | None, storage: str) -> None:
        if storage not in STORAGES:
            raise InvalidArgument(f"storage is one of {', '.join(STORAGES)}", field="storage")
        check_subject(name)
        self._bus = bus
        self._name = name
        self._ensured_in = 0
        self._config = KeyValueConfig(
            bucket=name, ttl=ttl_s, storage=STORAGES[storage], max_bytes=BUCKET_BYTES_MAX, direct=True
        )

    async def ensure(self) -> None:
        """Make the bucket if it is not there."""
        connection = self._bus.connections
        with self._bus.translated() as js:
            await js.create_key_value(self._config)
        self._ensured_in = connection

    async def put(self, key: str, value: bytes, *, revision: int | None = None) -> int:
        expected = {} if revision is None else {"Nats-Expected-Last-Subject-Sequence": str(revision)}
        return await self._publish(key, value, expected)

    async def get(self, key: str) -> KvChange | None:
        check_subject(key)
        if self._ensured_in != self._bus.connections:
            await self.ensure()
        with self._bus.translated() as js:
            try:
                message = await js.get_last_msg(f"KV_{self._name}", f"$KV.{self._name}.{key}", direct=True)
            except nats.js.errors.NotFoundError:
                return None
        if (message.headers or {}).get("KV-Operation") in ("DEL", "PURGE"):
            return None
        return KvChange(key=key, change=Change.PUT, value=message.data or b"", revision=int(message.seq or 0))

    async def delete(self, key: str) -> None:
        await self._publish(key, b"", {"KV-Operation": "DEL"})

    async def entries(self) -> Mapping[str, bytes]:
        found: dict[str, bytes] = {}
        with self._bus.translated() as js:
            bucket = await js.key_value(self._name)
            watcher = await bucket.watchall(ignore_deletes=True)
            try:
                with anyio.fail_after(FETCH_TIMEOUT_S):
                    while (entry := await watcher.updates(FETCH_TIMEOUT_S)) is not None:
                        found[entry.key] = entry.value or b""
            finally:
                with anyio.CancelScope(shield=True), anyio.move_on_after(FETCH_TIMEOUT_S):
                    await watcher.stop()
        return found

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[KvChange]]:
        # Buckets are subjects: a plain subscription hears each put, and outlives server restarts, which
        # a consumer of a stream in memory does not.
        prefix = f"$KV.{self._name}."
        async with self._bus.subscribe(prefix + ">") as messages:

            async def changes() -> AsyncIterator[KvChange]:
                async for message in messages:
                    yield _change(message, prefix)

            yield changes()

    async def _publish(self, key: str, value: bytes, headers: dict[str, str]) -> int:
        check_payload(value)
        check_subject(key)
        if self._ensured_in != self._bus.connections:
            await self.ensure()
        try:
            with self._bus.translated() as js:
                ack = await js.publish(f"$KV.{self._name}.{key}", value, headers=headers or None)
        except Unavailable:
            self._ensured_in = 0
            raise
        return int(ack.seq)


class NatsStream:
    """A journal on disk: what is acknowledged is synced, given the server's `sync_interval: always`."""

    def __init__(self, bus: NatsBus, name: str, subjects: tuple[str, ...], *, bytes_max: int) -> None:
        self._bus = bus
        self._name = name
        self._config = StreamConfig(
            name=name,
            subjects=list(subjects),
            retention=RetentionPolicy.LIMITS,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            max_bytes=bytes_max,
            duplicate_window=DEDUPE_WINDOW_S,
            allow_direct=True,
        )

    async def ensure(self) -> None:
        """Make the stream, or bring an older one's limits up to date."""
        with self._bus.translated() as js:
            try:
                await js.stream_info(self._name)
            except nats.js.errors.NotFoundError:
                await js.add_stream(self._config)
            else:
                await js.update_stream(self._config)

    async def append(
        self, subject: str, payload: bytes, *, expected_seq: int | None = None, msg_id: str | None = None
    ) -> int:
        check_payload(payload)
        check_subject(subject)
        headers: dict[str, str] = {}
        if expected_seq is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expected_seq)
        if msg_id is not None:
            headers["Nats-Msg-Id"] = msg_id
        with self._bus.translated() as js:
            ack = await js.publish(subject, payload, stream=self._name, headers=with_trace(headers) or None)
        return int(ack.seq)

    async def read(self, subject_filter: str, from_seq: int = 1) -> AsyncIterator[Record]:
        check_subject(subject_filter, wildcards=True)
        with self._bus.translated() as js:
            consumer = await js.pull_subscribe(subject_filter, stream=self._name, config=_reader(from_seq))
            try:
                left = (await consumer.consumer_info()).num_pending
                while left > 0:
                    for message in await consumer.fetch(min(left, FETCH_RECORDS), timeout=FETCH_TIMEOUT_S):
                        left -= 1
                        yield Record(
                            seq=message.metadata.sequence.stream, subject=message.subject, payload=message.data
                        )
            finally:
                with anyio.CancelScope(shield=True), anyio.move_on_after(FETCH_TIMEOUT_S):
                    await _discard(consumer)

    async def purge(self, subject: str) -> None:
        check_subject(subject, wildcards=True)
        with self._bus.translated() as js:
            await js.purge_stream(self._name, subject=subject)


def _reader(from_seq: int) -> ConsumerConfig:
    return ConsumerConfig(
        deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
        opt_start_seq=max(from_seq, 1),
        ack_policy=AckPolicy.NONE,
        inactive_threshold=CONSUMER_IDLE_S,
        mem_storage=True,
    )


async def _discard(consumer: Any) -> None:
    try:
        await consumer.unsubscribe()
    except nats.errors.Error as error:
        raise Unavailable("the connection to NATS ended during a read") from error


def _change(message: BusMessage, prefix: str) -> KvChange:
    gone = message.headers.get("KV-Operation") in ("DEL", "PURGE")
    return KvChange(
        key=message.subject.removeprefix(prefix),
        change=Change.GONE if gone else Change.PUT,
        value=b"" if gone else message.payload,
    )
