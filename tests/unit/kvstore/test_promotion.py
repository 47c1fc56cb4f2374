"""Blocks on their way up: one flight each, parents first, nobody's deadline ends another's; an engine that is away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anyio
import pytest

from covey.clock import MonotonicClock
from covey.errors import NoSpace, Unavailable
from covey.policy.disk_record import Record, pack
from covey.testing import VirtualClock, virtual_time
from covey.types.ids import BlockHash, NamespaceId
from services.kvstore.tiers.promotion import Promotion
from services.kvstore.tiers.remote import RemoteLimits, RemoteTier
from tests.support.records import names, new_chain, new_namespace

NS = new_namespace()


class Lower:
    """Records that take a while to read, and a memory that takes them in order."""

    def __init__(self, records: Sequence[Record], *, delay_s: float = 0.01, room: int = 1000) -> None:
        self.records = {record.hash: record for record in records}
        self.delay_s = delay_s
        self.room = room
        self.reads: list[BlockHash] = []
        self.memory: list[BlockHash] = []

    async def read(self, namespace: NamespaceId, name: BlockHash) -> Record | None:
        self.reads.append(name)
        await anyio.sleep(self.delay_s)
        return self.records.get(name)

    async def take_in(self, records: Sequence[Record]) -> int:
        for record in records:
            assert not record.parent or record.parent in self.memory, "a child before its parent"
            if len(self.memory) >= self.room:
                raise NoSpace("full")
            self.memory.append(record.hash)
        return len(records)


@virtual_time
async def test_many_that_wait_for_the_same_blocks_read_them_once() -> None:
    chain = new_chain(20, NS)
    lower = Lower(chain)
    results: list[int] = []
    async with anyio.create_task_group() as tg:
        promotion = Promotion(tg, lower.read, lower.take_in)

        async def ask(count: int) -> None:
            results.append(await promotion.bring_up(NS, names(chain)[:count]))

        async with anyio.create_task_group() as askers:
            for count in (20, 20, 5, 12, 20):
                askers.start_soon(ask, count)
        assert promotion.in_flight == 0
        assert promotion.promoted == 20
    assert sorted(results) == [5, 12, 20, 20, 20]
    assert sorted(lower.reads) == sorted(names(chain))
    assert lower.memory == names(chain)


@virtual_time
async def test_whoever_gives_up_ends_nothing_for_the_others() -> None:
    chain = new_chain(16, NS)
    lower = Lower(chain, delay_s=1.0)
    async with anyio.create_task_group() as tg:
        promotion = Promotion(tg, lower.read, lower.take_in)
        with anyio.move_on_after(0.5) as hasty:
            await promotion.bring_up(NS, names(chain))
        assert hasty.cancelled_caught
        assert await promotion.bring_up(NS, names(chain)) == 16
    assert len(lower.reads) == 16


@virtual_time
async def test_a_gap_a_foreign_parent_or_a_full_memory_ends_a_flight_there() -> None:
    chain = new_chain(12, NS)
    for spoil, expected in (("gap", 5), ("foreign", 5), ("full", 0)):
        lower = Lower(chain, room=3 if spoil == "full" else 1000)
        if spoil == "gap":
            del lower.records[chain[5].hash]
        elif spoil == "foreign":
            lower.records[chain[5].hash] = new_chain(1, NS, parent=BlockHash(b"x" * 16))[0]
        async with anyio.create_task_group() as tg:
            promotion = Promotion(tg, lower.read, lower.take_in)
            assert await promotion.bring_up(NS, names(chain)) == expected, spoil
            assert promotion.in_flight == 0


class Fickle:
    """An engine in memory that can be made to fail, or to answer late."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.calls = 0
        self.delay_s = 0.0
        self.is_down = False

    async def _answer(self) -> None:
        self.calls += 1
        await anyio.sleep(self.delay_s)
        if self.is_down:
            raise Unavailable("down")

    async def put(self, items: Mapping[str, bytes]) -> None:
        await self._answer()
        self.values.update(items)

    async def get(self, key: str) -> bytes | None:
        await self._answer()
        return self.values.get(key)

    async def has(self, keys: Sequence[str]) -> list[bool]:
        await self._answer()
        return [key in self.values for key in keys]

    async def delete(self, keys: Sequence[str]) -> int:
        await self._answer()
        return sum(self.values.pop(key, None) is not None for key in keys)


@pytest.mark.parametrize("how", ["down", "late"])
@virtual_time
async def test_an_engine_that_fails_is_left_alone_and_probed(how: str) -> None:
    engine, clock = Fickle(), VirtualClock()
    limits = RemoteLimits(timeout_s=1.0, lookup_s=0.1, breaker_failures=3, breaker_open_s=5.0)
    tier = RemoteTier(engine, limits=limits, clock=clock)
    chain = new_chain(3, NS)
    assert await tier.put(chain, durable=True) == 3
    engine.is_down, engine.delay_s = how == "down", 60.0 if how == "late" else 0.0
    for _ in range(10):
        started = clock.now()
        assert await tier.prefix(NS, names(chain)) == 0
        assert clock.now() - started <= 0.1 + 1e-6, "a look-up takes no longer than it may"
    assert not tier.stats().writable
    asked = engine.calls
    assert await tier.get(NS, chain[0].hash) is None
    assert await tier.put(new_chain(1, NS), durable=True) == 0
    assert engine.calls == asked, "nobody asks it while the breaker is open"
    assert tier.counts.failed == 3
    engine.is_down, engine.delay_s = False, 0.0
    await anyio.sleep(5.1)
    await tier.heal()
    assert tier.stats().writable
    assert await tier.prefix(NS, names(chain)) == 3


async def test_look_ups_ask_in_batches_and_stop_at_the_first_gap() -> None:
    engine = Fickle()
    tier = RemoteTier(engine, limits=RemoteLimits(lookup_s=5.0), clock=MonotonicClock())
    chain = new_chain(100, NS)
    await tier.put(chain, durable=False)
    engine.calls = 0
    assert await tier.prefix(NS, names(chain)) == 100
    assert engine.calls == 3, "16, 32 and the rest"
    engine.values.pop(f"{NS.hex()}/{chain[10].hash.hex()}")
    engine.calls = 0
    assert await tier.prefix(NS, names(chain)) == 10
    assert engine.calls == 1


async def test_what_went_to_an_engine_is_not_sent_again() -> None:
    engine = Fickle()
    tier = RemoteTier(engine, limits=RemoteLimits(), clock=MonotonicClock())
    chain = new_chain(3, NS)
    await tier.put(chain, durable=False)
    assert all(tier.knows(NS, each.hash) for each in chain)
    assert await tier.put(chain, durable=True) == 3
    assert tier.counts.puts == 3
    engine.values[f"{NS.hex()}/{chain[1].hash.hex()}"] = pack(chain[0])
    assert await tier.get(NS, chain[1].hash) is None
    assert not tier.knows(NS, chain[1].hash)
    assert tier.counts.quarantined == 1
    assert await tier.put(chain, durable=True) == 3, "the bad one was taken out and comes again"
