"""Holders of a kvstore's blocks die, stall or are slow: their rights end by themselves, and others go on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from covey.clock import MonotonicClock
from covey.codec.methods import KvStore
from covey.errors import Fenced, LeaseExpired
from covey.failpoint import CRASH_EXIT_CODE
from covey.net.kv import KvClient, KvClientConfig, StoreNode
from covey.net.kv.held import StoreHeld
from covey.net.rpc import Channel, Channels
from covey.testing import assert_eventually
from covey.types.block import BlockShape
from covey.types.common import Empty
from covey.types.ids import WorkerId
from covey.types.kv import GetRequest, LeaseRequest, RenewRequest
from covey.types.kv_state import StoreStats
from tests.contract.kv_stores import BOOT_ID, CAPACITY_BYTES, COOLING_S, StoreProcess, store_process
from tests.support import kv_holder
from tests.support.detour import Detour
from tests.support.kv_mesh import chain_of
from tests.support.proxy import Fault, proxy_to

pytestmark = [pytest.mark.faults, pytest.mark.timeout(60)]

TTL_S = 1.5
CLOCK = MonotonicClock()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[StoreProcess]:
    with store_process(tmp_path) as process:
        yield process


@pytest.fixture
def large(tmp_path: Path) -> Iterator[StoreProcess]:
    with store_process(tmp_path, "capacity_bytes=67108864") as process:
        yield process


@asynccontextmanager
async def client_at(address: str, transport: Any = "auto", **config: Any) -> AsyncIterator[tuple[KvClient, Channel]]:
    node = StoreNode(worker=WorkerId("kv-0"), address=address, capacity_bytes=CAPACITY_BYTES)
    settings = KvClientConfig(transport=transport, **config)
    async with Channels.open() as channels:
        client = KvClient(lambda: [node], channels, clock=CLOCK, boot_id=BOOT_ID, config=settings)
        yield client, channels.to(address)


async def _stats(channel: Channel) -> StoreStats:
    return await channel.call(KvStore.STATS, Empty(), timeout_s=5)


def _holder(process: StoreProcess, what: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.support.kv_holder", process.address, what, str(TTL_S)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def _crashed_writer(process: StoreProcess) -> int:
    with _holder(process, "write") as writer:
        return writer.wait(30)


def _killed_holder(process: StoreProcess, what: str) -> None:
    """Have something held by a process that is killed then."""
    with _holder(process, what) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        holder.kill()


async def test_a_writer_that_dies_between_reserve_and_commit_is_replaced_by_the_next(process: StoreProcess) -> None:
    async with client_at(process.address) as (client, channel):
        assert await to_thread.run_sync(_crashed_writer, process) == CRASH_EXIT_CODE
        died_at = CLOCK.now()
        assert (await _stats(channel)).reserved_blocks == 4
        chain = kv_holder.chain()
        assert await chain.read(client) == 0, "what was not committed is not seen"
        await chain.put(client)  # waits for the dead writer's lease, no longer
        assert CLOCK.now() - died_at < TTL_S + 1
        assert await chain.read(client) == 4

        async def clean() -> bool:
            now = await _stats(channel)
            return (now.reserved_blocks, now.leases, now.blocks) == (0, 0, 4)

        await assert_eventually(clean, timeout_s=COOLING_S + 3)


@pytest.mark.parametrize("what", ["read", "hard", "soft"])
async def test_what_a_killed_holder_held_is_free_within_its_lease_and_a_second(
    what: str, process: StoreProcess
) -> None:
    async with client_at(process.address) as (client, channel):
        await kv_holder.chain().put(client)
        await to_thread.run_sync(_killed_holder, process, what)
        died_at = CLOCK.now()
        now = await _stats(channel)
        assert (now.pinned_bytes > 0) is (what != "read")
        assert now.leased_blocks == 4

        async def free() -> bool:
            now = await _stats(channel)
            return now.pinned_bytes == now.leased_blocks == now.leases == 0

        await assert_eventually(free, timeout_s=TTL_S + 1)
        assert CLOCK.now() - died_at < TTL_S + 1


async def test_an_old_epoch_renews_and_releases_nothing(process: StoreProcess) -> None:
    async with client_at(process.address) as (client, channel):
        chain = kv_holder.chain()
        await chain.put(client)
        held = await chain.find(client)
        assert isinstance(held, StoreHeld)
        grant, tenant = held.grant, chain.key.tenant
        with pytest.raises(Fenced):
            await channel.call(
                KvStore.RENEW,
                RenewRequest(tenant=tenant, lease=grant.lease, epoch=grant.epoch - 1, done=1, ttl_s=60),
                timeout_s=5,
            )
        with pytest.raises(Fenced):
            await channel.call(
                KvStore.RELEASE, LeaseRequest(tenant=tenant, lease=grant.lease, epoch=grant.epoch - 1), timeout_s=5
            )
        assert (await _stats(channel)).leases == 1
        assert await client.load(held, chain.buffers()) == 4


async def test_a_slow_reader_that_makes_progress_keeps_its_lease_and_holds_nobody_up(process: StoreProcess) -> None:
    shape = BlockShape(size_bytes=4 * 65_536, layers=4)
    async with client_at(process.address) as (quick, channel):
        bulk = (await channel.call(KvStore.INFO, Empty(), timeout_s=5)).bulk_address
        async with proxy_to(bulk) as proxy, Channels.open() as channels:
            source: Any = Detour(channels, proxy.address)
            node = StoreNode(worker=WorkerId("kv-0"), address=process.address, capacity_bytes=CAPACITY_BYTES)
            settings = KvClientConfig(transport="tcp")
            slow = KvClient(lambda: [node], source, clock=CLOCK, boot_id=BOOT_ID, config=settings)
            long, other = chain_of(12, shape), chain_of(4)
            await long.put(quick)
            await other.put(quick)
            assert await other.read(slow) == 4
            proxy.fault = Fault(bytes_per_s=1_000_000)
            took, began = [], CLOCK.now()

            async def read_slowly() -> None:
                held = await long.find(slow, ttl_s=TTL_S)
                into = long.buffers()
                assert await slow.load(held, into) == 12
                assert into == long.data
                await held.release()
                tg.cancel_scope.cancel()

            async with anyio.create_task_group() as tg:
                tg.start_soon(read_slowly)
                while True:
                    at = CLOCK.now()
                    assert await other.read(quick) == 4
                    took.append(CLOCK.now() - at)
                    await anyio.sleep(0.02)
            assert CLOCK.now() - began > 2 * TTL_S, "too quick to outlive its first lease"
            assert sorted(took)[len(took) * 9 // 10] < 0.5


async def test_a_reader_that_stalls_loses_its_lease_and_never_sees_what_comes_after(large: StoreProcess) -> None:
    """The slots of a stalled reader are used again: what it then reads is refused, or what it asked for."""
    shape = BlockShape(size_bytes=1 << 20, layers=4)
    async with client_at(large.address) as (client, channel):
        chain = chain_of(56, shape)  # more than any window of flow control
        await chain.put(client)
        held = await chain.find(client, ttl_s=0.5)
        assert isinstance(held, StoreHeld)
        request = GetRequest(tenant=chain.key.tenant, lease=held.grant.lease, hashes=tuple(chain.names))
        seen: dict[bytes, bytearray] = {}
        with pytest.raises(LeaseExpired):
            async with channel.stream(KvStore.GET, request, timeout_s=20) as chunks:
                async for chunk in chunks:
                    seen.setdefault(chunk.hash, bytearray()).extend(chunk.data)
                    if len(seen) == 1:
                        await assert_eventually(lambda: _is_free(channel), timeout_s=5)
                        for _ in range(4):  # new blocks over most of the arena
                            await chain_of(12, shape).put(client)
        complete = {bytes(name): bytes(data) for name, data in seen.items() if len(data) == shape.size_bytes}
        asked = {bytes(name): bytes(data) for name, data in zip(chain.names, chain.data, strict=True)}
        assert all(asked[name] == data for name, data in complete.items())
        with pytest.raises(LeaseExpired):
            await client.load(held, chain.buffers())


async def _is_free(channel: Channel) -> bool:
    return (await _stats(channel)).leases == 0
