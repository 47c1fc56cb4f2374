"""A snapshot in pages, taken while the store goes on, and the events after it: together what there is."""

from __future__ import annotations

from random import Random
from typing import Any, cast

import pytest

from covey.actor import Ref, supervise
from covey.net.kv_events import KvEventIndex
from covey.policy.arena import Arena
from covey.policy.store_index import StoreIndex
from covey.testing import VirtualClock, virtual_time
from covey.types.ids import BlockHash, NamespaceId, WorkerId
from covey.types.kv import BlockKey, GrantStatus
from covey.types.kv_state import KvSnapshot
from services.kvstore import watching
from services.kvstore.arena_file import ArenaFile
from services.kvstore.event_log import EventLog
from services.kvstore.store import Command, Store, StoreActor
from services.kvstore.watching import Watching

from .index_calls import M, N, commit, release, reserve

WORKER = WorkerId("kv-0")


def change(rng: Random, store: Store, now: float) -> None:
    """Store a part of some chain; the arena is small, so that others go for it."""
    space = rng.choice([N, M])
    names = [BlockHash(b"%c%015d" % (97 + rng.randrange(6), i)) for i in range(rng.randint(1, 6))]
    blocks = tuple(BlockKey(hash=n, parent=names[i - 1] if i else BlockHash(b"")) for i, n in enumerate(names))
    reply = reserve(store.index, blocks, now, ns=space)
    granted = [grant.hash for grant in reply.grants if grant.status is GrantStatus.GRANTED]
    commit(store.index, reply.lease, granted, now, ns=space)
    release(store.index, reply.lease, now)


async def no_snapshot(_: WorkerId) -> KvSnapshot:
    raise AssertionError("it was not to ask")


@virtual_time
async def check(seed: int) -> int:
    rng = Random(seed)
    index = StoreIndex(arena=Arena(16 * 4096 * 4), epoch=1, name="s")
    store = Store(index, cast(ArenaFile, None), EventLog(worker=WORKER, epoch=1, kept=4096))
    async with supervise(grace_s=1.0) as actors:
        actor: Ref[Command[Any]] = actors.start(lambda: StoreActor(store, VirtualClock()), name="store", capacity=16)

        async def churn(times: int) -> None:
            for _ in range(times):
                await actor.ask(Command(act=lambda store, now: change(rng, store, now)), timeout_s=5)

        await churn(20)
        follower = KvEventIndex(no_snapshot)
        follower.watch(WORKER)
        parts: list[KvSnapshot] = []
        async for part in Watching(store, actor).pages():
            parts.append(part)
            await churn(rng.randint(0, 3))
        assert len({part.seq for part in parts}) == 1
        entries = tuple(entry for part in parts for entry in part.entries)
        assert follower.apply_snapshot(KvSnapshot(epoch=1, seq=parts[0].seq, worker=WORKER, entries=entries))
        for event in store.log.after(parts[0].seq):
            follower.apply(event)
        told = {
            (space, name)
            for space in (N, M)
            for chain in range(6)
            for i in range(6)
            if follower.holders(space, name := BlockHash(b"%c%015d" % (97 + chain, i)))
        }
        there: set[tuple[NamespaceId, BlockHash]] = {(s, name) for s, names in index.snapshot() for name in names}
        assert told == there
    return len(parts)


def test_pages_and_events_together_say_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "PAGE_ROWS", 3)
    assert max(check(seed) for seed in range(40)) > 3


def test_a_snapshot_of_nothing_is_one_empty_page() -> None:
    @virtual_time
    async def run() -> None:
        index = StoreIndex(arena=Arena(1 << 20), epoch=1, name="s")
        store = Store(index, cast(ArenaFile, None), EventLog(worker=WORKER, epoch=1, kept=8))
        async with supervise(grace_s=1.0) as actors:
            actor: Ref[Command[Any]] = actors.start(lambda: StoreActor(store, VirtualClock()), name="s", capacity=4)
            pages = [page async for page in Watching(store, actor).pages()]
            assert [(page.seq, page.entries) for page in pages] == [(0, ())]

    run()
