"""Tenants in a store: their quotas, their pins' share, and leases that exist for their holder only."""

from __future__ import annotations

import pytest

from covey.errors import LeaseExpired, QuotaExceeded
from covey.policy.arena import Arena
from covey.policy.store_index import StoreIndex, StoreLimits
from covey.types.ids import LeaseId, TenantId, WorkerId
from covey.types.kv import CommitRequest, GrantStatus, LeaseGrant, PinKind, RenewRequest, ReserveReply, ReserveRequest
from covey.types.kv_state import KvEventKind, QuotaRequest
from services.kvstore.event_log import HASHES_KEPT_MAX, EventLog

from .index_calls import CHAINS, SHAPES, N, T, commit, keys, lookup, make, pin, put, release, reserve

U = TenantId("u")
SLOT = 4 * 4096


def limited(blocks: int, pinned_share: float = 0.8) -> StoreIndex:
    limits = StoreLimits(pinned_share=pinned_share)
    return StoreIndex(arena=Arena(16 * SLOT), epoch=7, name="s", limits=limits, quotas={T: blocks * SLOT})


def reserve_as(index: StoreIndex, tenant: TenantId, chain: int, stop: int, now: float = 0.0) -> ReserveReply:
    blocks = keys(CHAINS[chain], 0, stop)
    request = ReserveRequest(tenant=tenant, namespace=N, blocks=blocks, shape=SHAPES[N], owner="w", ttl_s=10.0)
    return index.reserve(request, now)


def test_at_its_quota_a_tenants_own_blocks_make_room_and_others_stay() -> None:
    index = limited(6)
    reply = reserve_as(index, U, 1, 4)
    index.commit(reply.lease.lease, {grant.hash: 9 for grant in reply.grants}, 0.0)
    release(index, reply.lease, tenant=U)
    release(index, put(index, CHAINS[0], 6, 1.0))
    index.drain_changes()
    assert len(reserve(index, keys(CHAINS[2], 0, 3), 2.0).grants) == 3
    gone = [h for change in index.drain_changes() if change.kind is KvEventKind.EVICTED for h in change.hashes]
    assert gone == CHAINS[0][5:2:-1], "its own leaves, though those of the other are older and there is room"
    assert index.quota(QuotaRequest(tenant=T)).used_bytes == 6 * SLOT
    index.check()


def test_a_quota_of_leased_blocks_is_refused_and_nothing_stays_reserved() -> None:
    index = limited(4)
    put(index, CHAINS[0], 3)
    with pytest.raises(QuotaExceeded) as refused:
        reserve(index, keys(CHAINS[2], 0, 2), 1.0)
    assert refused.value.retry_after_ms == 9000
    assert index.stats().reserved_blocks == 0
    assert index.quota(QuotaRequest(tenant=T)).used_bytes == 3 * SLOT
    reserve_as(index, U, 1, 8)
    index.check()


def test_soft_pins_of_the_tenant_give_way_to_its_quota_and_those_of_others_do_not() -> None:
    index = limited(4)
    release(index, put(index, CHAINS[0], 4))
    pin(index, CHAINS[0][:2], kind=PinKind.SOFT)
    assert len(reserve(index, keys(CHAINS[2], 0, 4), 1.0).grants) == 4
    assert not lookup(index, CHAINS[0][:1], 1.0).blocks
    index.check()


def test_pins_of_a_tenant_hold_a_share_of_its_quota() -> None:
    index = limited(8, pinned_share=0.5)
    put(index, CHAINS[0], 6)
    first = pin(index, CHAINS[0][:3])
    with pytest.raises(QuotaExceeded):
        pin(index, CHAINS[0][:2])  # each pin counts in full: it keeps them by itself
    release(index, first)
    pin(index, CHAINS[0][:4])
    index.check()


def test_a_lowered_quota_is_reached_by_the_next_write_of_anybody_who_needs_room() -> None:
    index = limited(0)
    release(index, put(index, CHAINS[0], 8))
    reply = reserve_as(index, U, 1, 8)
    index.commit(reply.lease.lease, {grant.hash: 9 for grant in reply.grants}, 1.0)
    release(index, reply.lease, 1.0, tenant=U)
    index.quota(QuotaRequest(tenant=T, quota_bytes=4 * SLOT))
    found = lookup(index, CHAINS[0], 2.0)  # its blocks are the newest now
    assert found.lease is not None
    release(index, found.lease, 2.0)
    index.drain_changes()
    reserve_as(index, U, 2, 4, 3.0)
    gone = [h for change in index.drain_changes() if change.kind is KvEventKind.EVICTED for h in change.hashes]
    assert gone == CHAINS[0][7:3:-1]
    index.check()


def test_another_tenants_lease_does_not_exist() -> None:
    index = make()
    reply = reserve(index, keys(CHAINS[0], 0, 2))
    grant = reply.lease
    with pytest.raises(LeaseExpired) as foreign:
        release(index, grant, tenant=U)
    with pytest.raises(LeaseExpired) as unknown:
        release(index, LeaseGrant(lease=LeaseId("s-99"), epoch=7, ttl_s=1.0), tenant=U)
    assert foreign.value.message.replace(grant.lease, "") == unknown.value.message.replace("s-99", ""), "no oracle"
    for act in (
        lambda: index.renew(RenewRequest(tenant=U, lease=grant.lease, epoch=7, done=1, ttl_s=1.0), 0.0),
        lambda: index.can_commit(CommitRequest(tenant=U, lease=grant.lease, epoch=7, blocks=()), 0.0),
        lambda: index.writable(grant.lease, CHAINS[0][0], 0.0, tenant=U),
        lambda: index.locate(grant.lease, (), 0.0, tenant=U),
    ):
        with pytest.raises(LeaseExpired):
            act()
    assert [each.status for each in reply.grants] == [GrantStatus.GRANTED] * 2
    commit(index, grant, CHAINS[0][:2])


def test_lease_ids_end_in_what_cannot_be_guessed() -> None:
    tokens = iter(["p6W", "x9Q"])
    index = StoreIndex(arena=Arena(1 << 20), epoch=7, name="s", token=lambda: next(tokens))
    assert [put(index, CHAINS[i], 1).lease for i in range(2)] == ["s-p6W", "s-x9Q"]


def test_a_renewal_extends_by_what_it_asks_within_the_cap() -> None:
    index = make(lease_cap_s=20.0)
    put(index, CHAINS[0], 2)
    grant = lookup(index, CHAINS[0][:2], ttl_s=2.0).lease
    assert grant is not None

    def renewed_s(done: int, ttl_s: float, now: float) -> float:
        request = RenewRequest(tenant=T, lease=grant.lease, epoch=7, done=done, ttl_s=ttl_s)
        return index.renew(request, now).ttl_s

    assert renewed_s(1, 5.0, 1.0) == 5.0
    assert renewed_s(2, 100.0, 5.0) == 15.0, "no lease lives past its cap"
    assert renewed_s(3, 1.0, 6.0) == 14.0, "a renewal never shortens"


def test_long_events_are_kept_in_smaller_number() -> None:
    log = EventLog(worker=WorkerId("w"), epoch=1, kept=4096)
    index = make()
    put(index, CHAINS[0], 8)
    (change,) = index.drain_changes()
    for _ in range(HASHES_KEPT_MAX // 8 + 10):
        log.append([change])
    assert not log.can_follow(1, log.seq - 4097)
    assert log.can_follow(1, log.seq - 4000)
    wide = type(change)(kind=change.kind, namespace=change.namespace, hashes=change.hashes * 512)
    for _ in range(HASHES_KEPT_MAX // 4096 + 1):
        log.append([wide])
    assert not log.can_follow(1, log.seq - HASHES_KEPT_MAX // 4096 - 1)
    assert log.can_follow(1, log.seq - HASHES_KEPT_MAX // 4096)
