"""What a writer tells its replicas: numbered changes of a tenant's entries, a snapshot for who missed some."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import anyio

from covey.clock import Clock
from covey.errors import CoveyError, FailedPrecondition
from covey.types.ids import TenantId
from covey.types.semcache import CacheEvent, CacheEventKind, CacheRecord, WatchCacheRequest

from .entry import entry_id
from .library import Library
from .transfer import record_of

RING = 1024
"""Changes kept for replicas that fall behind; who misses more gets a snapshot."""
BEAT_S = 1.0
"""A replica hears from its writer at least this often."""
BATCH = 128
VOIDED_MAX = 65_536
"""Entries of one event."""


@dataclass(frozen=True, slots=True)
class _Change:
    seq: int
    kind: CacheEventKind
    labels: tuple[int, ...] = ()
    voided: int = 0


@dataclass(slots=True, eq=False)
class Journal:
    """One tenant's changes in one reign; `seq` is the last one's number."""

    reign: int
    epoch: int
    seq: int = 0
    ring: deque[_Change] = field(default_factory=lambda: deque(maxlen=RING))
    changed: anyio.Event = field(default_factory=anyio.Event)
    watching: int = 0
    is_closed: bool = False

    def write(self, kind: CacheEventKind, labels: tuple[int, ...] = (), voided: int = 0) -> None:
        """Number a change and wake who follows."""
        self.seq += 1
        if self.watching:
            self.ring.append(_Change(self.seq, kind, labels, voided))
            self.wake()
        elif self.ring:
            self.ring.clear()

    def since(self, seq: int) -> list[_Change] | None:
        """The changes after `seq`; None when some of them are gone, or are of another time."""
        if seq > self.seq or (seq < self.seq and (not self.ring or self.ring[0].seq > seq + 1)):
            return None
        return [change for change in self.ring if change.seq > seq]

    def wake(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()


class Journals:
    """The journals of the tenants that this process writes for; hears of every change from the library."""

    def __init__(self, library: Library, clock: Clock) -> None:
        self._library = library
        self._clock = clock
        self._journals: dict[TenantId, Journal] = {}
        library.listener = self

    def open(self, tenant: TenantId, *, reign: int, epoch: int) -> None:
        """Begin a reign."""
        self.close(tenant)
        self._journals[tenant] = Journal(reign, epoch)

    def close(self, tenant: TenantId) -> None:
        """End a reign: who follows is told to look for the next writer."""
        journal = self._journals.pop(tenant, None)
        if journal is not None:
            journal.is_closed = True
            journal.wake()

    def stored(self, tenant: TenantId, label: int) -> None:
        if (journal := self._journals.get(tenant)) is not None:
            journal.write(CacheEventKind.STORED, (label,))

    def removed(self, tenant: TenantId, label: int) -> None:
        if (journal := self._journals.get(tenant)) is not None:
            journal.write(CacheEventKind.REMOVED, (label,))

    def voided(self, tenant: TenantId, epoch: int, labels: tuple[int, ...]) -> None:
        if (journal := self._journals.get(tenant)) is not None:
            journal.epoch = epoch
            for at in range(0, max(1, len(labels)), VOIDED_MAX):
                journal.write(CacheEventKind.VOIDED, labels[at : at + VOIDED_MAX], epoch)

    async def watch(self, request: WatchCacheRequest) -> AsyncIterator[CacheEvent]:
        """Yield a tenant's changes after the request's number, or a snapshot and the changes after that, for ever.

        A snapshot begins with VOIDED and ends with REMOVED, both without entries and all of one number; a REMOVED
        without entries at other times only says that the writer lives. Ends with `FailedPrecondition` when the reign
        does.
        """
        journal = self._journals[request.tenant]
        journal.watching += 1
        try:
            async for event in self._watch(request, journal):
                yield event
        finally:
            journal.watching -= 1

    async def _watch(self, request: WatchCacheRequest, journal: Journal) -> AsyncIterator[CacheEvent]:
        tenant = request.tenant
        seq = request.seq if request.epoch == journal.reign else -1
        while True:
            changes = journal.since(seq) if seq >= 0 else None
            if changes is None:
                seq = journal.seq
                async for event in self._snapshot(tenant, journal, seq):
                    yield event
                continue
            for change in changes:
                yield await self._event(journal, change)
                seq = change.seq
            if journal.is_closed:
                raise FailedPrecondition("another process writes this tenant's entries by now", field="tenant")
            if journal.seq == seq:
                with anyio.move_on_after(BEAT_S) as silence:
                    await journal.changed.wait()
                if silence.cancelled_caught:
                    yield _event(journal, seq, CacheEventKind.REMOVED)

    async def _snapshot(self, tenant: TenantId, journal: Journal, seq: int) -> AsyncIterator[CacheEvent]:
        yield _event(journal, seq, CacheEventKind.VOIDED, voided=journal.epoch)
        labels = [held.label for held in self._library.store.matching(tenant)]
        for at in range(0, len(labels), BATCH):
            for document in await self._library.documents.get(labels[at : at + BATCH]):
                if document.label in self._library.store:
                    record = record_of(document, self._clock.now())
                    yield _event(journal, seq, CacheEventKind.STORED, record=record)
        yield _event(journal, seq, CacheEventKind.REMOVED)

    async def _event(self, journal: Journal, change: _Change) -> CacheEvent:
        entries = tuple(map(entry_id, change.labels))
        if change.kind is not CacheEventKind.STORED:
            return _event(journal, change.seq, change.kind, entries=entries, voided=change.voided)
        try:
            found = await self._library.fetch(change.labels)
        except CoveyError:
            found = {}
        if not found:  # gone again: the number must not be missing
            return _event(journal, change.seq, CacheEventKind.REMOVED, entries=entries)
        record = record_of(found[change.labels[0]], self._clock.now())
        return _event(journal, change.seq, CacheEventKind.STORED, record=record)


def _event(
    journal: Journal,
    seq: int,
    kind: CacheEventKind,
    *,
    record: CacheRecord | None = None,
    entries: tuple[str, ...] = (),
    voided: int = 0,
) -> CacheEvent:
    return CacheEvent(epoch=journal.reign, seq=seq, kind=kind, record=record, entries=entries, voided=voided)
