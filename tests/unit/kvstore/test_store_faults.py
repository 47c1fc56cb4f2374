"""Ten thousand operations against the real actor, by clients that die at any step, in virtual time."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import anyio
import pytest

from covey.actor import supervise
from covey.policy.arena import PAGE_BYTES, Arena
from covey.policy.retention import LeastRecentlyUsed, Retention, ReuseValue
from covey.policy.store_index import StoreIndex, StoreLimits
from covey.testing import VirtualClock, virtual_time
from covey.types.ids import WorkerId
from services.kvstore.arena_file import ArenaFile, arena_file
from services.kvstore.event_log import EventLog
from services.kvstore.store import Store, StoreActor

from .store_world import COOLING_S, Client, World, settled

OPERATIONS = 10_000 * (20 if os.environ.get("COVEY_SOAK") else 1)
CLIENTS = 16
SLOTS = 32


@virtual_time
async def course(arena: ArenaFile, layout: Arena, seed: int, operations: int, retention: Retention) -> World:
    """Let clients come and die until so many commands were served; return what is left."""
    clock = VirtualClock()
    limits = StoreLimits(leases_max=64, cooling_s=COOLING_S, pinned_share=0.5, lease_cap_s=12.0)
    index = StoreIndex(arena=layout, epoch=1, name="s", limits=limits, retention=retention)
    store = Store(index, arena, EventLog(worker=WorkerId("w"), epoch=1, kept=64))
    async with supervise(grace_s=1.0) as actors:
        actor = actors.start(lambda: StoreActor(store, clock), name="store", capacity=256)
        world = World(store=store, actor=actor, clock=clock, rng=Random(seed))

        async def live() -> None:
            while world.operations < operations:
                await anyio.sleep(world.rng.expovariate(2.0))
                await Client(world).run()

        async with anyio.create_task_group() as tg:
            for _ in range(CLIENTS):
                tg.start_soon(live)
        await settled(world)
    return world


@pytest.mark.parametrize(("seed", "retention"), [(1, LeastRecentlyUsed()), (2, ReuseValue())], ids=["lru", "reuse"])
def test_no_course_of_faults_breaks_the_contract(tmp_path: Path, seed: int, retention: Retention) -> None:
    layout = Arena(SLOTS * PAGE_BYTES)
    with arena_file(tmp_path, "store", layout.capacity_bytes) as arena:
        arena.back(0, layout.capacity_bytes)
        world = course(arena, layout, seed, OPERATIONS // 2, retention)
    stats = world.store.index.stats()
    assert world.operations >= OPERATIONS // 2
    assert world.kills > OPERATIONS // 100, "clients died"
    assert world.reads > OPERATIONS // 50, "blocks were read and verified"
    assert stats.evictions > OPERATIONS // 200, "room was needed"
    assert stats.quarantined == len(world.bad) > 0, "bad blocks were found"
