"""A kvstore in a mesh: found through the registry, its blocks known through events."""

from __future__ import annotations

from pathlib import Path
from random import Random

import anyio

from covey.clock import MonotonicClock
from covey.net.embedded import EmbeddedNats
from covey.net.kv import KvClient, nodes_of
from covey.net.kv_events import KvEventIndex
from covey.net.nats import NatsBus
from covey.net.registry import Registry
from covey.net.rpc import Channels
from covey.testing import assert_eventually
from covey.types.generate import Role
from covey.types.ids import WorkerId
from covey.types.kv_state import KvSnapshot
from tests.contract.kv_stores import BOOT_ID, StoreProcess
from tests.contract.test_block_store import buffers, chain, content, find, key, names, put
from tests.support.kv_state import snapshot

KV_0 = WorkerId("kv-0")


async def test_a_store_is_found_through_the_registry_and_its_blocks_through_events(tmp_path: Path) -> None:
    clock = MonotonicClock()
    async with (
        EmbeddedNats.start(tmp_path / "nats") as nats,
        NatsBus.open(nats.url, token=nats.token, name="test", rng=Random(1)) as bus,
        Registry.open(bus, clock=clock) as registry,
        Channels.open() as channels,
    ):
        process = StoreProcess(tmp_path, f"nats={nats.url}", f"nats_token_file={nats.token_file}")
        await anyio.to_thread.run_sync(process.start)
        try:
            await registry.until(lambda r: r.workers(Role.KVSTORE), timeout_s=20)
            (view,) = registry.workers(Role.KVSTORE)
            assert view.record.store is not None
            assert view.record.store.arena_path == str(process.arena)

            async def whole(worker: WorkerId) -> KvSnapshot:
                assert worker == KV_0
                return await snapshot(channels.to(view.record.address))

            client = KvClient(nodes_of(registry), channels, clock=clock, boot_id=BOOT_ID)
            where, blocks = key(), chain(3)
            data = content(3)
            async with KvEventIndex.open(bus, whole) as index:
                await put(client, where, blocks, data)
                await assert_eventually(lambda: index.overlap(where.namespace, names(blocks)) == {KV_0: 3})
                assert index.gaps == 0
            into = buffers(3)
            assert await client.load(await find(client, where, blocks), into) == 3
            assert into == data
            async with KvEventIndex.open(bus, whole) as late:
                await put(client, where, chain(1), content(1))
                await assert_eventually(lambda: late.overlap(where.namespace, names(blocks)) == {KV_0: 3})
        finally:
            assert await anyio.to_thread.run_sync(process.stop) == 0
        await assert_eventually(lambda: not registry.workers(Role.KVSTORE), 10.0)
        assert (await find(client, where, blocks)).hashes == ()
        assert list(process.arena_dir.glob("*.arena")) == []
