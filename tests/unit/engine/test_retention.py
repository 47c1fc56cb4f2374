"""What becomes of blocks after their request: grace, retain, demote, drop; and what the prefix cache reports."""

from __future__ import annotations

import anyio
import pytest

from covey.engine.fake import FakeRunner
from covey.engine.limits import EngineLimits
from covey.errors import LeaseExpired
from covey.policy.prefix_cache import BlockChanges, CacheKey
from covey.testing import assert_eventually
from covey.types.generate import Afterwards, RetainRequest
from tests.support.engines import Shelf, assert_idle, collect, request_of, running_engine

PROMPT = tuple(range(1, 30))


async def test_after_the_grace_blocks_are_demoted_and_unpinned() -> None:
    shelf = Shelf()
    async with running_engine(store=shelf, limits=EngineLimits(grace_s=0.1)) as engine:
        answer = await collect(engine, request_of(PROMPT, max_tokens=12))
        assert answer.last.lease is not None
        await assert_eventually(lambda: engine.load().pinned_blocks == 5)
        await assert_idle(engine)
        assert shelf.stats.blocks == 5
        assert shelf.stats.leases == 0
        with pytest.raises(LeaseExpired):
            await engine.retain(RetainRequest(lease=answer.last.lease, ttl_s=1))


async def test_retained_blocks_survive_pressure_until_their_time_is_up() -> None:
    shelf, runner = Shelf(), FakeRunner(n_blocks=16, context_limit=96)
    async with running_engine(runner, store=shelf, limits=EngineLimits(grace_s=0.2)) as engine:
        answer = await collect(engine, request_of(PROMPT, max_tokens=12))
        reply = await engine.retain(RetainRequest(lease=answer.last.lease, ttl_s=1.0, then=Afterwards.DROP))
        assert (reply.blocks, reply.ttl_s) == (5, 1.0)
        assert reply.size_bytes == 5 * runner.info.block_bytes
        for index in range(4):  # more than the pool holds beside the pin
            await collect(engine, request_of(tuple(range(40 + index, 110 + index)), request_id=f"x{index}"))
        next_turn = (*PROMPT, *answer.ids, 7, 8, 9)
        again = await collect(engine, request_of(next_turn, request_id="next"))
        assert again.last.usage.cached_tokens == 40
        await assert_idle(engine)


@pytest.mark.parametrize("then", list(Afterwards))
async def test_what_follows_a_retained_time(then: Afterwards) -> None:
    shelf = Shelf()
    async with running_engine(store=shelf, limits=EngineLimits(grace_s=5.0)) as engine:
        answer = await collect(engine, request_of(PROMPT, max_tokens=12))
        await engine.retain(RetainRequest(lease=answer.last.lease, ttl_s=0.1, then=then))
        await assert_idle(engine)
        assert shelf.stats.blocks == (5 if then is Afterwards.DEMOTE else 0)


async def test_a_dead_store_keeps_nothing_pinned() -> None:
    shelf = Shelf()
    shelf.is_down = True
    async with running_engine(store=shelf, limits=EngineLimits(grace_s=0.05)) as engine:
        await collect(engine, request_of(PROMPT))
        await assert_idle(engine)
        assert engine.board.lost_demotions == 1


async def test_pins_never_hold_more_than_their_share() -> None:
    runner = FakeRunner(n_blocks=20, context_limit=96)
    async with running_engine(runner, limits=EngineLimits(grace_s=60.0)) as engine:
        for index in range(6):
            await collect(engine, request_of(tuple(range(index * 30 + 1, index * 30 + 30)), request_id=str(index)))
            await assert_eventually(lambda: engine.load().running == 0)
            assert engine.load().pinned_blocks <= 10
        engine.check()


async def test_a_pin_gives_way_when_nothing_else_would_make_room() -> None:
    shelf, runner = Shelf(), FakeRunner(n_blocks=12, context_limit=96)
    async with running_engine(runner, store=shelf) as engine:
        answer = await collect(engine, request_of(PROMPT, max_tokens=12))
        await engine.retain(RetainRequest(lease=answer.last.lease, ttl_s=60))
        large = await collect(engine, request_of(tuple(range(40, 110)), request_id="large", max_tokens=20))
        assert len(large.ids) == 20
        assert shelf.stats.blocks >= 5  # demoted, not lost
        await assert_idle(engine)


async def test_stopping_demotes_what_is_pinned() -> None:
    shelf = Shelf()
    async with running_engine(store=shelf, limits=EngineLimits(grace_s=60.0)) as engine:
        await collect(engine, request_of(PROMPT, max_tokens=12))
        assert shelf.stats.blocks == 0
    assert shelf.stats.blocks == 5


async def test_changes_add_up_to_the_snapshot() -> None:
    known: set[CacheKey] = set()

    def note(changes: BlockChanges) -> None:
        assert not known & set(changes.stored)
        assert known >= set(changes.evicted)
        known.update(changes.stored)
        known.difference_update(changes.evicted)

    runner = FakeRunner(n_blocks=16, context_limit=96)
    async with running_engine(runner, on_blocks=note, limits=EngineLimits(grace_s=0.01)) as engine:
        for index in range(8):
            await collect(engine, request_of(tuple(range(index * 20 + 1, index * 20 + 40)), request_id=str(index)))
        await assert_idle(engine)
        with anyio.fail_after(5):
            assert set(await engine.keys()) == known
        assert len(known) <= 16
