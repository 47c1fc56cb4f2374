"""The agreed ring: one version at a time wins, everybody adopts the newest, it outlives NATS."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import anyio

from covey.clock import MonotonicClock
from covey.codec import decode
from covey.net.kv.agreed import BUCKET, KEY, AgreedRing
from covey.net.memory import MemoryBroker
from covey.net.nats import NatsBus
from covey.testing import VirtualClock, assert_eventually, virtual_time
from covey.types.ids import WorkerId
from covey.types.kv_state import RingMember, RingVersion
from tests.support.nats import NatsServer

A, B = (RingMember(worker=WorkerId(name), epoch=1, host=f"host-{name}", capacity_bytes=1 << 20) for name in "ab")


async def _propose(ring: AgreedRing, *members: RingMember, proposer: str = "a") -> bool:
    return await ring.propose(members, replicas=2, proposer=WorkerId(proposer))


def _version(ring: AgreedRing) -> int:
    return ring.current.version if ring.current is not None else 0


async def test_one_of_two_proposals_wins_and_everybody_adopts_it_also_after_a_restart_of_nats(tmp_path: Path) -> None:
    clock = MonotonicClock()

    def bus() -> AbstractAsyncContextManager[NatsBus]:
        return NatsBus.open(server.url, token=server.token)

    async with NatsServer(tmp_path) as server, bus() as one, bus() as two, bus() as three:
        async with (
            AgreedRing.open(one, clock=clock) as first,
            AgreedRing.open(two, clock=clock) as second,
            AgreedRing.open(three, clock=clock) as reader,
        ):
            results = []

            async def propose(ring: AgreedRing, member: RingMember) -> None:
                results.append(await _propose(ring, member, proposer=member.worker))

            async with anyio.create_task_group() as tg:
                tg.start_soon(propose, first, A)
                tg.start_soon(propose, second, B)
            assert sorted(results) == [False, True]
            await assert_eventually(lambda: _version(first) == _version(second) == _version(reader) == 1)
            assert first.current == second.current == reader.current
            await server.kill()
            await assert_eventually(lambda: not one.connected and not two.connected and not three.connected)
            assert not await _propose(first, A, B)
            assert _version(first) == 1, "the last known ring stays in force"
            await server.start()
            for each in (one, two, three):
                with anyio.fail_after(10):
                    await each.until_connected()
            async with bus() as four, AgreedRing.open(four, clock=clock) as late:
                await assert_eventually(lambda: late.current == first.current, timeout_s=8)
                assert await _propose(second, A, B, proposer="b")
                await assert_eventually(lambda: _version(first) == _version(reader) == _version(late) == 2)


@virtual_time
async def test_what_is_malformed_is_not_adopted_and_is_replaced() -> None:
    broker = MemoryBroker()
    async with broker.bus() as bus, AgreedRing.open(bus, clock=VirtualClock()) as ring:
        assert await _propose(ring, A)
        bucket = await bus.kv(BUCKET)
        await bucket.put(KEY, b"\xff\xff")
        await anyio.sleep(10)
        assert ring.rejected >= 1
        assert _version(ring) == 1
        found = await bucket.get(KEY)
        assert found is not None
        assert decode(RingVersion, found.value) == ring.current


@virtual_time
async def test_of_two_rings_of_one_number_everybody_takes_the_same() -> None:
    """An acknowledged version that died with NATS's memory meets another one of its number."""
    broker = MemoryBroker()
    async with broker.bus() as one, broker.bus() as two:
        async with (
            AgreedRing.open(one, clock=VirtualClock()) as first,
            AgreedRing.open(two, clock=VirtualClock()) as second,
        ):
            two.disconnect()
            assert await _propose(first, A, proposer="a")
            broker.stop()
            one.disconnect()
            broker.running = True
            two.reconnect()
            assert await _propose(second, B, proposer="b")
            one.reconnect()
            with anyio.fail_after(30):
                while first.current != second.current:
                    await anyio.sleep(0.5)
            assert first.current is not None
            assert first.current.members == (B,)


@virtual_time
async def test_versions_go_on_after_all_nodes_and_nats_started_anew_if_one_client_remembers() -> None:
    broker = MemoryBroker()
    async with broker.bus() as one, AgreedRing.open(one, clock=VirtualClock()) as client:
        async with broker.bus() as two, AgreedRing.open(two, clock=VirtualClock()) as node:
            assert await _propose(node, A)
            assert await _propose(node, A, B)
            await anyio.sleep(1)
            assert _version(client) == 2
        broker.stop()
        broker.running = True
        async with broker.bus() as three, AgreedRing.open(three, clock=VirtualClock()) as new:
            assert await _propose(new, B)
            one.reconnect()
            await anyio.sleep(10)
            assert new.current == client.current
            assert _version(new) == 2, "the older knowledge has the larger number"
            assert await _propose(new, B)
            await anyio.sleep(1)
            assert _version(client) == 3
