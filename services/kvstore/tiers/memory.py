"""What the tiers below ask of memory: to hold blocks while they are copied out, to take in those that come up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from typing import TypeVar

import anyio
from anyio import to_thread

from covey.actor import Ref
from covey.compression.codec import raw
from covey.errors import CoveyError, DataCorrupt
from covey.net.kv.copying import copy_in
from covey.policy.disk_record import Record, has_sums
from covey.policy.rights import STORE
from covey.policy.store_index import Placed
from covey.types import block, kv
from covey.types.ids import BlockHash, NamespaceId, TenantId
from services.kvstore.store import Command, Store

R = TypeVar("R")

ASK_TIMEOUT_S = 5.0
OWNER = "store/tiers"
COPY_TTL_S = 60.0
"""How long blocks are held while a batch of them is copied: long past any deadline of a tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Blocks that are kept while they are copied out. `bad` is one that follows them and was found to be damaged."""

    records: tuple[Record, ...]
    bad: Placed | None = None


class Memory:
    """The store's actor, as the tiers see it; every block copied out is verified, in a thread, before it goes down."""

    def __init__(self, store: Store, actor: Ref[Command[object]]) -> None:
        self._store = store
        self._actor = actor

    async def ask(self, act: Callable[[Store, float], R]) -> R:
        return await self._actor.ask(Command(act=act), timeout_s=ASK_TIMEOUT_S)

    async def lineage(
        self, namespace: NamespaceId, name: BlockHash, known: Callable[[BlockHash], bool]
    ) -> list[Placed]:
        """Return a visible block and what it grows from, oldest first, up to the first that is `known` below."""

        def walk(store: Store, _: float) -> list[Placed]:
            chain: list[Placed] = []
            at = name
            while at and not known(at):
                placed = store.index.visible(namespace, (at,))
                if not placed:
                    return []
                chain.append(placed[0])
                at = placed[0].parent
            return chain[::-1]

        return await self.ask(walk)

    async def visible(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> tuple[BlockHash, ...]:
        """Return those of the named shared blocks that are in memory."""
        placed = await self.ask(lambda store, _: store.index.visible(namespace, hashes))
        return tuple(each.location.hash for each in placed)

    async def all_of(self, namespace: NamespaceId) -> list[tuple[NamespaceId, tuple[BlockHash, ...]]]:
        """Return the shared blocks of a namespace, parents first; of every one, if it is empty."""
        every = await self.ask(lambda store, _: list(store.index.snapshot()))
        return [(name, hashes) for name, hashes in every if namespace in {name, b""}]

    async def drop(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> int:
        """Let go of blocks that nobody needs here; returns how many went."""
        return await self.ask(lambda store, now: store.index.drop(namespace, hashes, now))

    async def note_below(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> None:
        """Say that blocks also lie below: their eviction costs less than that of others."""
        await self.ask(lambda store, _: store.index.note_below(namespace, hashes, below=True))

    def has_room(self, size_bytes: int) -> bool:
        """Whether so many bytes more would come without an eviction."""
        stats = self._store.index.stats()
        return stats.used_bytes + size_bytes <= stats.capacity_bytes

    @asynccontextmanager
    async def held(self, chain: Sequence[Placed]) -> AsyncIterator[Held]:
        """Hold blocks of one namespace, parents first, and read them; as many leading ones as are there and good."""
        grant, placed = await self.ask(lambda store, now: _keep(store, chain, now))
        try:
            yield await to_thread.run_sync(self._read, placed)
        finally:
            if grant is not None:
                await self.release(STORE, grant)

    async def condemn(self, placed: Placed, why: str) -> None:
        """Take out a block that is bad."""
        request = kv.QuarantineRequest(
            tenant=placed.tenant, namespace=placed.namespace, hash=placed.location.hash, reason=why
        )
        await self.ask(lambda store, now: store.index.quarantine(request, now))

    async def take_in(self, records: Sequence[Record]) -> int:
        """Make blocks of one namespace and tenant visible, parents first. Returns how many leading ones are.

        Raises `CoveyError` when there is no room, or the block that the first one grows from is not there.
        """
        came = 0
        for _, alike in groupby(records, key=lambda record: (record.header.codec, record.header.shape)):
            run = tuple(alike)
            taken = await self._take_in(run)
            came += taken
            if taken < len(run):
                break
        return came

    async def _take_in(self, records: Sequence[Record]) -> int:
        """The same for blocks that are encoded alike."""
        first = records[0]
        size_bytes = first.header.shape.size_bytes
        request = kv.ReserveRequest(
            tenant=first.tenant, namespace=first.namespace, owner=OWNER, ttl_s=COPY_TTL_S,
            shape=replace(first.header.shape, size_bytes=first.raw_bytes or size_bytes),
            blocks=tuple(kv.BlockKey(hash=record.hash, parent=record.parent) for record in records),
            codec=first.header.codec, encoded_bytes=0 if first.header.codec is block.BlockCodec.RAW else size_bytes,
        )  # fmt: skip
        reply, unbacked = await self.ask(lambda store, now: _reserve(store, request, now))
        try:
            if unbacked:
                await to_thread.run_sync(self._back, unbacked)
                await self.ask(lambda store, now: store.mark(reply, now))
            return await self._fill(records, reply)
        finally:
            await self.release(first.tenant, reply.lease)

    async def release(self, tenant: TenantId, grant: kv.LeaseGrant) -> None:
        request = kv.LeaseRequest(tenant=tenant, lease=grant.lease, epoch=grant.epoch)
        with anyio.move_on_after(ASK_TIMEOUT_S, shield=True):
            try:
                await self.ask(lambda store, now: store.index.release(request, now))
            except CoveyError:
                return  # it ended by itself

    async def _fill(self, records: Sequence[Record], reply: kv.ReserveReply) -> int:
        granted = [grant.hash for grant in reply.grants if grant.status is kv.GrantStatus.GRANTED]
        slots = await self.ask(
            lambda store, now: {name: store.index.writable(reply.lease.lease, name, now) for name in granted}
        )
        commits, good = [], 0
        for record, grant in zip(records, reply.grants, strict=True):
            if grant.status is kv.GrantStatus.PENDING:
                break
            if grant.status is kv.GrantStatus.GRANTED:
                if not await to_thread.run_sync(self._write, slots[record.hash], record):
                    break
                commits.append(kv.CommitBlock(hash=record.hash, checksums=record.header.checksums))
            good += 1
        if commits:
            commit = kv.CommitRequest(
                tenant=records[0].tenant, lease=reply.lease.lease, epoch=reply.lease.epoch, blocks=tuple(commits)
            )
            await self.ask(lambda store, now: store.commit(commit, now))
            await self.note_below(records[0].namespace, [block.hash for block in commits])
        return good

    def _back(self, slots: Sequence[Placed]) -> None:
        for slot in slots:
            self._store.back(slot)

    def _write(self, slot: Placed, record: Record) -> bool:
        sums = copy_in(self._store.payload(slot), memoryview(record.payload), record.header.shape)
        return sums == record.header.checksums

    def _read(self, placed: Sequence[Placed]) -> Held:
        records: list[Record] = []
        for each in placed:
            try:
                header = self._store.header(each)
            except DataCorrupt:
                return Held(records=tuple(records), bad=each)
            payload = self._store.payload(each)
            if not has_sums(payload, header):
                return Held(records=tuple(records), bad=each)
            records.append(
                Record(
                    header=header, parent=each.parent, tenant=each.tenant, payload=payload,
                    raw_bytes=_raw(each).size_bytes,
                )
            )  # fmt: skip
        return Held(records=tuple(records))


def _raw(slot: Placed) -> block.BlockShape:
    return slot.shape if slot.codec is block.BlockCodec.RAW else raw(slot.shape)


def _keep(store: Store, chain: Sequence[Placed], now: float) -> tuple[kv.LeaseGrant | None, tuple[Placed, ...]]:
    """Lease a chain to the store itself, as far as it is still there."""
    names = tuple(each.location.hash for each in chain)
    kept = store.index.keep(chain[0].namespace, names, owner=OWNER, ttl_s=COPY_TTL_S, now=now)
    if kept is None:
        return None, ()
    grant, placed = kept
    whole = takewhile(lambda pair: pair[0].location.hash == pair[1], zip(placed, names, strict=False))
    return grant, tuple(each for each, _ in whole)


def _reserve(store: Store, request: kv.ReserveRequest, now: float) -> tuple[kv.ReserveReply, list[Placed]]:
    reply = store.reserve(request, now)
    return reply, store.unbacked(reply, now)
