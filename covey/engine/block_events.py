"""Tells the mesh what a worker's prefix cache holds: events as it changes, a snapshot for who missed some."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import anyio

from covey.net.kv_events import KvEventPublisher
from covey.policy.prefix_cache import BlockChanges, CacheKey
from covey.types.ids import BlockHash, NamespaceId, WorkerId
from covey.types.kv import HASHES_MAX
from covey.types.kv_state import KvEventKind, KvSnapshot, KvSnapshotEntry

from .engine import Engine

QUEUED_MAX = 1024


class BlockEvents:
    """A bounded queue between the engine, which never waits, and the bus. What does not fit shows as a gap."""

    def __init__(self, publisher: KvEventPublisher, worker: WorkerId) -> None:
        self._publisher = publisher
        self._worker = worker
        self._has_lost = False
        self._send, self._receive = anyio.create_memory_object_stream[BlockChanges](QUEUED_MAX)

    def note(self, changes: BlockChanges) -> None:
        """Queue a change; called by the engine."""
        try:
            self._send.send_nowait(changes)
        except anyio.WouldBlock:
            self._has_lost = True

    async def run(self) -> None:
        """Publish what is queued, until cancelled."""
        with self._send, self._receive:
            async for changes in self._receive:
                if self._has_lost:
                    self._has_lost = False
                    self._publisher.seq += 1  # a missing number: subscribers ask for a snapshot
                for kind, keys in ((KvEventKind.EVICTED, changes.evicted), (KvEventKind.STORED, changes.stored)):
                    for namespace, hashes in _by_namespace(keys).items():
                        await self._publisher.publish(kind, namespace, hashes)

    async def snapshot(self, engine: Engine) -> KvSnapshot:
        """All that the prefix cache holds; events numbered after it may repeat what it says."""
        seq = self._publisher.seq
        entries = [
            KvSnapshotEntry(namespace=namespace, hashes=tuple(hashes[start : start + HASHES_MAX]))
            for namespace, hashes in _by_namespace(await engine.keys()).items()
            for start in range(0, len(hashes), HASHES_MAX)
        ]
        return KvSnapshot(epoch=self._publisher.epoch, seq=seq, worker=self._worker, entries=tuple(entries))


def _by_namespace(keys: Iterable[CacheKey]) -> dict[NamespaceId, list[BlockHash]]:
    found: dict[NamespaceId, list[BlockHash]] = defaultdict(list)
    for namespace, name in keys:
        found[namespace].append(name)
    return found
