"""What is worth keeping: learned chances, depth, size, lower tiers; and what the index makes of it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from covey.policy.arena import Arena
from covey.policy.retention import (
    BUCKETS,
    FRESH_EVERY,
    Candidates,
    LeastRecentlyUsed,
    RecomputeCost,
    ReuseValue,
)
from covey.policy.store_index import StoreIndex, StoreLimits
from covey.types.ids import BlockHash
from covey.types.kv_state import KvEventKind, QuotaRequest

from .index_calls import CHAINS, N, T, keys, lookup, put, release, reserve


def blocks(
    *, idle_s: list[float], reads: list[int] | None = None, depth: list[int] | None = None,
    slot_bytes: list[int] | None = None, below: list[bool] | None = None,
) -> Candidates:  # fmt: skip
    count = len(idle_s)
    return Candidates(
        idle_s=np.array(idle_s, float),
        reads=np.array(reads or [0] * count),
        depth=np.array(depth or [0] * count),
        slot_bytes=np.array(slot_bytes or [65536] * count),
        below=np.array(below or [False] * count),
    )


def observe(policy: ReuseValue, *, idle_s: float, reads: int, count: int) -> None:
    policy.read(np.full(count, idle_s), np.full(count, reads))
    policy.learn()


def test_what_is_read_again_is_worth_more_than_what_never_is() -> None:
    policy = ReuseValue(horizon_s=600.0)
    observe(policy, idle_s=30.0, reads=2, count=200)
    for _ in range(200):
        policy.evicted(2000.0, 0)
    policy.learn()
    assert policy.chance(10.0, 2) > 0.9
    assert policy.chance(10.0, 0) < 0.1
    worth = policy.worth(blocks(idle_s=[10.0, 10.0], reads=[2, 0]))
    assert worth[0] > 5 * worth[1]
    policy.check()


def test_the_chance_falls_once_the_usual_time_of_reuse_has_passed() -> None:
    policy = ReuseValue(horizon_s=60.0)
    observe(policy, idle_s=20.0, reads=0, count=500)
    for _ in range(500):
        policy.evicted(3000.0, 0)
    policy.learn()
    assert policy.chance(5.0, 0) > 0.4
    assert policy.chance(500.0, 0) < policy.chance(5.0, 0) / 4


def test_deep_small_and_unsaved_blocks_are_worth_more() -> None:
    policy = ReuseValue()
    deep, shallow = policy.worth(blocks(idle_s=[5.0, 5.0], depth=[500, 0]))
    assert deep > 2 * shallow, "its attention is long"
    small, large = policy.worth(blocks(idle_s=[5.0, 5.0], slot_bytes=[4096, 1 << 20]))
    assert small > large, "the same time saved for fewer bytes"
    saved, only = policy.worth(blocks(idle_s=[5.0, 5.0], below=[True, False], slot_bytes=[65536, 65536]))
    assert saved < only, "evicting it costs a load, not a prefill"


@given(
    st.lists(
        st.tuples(st.floats(0.0, 1e6), st.integers(0, 60_000), st.integers(0, 4096), st.booleans()),
        min_size=1, max_size=40,
    ),
    st.lists(st.tuples(st.floats(0.0, 1e6), st.integers(0, 100), st.booleans()), max_size=100),
)  # fmt: skip
def test_whatever_was_seen_a_worth_is_finite_and_never_negative(
    seen: list[tuple[float, int, int, bool]], past: list[tuple[float, int, bool]]
) -> None:
    policy = ReuseValue()
    for idle_s, reads, was_read in past:
        if was_read:
            policy.read(np.array([idle_s]), np.array([reads]))
        else:
            policy.evicted(idle_s, reads)
    policy.learn()
    policy.check()
    idle, reads_, depth, below = (list(column) for column in zip(*seen, strict=True))
    worth = policy.worth(blocks(idle_s=idle, reads=reads_, depth=depth, below=below))
    assert np.isfinite(worth).all()
    assert (worth >= 0).all()


def test_what_was_seen_long_ago_counts_less_and_memory_stays_bounded() -> None:
    policy = ReuseValue()
    for _ in range(60):
        observe(policy, idle_s=1.0, reads=0, count=FRESH_EVERY)
    assert policy._reached.shape[1] == BUCKETS
    assert policy._reached.max() <= 150_000
    assert not policy._unseen


def test_recently_used_and_cost_alone() -> None:
    assert LeastRecentlyUsed().worth(blocks(idle_s=[1.0, 9.0])).argmin() == 1
    cost = RecomputeCost(block_s=0.01, attention_depth=100.0)
    first, later = cost.saved_s(blocks(idle_s=[0.0, 0.0], depth=[0, 100]))
    assert 1.9 < later / first < 2.1


def test_the_index_learns_from_its_readers_and_evicts_what_they_leave() -> None:
    index = StoreIndex(
        arena=Arena(16 * 4096 * 4), epoch=7, name="s", limits=StoreLimits(), retention=ReuseValue(horizon_s=100.0)
    )
    release(index, put(index, CHAINS[0][:4], 4))
    release(index, put(index, CHAINS[1][:4], 4))
    now = 0.0
    for _ in range(2 * FRESH_EVERY // 4):
        now += 1.0
        found = lookup(index, CHAINS[0][:4], now)
        assert found.lease is not None
        release(index, found.lease, now)
    found = lookup(index, CHAINS[1][:4], now)  # just used, but for the first time
    assert found.lease is not None
    release(index, found.lease, now)
    index.drain_changes()
    reserve(index, keys([BlockHash(b"x%015d" % i) for i in range(12)], 0, 12), now + 1.0)
    gone = [h for change in index.drain_changes() if change.kind is KvEventKind.EVICTED for h in change.hashes]
    assert gone == CHAINS[1][3::-1], "leaf first, and not what is read every second"
    assert [placed.location.hash for placed in index.coldest(1, now + 1.0)] == [CHAINS[0][3]]


def test_a_tenant_over_its_quota_loses_its_own_blocks_first() -> None:
    index = StoreIndex(arena=Arena(16 * 4096 * 4), epoch=7, name="s")
    release(index, put(index, CHAINS[0], 6))
    release(index, put(index, CHAINS[1], 6, 1.0))
    index.quota(QuotaRequest(tenant=T, quota_bytes=4 * 4 * 4096))
    index.drain_changes()
    reply = reserve(index, keys(CHAINS[2], 0, 2), 2.0)
    assert len(reply.grants) == 2
    told = index.quota(QuotaRequest(tenant=T))
    assert told.used_bytes == told.quota_bytes
    gone = [h for change in index.drain_changes() if change.kind is KvEventKind.EVICTED for h in change.hashes]
    assert len(gone) == 10
    assert CHAINS[1][0] not in gone or CHAINS[0][0] not in gone
    assert {namespace for namespace, _ in index.snapshot()} == {N}
    index.check()
