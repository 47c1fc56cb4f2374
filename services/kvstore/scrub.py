"""Reads what memory holds and verifies it: as a task, and at its own pace when nobody asks."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

import anyio
from anyio import to_thread

from covey.actor import Ref
from covey.errors import CoveyError, DataCorrupt
from covey.net.kv.copying import checksums
from covey.policy.store_index import Placed
from covey.types.ids import BlockHash, NamespaceId
from covey.types.kv import LeaseRequest, QuarantineRequest
from covey.types.kv_state import StartTask, TaskKind

from .store import Command, Store
from .tasks import Progress

R = TypeVar("R")
Pieces = tuple[tuple[NamespaceId, tuple[BlockHash, ...]], ...]

OWNER = "scrub"
LEASE_TTL_S = 30.0
BATCH_BYTES = 4 << 20
"""Read under one lease, in one thread; a writer waits at most that long for these blocks to be let go."""
PAGE_ROWS = 4096
COMMAND_TIMEOUT_S = 5.0
ROUND_PAUSE_S = 60.0
"""Between two rounds through the store when nobody asks."""

log = logging.getLogger(__name__)


class Scrubber:
    """Finds blocks whose bytes no longer fit their checksums; each is quarantined as one that a reader found."""

    def __init__(self, store: Store, actor: Ref[Command[object]], *, bytes_per_s: int) -> None:
        self._store = store
        self._actor = actor
        self._bytes_per_s = bytes_per_s
        self.checked = 0
        self.bad = 0

    async def scrub(self, request: StartTask, progress: Progress) -> str:
        """Verify the named blocks of a namespace, those of a namespace, or all; say what was found."""
        checked, bad = self.checked, self.bad
        stats = self._store.index.stats()
        progress.expect(len(request.hashes) or stats.blocks)
        async for namespace, hashes in self._parts(request):
            await self._verify(namespace, hashes, progress)
        progress.expect(progress.done)
        return f"{self.checked - checked} blocks verified, {self.bad - bad} quarantined"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Verify all blocks again and again for a block, slowly."""
        async with anyio.create_task_group() as tg:
            if self._bytes_per_s:
                tg.start_soon(self._rounds, name="scrub")
            yield
            tg.cancel_scope.cancel()

    async def _rounds(self) -> None:
        everything = StartTask(kind=TaskKind.SCRUB)
        while True:
            await anyio.sleep(ROUND_PAUSE_S)
            with suppress(CoveyError):
                async for namespace, hashes in self._parts(everything):
                    size_bytes = await self._verify(namespace, hashes, Progress())
                    await anyio.sleep(size_bytes / self._bytes_per_s)

    async def _parts(self, request: StartTask) -> AsyncIterator[tuple[NamespaceId, Sequence[BlockHash]]]:
        """Yield blocks in parts that one lease covers for a short time."""
        first = 0
        while True:
            pieces: Pieces = ((request.namespace, request.hashes),)
            rows = 0
            if not request.hashes:
                pieces, rows = await self._ask(partial(_page, first))
            for namespace, hashes in pieces:
                if request.namespace in {namespace, b""}:
                    for part in await self._ask(partial(_parts, namespace, hashes)):
                        yield namespace, part
            first += PAGE_ROWS
            if first >= rows:
                return

    async def _verify(self, namespace: NamespaceId, hashes: Sequence[BlockHash], progress: Progress) -> int:
        """Verify blocks under leases; return how many bytes were read."""
        size_bytes = 0
        kept = await self._ask(
            lambda store, now: store.index.keep(namespace, hashes, owner=OWNER, ttl_s=LEASE_TTL_S, now=now)
        )
        if kept is None:
            return 0
        grant, slots = kept
        try:
            for slot in slots:
                fault = await to_thread.run_sync(self._fault, slot)
                size_bytes += slot.shape.size_bytes
                self.checked += 1
                progress.step()
                if fault:
                    self.bad += 1
                    log.warning("a block in memory is bad: %s", fault)
                    await self._ask(partial(_condemn, slot, fault))
        finally:
            ended = LeaseRequest(lease=grant.lease, epoch=grant.epoch)
            with anyio.CancelScope(shield=True), suppress(CoveyError):
                await self._ask(lambda store, now: store.index.release(ended, now))
        return size_bytes

    def _fault(self, slot: Placed) -> str:
        try:
            header = self._store.header(slot)
        except DataCorrupt as error:
            return error.message
        good = checksums(self._store.payload(slot), slot.shape) == header.checksums
        return "" if good else "a layer does not have its checksum"

    async def _ask(self, act: Callable[[Store, float], R]) -> R:
        return await self._actor.ask(Command(act=act), timeout_s=COMMAND_TIMEOUT_S)


def _page(first: int, store: Store, _: float) -> tuple[Pieces, int]:
    return tuple(store.index.snapshot(first, PAGE_ROWS)), store.index.rows


def _parts(namespace: NamespaceId, hashes: Sequence[BlockHash], store: Store, _: float) -> list[list[BlockHash]]:
    """Cut blocks into parts of about `BATCH_BYTES`."""
    parts: list[list[BlockHash]] = []
    room_bytes = 0
    for slot in store.index.visible(namespace, hashes):
        if not parts or slot.shape.size_bytes > room_bytes:
            parts.append([])
            room_bytes = BATCH_BYTES
        parts[-1].append(slot.location.hash)
        room_bytes -= slot.shape.size_bytes
    return parts


def _condemn(slot: Placed, fault: str, store: Store, now: float) -> bool:
    request = QuarantineRequest(tenant=slot.tenant, namespace=slot.namespace, hash=slot.location.hash, reason=fault)
    return store.index.quarantine(request, now)
