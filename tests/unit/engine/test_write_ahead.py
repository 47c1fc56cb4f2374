"""Blocks of a long prompt are stored behind its chunks; a store that refuses or stalls costs no request anything."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from covey.engine.fake import FakeRunner
from covey.engine.limits import EngineLimits
from covey.policy.batch_limits import BatchLimits
from covey.testing import assert_eventually
from covey.types.generate import Handover, Role
from covey.types.kv import BlockKey
from covey.types.store import Held, StoreKey
from tests.support.engines import Shelf, assert_idle, collect, plain, request_of, running_engine

BLOCK_BYTES = 8 * 2 * 8
PROMPT = tuple(range(1, 100))
CHUNKS = BatchLimits(max_tokens=24, max_running=4, chunk_min=8)


class Counting(Shelf):
    """Notes how many blocks each write brought, and how many were in flight at once."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[int] = []
        self.in_flight = 0
        self.most = 0

    async def store(
        self,
        key: StoreKey,
        blocks: Sequence[BlockKey],
        data: Sequence[memoryview],
        *,
        owner: str,
        ttl_s: float,
        private: bool = False,
    ) -> Held:
        before = self.stats.blocks
        self.in_flight += len(blocks) if owner.endswith("ahead") else 0
        self.most = max(self.most, self.in_flight)
        try:
            held = await super().store(key, blocks, data, owner=owner, ttl_s=ttl_s, private=private)
        finally:
            self.in_flight -= len(blocks) if owner.endswith("ahead") else 0
        self.writes.append(self.stats.blocks - before)
        return held


async def test_the_hand_over_writes_only_what_the_last_chunk_filled() -> None:
    store, runner = Counting(), FakeRunner(step_s=0.01)
    limits = EngineLimits(batch=CHUNKS)
    async with running_engine(runner, role=Role.PREFILL, store=store, limits=limits) as engine:
        answer = await collect(engine, request_of(PROMPT))
        ticket = answer.last.ticket
        assert engine.board.written_ahead >= 8
        await engine.cancel(request_of(PROMPT).request_id)
        await assert_idle(engine)
    assert ticket.covered == len(PROMPT)
    assert len(ticket.hashes) == len(PROMPT) // 8
    *ahead, last, tail = store.writes
    assert len(ahead) >= 3
    assert last <= 3
    assert tail == 1
    assert answer.last.usage.blocks_moved == sum(store.writes) == 13
    await assert_eventually(lambda: store.stats.leases == store.stats.private_blocks == 0)


@pytest.mark.parametrize("blocks", [0, 1, 3])
async def test_bytes_in_flight_are_bounded(blocks: int) -> None:
    store, runner = Counting(), FakeRunner(step_s=0.005)
    store.slow_s = 0.002
    limits = EngineLimits(batch=CHUNKS, ahead_bytes=blocks * BLOCK_BYTES)
    async with running_engine(runner, role=Role.PREFILL, store=store, limits=limits) as engine:
        async with anyio.create_task_group() as tg:
            for index in range(3):
                prompt = [index + 1, *PROMPT]
                tg.start_soon(collect, engine, request_of(prompt, request_id=f"r{index}"))
        assert store.most == blocks
        assert (engine.board.written_ahead > 0) == (blocks > 0)
        for index in range(3):
            await engine.cancel(request_of(PROMPT, request_id=f"r{index}").request_id)
        await assert_idle(engine)
    assert store.stats.blocks == 3 * 12
    await assert_eventually(lambda: store.stats.leases == store.stats.private_blocks == 0)


@pytest.mark.parametrize("recovers", [True, False])
async def test_a_store_that_refuses_amid_a_prompt(recovers: bool) -> None:
    """Back in time, it takes everything at hand-over; else the ticket is bare."""
    store, runner = Counting(), FakeRunner(step_s=0.01)
    store.is_down = True
    async with (
        running_engine(runner, role=Role.PREFILL, store=store, limits=EngineLimits(batch=CHUNKS), name="p") as prefill,
        running_engine(store=store, name="d") as decode,
    ):
        expected = await collect(decode, request_of(PROMPT, request_id="alone"))

        async def recover() -> None:
            await assert_eventually(lambda: prefill.board.computed_tokens > 48, every_s=0.001)
            store.is_down = False

        async with anyio.create_task_group() as tg:
            if recovers:
                tg.start_soon(recover)
            first = await collect(prefill, request_of(PROMPT))
        assert isinstance(first.last, Handover)
        assert first.last.ticket.covered == (len(PROMPT) if recovers else 0)
        assert prefill.board.written_ahead == 0
        rest = await collect(decode, plain(request_of(PROMPT), ticket=first.last.ticket))
        assert first.ids + rest.ids == expected.ids
        await prefill.cancel(request_of(PROMPT).request_id)
        await assert_idle(prefill)


async def test_cancelling_amid_a_write_frees_everything() -> None:
    store, runner = Counting(), FakeRunner(step_s=0.01)
    limits = EngineLimits(batch=CHUNKS, kv_timeout_s=30.0)
    async with running_engine(runner, role=Role.PREFILL, store=store, limits=limits) as engine:
        async with anyio.create_task_group() as tg:
            tg.start_soon(collect, engine, request_of(PROMPT))
            await assert_eventually(lambda: engine.board.written_ahead > 0, every_s=0.001)
            store.slow_s = 20.0
            written = len(store.writes)
            await assert_eventually(lambda: store.in_flight > 0, every_s=0.001)
            assert len(store.writes) == written
            store.slow_s = 0.0
            await engine.cancel(request_of(PROMPT).request_id)
        with anyio.fail_after(1.0):
            await assert_idle(engine)
    assert store.stats.leases == 0
