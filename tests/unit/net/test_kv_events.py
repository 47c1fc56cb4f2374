"""KV events: numbers without gaps, and an index that equals what workers hold whatever gets lost on the way."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.errors import Unavailable
from covey.net.kv_events import KvEventIndex, KvEventPublisher
from covey.net.kv_holders import BlockHolders
from covey.net.memory import Faults, MemoryBroker
from covey.net.nats import NatsBus
from covey.testing import assert_eventually, virtual_time
from covey.types.generate import Role
from covey.types.ids import BlockHash, NamespaceId, WorkerId
from covey.types.kv_state import KvEventKind, KvSnapshot, KvSnapshotEntry
from tests.support.nats import NatsServer

SPACE = NamespaceId(b"n" * 16)
W = WorkerId("w1")


def block(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


class Owner:
    """A worker's store with its publisher; answers snapshots truthfully."""

    def __init__(self, publisher: KvEventPublisher) -> None:
        self.publisher = publisher
        self.held: set[BlockHash] = set()
        self.snapshots = 0
        self.reachable = True

    async def store(self, *numbers: int) -> None:
        self.held |= {block(n) for n in numbers}
        await self.publisher.publish(KvEventKind.STORED, SPACE, [block(n) for n in numbers])

    async def evict(self, *numbers: int) -> None:
        self.held -= {block(n) for n in numbers}
        await self.publisher.publish(KvEventKind.EVICTED, SPACE, [block(n) for n in numbers])

    async def snapshot(self, worker: WorkerId) -> KvSnapshot:
        assert worker == W
        if not self.reachable:
            raise Unavailable("no")
        self.snapshots += 1
        taken = KvSnapshot(
            epoch=self.publisher.epoch,
            seq=self.publisher.seq,
            worker=W,
            entries=(KvSnapshotEntry(namespace=SPACE, hashes=tuple(self.held)),),
        )
        await anyio.sleep(0.05)  # events go on while it travels
        return taken


def known(index: KvEventIndex) -> set[BlockHash]:
    index.blocks.check()
    return {hash_ for _, hash_ in index.blocks.blocks(W)}


async def test_events_over_nats_build_the_index(tmp_path: Path) -> None:
    async with (
        NatsServer(tmp_path) as server,
        NatsBus.open(server.url, token=server.token) as there,
        NatsBus.open(server.url, token=server.token) as here,
    ):
        owner = Owner(KvEventPublisher(there, role=Role.DECODE, worker=W, epoch=1))
        async with KvEventIndex.open(here, owner.snapshot, role=Role.DECODE) as index:
            await owner.store(1, 2, 3)
            await owner.evict(2)
            await owner.store(*range(10, 6000))
            await assert_eventually(lambda: known(index) == owner.held)
            assert index.holders(SPACE, block(1)) == {W}
            assert index.overlap(SPACE, [block(1), block(2), block(3)]) == {W: 1}
            assert (owner.snapshots, index.gaps) == (0, 0)
            await server.kill()
            await assert_eventually(lambda: not there.connected)
            await owner.store(7000)
            assert owner.publisher.lost == 1
            await server.start()
            with anyio.fail_after(10):
                await there.until_connected()
                await here.until_connected()
            await owner.store(7001)
            await assert_eventually(lambda: known(index) == owner.held)
            assert (owner.snapshots, index.gaps) == (1, 1)


@pytest.mark.parametrize("seed", range(20))
def test_losses_and_delays_end_in_the_truth(seed: int) -> None:
    @virtual_time
    async def run() -> None:
        broker = MemoryBroker(seed=seed, faults=Faults(drop=0.2, delay=0.2, delay_s=0.1))
        async with broker.bus() as bus:
            owner = Owner(KvEventPublisher(bus, role=Role.DECODE, worker=W, epoch=1))
            async with KvEventIndex.open(bus, owner.snapshot) as index:
                for i in range(200):
                    await owner.store(i, i + 1000)
                    if i % 3 == 0:
                        await owner.evict(i)
                broker.faults = Faults()
                await owner.store(5000)
                await anyio.sleep(5)
                assert known(index) == owner.held
                assert index.gaps > 0
                # A new process of the same name starts empty and counts from one.
                reborn = Owner(KvEventPublisher(bus, role=Role.DECODE, worker=W, epoch=2))
                await reborn.store(1)
                await anyio.sleep(1)
                assert known(index) == {block(1)}

    run()


@virtual_time
async def test_an_unreachable_owner_is_asked_again_but_not_in_a_loop() -> None:
    broker = MemoryBroker()
    async with broker.bus() as bus:
        owner = Owner(KvEventPublisher(bus, role=Role.DECODE, worker=W, epoch=1))
        await owner.store(1)
        owner.reachable = False
        async with KvEventIndex.open(bus, owner.snapshot) as index:
            await owner.store(2)
            await anyio.sleep(10)
            assert known(index) == {block(2)}
            owner.reachable = True
            await anyio.sleep(2)
            assert known(index) == owner.held
            assert owner.snapshots == 1


@virtual_time
async def test_watching_a_new_worker_and_forgetting_an_old_one() -> None:
    broker = MemoryBroker()
    async with broker.bus() as bus:
        owner = Owner(KvEventPublisher(bus, role=Role.DECODE, worker=W, epoch=1))
        await owner.store(1, 2)
        async with KvEventIndex.open(bus, owner.snapshot) as index:
            index.watch(W)
            await anyio.sleep(1)
            assert known(index) == owner.held
            index.forget(W)
            assert known(index) == set()


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "clear"]), st.integers(0, 3), st.integers(0, 9))))
def test_holders_keep_both_directions_and_their_bound(steps: list[tuple[str, int, int]]) -> None:
    holders = BlockHolders(entries_max=12)
    for action, worker, number in steps:
        name, entry = WorkerId(f"w{worker}"), (SPACE, block(number))
        if action == "add":
            holders.add(name, entry)
        elif action == "remove":
            holders.remove(name, entry)
        else:
            holders.clear(name)
        holders.check()
    assert len(holders) <= 12
