"""What the index of a store promises, case by case."""

from __future__ import annotations

import pytest

from covey.errors import (
    FailedPrecondition,
    Fenced,
    InvalidArgument,
    LayoutMismatch,
    LeaseExpired,
    Miss,
    NoSpace,
    Overloaded,
)
from covey.types.ids import BlockHash
from covey.types.kv import (
    GrantStatus,
    LeaseGrant,
    LeaseRequest,
    LookupRequest,
    PinKind,
    QuarantineRequest,
    RenewRequest,
)
from covey.types.kv_state import KvEventKind

from .index_calls import CHAINS, SHAPES, M, N, T, commit, keys, lookup, make, pin, put, release, reserve


def test_a_block_is_visible_only_once_committed() -> None:
    index = make()
    reply = reserve(index, keys(CHAINS[0], 0, 3))
    assert not lookup(index, CHAINS[0][:3]).blocks
    commit(index, reply.lease, CHAINS[0][:2])
    found = lookup(index, CHAINS[0][:3])
    assert [b.hash for b in found.blocks] == CHAINS[0][:2]
    assert {b.digest for b in found.blocks} == {99}
    index.check()


def test_a_block_before_its_parent_cannot_be_committed() -> None:
    index = make()
    reply = reserve(index, keys(CHAINS[0], 0, 3))
    with pytest.raises(FailedPrecondition):
        commit(index, reply.lease, CHAINS[0][1:2])
    assert index.stats().blocks == 0


def test_a_second_writer_waits_and_takes_over_when_the_first_dies() -> None:
    index = make()
    reserve(index, keys(CHAINS[0], 0, 2), ttl_s=1.0)
    second = reserve(index, keys(CHAINS[0], 0, 3), 0.5, owner="w2")
    assert [g.status for g in second.grants] == [GrantStatus.PENDING] * 3
    release(index, second.lease, 0.5)
    second = reserve(index, keys(CHAINS[0], 0, 3), 1.0, owner="w2")
    assert [g.status for g in second.grants] == [GrantStatus.GRANTED] * 3
    index.check()


def test_the_slot_of_a_dead_writer_rests_before_it_is_used_again() -> None:
    index = make(cooling_s=5.0)
    first = reserve(index, keys(CHAINS[0], 0, 1), ttl_s=1.0).grants[0].offset
    offsets = {g.offset for g in reserve(index, keys(CHAINS[1], 0, 8), 2.0).grants}
    assert first not in offsets
    index.expire(7.1)
    assert index.stats().used_bytes == 8 * 4 * 4096


def test_no_space_leaves_nothing_reserved() -> None:
    index = make(capacity=16 * 4096 * 4)  # 16 extents of one slot each
    for chain in CHAINS[:2]:
        put(index, chain, 6)
    with pytest.raises(NoSpace) as caught:
        reserve(index, keys(CHAINS[2], 0, 5), 1.0)
    assert caught.value.retry_after_ms == 9000
    assert index.stats().reserved_blocks == 0
    assert index.stats().leases == 2
    index.check()


def test_eviction_takes_the_oldest_leaves_and_spares_what_is_leased_or_pinned() -> None:
    index = make(capacity=16 * 4096 * 4)
    leases = [put(index, chain, 5, float(i)) for i, chain in enumerate(CHAINS)]
    pin(index, CHAINS[1][:1], 3.0)
    release(index, leases[0], 3.0)
    release(index, leases[1], 4.0)
    index.drain_changes()
    reserve(index, keys([BlockHash(b"x" * 15 + bytes([i])) for i in range(6)], 0, 6), 5.0)
    gone = [c for c in index.drain_changes() if c.kind is KvEventKind.EVICTED]
    assert [h for c in gone for h in c.hashes] == CHAINS[0][4::-1]
    assert len(lookup(index, CHAINS[2][:5], 5.0).blocks) == 5
    index.check()


def test_a_soft_pin_gives_way_to_a_writer_and_a_hard_one_does_not() -> None:
    index = make(capacity=16 * 4096 * 4)
    release(index, put(index, CHAINS[0], 6))
    release(index, put(index, CHAINS[1], 6))
    pin(index, CHAINS[0][:6])
    pin(index, CHAINS[1][:6], kind=PinKind.SOFT)
    reserve(index, keys(CHAINS[2], 0, 8))
    assert len(lookup(index, CHAINS[0][:6]).blocks) == 6
    assert len(lookup(index, CHAINS[1][:6]).blocks) == 2
    with pytest.raises(NoSpace):
        reserve(index, keys([BlockHash(b"y%015d" % i) for i in range(6)], 0, 6))
    index.check()


def test_pins_end_by_themselves_and_cannot_be_renewed() -> None:
    index = make()
    release(index, put(index, CHAINS[0], 2))
    lease = pin(index, CHAINS[0][:2], ttl_s=2.0)
    index.renew(RenewRequest(tenant=T, lease=lease.lease, epoch=7, done=5, ttl_s=100.0), 1.0)
    assert index.stats().pinned_blocks == 2
    index.expire(2.0)
    assert index.stats().pinned_blocks == 0


def test_pins_hold_at_most_their_share() -> None:
    index = make(capacity=16 * 4096 * 4, pinned_share=0.25)
    put(index, CHAINS[0], 6)
    with pytest.raises(NoSpace):
        pin(index, CHAINS[0][:5])
    pin(index, CHAINS[0][:4])


def test_a_private_block_goes_with_its_last_lease_and_is_never_announced() -> None:
    index = make()
    writer = put(index, CHAINS[0], 1, private=True)
    reader = lookup(index, CHAINS[0][:1]).lease
    assert reader is not None
    release(index, writer)
    assert len(lookup(index, CHAINS[0][:1], ttl_s=1.0).blocks) == 1
    release(index, reader)
    index.expire(1.0)
    assert (index.stats().blocks, index.stats().used_bytes) == (0, 0)
    assert index.drain_changes() == ()
    assert list(index.snapshot()) == []


def test_renewal_needs_progress() -> None:
    index = make()
    put(index, CHAINS[0], 2)
    lease = lookup(index, CHAINS[0][:2], ttl_s=2.0).lease
    assert lease is not None
    assert index.renew(RenewRequest(tenant=T, lease=lease.lease, epoch=7, done=1, ttl_s=2.0), 1.0).ttl_s == 2.0
    assert index.renew(RenewRequest(tenant=T, lease=lease.lease, epoch=7, done=1, ttl_s=2.0), 2.0).ttl_s == 1.0
    with pytest.raises(LeaseExpired):
        index.renew(RenewRequest(tenant=T, lease=lease.lease, epoch=7, done=2, ttl_s=2.0), 3.0)


def test_an_older_epoch_is_fenced() -> None:
    index = make()
    reply = reserve(index, keys(CHAINS[0], 0, 1))
    with pytest.raises(Fenced):
        commit(index, LeaseGrant(lease=reply.lease.lease, epoch=6, ttl_s=1.0), CHAINS[0][:1])
    with pytest.raises(Fenced):
        index.release(LeaseRequest(tenant=T, lease=reply.lease.lease, epoch=6), 0.0)


def test_a_commit_may_be_repeated_but_not_of_what_was_not_granted() -> None:
    index = make()
    lease = put(index, CHAINS[0], 2)
    commit(index, lease, CHAINS[0][:2])
    assert index.stats().blocks == 2
    with pytest.raises(InvalidArgument):
        commit(index, lease, CHAINS[1][:1])


def test_another_geometry_is_refused() -> None:
    index = make()
    put(index, CHAINS[0], 1)
    wrong = LookupRequest(tenant=T, namespace=N, hashes=(CHAINS[0][0],), owner="r", ttl_s=1.0, shape=SHAPES[M])
    with pytest.raises(LayoutMismatch):
        index.lookup(wrong, 0.0)


def test_quarantine_hides_what_grows_from_a_block_and_never_uses_its_slot_again() -> None:
    index = make()
    lease = put(index, CHAINS[0], 4)
    bad = lookup(index, CHAINS[0][:4]).blocks[1].offset
    assert index.quarantine(QuarantineRequest(tenant=T, namespace=N, hash=CHAINS[0][1], reason="bit flip"), 0.0)
    assert not index.quarantine(QuarantineRequest(tenant=T, namespace=N, hash=CHAINS[0][1], reason="again"), 0.0)
    assert [b.hash for b in lookup(index, CHAINS[0][:4], ttl_s=1.0).blocks] == CHAINS[0][:1]
    index.check()
    release(index, lease)
    index.expire(20.0)
    assert bad not in {g.offset for g in reserve(index, keys(CHAINS[1], 0, 8), 20.0).grants}
    assert index.stats().quarantined == 1
    index.check()


def test_a_child_of_what_is_not_stored_is_refused() -> None:
    index = make()
    with pytest.raises(Miss):
        reserve(index, keys(CHAINS[0], 1, 2))
    assert index.stats().leases == 0


def test_leases_are_bounded_in_number_and_in_what_they_cover() -> None:
    index = make(leases_max=3, lease_refs_max=6)
    put(index, CHAINS[0], 2)  # 3 references: two blocks and a parent
    lookup(index, CHAINS[0][:2])
    with pytest.raises(Overloaded):
        lookup(index, CHAINS[0][:2])
    lookup(index, CHAINS[0][:1])
    with pytest.raises(Overloaded):
        lookup(index, CHAINS[0][:1])
    index.check()
