"""A node gives blocks up that another one has: leaves first, and never what somebody needs."""

from __future__ import annotations

from covey.types.kv_state import KvEventKind

from .index_calls import CHAINS, N, T, commit, keys, lookup, make, release, reserve


def test_what_is_visible_is_listed_with_its_parents_and_untouched() -> None:
    index = make()
    reply = reserve(index, keys(CHAINS[0], 0, 4))
    commit(index, reply.lease, CHAINS[0][:3])
    release(index, reply.lease, 0.0)
    private = reserve(index, keys(CHAINS[1], 0, 1), private=True)
    commit(index, private.lease, CHAINS[1][:1])
    placed = index.visible(N, [*CHAINS[0], *CHAINS[1]])
    assert [p.location.hash for p in placed] == CHAINS[0][:3]
    assert [p.parent for p in placed] == [b"", *CHAINS[0][:2]]
    assert {p.tenant for p in placed} == {T}
    assert index.stats().leases == 1


def test_a_chain_is_dropped_from_its_end_up_to_what_is_leased() -> None:
    index = make()
    reply = reserve(index, keys(CHAINS[0], 0, 4))
    commit(index, reply.lease, CHAINS[0][:4])
    release(index, reply.lease, 0.0)
    index.drain_changes()
    held = lookup(index, CHAINS[0][:2])
    assert held.lease is not None
    assert index.drop(N, CHAINS[0], 0.0) == 2
    assert [p.location.hash for p in index.visible(N, CHAINS[0])] == CHAINS[0][:2]
    release(index, held.lease, 0.0)
    assert index.drop(N, CHAINS[0], 0.0) == 2
    assert index.stats().blocks == 0
    assert {change.kind for change in index.drain_changes()} == {KvEventKind.EVICTED}
    assert index.drop(N, CHAINS[0], 0.0) == 0
    index.check()
