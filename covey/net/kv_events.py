"""Which worker holds which KV blocks: numbered events, and a bounded view that knows when it missed one."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Self

import anyio
from anyio.abc import TaskGroup

from covey.codec import decode, encode
from covey.errors import CoveyError, InvalidArgument
from covey.net.bus import SCHEMA, Bus, BusMessage
from covey.net.kv_holders import BlockHolders
from covey.net.tasks import background_tasks
from covey.types.generate import Role
from covey.types.ids import BlockHash, NamespaceId, WorkerId
from covey.types.kv_state import KvEvent, KvEventKind, KvSnapshot

HASHES_PER_EVENT_MAX: Final = 4096
ENTRIES_MAX: Final = 500_000
BUFFERED_MAX: Final = 4096
WORKERS_MAX: Final = 4096
CAPACITY: Final = 8192
SNAPSHOT_TIMEOUT_S: Final = 5.0
SNAPSHOT_PAUSE_S: Final = 1.0
"""At most one snapshot of a worker in this time: a worker that cannot keep up is not asked in a loop."""

log = logging.getLogger(__name__)

Snapshot = Callable[[WorkerId], Awaitable[KvSnapshot]]
"""Asks a worker for all that it holds; raises `CoveyError` when it cannot be had."""


def kv_subject(role: Role | str, worker: str) -> str:
    return f"covey.v1.kv.{str(role).lower()}.{worker}"


class KvEventPublisher:
    """Tells the mesh what this worker stores and evicts; numbers have no gaps within an epoch."""

    def __init__(self, bus: Bus, *, role: Role, worker: WorkerId, epoch: int) -> None:
        self.epoch = epoch
        self.seq = 0
        """The number of the last event made: what a snapshot taken now carries."""
        self.lost = 0
        """Events that NATS did not take; their missing numbers make subscribers ask for a snapshot."""
        self._bus = bus
        self._worker = worker
        self._subject = kv_subject(role, worker)
        self._lock = anyio.Lock()  # events leave in the order of their numbers

    async def publish(self, kind: KvEventKind, namespace: NamespaceId, hashes: Iterable[BlockHash] = ()) -> None:
        """Publish one change, in several events if it is long. Never raises `CoveyError`: nobody waits for events."""
        left = tuple(hashes)
        async with self._lock:
            for start in range(0, max(len(left), 1), HASHES_PER_EVENT_MAX):
                await self._send(kind, namespace, left[start : start + HASHES_PER_EVENT_MAX])

    async def _send(self, kind: KvEventKind, namespace: NamespaceId, hashes: tuple[BlockHash, ...]) -> None:
        self.seq += 1
        event = KvEvent(
            epoch=self.epoch, seq=self.seq, schema=SCHEMA, worker=self._worker, kind=kind, namespace=namespace,
            hashes=hashes,
        )  # fmt: skip
        try:
            await self._bus.publish(self._subject, encode(event))
        except CoveyError as error:
            self.lost += 1
            log.debug("kv event %d not sent: %s", self.seq, error)


@dataclass(slots=True)
class _Follower:
    """How far the events of one worker have been heard; `missed` holds those that came while a snapshot is fetched."""

    epoch: int = 0
    seq: int = 0
    fetching: bool = False
    missed: deque[KvEvent] = field(default_factory=lambda: deque(maxlen=BUFFERED_MAX))


class KvEventIndex:
    """Who holds which block, as far as this process has heard. A wrong entry costs a miss, never a wrong answer.

    A gap or a new epoch asks the owner for a snapshot; until it comes, what is known is kept up as well as it can
    be. Over `entries_max` entries new ones are not taken in, and counted.
    """

    def __init__(self, snapshot: Snapshot, *, entries_max: int = ENTRIES_MAX) -> None:
        self.gaps = 0
        """Times that events were missing."""
        self.rejected = 0
        """Events that could not be read, or came from more than `WORKERS_MAX` workers."""
        self.blocks = BlockHolders(entries_max)
        self._snapshot = snapshot
        self._followers: dict[WorkerId, _Follower] = {}
        self._tg: TaskGroup | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls, bus: Bus, snapshot: Snapshot, *, role: Role | None = None, entries_max: int = ENTRIES_MAX
    ) -> AsyncIterator[Self]:
        """Follow the events of a role (None: all) for a block."""
        index = cls(snapshot, entries_max=entries_max)
        subject = kv_subject(role, "*") if role else "covey.v1.kv.>"
        async with bus.subscribe(subject, capacity=CAPACITY) as messages, background_tasks() as tg:
            index._tg = tg
            tg.start_soon(index._follow, messages)
            yield index

    def holders(self, namespace: NamespaceId, block: BlockHash) -> frozenset[WorkerId]:
        """Return the workers that hold a block."""
        return self.blocks.holders((namespace, block))

    def overlap(self, namespace: NamespaceId, hashes: Iterable[BlockHash]) -> Mapping[WorkerId, int]:
        """Return for each worker how many of the hashes, from the first on without a gap, it holds."""
        return self.blocks.overlap(namespace, hashes)

    def watch(self, worker: WorkerId) -> None:
        """Ask a worker that has just appeared for what it holds, rather than wait for its first event."""
        if worker not in self._followers and len(self._followers) < WORKERS_MAX:
            self._ask(worker, self._followers.setdefault(worker, _Follower()))

    def forget(self, worker: WorkerId) -> None:
        """Drop all entries of a worker that left the registry."""
        self._followers.pop(worker, None)
        self.blocks.clear(worker)

    def apply(self, event: KvEvent) -> None:
        """Take one event in; asks for a snapshot when events before it are missing."""
        follower = self._followers.get(event.worker)
        if follower is None:
            if len(self._followers) >= WORKERS_MAX:
                self.rejected += 1
                return
            follower = self._followers[event.worker] = _Follower()
        if (event.epoch, event.seq) <= (follower.epoch, follower.seq):
            return
        if event.epoch > follower.epoch:
            self.blocks.clear(event.worker)  # another process: whatever the last one held is gone
            complete = event.seq == 1
        else:
            complete = event.seq == follower.seq + 1
        follower.epoch, follower.seq = event.epoch, event.seq
        self._change(event)
        if follower.fetching:
            follower.missed.append(event)
        elif not complete:
            self.gaps += 1
            self._ask(event.worker, follower)

    def apply_snapshot(self, snapshot: KvSnapshot) -> bool:
        """Replace what is known of a worker, then repeat the events after it; False if some of those are missing."""
        follower = self._followers.get(snapshot.worker)
        if follower is None or snapshot.epoch < follower.epoch:
            return follower is None
        later = [event for event in follower.missed if (event.epoch, event.seq) > (snapshot.epoch, snapshot.seq)]
        self.blocks.clear(snapshot.worker)
        for entry in snapshot.entries:
            for block in entry.hashes:
                self.blocks.add(snapshot.worker, (entry.namespace, block))
        newest = max((follower.epoch, follower.seq), (snapshot.epoch, snapshot.seq))
        follower.epoch, follower.seq = newest
        for event in later:
            self._change(event)
        numbers = [event.seq for event in later]
        complete = numbers == list(range(snapshot.seq + 1, newest[1] + 1))
        follower.missed.clear()
        return complete

    def _change(self, event: KvEvent) -> None:
        match event.kind:
            case KvEventKind.STORED:
                for block in event.hashes:
                    self.blocks.add(event.worker, (event.namespace, block))
            case KvEventKind.EVICTED | KvEventKind.MOVED:  # who holds it below says so when it is asked
                for block in event.hashes:
                    self.blocks.remove(event.worker, (event.namespace, block))
            case KvEventKind.CLEARED:
                self.blocks.clear(event.worker, event.namespace or None)
            case KvEventKind.PINNED | KvEventKind.UNPINNED:
                pass  # a pin does not change who holds a block

    def _ask(self, worker: WorkerId, follower: _Follower) -> None:
        if not follower.fetching and self._tg is not None:
            follower.fetching = True
            follower.missed.clear()
            self._tg.start_soon(self._fetch, worker, follower)

    async def _fetch(self, worker: WorkerId, follower: _Follower) -> None:
        """Fetch snapshots, pausing in between, until one of them and the events after it leave no gap."""
        while self._followers.get(worker) is follower:
            try:
                with anyio.fail_after(SNAPSHOT_TIMEOUT_S):
                    snapshot = await self._snapshot(worker)
                if self.apply_snapshot(snapshot):
                    break
            except (CoveyError, TimeoutError) as error:
                log.info("no snapshot of %s: %s", worker, error)
            await anyio.sleep(SNAPSHOT_PAUSE_S)
        follower.fetching = False

    async def _follow(self, messages: AsyncIterator[BusMessage]) -> None:
        async for message in messages:
            try:
                event: KvEvent = decode(KvEvent, message.payload)
            except InvalidArgument:
                self.rejected += 1
            else:
                self.apply(event)
