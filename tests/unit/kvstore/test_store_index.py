"""The index of a store against a simple model: leases, pins, reservations, eviction, quarantine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from covey.errors import (
    CoveyError,
    FailedPrecondition,
    Fenced,
    InvalidArgument,
    LayoutMismatch,
    LeaseExpired,
    Miss,
    NoSpace,
    Overloaded,
)
from covey.policy.arena import Arena
from covey.policy.store_index import StoreIndex, StoreLimits
from covey.types.ids import BlockHash, LeaseId, NamespaceId, TenantId
from covey.types.kv import (
    BlockKey,
    BlockShape,
    CommitBlock,
    CommitRequest,
    GrantStatus,
    KvEventKind,
    LeaseGrant,
    LeaseRequest,
    LookupReply,
    LookupRequest,
    PinKind,
    PinRequest,
    QuarantineRequest,
    RenewRequest,
    ReserveReply,
    ReserveRequest,
)

T = TenantId("t")
SHAPES = {
    NamespaceId(b"n" * 16): BlockShape(size_bytes=3 * 4096, layers=3),
    NamespaceId(b"m" * 16): BlockShape(size_bytes=8192, layers=2),
}
N, M = SHAPES
CHAINS = [[BlockHash(f"{c}{i:015d}".encode()) for i in range(8)] for c in "abc"]


def keys(chain: list[BlockHash], start: int, stop: int) -> tuple[BlockKey, ...]:
    return tuple(BlockKey(hash=chain[i], parent=chain[i - 1] if i else BlockHash(b"")) for i in range(start, stop))


def make(capacity: int = 16 * 4096 * 8, **limits: Any) -> StoreIndex:
    return StoreIndex(arena=Arena(capacity), epoch=7, name="s", limits=StoreLimits(**limits))


def reserve(
    index: StoreIndex, blocks: tuple[BlockKey, ...], now: float = 0.0, *, ns: NamespaceId = N, owner: str = "w",
    private: bool = False, ttl_s: float = 10.0,
) -> ReserveReply:  # fmt: skip
    return index.reserve(
        ReserveRequest(
            tenant=T, namespace=ns, blocks=blocks, shape=SHAPES[ns], owner=owner, ttl_s=ttl_s, private=private
        ),
        now,
    )


def commit(
    index: StoreIndex, lease: LeaseGrant, hashes: list[BlockHash], now: float = 0.0, *, ns: NamespaceId = N
) -> None:
    layers = SHAPES[ns].layers
    request = CommitRequest(
        lease=lease.lease, epoch=lease.epoch, blocks=tuple(CommitBlock(hash=h, checksums=(1,) * layers) for h in hashes)
    )
    slots = index.can_commit(request, now)
    index.commit(lease.lease, {slot.location.hash: 99 for slot in slots}, now)


def put(
    index: StoreIndex,
    chain: list[BlockHash],
    stop: int,
    now: float = 0.0,
    *,
    private: bool = False,
    ns: NamespaceId = N,
) -> LeaseGrant:
    reply = reserve(index, keys(chain, 0, stop), now, private=private, ns=ns)
    commit(index, reply.lease, [g.hash for g in reply.grants if g.status is GrantStatus.GRANTED], now, ns=ns)
    return reply.lease


def lookup(
    index: StoreIndex, hashes: list[BlockHash], now: float = 0.0, *, ns: NamespaceId = N, ttl_s: float = 10.0
) -> LookupReply:
    return index.lookup(
        LookupRequest(tenant=T, namespace=ns, hashes=tuple(hashes), owner="r", ttl_s=ttl_s, shape=SHAPES[ns]), now
    )


def release(index: StoreIndex, lease: LeaseGrant, now: float = 0.0) -> None:
    index.release(LeaseRequest(lease=lease.lease, epoch=lease.epoch), now)


def pin(
    index: StoreIndex, hashes: list[BlockHash], now: float = 0.0, *, kind: PinKind = PinKind.HARD, ttl_s: float = 10.0
) -> LeaseGrant:
    return index.pin(
        PinRequest(tenant=T, namespace=N, hashes=tuple(hashes), kind=kind, ttl_s=ttl_s, owner="p"), now
    ).lease


def test_a_block_is_visible_only_once_committed() -> None:
    index = make()
    reply = reserve(index, keys(CHAINS[0], 0, 3))
    assert lookup(index, CHAINS[0][:3]).blocks == ()
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
    reserve(index, keys([BlockHash(b"x" * 16 + bytes([i])) for i in range(6)], 0, 6), 5.0)
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
        reserve(index, keys([BlockHash(b"y%d" % i) for i in range(6)], 0, 6))
    index.check()


def test_pins_end_by_themselves_and_cannot_be_renewed() -> None:
    index = make()
    release(index, put(index, CHAINS[0], 2))
    lease = pin(index, CHAINS[0][:2], ttl_s=2.0)
    index.renew(RenewRequest(lease=lease.lease, epoch=7, done=5, ttl_s=100.0), 1.0)
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
    assert index.renew(RenewRequest(lease=lease.lease, epoch=7, done=1, ttl_s=2.0), 1.0).ttl_s == 2.0
    assert index.renew(RenewRequest(lease=lease.lease, epoch=7, done=1, ttl_s=2.0), 2.0).ttl_s == 1.0
    with pytest.raises(LeaseExpired):
        index.renew(RenewRequest(lease=lease.lease, epoch=7, done=2, ttl_s=2.0), 3.0)


def test_an_older_epoch_is_fenced() -> None:
    index = make()
    reply = reserve(index, keys(CHAINS[0], 0, 1))
    with pytest.raises(Fenced):
        commit(index, LeaseGrant(lease=reply.lease.lease, epoch=6, ttl_s=1.0), CHAINS[0][:1])
    with pytest.raises(Fenced):
        index.release(LeaseRequest(lease=reply.lease.lease, epoch=6), 0.0)


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
        )  # fmt: skip
        self.rights: dict[LeaseId, Right] = {}
        self.bad: set[tuple[NamespaceId, BlockHash]] = set()
        self.visible: dict[NamespaceId, set[BlockHash]] = {N: set(), M: set()}

    def name(self, chain: int, i: int, *, private: bool) -> BlockHash:
        return BlockHash(CHAINS[chain][i] + (b"p" if private else b""))

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
        grant = self.index.renew(RenewRequest(lease=lease, epoch=7, done=done, ttl_s=5.0), self.now)
        self.rights[lease].ends = self.now + grant.ttl_s

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
    def private_blocks_are_not_shown(self) -> None:
        shown = {h for _, hashes in self.index.snapshot() for h in hashes}
        assert not any(h.endswith(b"p") for h in shown)

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
            reserve(self.index, keys([BlockHash(b"%d" % i) for i in range(17)], 0, 17), self.now + 1000.0)


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50)
TestIndexMachine = IndexMachine.TestCase
