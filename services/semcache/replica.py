"""A copy of a tenant's entries that follows their writer."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from covey.clock import Clock
from covey.codec.methods import SemCache
from covey.errors import CoveyError, Fenced
from covey.net.channels import Channel
from covey.types.ids import TenantId
from covey.types.semcache import CacheEvent, CacheEventKind, CacheRecord, WatchCacheRequest

from .documents import Voided
from .entry import label_of
from .library import Filing, Library
from .transfer import document_of

SILENCE_S = 3.0
"""A writer that says nothing for so long is gone: it would at least say that it lives."""
RETRY_S = 0.2

Ttl = Callable[[str], float | None]
"""The time to live of a category's entries in seconds; None for an unknown category."""


class Replica:
    """Follows one tenant; serves nothing unless it is `current`."""

    def __init__(self, tenant: TenantId, library: Library, ttl: Ttl, clock: Clock, *, reign: int, epoch: int) -> None:
        """`reign` is the last one known: events of an earlier one are a stale writer's."""
        self.tenant = tenant
        self.reign = reign
        self.epoch = epoch
        self.is_current = False
        self.encoder = library.encoder
        """What made the writer's vectors; those of another encoder than this process's are not indexed here."""
        self._library = library
        self._ttl = ttl
        self._clock = clock
        self._seq = -1
        self._snapshot: set[int] | None = None

    async def follow(self, writer: Callable[[], Channel | None], on_synced: Callable[[], None]) -> None:
        """Follow whoever is the writer, until cancelled; `on_synced` is called each time it has caught up."""
        while True:
            channel = writer()
            try:
                if channel is not None:
                    await self._watch(channel, on_synced)
            except (CoveyError, TimeoutError):
                pass
            finally:
                self.is_current = False
            await anyio.sleep(RETRY_S)

    async def sync(self, channel: Channel, *, timeout_s: float) -> None:
        """Catch up once. Raises `TimeoutError`, or what the writer raises."""
        with anyio.fail_after(timeout_s), anyio.CancelScope() as done:
            await self._watch(channel, done.cancel)

    async def _watch(self, channel: Channel, on_synced: Callable[[], None]) -> None:
        request = WatchCacheRequest(tenant=self.tenant, epoch=self.reign, seq=max(0, self._seq))
        async with channel.stream(SemCache.WATCH, request, timeout_s=None) as events:
            self._snapshot = None
            is_first = True
            while True:
                with anyio.fail_after(SILENCE_S):
                    event = await anext(events)
                was_current = self.is_current
                await self._apply(event, is_first=is_first)
                is_first = False
                if self.is_current and not was_current:
                    on_synced()

    async def _apply(self, event: CacheEvent, *, is_first: bool) -> None:
        if event.epoch < self.reign:
            raise Fenced("a stale writer's event", field="epoch")
        is_next = event.epoch == self.reign and event.seq in (self._seq, self._seq + 1)
        if is_first and event.kind is CacheEventKind.VOIDED and not (is_next and event.seq > self._seq >= 0):
            self._snapshot, self.reign, self._seq, self.epoch = set(), event.epoch, event.seq, event.voided
            return
        if self._snapshot is None and not is_next:
            raise Fenced("an event is missing", field="seq")
        if event.record is not None:
            await self._store(event.record)
        elif self._snapshot is not None:
            await self._finish(self._snapshot)
        else:
            labels = [label for entry in event.entries if (label := label_of(entry)) is not None]
            if event.kind is CacheEventKind.VOIDED:
                self.epoch = event.voided
                await self._library.void(self.tenant, Voided(epoch=self.epoch, reign=self.reign), self._mine(labels))
            else:
                self._forget(labels)
        if self._snapshot is None:
            self._seq, self.is_current = event.seq, True

    async def _store(self, record: CacheRecord) -> None:
        ttl_s = self._ttl(record.category)
        now = self._clock.now()
        if ttl_s is None or record.age_s >= ttl_s:
            return
        document = document_of(record, self.tenant, encoder=self.encoder, ttl_s=ttl_s, now=now)
        if document is None:
            return
        if self._snapshot is not None:
            self._snapshot.add(document.label)
        if document.label not in self._library.store:
            vector = self._library.vector_of(document)
            await self._library.put([Filing(document=document, vector=vector, quota_entries=1 << 31)])

    async def _finish(self, snapshot: set[int]) -> None:
        """The snapshot is whole: what it does not hold is gone at the writer."""
        held = [held.label for held in self._library.store.matching(self.tenant)]
        gone = [label for label in held if label not in snapshot]
        await self._library.void(self.tenant, Voided(epoch=self.epoch, reign=self.reign), gone)
        self._snapshot = None
        self.is_current = True

    def _forget(self, labels: list[int]) -> None:
        gone = [label for label in self._mine(labels) if self._library.drop(label)]
        self._library.documents.forget(gone)

    def _mine(self, labels: list[int]) -> list[int]:
        """Those that are this tenant's: no event reaches another one's entries."""
        held = ((label, self._library.store.held(label)) for label in labels)
        return [label for label, entry in held if entry is not None and entry.scope.tenant == self.tenant]
