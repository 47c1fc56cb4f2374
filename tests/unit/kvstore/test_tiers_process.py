"""A real kvstore with tiers below its memory: restarts, what a look-up finds there, damage, a full disk, an engine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from covey.codec.methods import KvStore
from covey.errors import FailedPrecondition, Unavailable
from covey.net.kv.copying import checksums
from covey.net.rpc import Channel
from covey.testing import assert_eventually
from covey.types import kv, kv_state
from covey.types.ids import BlockHash, NamespaceId
from covey.types.kv import AckLevel, BlockKey
from covey.types.kv_state import Tier, TierStats
from covey.types.store import StoreKey
from tests.contract.kv_stores import StoreProcess, flip_byte, store_process
from tests.contract.test_block_store import SHAPE, buffers, chain, content, key, names, put
from tests.support.engines_remote import REDIS, RedisServer, redis_server
from tests.support.kv_state import stats

from .connection import connected

DISK = ("disk.capacity_bytes=67108864", "disk.segment_bytes=1048576")
FAST = ("move.high=0.3", "move.low=0.1")


def settings(tmp_path: Path, *more: str) -> tuple[str, ...]:
    return (f"disk.path={tmp_path / 'tier'}", *DISK, *more)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreProcess]:
    with store_process(tmp_path, *settings(tmp_path)) as process:
        yield process


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    """One that several tests use and none harms."""
    path = tmp_path_factory.mktemp("calm")
    with store_process(path, *settings(path)) as process:
        yield process


async def write(
    channel: Channel, where: StoreKey, blocks: list[BlockKey], data: list[Any], ack: AckLevel = AckLevel.DURABLE
) -> None:
    """Store blocks over gRPC and let go of them."""
    reserve = kv.ReserveRequest(
        tenant=where.tenant, namespace=where.namespace, blocks=tuple(blocks), shape=where.shape, owner="w", ttl_s=20
    )
    reply = await channel.call(KvStore.RESERVE, reserve, timeout_s=5)
    lease = reply.lease

    async def chunks() -> Any:
        for block, payload, grant in zip(blocks, data, reply.grants, strict=True):
            if grant.status is not kv.GrantStatus.GRANTED:
                continue
            yield kv.WriteChunk(
                tenant=where.tenant, lease=lease.lease, hash=block.hash, offset=0, data=bytes(payload)
            )  # fmt: skip

    await channel.upload(KvStore.WRITE, chunks(), timeout_s=5)
    commit = kv.CommitRequest(
        tenant=where.tenant, lease=lease.lease, epoch=lease.epoch, ack=ack,
        blocks=tuple(
            kv.CommitBlock(hash=block.hash, checksums=checksums(payload, where.shape))
            for block, payload in zip(blocks, data, strict=True)
        ),
    )  # fmt: skip
    try:
        await channel.call(KvStore.COMMIT, commit, timeout_s=10)
    finally:
        await release(channel, where, lease)


async def release(channel: Channel, where: StoreKey, lease: kv.LeaseGrant) -> None:
    request = kv.LeaseRequest(tenant=where.tenant, lease=lease.lease, epoch=lease.epoch)
    await channel.call(KvStore.RELEASE, request, timeout_s=5)


async def look(channel: Channel, where: StoreKey, hashes: list[BlockHash], *, wait_s: float = 0.0) -> kv.LookupReply:
    request = kv.LookupRequest(
        tenant=where.tenant, namespace=where.namespace, hashes=tuple(hashes), owner="r", ttl_s=20, shape=where.shape,
        wait_s=wait_s,
    )  # fmt: skip
    return await channel.call(KvStore.LOOKUP, request, timeout_s=10 + wait_s)


async def read(channel: Channel, where: StoreKey, reply: kv.LookupReply) -> list[bytes]:
    assert reply.lease is not None
    wanted = tuple(block.hash for block in reply.blocks)
    got = dict.fromkeys(wanted, b"")
    request = kv.GetRequest(tenant=where.tenant, lease=reply.lease.lease, hashes=wanted)
    async with channel.stream(KvStore.GET, request, timeout_s=10) as chunks:
        async for chunk in chunks:
            got[chunk.hash] += chunk.data
    await release(channel, where, reply.lease)
    return list(got.values())


async def tier(channel: Channel, kind: Tier) -> TierStats:
    return next(each for each in (await stats(channel)).tiers if each.tier is kind)


async def done(channel: Channel, task: kv_state.StartTask) -> kv_state.TaskStatus:
    """Run a task to its end."""
    status = await channel.call(KvStore.START, task, timeout_s=5)

    async def ended() -> bool:
        nonlocal status
        status = await channel.call(KvStore.GET_TASK, kv_state.TaskRequest(task=status.task), timeout_s=5)
        return status.state is not kv_state.TaskState.RUNNING

    await assert_eventually(ended, 10)
    return status


async def lies_below(channel: Channel, blocks: int) -> bool:
    return (await tier(channel, Tier.DISK)).blocks >= blocks


@pytest.mark.faults
@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_durable_blocks_are_back_after_a_restart(store: StoreProcess, how: str) -> None:
    where, blocks, data = key(), chain(5), content(5)
    async with connected(store) as (_, channel):
        await write(channel, where, blocks, data)
        assert (await tier(channel, Tier.DISK)).blocks == 5
    store.kill() if how == "kill" else store.stop()
    store.start()
    async with connected(store) as (client, channel):
        assert (await stats(channel)).blocks == 0
        reply = await look(channel, where, names(blocks))
        assert (len(reply.blocks), reply.lease, reply.cold_blocks) == (0, None, 5)
        assert 0 < reply.load_s < 1
        reply = await look(channel, where, names(blocks), wait_s=5)
        assert (len(reply.blocks), reply.cold_blocks, reply.load_s) == (5, 0, 0.0)
        assert await read(channel, where, reply) == [bytes(each) for each in data]
        into = buffers(5)
        assert await client.load(await client.lookup(where, names(blocks), owner="o", ttl_s=5), into) == 5
        assert into == data
        assert (await stats(channel)).leases <= 1, "the tiers hold nothing"


async def test_a_node_without_tiers_says_that_it_cannot_make_durable(fresh: StoreProcess) -> None:
    where, blocks = key(), chain(1)
    async with connected(fresh) as (_, channel):
        with pytest.raises(FailedPrecondition, match=r"disk.path"):
            await write(channel, where, blocks, content(1))
        reply = await look(channel, where, names(blocks), wait_s=1)
        assert (len(reply.blocks), reply.cold_blocks) == (0, 0)


async def test_what_eviction_would_take_was_copied_down_before(tmp_path: Path) -> None:
    with store_process(tmp_path, *settings(tmp_path, *FAST)) as process:
        async with connected(process) as (client, channel):
            chains = [(key(), chain(4), content(4)) for _ in range(60)]  # 28 MB through 16 MiB
            for number, (where, blocks, data) in enumerate(chains, start=1):
                held = await put(client, where, blocks, data)
                await held.release()
                await assert_eventually(partial(lies_below, channel, 4 * number - 40), 10)
            assert (await tier(channel, Tier.MEMORY)).blocks < 240
            came = 0
            for where, blocks, data in chains:
                reply = await look(channel, where, names(blocks), wait_s=5)
                if len(reply.blocks) == 4:
                    assert await read(channel, where, reply) == [bytes(each) for each in data]
                    came += 1
            assert came >= len(chains) - 3, "what memory could not hold was below"
            assert (await stats(channel)).quarantined == 0


async def test_a_node_that_is_told_to_stop_keeps_what_it_has(store: StoreProcess) -> None:
    where, blocks, data = key(), chain(5), content(5)
    async with connected(store) as (client, _):
        await (await put(client, where, blocks, data)).release()
    store.stop()
    store.start()
    async with connected(store) as (client, _):
        held = await client.lookup(where, names(blocks), owner="o", ttl_s=5)
        into = buffers(5)
        assert await client.load(held, into) == 5, "a client waits for what comes up"
        assert into == data
        await held.release()


async def test_watchers_hear_what_moved_and_what_came_back(calm: StoreProcess) -> None:
    where, blocks = key(), chain(3)
    async with connected(calm) as (_, channel):
        await write(channel, where, blocks, content(3))
        seen: list[kv_state.KvEventKind] = []

        async def watch() -> None:
            async with channel.stream(KvStore.WATCH, kv_state.WatchKvRequest(), timeout_s=None) as events:
                async for event in events:
                    seen.append(event.kind)

        fields: dict[str, Any] = {
            "tenant": where.tenant, "namespace": where.namespace, "hashes": tuple(names(blocks)),
        }  # fmt: skip
        async with anyio.create_task_group() as tg:
            tg.start_soon(watch)
            await assert_eventually(lambda: len(seen) >= 2)
            seen.clear()
            await done(channel, kv_state.StartTask(kind=kv_state.TaskKind.DEMOTE, **fields))
            await done(channel, kv_state.StartTask(kind=kv_state.TaskKind.PREFETCH, **fields))
            await assert_eventually(lambda: len(seen) >= 2)
            tg.cancel_scope.cancel()
        assert seen == [kv_state.KvEventKind.MOVED, kv_state.KvEventKind.STORED]


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["bit", "truncated", "swapped files"])
async def test_damage_on_disk_is_a_quarantined_miss(store: StoreProcess, tmp_path: Path, damage: str) -> None:
    where, blocks, data = key(), chain(20), content(20)
    async with connected(store) as (_, channel):
        await write(channel, where, blocks, data)
    files = sorted((tmp_path / "tier" / "kv-0").glob("*.kv"))
    assert len(files) >= 2
    if damage == "swapped files":
        store.kill()
        content_of = [path.read_bytes() for path in files[:2]]
        files[0].write_bytes(content_of[1])
        files[1].write_bytes(content_of[0])
    else:
        store.kill()
        if damage == "bit":
            flip_byte(files[0], 3 * 122_880 + 60_000)
        else:
            os.truncate(files[0], 3 * 122_880 + 60_000)
    store.start()
    async with connected(store) as (_, channel):
        reply = await look(channel, where, names(blocks), wait_s=5)
        good = len(reply.blocks)
        assert good == {"bit": 3, "truncated": 3, "swapped files": 0}[damage]
        assert (await stats(channel)).quarantined >= 1
        if good:
            assert await read(channel, where, reply) == [bytes(each) for each in data[:good]]
        await write(channel, where, blocks, data)
        reply = await look(channel, where, names(blocks))
        assert await read(channel, where, reply) == [bytes(each) for each in data]


async def test_prefetch_and_demote_move_chains(calm: StoreProcess) -> None:
    where, blocks, data = key(), chain(6), content(6)
    async with connected(calm) as (_, channel):
        await write(channel, where, blocks, data, AckLevel.LOCAL)
        fields: dict[str, Any] = {
            "tenant": where.tenant, "namespace": where.namespace, "hashes": tuple(names(blocks)),
        }  # fmt: skip
        status = await done(channel, kv_state.StartTask(kind=kv_state.TaskKind.DEMOTE, **fields))
        assert (status.state, status.done) == (kv_state.TaskState.DONE, 6), status.why
        below = (await tier(channel, Tier.DISK)).blocks
        assert below >= 6
        scrub = await done(channel, kv_state.StartTask(kind=kv_state.TaskKind.SCRUB))
        assert scrub.state is kv_state.TaskState.DONE
        assert scrub.done >= below
        assert "0 bad" in scrub.why
        status = await done(channel, kv_state.StartTask(kind=kv_state.TaskKind.PREFETCH, **fields))
        assert (status.state, status.done, status.total) == (kv_state.TaskState.DONE, 6, 6), status.why
        reply = await look(channel, where, names(blocks))
        assert await read(channel, where, reply) == [bytes(each) for each in data]
        everything = kv_state.StartTask(kind=kv_state.TaskKind.DEMOTE, tenant=where.tenant)
        assert (await done(channel, everything)).done >= 6
        assert (await stats(channel)).blocks == 0
        elsewhere = kv_state.StartTask(kind=kv_state.TaskKind.DEMOTE, tier=Tier.REMOTE, **fields)
        assert (await done(channel, elsewhere)).state is kv_state.TaskState.FAILED


async def test_only_what_stands_in_the_same_namespace_and_chain_comes_up(calm: StoreProcess) -> None:
    where, blocks, data = key(), chain(4), content(4)
    async with connected(calm) as (_, channel):
        await write(channel, where, blocks, data)
        demote = kv_state.StartTask(
            kind=kv_state.TaskKind.DEMOTE, tenant=where.tenant, namespace=where.namespace, hashes=tuple(names(blocks))
        )
        assert (await done(channel, demote)).state is kv_state.TaskState.DONE
        other = StoreKey(tenant=where.tenant, namespace=NamespaceId(os.urandom(16)), shape=SHAPE)
        assert (await look(channel, other, names(blocks), wait_s=1)).cold_blocks == 0
        middle = await look(channel, where, names(blocks)[2:], wait_s=1)
        assert len(middle.blocks) == 0, "a block without its parents in memory is not served"
        assert len((await look(channel, where, names(blocks), wait_s=5)).blocks) == 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if not (mount and umount) or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield path
    subprocess.run([str(umount), "--lazy", str(path)], check=True)


@pytest.mark.faults
async def test_a_full_disk_is_told_and_heals_by_itself(tmp_path: Path, small_disk: Path) -> None:
    other = small_disk / "other"
    other.write_bytes(bytes(1_500_000))
    with store_process(tmp_path, f"disk.path={small_disk / 'tier'}", *DISK) as process:
        async with connected(process) as (_, channel):
            where, blocks, data = key(), chain(2), content(2)
            await write(channel, where, blocks, data)
            second, more, much = key(), chain(8), content(8)
            with pytest.raises(Unavailable, match="stored in memory"):
                await write(channel, second, more, much)
            state = await tier(channel, Tier.DISK)
            assert (state.writable, state.why) == (False, "the disk is full")
            reply = await look(channel, second, names(more))
            assert await read(channel, second, reply) == [bytes(each) for each in much], "memory is as it was"
            demote = kv_state.StartTask(
                kind=kv_state.TaskKind.DEMOTE,
                tenant=where.tenant,
                namespace=where.namespace,
                hashes=tuple(names(blocks)),
            )
            assert (await done(channel, demote)).state is kv_state.TaskState.DONE, "what is below already needs no room"
            reply = await look(channel, where, names(blocks), wait_s=5)
            assert await read(channel, where, reply) == [bytes(each) for each in data], "reads go on"
            other.unlink()

            async def writable() -> bool:
                return (await tier(channel, Tier.DISK)).writable

            await assert_eventually(writable, 5)
            await write(channel, second, more, much)


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if REDIS is None:
        pytest.skip("redis-server is not installed")
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


async def test_two_nodes_share_what_an_engine_keeps(tmp_path: Path, redis: RedisServer) -> None:
    where, blocks, data = key(), chain(4), content(4)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    with (
        store_process(one, f"remote.url={redis.url}") as first,
        store_process(two, f"remote.url={redis.url}") as second,
    ):
        async with connected(first) as (_, channel):
            await write(channel, where, blocks, data)
        first.kill()
        async with connected(second) as (_, channel):
            reply = await look(channel, where, names(blocks), wait_s=5)
            assert await read(channel, where, reply) == [bytes(each) for each in data]


@pytest.mark.faults
async def test_an_engine_that_is_away_or_frozen_is_a_miss(tmp_path: Path, redis: RedisServer) -> None:
    where, blocks, data = key(), chain(3), content(3)
    remote = (f"remote.url={redis.url}", "remote.timeout_s=0.3", "remote.lookup_s=0.1", "remote.breaker_open_s=0.3")
    with store_process(tmp_path, *remote) as process:
        async with connected(process) as (client, channel):
            await write(channel, where, blocks, data)
            redis.freeze()
            for _ in range(6):
                reply = await look(channel, key(), names(chain(3)), wait_s=1)
                assert (len(reply.blocks), reply.cold_blocks) == (0, 0)
            other = key()
            held = await put(client, other, chain(2), content(2))
            await held.release()
            assert not (await tier(channel, Tier.REMOTE)).writable
            with pytest.raises(Unavailable):
                await write(channel, key(), chain(1), content(1))
            redis.thaw()

            async def up() -> bool:
                return (await tier(channel, Tier.REMOTE)).writable

            await assert_eventually(up, 5)
            await write(channel, other, chain(2), content(2))
            redis.kill()
            reply = await look(channel, where, names(blocks), wait_s=1)
            assert len(reply.blocks) == 3, "memory answers alone"
            redis.start()
