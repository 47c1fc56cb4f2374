"""What happened to the blocks of this store, numbered without gaps; watchers read it at their own pace."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress

import anyio

from covey.errors import CoveyError
from covey.policy.changes import IndexChange
from covey.types.ids import WorkerId
from covey.types.kv_state import KvEvent

SCHEMA = 1
EVENT_HASHES_MAX = 4096
"""Keeps an event far below what NATS carries."""


HASHES_KEPT_MAX = 262_144
"""Names in all events that are kept, about 16 MiB: one event may name thousands."""


class EventLog:
    """The last `kept` events, fewer when they are long. A watcher that lags further starts again from a snapshot."""

    def __init__(self, *, worker: WorkerId, epoch: int, kept: int) -> None:
        self.worker = worker
        self.epoch = epoch
        self.seq = 0
        self.closed = False
        self._events: deque[KvEvent] = deque()
        self._kept = kept
        self._hashes = 0
        self._changed = anyio.Event()

    def append(self, changes: Iterable[IndexChange]) -> None:
        """Number changes and wake the watchers."""
        for change in changes:
            for start in range(0, len(change.hashes), EVENT_HASHES_MAX):
                self.seq += 1
                self._keep(
                    KvEvent(
                        epoch=self.epoch,
                        seq=self.seq,
                        schema=SCHEMA,
                        worker=self.worker,
                        kind=change.kind,
                        namespace=change.namespace,
                        hashes=change.hashes[start : start + EVENT_HASHES_MAX],
                    )
                )
        self._wake()

    def can_follow(self, epoch: int, seq: int) -> bool:
        """Whether all events after `seq` are still here."""
        first = self._events[0].seq if self._events else self.seq + 1
        return epoch == self.epoch and first - 1 <= seq <= self.seq

    def after(self, seq: int) -> Iterator[KvEvent]:
        """Yield the kept events after `seq`, as of now."""
        newest = [event for event in reversed(self._events) if event.seq > seq] if seq < self.seq else []
        return reversed(newest)

    async def forward(self, publish: Callable[[KvEvent], Awaitable[None]]) -> None:
        """Pass every event on until the log is closed. One that cannot be passed on leaves a gap, which tells."""
        seq = 0
        while not self.closed:
            for event in tuple(self.after(seq)):
                seq = event.seq
                with suppress(CoveyError):
                    await publish(event)
            await self.changed(seq)

    async def changed(self, seq: int) -> None:
        """Wait until there is an event after `seq` or the log is closed."""
        while self.seq <= seq and not self.closed:
            await self._changed.wait()

    def close(self) -> None:
        """End all watches: the store is stopping."""
        self.closed = True
        self._wake()

    def _keep(self, event: KvEvent) -> None:
        self._events.append(event)
        self._hashes += len(event.hashes)
        while len(self._events) > self._kept or self._hashes > HASHES_KEPT_MAX:
            self._hashes -= len(self._events.popleft().hashes)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
