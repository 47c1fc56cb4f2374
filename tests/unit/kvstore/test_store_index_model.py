"""The index of a store against a simple model: leases, pins, reservations, eviction, quarantine."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from covey.errors import (
    CoveyError,
    FailedPrecondition,
    Fenced,
    LeaseExpired,
    Miss,
    NoSpace,
    Overloaded,
    QuotaExceeded,
)
from covey.policy.arena import Arena
from covey.policy.retention import ReuseValue
from covey.policy.rights import STORE
from covey.policy.store_index import StoreIndex, StoreLimits
from covey.types.ids import BlockHash, LeaseId, NamespaceId, TenantId
from covey.types.kv import BlockKey, GrantStatus, LeaseGrant, PinKind, QuarantineRequest, RenewRequest
from covey.types.kv_state import KvEventKind, QuotaRequest

from .index_calls import CHAINS, M, N, T, commit, keys, lookup, pin, release, reserve


def lookup_names(index: StoreIndex, ns: NamespaceId, hashes: list[BlockHash]) -> list[BlockHash]:
    return [slot.location.hash for slot in index.visible(ns, hashes)]


@dataclass
class Right:
    kind: str
    ends: float
    ns: NamespaceId
    blocks: set[BlockHash]
    grants: list[BlockHash] = field(default_factory=list)
    private: bool = False


class IndexMachine(RuleBasedStateMachine):
    """Drives an index at random; a model of rights says what must still be visible."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.index = StoreIndex(
            arena=Arena(16 * 4096 * 4), epoch=7, name="s",
            limits=StoreLimits(leases_max=24, cooling_s=2.0, pinned_share=0.5, lease_cap_s=30.0),
            retention=ReuseValue(horizon_s=10.0),
        )  # fmt: skip
        self.quota_bytes = 0
        self.allowed_bytes = 0
        """What the tenant may use: its quota, or what it used when that was lowered."""
        self.rights: dict[LeaseId, Right] = {}
        self.bad: set[tuple[NamespaceId, BlockHash]] = set()
        self.visible: dict[NamespaceId, set[BlockHash]] = {N: set(), M: set()}

    def name(self, chain: int, i: int, *, private: bool) -> BlockHash:
        return BlockHash(CHAINS[chain][i].upper()) if private else CHAINS[chain][i]

    def chain(self, chain: int, stop: int, *, private: bool) -> tuple[BlockKey, ...]:
        hashes = [self.name(chain, i, private=private) for i in range(stop)]
        return tuple(BlockKey(hash=h, parent=hashes[i - 1] if i else BlockHash(b"")) for i, h in enumerate(hashes))

    @rule(
        chain=st.integers(0, 2),
        stop=st.integers(1, 8),
        ns=st.sampled_from([N, M]),
        private=st.booleans(),
        ttl=st.sampled_from([1.0, 5.0]),
    )
    def reserve(self, chain: int, stop: int, ns: NamespaceId, private: bool, ttl: float) -> None:
        before = self.index.stats()
        try:
            reply = reserve(
                self.index, self.chain(chain, stop, private=private), self.now, ns=ns, private=private, ttl_s=ttl
            )
        except QuotaExceeded:
            assert self.quota_bytes
            assert self.index.stats().reserved_blocks == before.reserved_blocks
            return
        except (NoSpace, Overloaded):
            assert self.index.stats().reserved_blocks == before.reserved_blocks
            return
        by = {status: [g.hash for g in reply.grants if g.status is status] for status in GrantStatus}
        others = [set(r.grants) for r in self.rights.values() if r.ns == ns]
        assert not any(set(by[GrantStatus.GRANTED]) & grants for grants in others), "two writers of one block"
        self.rights[reply.lease.lease] = Right(
            "write", self.now + ttl, ns, set(by[GrantStatus.EXISTS]), by[GrantStatus.GRANTED], private
        )

    @precondition(lambda self: any(r.grants for r in self.rights.values()))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(k for k, r in self.rights.items() if r.grants)))
        right = self.rights[lease]
        count = data.draw(st.integers(1, len(right.grants)))
        done = right.grants[:count]
        try:
            commit(self.index, LeaseGrant(lease=lease, epoch=7, ttl_s=1.0), done, self.now, ns=right.ns)
        except FailedPrecondition:
            assert self.bad, "a parent can only have gone by quarantine"
            return
        right.grants = right.grants[count:]
        right.blocks |= set(done)

    @rule(chain=st.integers(0, 2), ns=st.sampled_from([N, M]), private=st.booleans(), ttl=st.sampled_from([1.0, 5.0]))
    def lookup(self, chain: int, ns: NamespaceId, private: bool, ttl: float) -> None:
        hashes = [self.name(chain, i, private=private) for i in range(8)]
        try:
            reply = lookup(self.index, hashes, self.now, ns=ns, ttl_s=ttl)
        except Overloaded:
            return
        names = [b.hash for b in reply.blocks]
        assert names == hashes[: len(names)], "a look-up is prefix-closed"
        if reply.lease is not None:
            self.rights[reply.lease.lease] = Right("read", self.now + ttl, ns, set(names))

    @rule(
        chain=st.integers(0, 2), stop=st.integers(1, 8), kind=st.sampled_from(PinKind), ttl=st.sampled_from([1.0, 5.0])
    )
    def pin(self, chain: int, stop: int, kind: PinKind, ttl: float) -> None:
        try:
            lease = pin(self.index, CHAINS[chain][:stop], self.now, kind=kind, ttl_s=ttl)
        except (Miss, NoSpace, Overloaded):
            return
        if kind is PinKind.HARD:
            prefix = set(CHAINS[chain][:1])
            self.rights[lease.lease] = Right("pin", self.now + ttl, N, prefix)

    @precondition(lambda self: bool(self.rights))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.rights)))
        release(self.index, LeaseGrant(lease=lease, epoch=7, ttl_s=1.0), self.now)
        del self.rights[lease]

    @precondition(lambda self: any(r.kind != "pin" for r in self.rights.values()))
    @rule(data=st.data(), done=st.integers(0, 3))
    def renew(self, data: st.DataObject, done: int) -> None:
        lease = data.draw(st.sampled_from(sorted(k for k, r in self.rights.items() if r.kind != "pin")))
        grant = self.index.renew(RenewRequest(tenant=T, lease=lease, epoch=7, done=done, ttl_s=5.0), self.now)
        self.rights[lease].ends = self.now + grant.ttl_s

    @rule(blocks=st.sampled_from([0, 4, 8, 14]))
    def set_quota(self, blocks: int) -> None:
        told = self.index.quota(QuotaRequest(tenant=T, quota_bytes=blocks * 4 * 4096))
        self.quota_bytes = told.quota_bytes
        self.allowed_bytes = max(told.quota_bytes, told.used_bytes)

    @rule(chain=st.integers(0, 2), stop=st.integers(1, 8), ns=st.sampled_from([N, M]))
    def keep(self, chain: int, stop: int, ns: NamespaceId) -> None:
        """The store holds blocks for itself, which is no use of them."""
        cold = [slot.location for slot in self.index.coldest(1, self.now)]
        try:
            kept = self.index.keep(ns, CHAINS[chain][:stop], owner="mover", ttl_s=2.0, now=self.now)
        except Overloaded:
            return
        if kept is None:
            assert not lookup_names(self.index, ns, CHAINS[chain][:stop])
            return
        grant, slots = kept
        assert {slot.location.hash for slot in slots} <= set(CHAINS[chain][:stop])
        release(self.index, grant, self.now, tenant=STORE)
        assert [slot.location for slot in self.index.coldest(1, self.now)] == cold

    @precondition(lambda self: bool(self.rights))
    @rule(data=st.data())
    def another_tenant_asks(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.rights)))
        with pytest.raises(LeaseExpired):
            release(self.index, LeaseGrant(lease=lease, epoch=7, ttl_s=1.0), self.now, tenant=TenantId("u"))
        with pytest.raises(LeaseExpired):
            self.index.locate(lease, (), self.now, tenant=TenantId("u"))

    @rule(chain=st.integers(0, 2), i=st.integers(0, 7))
    def quarantine(self, chain: int, i: int) -> None:
        name = CHAINS[chain][i]
        if len(self.bad) < 4 and self.index.quarantine(
            QuarantineRequest(tenant=T, namespace=N, hash=name, reason="x"), self.now
        ):
            self.bad.add((N, name))
            for right in self.rights.values():
                if right.ns == N:  # it and all that grows from it are gone for everybody
                    right.blocks -= set(CHAINS[chain][i:])

    @rule(seconds=st.sampled_from([0.25, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        ended = [lease for lease, right in self.rights.items() if right.ends <= self.now]
        for lease in ended:
            with pytest.raises((LeaseExpired, Fenced)):
                self.index.locate(lease, (), self.now)
            del self.rights[lease]
        self.index.expire(self.now)

    @invariant()
    def holds(self) -> None:
        self.index.check()

    @invariant()
    def what_is_leased_stays(self) -> None:
        for lease, right in self.rights.items():
            if right.kind == "pin":
                continue
            placed = self.index.locate(lease, tuple(right.blocks), self.now)
            assert {p.location.hash for p in placed} == right.blocks

    @invariant()
    def a_tenant_stays_within_its_quota(self) -> None:
        told = self.index.quota(QuotaRequest(tenant=T))
        if self.quota_bytes:
            assert told.used_bytes <= self.allowed_bytes
            self.allowed_bytes = max(self.quota_bytes, told.used_bytes)

    @invariant()
    def private_blocks_are_not_shown(self) -> None:
        shown = {h for _, hashes in self.index.snapshot() for h in hashes}
        assert all(h[:1].islower() for h in shown)

    @invariant()
    def events_say_what_is_visible(self) -> None:
        for change in self.index.drain_changes():
            if change.kind is KvEventKind.STORED:
                self.visible[change.namespace] |= set(change.hashes)
            elif change.kind is KvEventKind.EVICTED:
                self.visible[change.namespace] -= set(change.hashes)
        assert {ns: set(hashes) for ns, hashes in self.index.snapshot()} == {
            ns: v for ns, v in self.visible.items() if v
        }

    def teardown(self) -> None:
        """Whatever happened, everything that is not shared and not bad goes when its time is up."""
        self.index.expire(self.now + 1000.0)
        self.index.check()
        stats = self.index.stats()
        assert (
            stats.leases,
            stats.leased_blocks,
            stats.pinned_blocks,
            stats.reserved_blocks,
            stats.private_blocks,
        ) == (0,) * 5
        with pytest.raises(CoveyError):
            reserve(self.index, keys([BlockHash(b"%016d" % i) for i in range(17)], 0, 17), self.now + 1000.0)


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50)
TestIndexMachine = IndexMachine.TestCase
