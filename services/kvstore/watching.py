"""What those are told who follow a store: all that it holds, page by page, and then each change."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

from covey.actor import Ref
from covey.types.ids import NamespaceId
from covey.types.kv_state import KvEvent, KvEventKind, KvSnapshot, KvSnapshotEntry, WatchKvRequest

from .event_log import SCHEMA
from .store import Command, Store

PAGE_ROWS = 8192
"""Rows of the index that one command looks at: a few milliseconds, and far below what a message carries."""
COMMAND_TIMEOUT_S = 5.0


class Watching:
    """Snapshots and events of one store.

    A snapshot is taken in pieces while the store goes on, and each piece has the number of the event before the first
    of them. Whoever repeats all events after that number has what there is: what came or went in between is either in
    a later piece, or put right by its event.
    """

    def __init__(self, store: Store, actor: Ref[Command[object]]) -> None:
        self._store = store
        self._actor = actor

    async def pages(self) -> AsyncIterator[KvSnapshot]:
        """Yield a snapshot in pieces, at least one."""
        first, seq = 0, -1
        while True:
            page, rows = await self._actor.ask(Command(act=partial(_page, first)), timeout_s=COMMAND_TIMEOUT_S)
            seq = page.seq if seq < 0 else seq
            yield KvSnapshot(epoch=page.epoch, seq=seq, worker=page.worker, entries=page.entries)
            first += PAGE_ROWS
            if first >= rows:
                return

    async def watch(self, request: WatchKvRequest) -> AsyncIterator[KvEvent]:
        """Yield events; a snapshot is one CLEARED and then STORED events, all numbered as the event they follow."""
        log, epoch, seq = self._store.log, request.epoch, request.seq
        while not log.closed:
            if not log.can_follow(epoch, seq):
                is_first = True
                async for page in self.pages():
                    epoch, seq = page.epoch, page.seq
                    for event in _as_events(page, is_first=is_first):
                        yield event
                    is_first = False
            for event in tuple(log.after(seq)):
                yield event
                seq = event.seq
            await log.changed(seq)


def _page(first: int, store: Store, _: float) -> tuple[KvSnapshot, int]:
    return store.page(first, PAGE_ROWS), store.index.rows


def _as_events(page: KvSnapshot, *, is_first: bool) -> list[KvEvent]:
    def event(kind: KvEventKind, entry: KvSnapshotEntry) -> KvEvent:
        return KvEvent(
            epoch=page.epoch, seq=page.seq, schema=SCHEMA, worker=page.worker, kind=kind, namespace=entry.namespace,
            hashes=entry.hashes,
        )  # fmt: skip

    stored = [event(KvEventKind.STORED, entry) for entry in page.entries]
    return [event(KvEventKind.CLEARED, KvSnapshotEntry(namespace=NamespaceId(b""))), *stored] if is_first else stored
