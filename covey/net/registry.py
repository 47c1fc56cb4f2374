"""Who is in the mesh: announced records that live as long as they are renewed, and everybody's last known load."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final, Self

import anyio

from covey.clock import Clock
from covey.codec import decode, encode
from covey.errors import CoveyError, DeadlineExceeded, InvalidArgument
from covey.net.bus import SCHEMA, Bucket, Bus, BusMessage, Change, KvChange
from covey.net.tasks import background_tasks
from covey.types.event import LoadReport, WorkerRecord, WorkerState
from covey.types.generate import EngineLoad, Role
from covey.types.ids import WorkerId

BUCKET: Final = "covey-registry"
TTL_S: Final = 3.0
"""A worker that has not renewed its record for this long is gone, provided NATS was up to tell us."""
BEAT_S: Final = 1.0
SWEEP_S: Final = 0.25
WORKERS_MAX: Final = 4096
CALL_TIMEOUT_S: Final = 5.0

log = logging.getLogger(__name__)


def load_subject(role: Role | str, worker: str) -> str:
    return f"covey.v1.load.{str(role).lower()}.{worker}"


class Announcement:
    """This process's own record; `update` publishes at once and with every beat after."""

    def __init__(self, bus: Bus, record: WorkerRecord, load: Callable[[], EngineLoad]) -> None:
        self.record = record
        self._bus = bus
        self._load = load
        self._bucket: Bucket | None = None
        self._changed = anyio.Event()
        self._seq = 0

    def update(self, *, state: WorkerState) -> None:
        """Change the announced state."""
        self.record = replace(self.record, state=state)
        self._changed.set()

    async def beat(self) -> bool:
        """Publish record and load once; return whether NATS took them."""
        self._changed = anyio.Event()
        try:
            with anyio.fail_after(CALL_TIMEOUT_S):
                if self._bucket is None:
                    self._bucket = await self._bus.kv(BUCKET, ttl_s=TTL_S, storage="memory")
                await self._bucket.put(self._key(), encode(self.record))
                await self._bus.publish(load_subject(self.record.role, self.record.worker), encode(self._report()))
        except (CoveyError, TimeoutError) as error:
            log.info("not announced: %s", error)
            return False
        return True

    async def keep(self) -> None:
        """Beat each second, at once after an update or a reconnect."""
        connections = self._bus.connections
        while True:
            with anyio.move_on_after(BEAT_S):
                await self._changed.wait()
            if not self._bus.connected:
                with anyio.move_on_after(BEAT_S):
                    await self._bus.until_connected()
            if self._bus.connections != connections:
                connections = self._bus.connections
            await self.beat()

    async def withdraw(self) -> None:
        """Remove the record, if NATS is there to hear it; it ends by itself otherwise."""
        if self._bucket is None or not self._bus.connected:
            return
        try:
            with anyio.fail_after(BEAT_S):
                await self._bucket.delete(self._key())
        except (CoveyError, TimeoutError) as error:
            log.info("not withdrawn: %s", error)

    def _key(self) -> str:
        return f"{self.record.role.lower()}.{self.record.worker}"

    def _report(self) -> LoadReport:
        self._seq += 1
        return LoadReport(
            epoch=self.record.epoch,
            seq=self._seq,
            schema=SCHEMA,
            worker=self.record.worker,
            role=self.record.role,
            load=self._load(),
        )


@asynccontextmanager
async def announce(
    bus: Bus, record: WorkerRecord, *, load: Callable[[], EngineLoad] = EngineLoad, clock: Clock | None = None
) -> AsyncIterator[Announcement]:
    """Keep a record in the registry for a block and report `load()` each second; withdraw it on leaving.

    While NATS is down the service goes on; record and load are published again when it is back, even if it
    comes back empty.
    """
    del clock  # beats follow the event loop; records carry no time
    announcement = Announcement(bus, record, load)
    await announcement.beat()
    try:
        async with background_tasks() as tg:
            tg.start_soon(announcement.keep, name="registry announce")
            yield announcement
    finally:
        with anyio.CancelScope(shield=True):
            await announcement.withdraw()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A worker as last heard of; `age_s` is the time since its last sign of life."""

    record: WorkerRecord
    load: EngineLoad
    age_s: float


@dataclass(slots=True)
class _Entry:
    record: WorkerRecord
    load: EngineLoad
    load_seq: int
    seen_at: float


class Registry:
    """The mesh as this process knows it. While NATS is down it stays as it was."""

    def __init__(self, bus: Bus, clock: Clock) -> None:
        self._bus = bus
        self._clock = clock
        self._entries: dict[WorkerId, _Entry] = {}
        self._changed = anyio.Event()
        self._connections = bus.connections
        self._up_since = clock.now()
        self.rejected = 0
        """Records and reports that could not be read, or came over `WORKERS_MAX`."""

    @classmethod
    @asynccontextmanager
    async def open(cls, bus: Bus, *, clock: Clock) -> AsyncIterator[Self]:
        """Watch the registry for a block. Raises `Unavailable` when NATS is not there at the start."""
        registry = cls(bus, clock)
        bucket = await bus.kv(BUCKET, ttl_s=TTL_S, storage="memory")
        async with bucket.watch() as changes, bus.subscribe("covey.v1.load.>", capacity=WORKERS_MAX) as loads:
            for key, value in (await bucket.entries()).items():
                registry.apply(KvChange(key=key, change=Change.PUT, value=value))
            async with background_tasks() as tg:
                tg.start_soon(registry._follow, changes)
                tg.start_soon(registry._follow_loads, loads)
                tg.start_soon(registry._sweep_often)
                yield registry

    def workers(self, role: Role | None = None) -> tuple[WorkerView, ...]:
        """Return everyone of a role (None: everyone), ordered by name."""
        now = self._clock.now()
        return tuple(
            WorkerView(record=entry.record, load=entry.load, age_s=max(0.0, now - entry.seen_at))
            for _, entry in sorted(self._entries.items())
            if role is None or entry.record.role is role
        )

    def worker(self, worker: WorkerId) -> WorkerView | None:
        """Return one worker by name."""
        entry = self._entries.get(worker)
        if entry is None:
            return None
        return WorkerView(record=entry.record, load=entry.load, age_s=max(0.0, self._clock.now() - entry.seen_at))

    async def changed(self) -> None:
        """Wait for the next change of records or loads."""
        await self._changed.wait()

    async def until(self, condition: Callable[[Registry], object], *, timeout_s: float) -> None:
        """Wait until a condition on this registry holds. Raises `DeadlineExceeded`."""
        with anyio.move_on_after(timeout_s):
            while not condition(self):
                await self._changed.wait()
            return
        raise DeadlineExceeded(f"the mesh did not get there within {timeout_s:g} s")

    def apply(self, change: KvChange) -> None:
        """Take a change of the bucket in; what is malformed or from an older start is dropped."""
        worker = WorkerId(change.key.rpartition(".")[2])
        if change.change is Change.GONE:
            self._forget(worker)
            return
        try:
            record: WorkerRecord = decode(WorkerRecord, change.value)
        except InvalidArgument:
            self.rejected += 1
            return
        entry = self._entries.get(record.worker)
        if (entry is None and len(self._entries) >= WORKERS_MAX) or (entry and record.epoch < entry.record.epoch):
            self.rejected += 1
            return
        if entry is None or record.epoch > entry.record.epoch:
            entry = _Entry(record=record, load=EngineLoad(), load_seq=0, seen_at=0.0)
            self._entries[record.worker] = entry
        news = entry.seen_at == 0.0 or entry.record != record
        entry.record, entry.seen_at = record, self._clock.now()
        if news:
            self._notify()

    def apply_load(self, report: LoadReport) -> None:
        """Take a load report in; late and foreign ones are dropped."""
        entry = self._entries.get(report.worker)
        if entry is None or report.epoch != entry.record.epoch or report.seq <= entry.load_seq:
            return
        entry.load, entry.load_seq, entry.seen_at = report.load, report.seq, self._clock.now()
        self._notify()

    def sweep(self) -> None:
        """Forget who was silent for `TTL_S` of NATS being up: an outage of NATS is nobody's silence."""
        now = self._clock.now()
        if not self._bus.connected or self._bus.connections != self._connections:
            self._connections = self._bus.connections
            self._up_since = now
            return
        for worker, entry in tuple(self._entries.items()):
            if now - max(entry.seen_at, self._up_since) > TTL_S:
                self._forget(worker)

    def _forget(self, worker: WorkerId) -> None:
        if self._entries.pop(worker, None) is not None:
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _follow(self, changes: AsyncIterator[KvChange]) -> None:
        async for change in changes:
            self.apply(change)

    async def _follow_loads(self, loads: AsyncIterator[BusMessage]) -> None:
        async for message in loads:
            try:
                report: LoadReport = decode(LoadReport, message.payload)
            except InvalidArgument:
                self.rejected += 1
            else:
                self.apply_load(report)

    async def _sweep_often(self) -> None:
        while True:
            await anyio.sleep(SWEEP_S)
            self.sweep()
