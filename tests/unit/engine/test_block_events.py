"""What the mesh hears of a worker's prefix cache is what is in it, also after events were lost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import pytest

from covey.engine import block_events
from covey.engine.block_events import BlockEvents
from covey.engine.engine import Engine
from covey.engine.fake import FakeRunner
from covey.engine.limits import EngineLimits
from covey.net.kv_events import KvEventIndex, KvEventPublisher
from covey.net.memory_bus import MemoryBroker
from covey.testing import assert_eventually
from covey.types.generate import Role
from covey.types.ids import WorkerId
from covey.types.kv_state import KvSnapshot
from tests.support.engines import SCOPE, collect, request_of, running_engine

WORKER = WorkerId("w1")


@asynccontextmanager
async def heard_engine() -> AsyncIterator[tuple[Engine, KvEventIndex, Callable[[], object]]]:
    """A decode engine, an index of its events, and what starts to publish them."""
    broker = MemoryBroker()
    async with broker.bus() as bus, broker.bus() as other:
        events = BlockEvents(KvEventPublisher(bus, role=Role.DECODE, worker=WORKER, epoch=1), WORKER)
        limits = EngineLimits(grace_s=0.0)
        runner = FakeRunner(n_blocks=16, context_limit=96)
        async with running_engine(runner, on_blocks=events.note, limits=limits) as engine:

            async def snapshot(_: WorkerId) -> KvSnapshot:
                return await events.snapshot(engine)

            async with (
                KvEventIndex.open(other, snapshot, role=Role.DECODE) as index,
                anyio.create_task_group() as tg,
            ):
                yield engine, index, lambda: tg.start_soon(events.run)
                tg.cancel_scope.cancel()


async def churn(engine: Engine, count: int, start: int = 0) -> None:
    for index in range(start, start + count):
        await collect(engine, request_of(tuple(range(index * 20 + 1, index * 20 + 40)), request_id=str(index)))


async def agrees(engine: Engine, index: KvEventIndex) -> bool:
    held = {name for _, name in await engine.keys()}
    known = {name for name in held if WORKER in index.holders(SCOPE.namespace, name)}
    return bool(held) and held == known and len(index.blocks) == len(held)


async def test_the_index_follows_the_cache() -> None:
    async with heard_engine() as (engine, index, publish):
        publish()
        await churn(engine, 8)
        await assert_eventually(lambda: agrees(engine, index))
        assert index.gaps == 0


async def test_what_does_not_fit_the_queue_is_mended_by_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_events, "QUEUED_MAX", 1)
    async with heard_engine() as (engine, index, publish):
        await churn(engine, 4)
        publish()
        await assert_eventually(lambda: agrees(engine, index), timeout_s=10)
