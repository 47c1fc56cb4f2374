"""The store behind the service: the index of blocks and the arena that holds them, owned by one actor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import anyio

from covey import failpoint
from covey.actor import Ask, Inbox
from covey.clock import Clock
from covey.errors import CoveyError, DataCorrupt, Unavailable
from covey.net.kv.copying import digest
from covey.policy.slot import SlotHeader, SlotState, header_bytes, payload_offset, slot_bytes
from covey.policy.store_index import Placed, StoreIndex
from covey.types.ids import BlockHash, LeaseId
from covey.types.kv import CommitReply, CommitRequest, GrantStatus, ReserveReply, ReserveRequest
from covey.types.kv_state import KvSnapshot, KvSnapshotEntry

from .arena_file import ArenaFile
from .event_log import EVENT_HASHES_MAX, EventLog

R = TypeVar("R")


class Store:
    """What the actor owns. Every method runs to its end without a pause, so no caller sees half of it."""

    def __init__(self, index: StoreIndex, arena: ArenaFile, log: EventLog) -> None:
        self.index = index
        self.arena = arena
        self.log = log
        self.draining = False
        """Takes no more blocks: this node is leaving."""

    def reserve(self, request: ReserveRequest, now: float) -> ReserveReply:
        """Grant slots; those with pages behind them are marked, the others wait for `unbacked` and `mark`.

        Raises `Unavailable` while draining, and what the index raises.
        """
        if self.draining:
            raise Unavailable("this kvstore is leaving and takes no more blocks")
        reply = self.index.reserve(request, now)
        self.mark(reply, now)
        return reply

    def unbacked(self, reply: ReserveReply, now: float) -> list[Placed]:
        """Return the granted slots that have no pages yet."""
        return [slot for slot in self._granted(reply, now) if not self.arena.is_backed(*_extent(slot))]

    def back(self, slot: Placed) -> None:
        """Put pages behind a slot; may be called from a thread. Raises `NoSpace`."""
        self.arena.back(*_extent(slot))

    def mark(self, reply: ReserveReply, now: float) -> None:
        """Mark granted slots as being written, so that a late reader of what was there before notices."""
        for slot in self._granted(reply, now):
            if self.arena.is_backed(*_extent(slot)):
                self._write_header(slot, _header(slot, SlotState.RESERVED, (0,) * slot.shape.layers).pack())

    def payload(self, slot: Placed) -> memoryview:
        """Return a slot's payload, in place."""
        start = slot.location.offset + payload_offset(slot.shape)
        return self.arena.view[start : start + slot.shape.size_bytes]

    def header(self, slot: Placed) -> SlotHeader:
        """Return a slot's header. Raises `DataCorrupt` when it is not the one that the index knows."""
        start = slot.location.offset
        data = bytes(self.arena.view[start : start + header_bytes(slot.shape)])
        if digest(data) != slot.location.digest:
            raise DataCorrupt("the header of a block is damaged", field="hashes")
        return SlotHeader.unpack(data)

    def commit(self, request: CommitRequest, now: float) -> CommitReply:
        """Seal the headers of filled slots and make the blocks visible."""
        sums = {block.hash: block.checksums for block in request.blocks}
        digests = {}
        for slot in self.index.can_commit(request, now):
            digests[slot.location.hash] = self._seal(slot, sums[slot.location.hash])
        failpoint.hit("kvstore.commit")
        self.index.commit(request.lease, digests, now)
        return CommitReply(blocks=len(request.blocks))

    def replace(self, lease: LeaseId, name: BlockHash, payload: bytes, sums: tuple[int, ...], now: float) -> bool:
        """Fill a draft and put it in the place of what readers see; False when that went meanwhile.

        Raises `LeaseExpired` and `Fenced`, and then touches nothing: a draft is filled and seen in one go.
        """
        slot = self.index.writable(lease, name, now)
        self._write_header(slot, _header(slot, SlotState.RESERVED, (0,) * slot.shape.layers).pack())
        self.payload(slot)[:] = payload
        sealed = self._seal(slot, sums)
        return self.index.replace(lease, {name: sealed}, now) == 1

    def page(self, first: int, rows_max: int) -> KvSnapshot:
        """Return a part of the shared blocks as of the newest event: see `StoreIndex.snapshot`."""
        entries = (
            KvSnapshotEntry(namespace=namespace, hashes=hashes[start : start + EVENT_HASHES_MAX])
            for namespace, hashes in self.index.snapshot(first, rows_max)
            for start in range(0, len(hashes), EVENT_HASHES_MAX)
        )
        return KvSnapshot(epoch=self.log.epoch, seq=self.log.seq, worker=self.log.worker, entries=tuple(entries))

    def _granted(self, reply: ReserveReply, now: float) -> list[Placed]:
        names = [grant.hash for grant in reply.grants if grant.status is GrantStatus.GRANTED]
        return [self.index.writable(reply.lease.lease, name, now) for name in names]

    def _seal(self, slot: Placed, sums: tuple[int, ...]) -> int:
        header = _header(slot, SlotState.COMMITTED, sums).pack()
        self._write_header(slot, header)
        return digest(header)

    def _write_header(self, slot: Placed, header: bytes) -> None:
        start = slot.location.offset
        self.arena.view[start : start + len(header)] = header


def _extent(slot: Placed) -> tuple[int, int]:
    return slot.location.offset, slot_bytes(slot.shape)


def _header(slot: Placed, state: SlotState, sums: tuple[int, ...]) -> SlotHeader:
    return SlotHeader(
        state=state,
        generation=slot.location.generation,
        namespace=slot.namespace,
        hash=slot.location.hash,
        shape=slot.shape,
        checksums=sums,
        codec=slot.codec,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Command(Ask[R], Generic[R]):
    """Something to do with the store, at the time it is taken."""

    act: Callable[[Store, float], R]


class StoreActor:
    """Serves commands one by one; in between, ends what has expired, without waiting for a call."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def run(self, inbox: Inbox[Command[Any]]) -> None:
        while True:
            try:
                command = inbox.next() or await self._next(inbox)
            except anyio.EndOfStream:
                return
            if command is None:
                self._store.index.expire(self._clock.now())
            elif not command.reply.abandoned:
                self._serve(command)
            self._store.log.append(self._store.index.drain_changes())

    async def _next(self, inbox: Inbox[Command[Any]]) -> Command[Any] | None:
        due = self._store.index.next_due()
        with anyio.move_on_after(None if due is None else max(0.0, due - self._clock.now())):
            return await inbox.get()
        return None

    def _serve(self, command: Command[Any]) -> None:
        try:
            command.reply.set(command.act(self._store, self._clock.now()))
        except CoveyError as error:
            command.reply.fail(error)
