"""The mover over a real arena and a real disk tier, without a service: what goes down, in which order, when not."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest

from covey.actor import supervise
from covey.clock import MonotonicClock
from covey.net.kv.copying import checksums
from covey.policy.arena import Arena
from covey.policy.store_index import StoreIndex
from covey.testing import assert_eventually
from covey.types import block, kv, kv_state
from covey.types.ids import BlockHash, NamespaceId, TenantId, WorkerId
from services.kvstore.arena_file import arena_file
from services.kvstore.event_log import EventLog
from services.kvstore.store import Store, StoreActor
from services.kvstore.tiers.config import DiskConfig, MoveConfig, RemoteConfig
from services.kvstore.tiers.opening import open_tiers
from services.kvstore.tiers.tiers import Tiers

CAPACITY_BYTES = 4 << 20
SHAPE = block.BlockShape(size_bytes=60_000, layers=4)
CLOCK = MonotonicClock()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    layout = Arena(CAPACITY_BYTES)
    with arena_file(tmp_path, "mover", layout.capacity_bytes) as arena:
        index = StoreIndex(arena=layout, epoch=1, name="mover")
        yield Store(index, arena, EventLog(worker=WorkerId("w"), epoch=1, kept=64))


@asynccontextmanager
async def opened(store: Store, tmp_path: Path, move: MoveConfig) -> AsyncIterator[Tiers]:
    async with supervise(grace_s=1.0) as actors:
        actor = actors.start(lambda: StoreActor(store, CLOCK), name="store", capacity=256)
        disk = DiskConfig(path=str(tmp_path / "tier"), capacity_bytes=64 << 20, segment_bytes=1 << 20)
        async with open_tiers(
            store, actor, disk=disk, remote=RemoteConfig(), move=move, worker="", clock=CLOCK, rng=Random(3)
        ) as tiers:
            yield tiers


def store_block(store: Store, namespace: NamespaceId, tenant: str) -> BlockHash:
    """Store one block that starts a chain, and let go of it."""
    name, now = BlockHash(os.urandom(16)), CLOCK.now()
    reserve = kv.ReserveRequest(
        tenant=TenantId(tenant), namespace=namespace, blocks=(kv.BlockKey(hash=name),), shape=SHAPE, owner="w", ttl_s=10
    )
    reply = store.reserve(reserve, now)
    for slot in store.unbacked(reply, now):
        store.back(slot)
    store.mark(reply, now)
    slot = store.index.writable(reply.lease.lease, name, now, tenant=TenantId(tenant))
    store.payload(slot)[:] = os.urandom(SHAPE.size_bytes)
    block = kv.CommitBlock(hash=name, checksums=checksums(store.payload(slot), SHAPE))
    owner, lease = TenantId(tenant), reply.lease
    store.commit(kv.CommitRequest(tenant=owner, lease=lease.lease, epoch=lease.epoch, blocks=(block,)), now)
    store.index.release(kv.LeaseRequest(tenant=owner, lease=lease.lease, epoch=lease.epoch), now)
    return name


async def test_all_above_the_low_mark_goes_down_once_memory_is_over_the_high_one(store: Store, tmp_path: Path) -> None:
    async with opened(store, tmp_path, MoveConfig(high=0.5, low=0.25)) as tiers:
        namespace = NamespaceId(os.urandom(16))
        for _ in range(20):
            store_block(store, namespace, "t")
        tiers.note_written()
        assert tiers.below.stats()[0].blocks == 0
        written = [store_block(store, namespace, "t") for _ in range(30)]
        tiers.note_written()

        def is_clean() -> bool:
            clean = tiers.below.stats()[0].blocks * 65_536
            return store.index.stats().used_bytes - clean <= 0.25 * CAPACITY_BYTES

        await assert_eventually(is_clean, 5)
        assert tiers.below.stats()[0].blocks < 50, "the newest are not worth a copy yet"
        assert not tiers.below.knows(namespace, written[-1])
        store.index.check()


async def test_what_is_cheaper_to_compute_than_to_load_stays_where_it_is(store: Store, tmp_path: Path) -> None:
    cheap = MoveConfig(high=0.3, low=0.1, recompute_s_per_mib=1e-6)
    async with opened(store, tmp_path, cheap) as tiers:
        for _ in range(40):
            store_block(store, NamespaceId(os.urandom(16)), "t")
        mover = tiers._mover
        assert not await mover._clean()
        assert tiers.below.stats()[0].blocks == 0


async def test_tenants_over_their_quota_go_down_first(store: Store, tmp_path: Path) -> None:
    async with opened(store, tmp_path, MoveConfig(high=0.9, low=0.8)) as tiers:
        modest = [store_block(store, NamespaceId(b"m" * 16), "modest") for _ in range(8)]
        greedy = [store_block(store, NamespaceId(b"g" * 16), "greedy") for _ in range(8)]
        store.index.quota(kv_state.QuotaRequest(tenant=TenantId("greedy"), quota_bytes=100_000))
        placed = store.index.coldest(16, CLOCK.now())
        order = await tiers._mover._in_order(list(placed))
        assert {each.location.hash for each in order[:8]} == set(greedy)
        assert {each.location.hash for each in order[8:]} == set(modest)


async def test_damage_in_memory_does_not_go_down(store: Store, tmp_path: Path) -> None:
    async with opened(store, tmp_path, MoveConfig()) as tiers:
        namespace = NamespaceId(os.urandom(16))
        name = store_block(store, namespace, "t")
        (placed,) = store.index.visible(namespace, (name,))
        payload = store.payload(placed)
        payload[100] ^= 1
        assert not await tiers._demotion.copy_down(namespace, name)
        assert tiers.below.stats()[0].blocks == 0
        assert store.index.stats().quarantined == 1
        assert store.index.visible(namespace, (name,)) == ()
