"""What a node refuses, by type: and then nothing is stored and nothing stays behind."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from covey.codec.methods import KvStore
from covey.errors import (
    CoveyError,
    DataCorrupt,
    Fenced,
    InvalidArgument,
    LayoutMismatch,
    LeaseExpired,
    Miss,
    NoSpace,
)
from covey.net.kv.copying import checksums
from covey.net.rpc import Channel
from covey.types.block import BlockShape
from covey.types.ids import BlockHash, NamespaceId, TenantId
from covey.types.kv import (
    BlockKey,
    CommitBlock,
    CommitRequest,
    GetRequest,
    LeaseGrant,
    LeaseRequest,
    LookupRequest,
    PinRequest,
    QuarantineRequest,
    RenewRequest,
    ReserveReply,
    ReserveRequest,
    WriteChunk,
)
from covey.types.kv_state import StoreStats
from tests.contract.kv_stores import StoreProcess
from tests.support.kv_state import stats

from .connection import connected

SHAPE = BlockShape(size_bytes=3 * 4096, layers=3)
MINE, OTHER, NOBODY = TenantId("t"), TenantId("u"), TenantId("")
DATA = b"k" * SHAPE.size_bytes
SUMS = checksums(memoryview(DATA), SHAPE)
FIRST = BlockHash(b"")


class Site:
    """A chain of two stored blocks under a read lease, and a reservation of a third, at a real node."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.namespace = NamespaceId(secrets.token_bytes(16))
        self.names = [BlockHash(secrets.token_bytes(16)) for _ in range(3)]
        self.reserved: ReserveReply
        self.read: LeaseGrant

    async def build(self) -> None:
        both = await self.reserve(BlockKey(hash=self.names[0]), BlockKey(hash=self.names[1], parent=self.names[0]))
        for name in self.names[:2]:
            await self.write(both.lease, name)
        await self.commit(both.lease, *self.names[:2])
        found = await self.channel.call(KvStore.LOOKUP, self.lookup(), timeout_s=5)
        assert found.lease is not None
        self.read = found.lease
        await self.release(both.lease)
        self.reserved = await self.reserve(BlockKey(hash=self.names[2], parent=self.names[1]))

    def lookup(self, **changes: Any) -> LookupRequest:
        request = LookupRequest(
            tenant=MINE, namespace=self.namespace, hashes=tuple(self.names), owner="r", ttl_s=60.0, shape=SHAPE
        )
        return replace(request, **changes)

    async def reserve(self, *blocks: BlockKey, **changes: Any) -> ReserveReply:
        request = ReserveRequest(
            tenant=MINE, namespace=self.namespace, blocks=blocks, shape=SHAPE, owner="w", ttl_s=60.0
        )
        return await self.channel.call(KvStore.RESERVE, replace(request, **changes), timeout_s=5)

    async def write(self, grant: LeaseGrant, name: BlockHash, data: bytes = DATA, **changes: Any) -> None:
        async def chunks() -> AsyncIterator[WriteChunk]:
            yield replace(WriteChunk(tenant=MINE, lease=grant.lease, hash=name, offset=0, data=data), **changes)

        await self.channel.upload(KvStore.WRITE, chunks(), timeout_s=5)

    async def commit(self, grant: LeaseGrant, *names: BlockHash, sums: tuple[int, ...] = SUMS, **changes: Any) -> None:
        blocks = tuple(CommitBlock(hash=name, checksums=sums) for name in names)
        request = CommitRequest(tenant=MINE, lease=grant.lease, epoch=grant.epoch, blocks=blocks)
        await self.channel.call(KvStore.COMMIT, replace(request, **changes), timeout_s=5)

    async def release(self, grant: LeaseGrant, **changes: Any) -> None:
        request = LeaseRequest(tenant=MINE, lease=grant.lease, epoch=grant.epoch)
        await self.channel.call(KvStore.RELEASE, replace(request, **changes), timeout_s=5)

    async def renew(self, grant: LeaseGrant, **changes: Any) -> None:
        request = RenewRequest(tenant=MINE, lease=grant.lease, epoch=grant.epoch, done=1, ttl_s=1.0)
        await self.channel.call(KvStore.RENEW, replace(request, **changes), timeout_s=5)

    async def get(self, grant: LeaseGrant, *names: BlockHash, **changes: Any) -> None:
        request = replace(GetRequest(tenant=MINE, lease=grant.lease, hashes=names), **changes)
        async with self.channel.stream(KvStore.GET, request, timeout_s=5) as chunks:
            async for _ in chunks:
                pass

    async def pin(self, *names: BlockHash, ttl_s: float = 1.0) -> None:
        request = PinRequest(tenant=MINE, namespace=self.namespace, hashes=names, ttl_s=ttl_s, owner="p")
        await self.channel.call(KvStore.PIN, request, timeout_s=5)


@asynccontextmanager
async def site(process: StoreProcess) -> AsyncIterator[Site]:
    async with connected(process) as (_, channel):
        site = Site(channel)
        await site.build()
        try:
            yield site
        finally:
            for grant in (site.reserved.lease, site.read):
                await site.release(grant)


STRANGE = BlockHash(b"?" * 16)
BLOCK = BlockKey(hash=STRANGE)
HUGE = BlockShape(size_bytes=1 << 28, layers=1)

CASES: dict[str, tuple[type[CoveyError], Callable[[Site], Awaitable[Any]]]] = {
    "another layout, looked up": (
        LayoutMismatch,
        lambda s: s.channel.call(
            KvStore.LOOKUP, s.lookup(shape=BlockShape(size_bytes=8192, layers=2)), timeout_s=5
        ),
    ),
    "another layout, reserved": (LayoutMismatch, lambda s: s.reserve(BLOCK, shape=replace(SHAPE, layers=1))),
    "layers that do not divide": (
        InvalidArgument,
        lambda s: s.reserve(BLOCK, shape=replace(SHAPE, layers=5), namespace=NamespaceId(b"new" * 5)),
    ),
    "larger than the store": (
        NoSpace, lambda s: s.reserve(BLOCK, shape=HUGE, namespace=NamespaceId(b"new" * 5)),
    ),
    "a name of another size": (InvalidArgument, lambda s: s.reserve(BlockKey(hash=BlockHash(b"short")))),
    "a parent of another size": (
        InvalidArgument, lambda s: s.reserve(BlockKey(hash=STRANGE, parent=BlockHash(b"short")))
    ),
    "a parent that is not stored": (Miss, lambda s: s.reserve(BlockKey(hash=BlockHash(b"!" * 16), parent=STRANGE))),
    "a block named twice": (InvalidArgument, lambda s: s.reserve(BLOCK, BLOCK)),
    "more than was reserved": (
        InvalidArgument, lambda s: s.write(s.reserved.lease, s.names[2], DATA + b"x")
    ),
    "beyond the end": (
        InvalidArgument, lambda s: s.write(s.reserved.lease, s.names[2], b"x", offset=SHAPE.size_bytes)
    ),
    "a slot that was not granted": (Fenced, lambda s: s.write(s.reserved.lease, s.names[0])),
    "a read lease writes": (Fenced, lambda s: s.write(s.read, s.names[2])),
    "a commit of what was not granted": (InvalidArgument, lambda s: s.commit(s.reserved.lease, STRANGE)),
    "too few checksums": (InvalidArgument, lambda s: s.commit(s.reserved.lease, s.names[2], sums=SUMS[:2])),
    "an older epoch commits": (
        Fenced, lambda s: s.commit(s.reserved.lease, s.names[2], epoch=s.reserved.lease.epoch - 1)
    ),
    "an older epoch renews": (Fenced, lambda s: s.renew(s.read, epoch=s.read.epoch - 1)),
    "an older epoch releases": (Fenced, lambda s: s.release(s.read, epoch=s.read.epoch - 1)),
    "another tenant writes": (LeaseExpired, lambda s: s.write(s.reserved.lease, s.names[2], tenant=OTHER)),
    "another tenant commits": (LeaseExpired, lambda s: s.commit(s.reserved.lease, s.names[2], tenant=OTHER)),
    "another tenant reads": (LeaseExpired, lambda s: s.get(s.read, s.names[0], tenant=OTHER)),
    "another tenant renews": (LeaseExpired, lambda s: s.renew(s.read, tenant=OTHER)),
    "another tenant releases": (LeaseExpired, lambda s: s.release(s.read, tenant=OTHER)),
    "nobody writes": (InvalidArgument, lambda s: s.write(s.reserved.lease, s.names[2], tenant=NOBODY)),
    "nobody commits": (InvalidArgument, lambda s: s.commit(s.reserved.lease, s.names[2], tenant=NOBODY)),
    "nobody reads": (InvalidArgument, lambda s: s.get(s.read, s.names[0], tenant=NOBODY)),
    "nobody releases": (InvalidArgument, lambda s: s.release(s.read, tenant=NOBODY)),
    "a block outside the lease": (Miss, lambda s: s.get(s.read, STRANGE)),
    "an uncommitted block": (Miss, lambda s: s.get(s.read, s.names[2])),
    "layers that are not there": (InvalidArgument, lambda s: s.get(s.read, s.names[0], first_layer=3)),
    "a pin of nothing": (Miss, lambda s: s.pin(STRANGE)),
}  # fmt: skip


def counted(found: StoreStats) -> tuple[int, ...]:
    return found.blocks, found.used_bytes, found.leases, found.reserved_blocks, found.leased_blocks, found.pinned_blocks


@pytest.mark.parametrize("case", CASES)
async def test_bad_input_is_refused_by_type_and_leaves_nothing(process: StoreProcess, case: str) -> None:
    error, act = CASES[case]
    async with site(process) as it:
        before = await stats(it.channel)
        with pytest.raises(error) as refused:
            await act(it)
        assert type(refused.value) is error
        after = await stats(it.channel)
        assert counted(after) == counted(before)
        assert (after.evictions, after.quarantined) == (before.evictions, before.quarantined)
        await it.get(it.read, *it.names[:2])


async def test_an_unknown_namespace_is_a_miss_without_a_lease(process: StoreProcess) -> None:
    async with site(process) as it:
        before = counted(await stats(it.channel))
        strange = it.lookup(namespace=NamespaceId(b"?" * 16))
        reply = await it.channel.call(KvStore.LOOKUP, strange, timeout_s=5)
        assert (len(reply.blocks), reply.lease) == (0, None)
        bad = QuarantineRequest(tenant=MINE, namespace=NamespaceId(b"?" * 16), hash=STRANGE, reason="no such block")
        await it.channel.call(KvStore.QUARANTINE, bad, timeout_s=5)
        assert counted(await stats(it.channel)) == before


@pytest.mark.parametrize("sent", [DATA[:-1] + b"?", DATA[:4096], b""], ids=["other bytes", "truncated", "nothing"])
async def test_bytes_that_do_not_have_their_checksums_never_become_visible(process: StoreProcess, sent: bytes) -> None:
    async with site(process) as it:
        await it.write(it.reserved.lease, it.names[2], sent)
        for _ in range(2):  # asking again does not help
            with pytest.raises(DataCorrupt):
                await it.commit(it.reserved.lease, it.names[2])
        found = await it.channel.call(KvStore.LOOKUP, it.lookup(ttl_s=0.05), timeout_s=5)
        assert found.blocks.names == tuple(it.names[:2])
        await it.write(it.reserved.lease, it.names[2])  # the right bytes still may come
        await it.commit(it.reserved.lease, it.names[2])
        found = await it.channel.call(KvStore.LOOKUP, it.lookup(ttl_s=0.05), timeout_s=5)
        assert found.blocks.names == tuple(it.names)
