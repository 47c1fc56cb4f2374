"""A real kvstore process behind its client: faults, fencing, events, memory."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from covey.clock import MonotonicClock
from covey.codec.methods import KvStore
from covey.errors import DataCorrupt, Fenced, InvalidArgument, LeaseExpired, Miss, Unavailable
from covey.net.kv import KvClient, StoreNode
from covey.net.kv.held import StoreHeld
from covey.net.rpc import Channel, Channels
from covey.policy.slot import payload_offset
from covey.testing import assert_eventually, free_port
from covey.types.block import BlockShape
from covey.types.common import Empty
from covey.types.ids import BlockHash, LeaseId, TenantId, WorkerId
from covey.types.kv import (
    CHUNK_BYTES_MAX,
    BlockKey,
    CommitBlock,
    CommitRequest,
    GetRequest,
    GrantStatus,
    LeaseGrant,
    LeaseRequest,
    RenewRequest,
    ReserveReply,
    ReserveRequest,
    WriteChunk,
)
from covey.types.kv_state import KvEvent, KvEventKind, WatchKvRequest
from covey.types.store import StoreKey
from tests.contract.kv_stores import BOOT_ID, CAPACITY_BYTES, StoreProcess, flip_byte
from tests.contract.test_block_store import LARGE, SHAPE, buffers, chain, content, find, key, names, put
from tests.support.kv_state import snapshot, stats

from .connection import connected


async def reserve(channel: Channel, where: StoreKey, blocks: list[BlockKey], *, ttl_s: float = 20.0) -> ReserveReply:
    request = ReserveRequest(
        tenant=where.tenant, namespace=where.namespace, blocks=tuple(blocks), shape=where.shape, owner="w", ttl_s=ttl_s
    )
    return await channel.call(KvStore.RESERVE, request, timeout_s=5)


async def upload(channel: Channel, lease: LeaseId, name: BlockHash, offset: int, data: bytes) -> int:
    async def chunks() -> AsyncIterator[WriteChunk]:
        yield WriteChunk(tenant=TenantId("t"), lease=lease, hash=name, offset=offset, data=data)

    return (await channel.upload(KvStore.WRITE, chunks(), timeout_s=5)).size_bytes


@pytest.mark.faults
async def test_a_killed_store_is_a_miss_and_its_successor_is_used_again(fresh: StoreProcess, transport: str) -> None:
    async with connected(fresh, transport) as (client, _):
        where, blocks = key(), chain(3)
        data = content(3)
        held = await put(client, where, blocks, data)
        old = fresh.arena
        fresh.kill()
        assert old.exists(), "nobody was left to remove it"
        assert (await find(client, where, blocks)).hashes == ()
        with pytest.raises(Unavailable):
            await put(client, where, blocks, data)
        assert (await client.pin(where, names(blocks), owner="o", ttl_s=1.0)).hashes == ()
        await held.release()

        fresh.start()
        assert fresh.arena != old
        assert not old.exists()

        async def stored() -> bool:
            try:
                await put(client, where, blocks, data)
            except Unavailable:
                return False
            return True

        await assert_eventually(stored, 10.0)
        into = buffers(3)
        assert await client.load(await find(client, where, blocks), into) == 3
        assert into == data


@pytest.mark.faults
async def test_a_store_killed_between_lookup_and_load_raises_nothing(fresh: StoreProcess, transport: str) -> None:
    async with connected(fresh, transport) as (client, _):
        where, blocks = key(), chain(3)
        await put(client, where, blocks, content(3))
        held = await find(client, where, blocks)
        await client.load(held, buffers(3))
        fresh.kill()
        good = await client.load(held, buffers(3))
        assert good == (3 if transport == "auto" else 0), "mapped bytes outlive their store, under the lease"
        await held.release()


async def test_an_older_epoch_is_fenced(fresh: StoreProcess) -> None:
    async with connected(fresh) as (_, channel):
        where, blocks = key(), chain(1)
        reply = await reserve(channel, where, blocks)
        old = reply.lease.epoch - 1
        commit = CommitRequest(
            tenant=TenantId("t"),
            lease=reply.lease.lease,
            epoch=old,
            blocks=(CommitBlock(hash=blocks[0].hash, checksums=(0, 0, 0)),),
        )
        with pytest.raises(Fenced):
            await channel.call(KvStore.COMMIT, commit, timeout_s=5)
        with pytest.raises(Fenced):
            await channel.call(
                KvStore.ABORT, LeaseRequest(tenant=TenantId("t"), lease=reply.lease.lease, epoch=old), timeout_s=5
            )
        renew = RenewRequest(tenant=TenantId("t"), lease=reply.lease.lease, epoch=old, done=1, ttl_s=1.0)
        with pytest.raises(Fenced):
            await channel.call(KvStore.RENEW, renew, timeout_s=5)
        await channel.call(
            KvStore.ABORT,
            LeaseRequest(tenant=TenantId("t"), lease=reply.lease.lease, epoch=reply.lease.epoch),
            timeout_s=5,
        )
        assert (await stats(channel)).used_bytes == 0


async def test_a_truncated_upload_cannot_be_committed(process: StoreProcess) -> None:
    async with connected(process) as (client, channel):
        where, blocks = key(), chain(1)
        reply = await reserve(channel, where, blocks)
        assert reply.grants[0].status is GrantStatus.GRANTED
        name, lease = blocks[0].hash, reply.lease.lease
        assert await upload(channel, lease, name, 0, b"x" * 1000) == 1000
        with pytest.raises(InvalidArgument):
            await upload(channel, lease, name, SHAPE.size_bytes - 10, b"x" * 11)
        with pytest.raises(Fenced):
            await upload(channel, lease, chain(1)[0].hash, 0, b"x")
        commit = CommitRequest(
            tenant=TenantId("t"),
            lease=lease,
            epoch=reply.lease.epoch,
            blocks=(CommitBlock(hash=name, checksums=(1, 2, 3)),),
        )
        with pytest.raises(DataCorrupt):
            await channel.call(KvStore.COMMIT, commit, timeout_s=5)
        assert (await find(client, where, blocks)).hashes == ()


async def test_a_writer_whose_lease_ended_writes_nothing(fresh: StoreProcess) -> None:
    async with connected(fresh) as (_, channel):
        where, blocks = key(), chain(1)
        reply = await reserve(channel, where, blocks, ttl_s=0.1)

        async def freed() -> bool:
            return (await stats(channel)).used_bytes == 0

        await assert_eventually(freed, 5.0)
        with pytest.raises(LeaseExpired):
            await upload(channel, reply.lease.lease, blocks[0].hash, 0, b"x")


async def test_get_sends_the_layers_that_are_asked_and_no_block_without_a_lease(process: StoreProcess) -> None:
    async with connected(process) as (client, channel):
        where, blocks = key(LARGE), chain(2)
        data = content(2, LARGE)
        await put(client, where, blocks, data)
        held = await find(client, where, blocks[:1])
        assert isinstance(held, StoreHeld)

        async def get(**fields: Any) -> bytes:
            request = GetRequest(tenant=TenantId("t"), lease=held.grant.lease, **fields)
            got = b""
            async with channel.stream(KvStore.GET, request, timeout_s=5) as chunks:
                async for chunk in chunks:
                    assert len(chunk.data) <= CHUNK_BYTES_MAX
                    assert bool(chunk.checksums) == (not got)
                    got += chunk.data
            return got

        layer = LARGE.size_bytes // LARGE.layers
        assert await get(hashes=(blocks[0].hash,), first_layer=1, last_layer=3) == bytes(data[0][layer : 3 * layer])
        assert await get(hashes=(blocks[0].hash,)) == bytes(data[0])
        with pytest.raises(Miss):
            await get(hashes=(blocks[1].hash,))
        with pytest.raises(InvalidArgument):
            await get(hashes=(blocks[0].hash,), first_layer=3, last_layer=2)
        await held.release()
        with pytest.raises(LeaseExpired):
            await get(hashes=(blocks[0].hash,))


async def test_progress_renews_a_lease_and_standing_still_loses_it(process: StoreProcess, transport: str) -> None:
    async with connected(process, transport) as (client, _):
        where, blocks = key(), chain(4)
        data = content(4)
        await put(client, where, blocks, data)
        held = await find(client, where, blocks, ttl_s=1.0)
        clock = MonotonicClock()
        started = clock.now()
        into = buffers(4)
        while clock.now() - started < 2.5:
            assert await client.load(held, into) == 4
        assert into == data

        def has_ended() -> bool:
            assert isinstance(held, StoreHeld)
            try:
                held.check()
            except LeaseExpired:
                return True
            return False

        await assert_eventually(has_ended, 5.0)
        with pytest.raises(LeaseExpired):
            await client.load(held, into)


async def test_a_cancelled_store_leaves_nothing_reserved(fresh: StoreProcess, transport: str) -> None:
    async with connected(fresh, transport) as (client, channel):
        where = key(LARGE)
        for delay_s in (0.0, 0.002, 0.01):
            with anyio.move_on_after(delay_s):
                await put(client, where, chain(3), content(3, LARGE))

        async def clean() -> bool:
            now = await stats(channel)
            return now.reserved_blocks == 0

        await assert_eventually(clean, 2.0)


async def test_a_dead_node_is_passed_over_and_writers_go_to_the_next(process: StoreProcess) -> None:
    dead = StoreNode(worker=WorkerId("kv-dead"), address=f"127.0.0.1:{free_port()}", capacity_bytes=CAPACITY_BYTES)
    live = StoreNode(worker=WorkerId("kv-0"), address=process.address, capacity_bytes=CAPACITY_BYTES)
    async with Channels.open() as channels:
        client = KvClient(lambda: [dead, live], channels, clock=MonotonicClock(), boot_id=BOOT_ID)
        for _ in range(12):
            where, blocks = key(), chain(2)
            data = content(2)
            await put(client, where, blocks, data)
            into = buffers(2)
            assert await client.load(await find(client, where, blocks), into) == 2
            assert into == data
        nobody = KvClient(list, channels, clock=MonotonicClock(), boot_id=BOOT_ID)
        assert (await find(nobody, key(), chain(1))).hashes == ()
        with pytest.raises(Unavailable):
            await put(nobody, key(), chain(1), content(1))
        draining = KvClient(lambda: [replace(live, draining=True)], channels, clock=MonotonicClock(), boot_id=BOOT_ID)
        with pytest.raises(Unavailable):
            await put(draining, key(), chain(1), content(1))
        assert len((await find(draining, where, blocks)).hashes) == 2


async def test_watchers_hear_of_every_change_and_snapshots_agree(fresh: StoreProcess) -> None:
    async with connected(fresh) as (client, channel):
        where, blocks = key(), chain(4)
        await put(client, where, blocks[:2], content(2))
        seen: list[KvEvent] = []

        async def watch() -> None:
            async with channel.stream(KvStore.WATCH, WatchKvRequest(), timeout_s=None) as events:
                async for event in events:
                    seen.append(event)

        async with anyio.create_task_group() as tg:
            tg.start_soon(watch)
            await assert_eventually(lambda: len(seen) == 2)
            held = await put(client, where, blocks[2:], content(2))
            tail = await put(client, where, chain(1, parent=blocks[3].hash), content(1), private=True)
            await tail.release()
            pin = await client.pin(where, names(blocks), owner="p", ttl_s=30)
            await pin.release()
            await held.release()
            await assert_eventually(lambda: len(seen) == 5)
            tg.cancel_scope.cancel()
        assert [event.kind for event in seen] == [
            KvEventKind.CLEARED, KvEventKind.STORED, KvEventKind.STORED, KvEventKind.PINNED, KvEventKind.UNPINNED,
        ]  # fmt: skip
        assert [event.seq for event in seen] == [1, 1, 2, 3, 4]
        held_now = await snapshot(channel)
        assert (held_now.epoch, held_now.seq) == (seen[-1].epoch, seen[-1].seq)
        assert [(entry.namespace, list(entry.hashes)) for entry in held_now.entries] == [
            (where.namespace, names(blocks))
        ]


async def test_an_idle_store_needs_little_memory_and_answers_a_strange_lease(fresh: StoreProcess) -> None:
    async with connected(fresh) as (_, channel):
        await stats(channel)
        lines = Path(f"/proc/{fresh.pid}/smaps_rollup").read_text().splitlines()
        rss_kib = next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
        assert rss_kib < 150 * 1024
        info = await channel.call(KvStore.INFO, Empty(), timeout_s=5)
        assert Path(info.arena_path) == fresh.arena
        grant = LeaseGrant(lease=LeaseId(secrets.token_hex(4)), epoch=0, ttl_s=1.0)
        with pytest.raises(Fenced):
            await channel.call(
                KvStore.RELEASE, LeaseRequest(tenant=TenantId("t"), lease=grant.lease, epoch=grant.epoch), timeout_s=5
            )


async def test_layers_that_do_not_divide_a_block_are_refused(process: StoreProcess) -> None:
    async with connected(process) as (client, _):
        where = key(BlockShape(size_bytes=100, layers=3))
        with pytest.raises(InvalidArgument):
            await put(client, where, chain(1), [memoryview(os.urandom(100))])


@pytest.mark.faults
async def test_a_store_that_started_anew_is_not_blamed_for_what_its_predecessor_held(fresh: StoreProcess) -> None:
    async with connected(fresh) as (client, channel):
        where, blocks = key(), chain(2)
        data = content(2)
        await put(client, where, blocks, data)
        held = await find(client, where, blocks)
        fresh.kill()
        fresh.start()

        async def stored() -> bool:
            try:
                await put(client, where, blocks, data)
            except Unavailable:
                return False
            return True

        await assert_eventually(stored, 10.0)  # maps the new arena
        assert isinstance(held, StoreHeld)
        held.node._known_epoch = held.grant.epoch  # as if the restart had come between look-up and mapping
        flip_byte(fresh.arena, held.locations[0].offset)
        flip_byte(fresh.arena, held.locations[0].offset + payload_offset(SHAPE))
        with pytest.raises(LeaseExpired):
            await client.load(held, buffers(2))
        assert (await stats(channel)).quarantined == 0


@pytest.mark.faults
async def test_a_store_that_dies_in_a_commit_leaves_nothing_half_visible(fresh: StoreProcess) -> None:
    async with connected(fresh) as (client, _):
        where, blocks = key(), chain(2)
        fresh.stop()
        fresh.start(env={"COVEY_FAILPOINTS": "kvstore.commit=crash@2"})
        await put(client, where, blocks[:1], content(1))
        with pytest.raises(Unavailable):
            await put(client, where, blocks[1:], content(1))
        assert fresh.stop() == 137, "it crashed in the commit"
        fresh.start()

        async def empty() -> bool:
            return (await find(client, where, blocks)).hashes == ()

        await assert_eventually(empty, 5.0)
