"""The bus in one process: a broker with subjects, buckets and journals, that can be stopped, and faults from a seed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Final, Self

import anyio

from covey.errors import Fenced, InvalidArgument, NoSpace, Unavailable
from covey.net.bus import BusMessage, Change, KvChange, Record, check_payload, check_subject, subject_matches
from covey.net.call import with_trace
from covey.net.memory_wire import Faults

DEDUPE_IDS_MAX: Final = 65536
DEDUPE_WINDOW_S: Final = 120.0


@dataclass(slots=True)
class _Bucket:
    ttl_s: float | None
    storage: str
    revision: int = 0
    values: dict[str, tuple[bytes, float, int]] = field(default_factory=dict)
    """Value, when it was put, and its revision."""


@dataclass(slots=True)
class _Journal:
    subjects: tuple[str, ...]
    bytes_max: int
    records: list[Record] = field(default_factory=list)
    last_seq: int = 0
    size_bytes: int = 0
    seen: OrderedDict[str, tuple[int, float]] = field(default_factory=OrderedDict)


class MemoryBroker:
    """What a NATS server is to its buses. `stop` and `start` are its restart: buckets in memory are lost by it."""

    def __init__(self, *, seed: int = 0, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.running = True
        self.rng = Random(seed)  # noqa: S311 - repeatable faults, not a secret
        self.buckets: dict[str, _Bucket] = {}
        self.journals: dict[str, _Journal] = {}
        self._buses: set[MemoryBus] = set()

    @asynccontextmanager
    async def bus(self) -> AsyncIterator[MemoryBus]:
        """Connect for a block. Raises `Unavailable` while stopped."""
        if not self.running:
            raise Unavailable("no NATS server answered", field="nats")
        bus = MemoryBus(self)
        self._buses.add(bus)
        try:
            yield bus
        finally:
            self._buses.discard(bus)

    def stop(self) -> None:
        self.running = False
        self.buckets = {name: bucket for name, bucket in self.buckets.items() if bucket.storage == "file"}
        for bus in self._buses:
            bus.connected = False

    def start(self) -> None:
        self.running = True
        for bus in self._buses:
            bus.reconnect()

    def route(self, message: BusMessage) -> None:
        """Hand a message to every subscription of every connected bus."""
        for bus in self._buses:
            bus.deliver(message)


class MemoryBus:
    """One connection to a `MemoryBroker`. Faults strike each publish; `disconnect` cuts it until `reconnect`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.connected = True
        self.connections = 1
        self._broker = broker
        self._subscriptions: list[MemorySubscription] = []
        self._reconnected = anyio.Event()

    async def until_connected(self) -> None:
        while not self.connected:
            await self._reconnected.wait()

    def disconnect(self) -> None:
        self.connected = False

    def reconnect(self) -> None:
        if not self.connected and self._broker.running:
            self.connected = True
            self.connections += 1
            self._reconnected.set()
            self._reconnected = anyio.Event()

    async def publish(self, subject: str, payload: bytes, *, headers: Mapping[str, str] | None = None) -> None:
        check_payload(payload)
        check_subject(subject)
        await anyio.lowlevel.checkpoint()
        self.check_connected()
        try:
            arrives = await self._broker.faults.strike(self._broker.rng, subject)
        except Unavailable:
            self.disconnect()
            raise
        if arrives:
            self._broker.route(BusMessage(subject=subject, payload=payload, headers=with_trace(headers)))

    @asynccontextmanager
    async def subscribe(self, subject: str, *, capacity: int = 1024) -> AsyncIterator[MemorySubscription]:
        check_subject(subject, wildcards=True)
        subscription = MemorySubscription(subject, capacity)
        self._subscriptions.append(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.remove(subscription)
            subscription.close()

    async def kv(self, bucket: str, *, ttl_s: float | None = None, storage: str = "memory") -> MemoryBucket:
        if storage not in ("memory", "file"):
            raise InvalidArgument("storage is one of memory, file", field="storage")
        check_subject(bucket)
        opened = MemoryBucket(self, self._broker, bucket, ttl_s=ttl_s, storage=storage)
        opened.live()
        return opened

    async def stream(self, name: str, subjects: tuple[str, ...], *, bytes_max: int = 1024**3) -> MemoryStream:
        self.check_connected()
        journal = self._broker.journals.setdefault(name, _Journal(subjects, bytes_max))
        journal.subjects, journal.bytes_max = subjects, bytes_max
        return MemoryStream(self, journal)

    def check_connected(self) -> None:
        if not self.connected:
            raise Unavailable("not connected to NATS", retry_after_ms=1000)

    def deliver(self, message: BusMessage) -> None:
        if self.connected:
            for subscription in self._subscriptions:
                subscription.deliver(message)


class MemorySubscription:
    """Messages of one subject; iterate while its block is open."""

    def __init__(self, subject: str, capacity: int) -> None:
        self.dropped = 0
        self._subject = subject
        self._send, self._receive = anyio.create_memory_object_stream[BusMessage](capacity)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BusMessage:
        try:
            return await self._receive.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            raise StopAsyncIteration from None

    def deliver(self, message: BusMessage) -> None:
        if subject_matches(self._subject, message.subject):
            try:
                self._send.send_nowait(message)
            except anyio.WouldBlock:
                self.dropped += 1

    def close(self) -> None:
        self._send.close()
        self._receive.close()


class MemoryBucket:
    """A key-value bucket; entries end with their time-to-live, silently, as JetStream's do."""

    def __init__(self, bus: MemoryBus, broker: MemoryBroker, name: str, *, ttl_s: float | None, storage: str) -> None:
        self._bus = bus
        self._broker = broker
        self._name = name
        self._ttl_s = ttl_s
        self._storage = storage

    async def put(self, key: str, value: bytes, *, revision: int | None = None) -> int:
        check_payload(value)
        check_subject(key)
        bucket = self.live()
        newest = bucket.values[key][2] if key in bucket.values else 0
        if revision is not None and revision != newest:
            raise Fenced("another value came first", field="revision")
        bucket.revision += 1
        bucket.values[key] = (value, anyio.current_time(), bucket.revision)
        self._tell(key, value, {})
        return bucket.revision

    async def get(self, key: str) -> KvChange | None:
        check_subject(key)
        found = self.live().values.get(key)
        return None if found is None else KvChange(key=key, change=Change.PUT, value=found[0], revision=found[2])

    async def delete(self, key: str) -> None:
        check_subject(key)
        self.live().values.pop(key, None)
        self._tell(key, b"", {"KV-Operation": "DEL"})

    async def entries(self) -> Mapping[str, bytes]:
        return {key: value for key, (value, _, _) in self.live().values.items()}

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[KvChange]]:
        prefix = f"kv.{self._name}."
        async with self._bus.subscribe(prefix + ">") as messages:

            async def changes() -> AsyncIterator[KvChange]:
                async for message in messages:
                    change = Change.GONE if message.headers else Change.PUT
                    yield KvChange(key=message.subject.removeprefix(prefix), change=change, value=message.payload)

            yield changes()

    def live(self) -> _Bucket:
        """Return the bucket, made if it is not there, without what has expired."""
        self._bus.check_connected()
        bucket = self._broker.buckets.setdefault(self._name, _Bucket(self._ttl_s, self._storage))
        if bucket.ttl_s is not None:
            oldest = anyio.current_time() - bucket.ttl_s
            bucket.values = {key: entry for key, entry in bucket.values.items() if entry[1] > oldest}
        return bucket

    def _tell(self, key: str, value: bytes, headers: dict[str, str]) -> None:
        self._broker.route(BusMessage(subject=f"kv.{self._name}.{key}", payload=value, headers=headers))


class MemoryStream:
    """A journal."""

    def __init__(self, bus: MemoryBus, journal: _Journal) -> None:
        self._bus = bus
        self._journal = journal

    async def append(
        self, subject: str, payload: bytes, *, expected_seq: int | None = None, msg_id: str | None = None
    ) -> int:
        check_payload(payload)
        check_subject(subject)
        await anyio.lowlevel.checkpoint()
        self._bus.check_connected()
        journal = self._journal
        if not any(subject_matches(pattern, subject) for pattern in journal.subjects):
            raise Unavailable(f"no stream takes {subject}", retry_after_ms=1000)
        if msg_id is not None and (known := self._known(msg_id)) is not None:
            return known
        last = next((record.seq for record in reversed(journal.records) if record.subject == subject), 0)
        if expected_seq is not None and expected_seq != last:
            raise Fenced("another record came first", field="expected_seq")
        if journal.size_bytes + len(payload) > journal.bytes_max:
            raise NoSpace("the stream is full", retry_after_ms=1000)
        journal.last_seq += 1
        journal.size_bytes += len(payload)
        journal.records.append(Record(seq=journal.last_seq, subject=subject, payload=payload))
        if msg_id is not None:
            journal.seen[msg_id] = (journal.last_seq, anyio.current_time())
            if len(journal.seen) > DEDUPE_IDS_MAX:
                journal.seen.popitem(last=False)
        return journal.last_seq

    async def read(self, subject_filter: str, from_seq: int = 1) -> AsyncIterator[Record]:
        check_subject(subject_filter, wildcards=True)
        self._bus.check_connected()
        for record in tuple(self._journal.records):
            if record.seq >= from_seq and subject_matches(subject_filter, record.subject):
                await anyio.lowlevel.checkpoint()
                yield record

    async def purge(self, subject: str) -> None:
        check_subject(subject, wildcards=True)
        self._bus.check_connected()
        kept = [record for record in self._journal.records if not subject_matches(subject, record.subject)]
        self._journal.records = kept
        self._journal.size_bytes = sum(len(record.payload) for record in kept)

    def _known(self, msg_id: str) -> int | None:
        seq, at = self._journal.seen.get(msg_id, (0, 0.0))
        return seq if seq and anyio.current_time() - at <= DEDUPE_WINDOW_S else None
