"""What every transport of blocks owes its caller, against a real node: leases, slowness, cancellation, death."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

from covey.clock import MonotonicClock
from covey.codec.methods import KvStore
from covey.errors import LeaseExpired, Unavailable
from covey.net.kv import KvClient
from covey.net.rpc import Channels
from covey.testing import assert_eventually
from covey.types.block import BlockShape
from covey.types.common import Empty
from covey.types.ids import BlockHash, NamespaceId, TenantId
from covey.types.kv import BlockKey
from covey.types.store import Held, StoreKey

from .kv_stores import StoreProcess, client_of, store_process

SHAPE = BlockShape(size_bytes=8 * 256 * 1024, layers=8)
BLOCKS = 12
TRANSPORTS = ("shm", "grpc", "tcp")


@pytest.fixture(params=TRANSPORTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    with store_process(tmp_path_factory.mktemp("kvstore"), "capacity_bytes=134217728") as process:
        yield process


class Site:
    """A client, and blocks that it has stored."""

    def __init__(self, process: StoreProcess, channels: Channels, kind: str) -> None:
        self.client: KvClient = client_of(process, channels, kind)
        self.key = StoreKey(tenant=TenantId("t"), namespace=NamespaceId(secrets.token_bytes(16)), shape=SHAPE)
        self.names = [BlockHash(secrets.token_bytes(16)) for _ in range(BLOCKS)]
        self.data = [memoryview(os.urandom(SHAPE.size_bytes)) for _ in self.names]
        self.into = [memoryview(bytearray(SHAPE.size_bytes)) for _ in self.names]
        self._channel = channels.to(process.address)

    async def fill(self) -> None:
        parents = [BlockHash(b""), *self.names]
        blocks = [BlockKey(hash=name, parent=parents[i]) for i, name in enumerate(self.names)]
        held = await self.client.store(self.key, blocks, self.data, owner="writer", ttl_s=20.0)
        await held.release()

    async def lease(self, ttl_s: float = 20.0) -> Held:
        held = await self.client.lookup(self.key, self.names, owner="reader", ttl_s=ttl_s)
        assert len(held.hashes) == BLOCKS
        return held

    async def is_free(self) -> bool:
        return (await self._channel.call(KvStore.STATS, Empty(), timeout_s=5)).leases == 0


@asynccontextmanager
async def site(process: StoreProcess, kind: str) -> AsyncIterator[Site]:
    async with Channels.open() as channels:
        it = Site(process, channels, kind)
        await it.fill()
        yield it


async def test_a_slow_reader_keeps_its_lease_by_progress(kind: str, process: StoreProcess) -> None:
    async with site(process, kind) as it:
        held = await it.lease(ttl_s=0.6)
        assert await it.client.load(held, it.into, ready=lambda _: compute(0.15)) == BLOCKS
        assert it.into == it.data, "it took twice its lease's time, and was let"
        await held.release()


async def test_a_stalled_reader_loses_its_lease_by_type(kind: str, process: StoreProcess) -> None:
    async with site(process, kind) as it:
        held = await it.lease(ttl_s=0.3)
        with pytest.raises(LeaseExpired):
            await it.client.load(held, it.into, ready=lambda _: compute(0.5))
        await held.release()
        again = await it.lease()
        assert await it.client.load(again, it.into) == BLOCKS, "the client is as good as before"
        await again.release()
        await assert_eventually(it.is_free, 3.0)


async def test_a_cancelled_read_frees_buffers_and_lease_at_once(kind: str, process: StoreProcess) -> None:
    async with site(process, kind) as it:
        sockets = await to_thread.run_sync(_sockets, process.pid)
        for _ in range(3):
            held = await it.lease()
            with anyio.CancelScope() as scope:
                await it.client.load(held, it.into, ready=lambda _, scope=scope: scope.cancel())  # type: ignore[misc]
            assert scope.cancelled_caught
            await held.release()
        assert await it.is_free()
        for view in it.into:
            view.release()  # nobody else looks at it any more, or this raised
        it.into = [memoryview(bytearray(SHAPE.size_bytes)) for _ in it.names]
        held = await it.lease()
        assert await it.client.load(held, it.into) == BLOCKS
        await held.release()

        async def closed() -> bool:
            return await to_thread.run_sync(_sockets, process.pid) <= sockets + 1

        await assert_eventually(closed, 3.0)


@pytest.mark.parametrize("kind", ["grpc", "tcp"])
async def test_a_read_from_a_frozen_node_is_cancelled_at_once(kind: str, tmp_path: Path) -> None:
    clock = MonotonicClock()
    with store_process(tmp_path, "capacity_bytes=67108864") as process:
        async with site(process, kind) as it:
            held = await it.lease()
            assert await it.client.load(held, it.into) == BLOCKS
            os.kill(process.pid, signal.SIGSTOP)
            try:
                began = clock.now()
                with anyio.move_on_after(0.2):
                    await it.client.load(held, it.into)
                assert clock.now() - began < 1.5
            finally:
                os.kill(process.pid, signal.SIGCONT)


async def test_a_node_that_dies_in_the_middle_ends_a_read_and_a_write(kind: str, tmp_path: Path) -> None:
    with store_process(tmp_path, "capacity_bytes=67108864") as process:
        async with site(process, kind) as it:
            held = await it.lease()
            with anyio.fail_after(15.0):
                good = await it.client.load(held, it.into, ready=lambda _: os.kill(process.pid, signal.SIGKILL))
                assert it.into[:good] == it.data[:good], "what is called good is good"
                await held.release()
                with pytest.raises(Unavailable):
                    await it.fill()


def compute(seconds: float) -> None:
    """Keep the event loop busy, as a decoder does."""
    clock = MonotonicClock()
    until = clock.now() + seconds
    while clock.now() < until:
        pass


def _sockets(pid: int) -> int:
    return sum(str(entry.readlink()).startswith("socket:") for entry in Path(f"/proc/{pid}/fd").iterdir())
