"""The lease table against a model: nothing outlives its deadline, its cap, its owner's epoch, or its release."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from covey.errors import FailedPrecondition, Fenced, InvalidArgument, LeaseExpired, Overloaded
from covey.lease import Lease, LeaseTable
from covey.types.ids import LeaseId


def table(capacity: int = 8) -> LeaseTable:
    return LeaseTable(name="kv", capacity=capacity)


def test_a_lease_ends_at_its_deadline_and_is_handed_out_once() -> None:
    leases = table()
    lease = leases.grant("decode-1", 1, ttl_s=30, cap_s=300, now=0)
    assert leases.get(lease.id, now=29.9) == lease
    assert leases.expire(29.9) == ()
    with pytest.raises(LeaseExpired):
        leases.get(lease.id, now=30)
    assert leases.expire(30) == (lease,)
    assert leases.expire(31) == ()
    assert len(leases) == 0


def test_only_progress_renews() -> None:
    leases = table()
    lease = leases.grant("d", 1, ttl_s=30, cap_s=300, now=0)
    assert leases.renew(lease.id, "d", 1, progress=5, now=20).expires_at == 50
    assert leases.renew(lease.id, "d", 1, progress=5, now=40).expires_at == 50, "a stuck owner is as good as dead"
    assert leases.expire(50) != ()


def test_a_renewal_never_shortens_a_lease() -> None:
    leases = table()
    lease = leases.grant("d", 1, ttl_s=30, cap_s=300, now=10)
    assert leases.renew(lease.id, "d", 1, progress=1, now=10).expires_at == 40


def test_no_renewal_passes_the_hard_cap() -> None:
    leases = table()
    lease = leases.grant("d", 1, ttl_s=30, cap_s=45, now=0)
    assert leases.renew(lease.id, "d", 1, progress=1, now=29).expires_at == 45
    assert leases.renew(lease.id, "d", 1, progress=2, now=44).expires_at == 45
    assert [ended.id for ended in leases.expire(45)] == [lease.id]


def test_a_released_lease_is_gone() -> None:
    leases = table()
    lease = leases.grant("d", 1, ttl_s=30, cap_s=300, now=0)
    assert leases.release(lease.id, "d", 1, now=1) == lease
    with pytest.raises(LeaseExpired):
        leases.release(lease.id, "d", 1, now=1)
    assert leases.expire(1e9) == ()


@pytest.mark.parametrize("act", ["grant", "renew", "release"])
def test_an_old_epoch_is_fenced_and_changes_nothing(act: str) -> None:
    leases = table()
    lease = leases.grant("d", 2, ttl_s=30, cap_s=300, now=0)
    acts: dict[str, Callable[[], Lease]] = {
        "grant": lambda: leases.grant("d", 1, ttl_s=30, cap_s=300, now=1),
        "renew": lambda: leases.renew(lease.id, "d", 1, progress=9, now=1),
        "release": lambda: leases.release(lease.id, "d", 1, now=1),
    }
    with pytest.raises(Fenced) as caught:
        acts[act]()
    assert isinstance(caught.value, FailedPrecondition)
    assert leases.leases() == (lease,)


@pytest.mark.parametrize("learn", ["fence", "grant", "renew"])
def test_a_new_epoch_ends_what_earlier_lives_held(learn: str) -> None:
    leases = table()
    old = leases.grant("d", 1, ttl_s=30, cap_s=300, now=0)
    other = leases.grant("other", 1, ttl_s=30, cap_s=300, now=0)
    match learn:
        case "fence":
            leases.fence("d", 2, now=5)
        case "grant":
            leases.grant("d", 2, ttl_s=30, cap_s=300, now=5)
        case _:
            with pytest.raises(LeaseExpired):
                leases.renew(old.id, "d", 2, progress=1, now=5)
    assert [ended.id for ended in leases.expire(5)] == [old.id]
    assert leases.get(other.id, now=5) == other


def test_a_strangers_call_is_fenced_and_leaves_no_trace() -> None:
    leases = table()
    lease = leases.grant("d", 1, ttl_s=30, cap_s=300, now=0)
    with pytest.raises(Fenced):
        leases.release(lease.id, "stranger", 7, now=1)
    assert leases.grant("stranger", 3, ttl_s=1, cap_s=1, now=1).epoch == 3
    assert leases.get(lease.id, now=1) == lease


def test_a_full_table_says_when_to_come_back() -> None:
    leases = table(capacity=2)
    for _ in range(2):
        leases.grant("d", 1, ttl_s=30, cap_s=300, now=0)
    with pytest.raises(Overloaded) as caught:
        leases.grant("d", 1, ttl_s=30, cap_s=300, now=10)
    assert caught.value.retry_after_ms == 20_000
    leases.expire(30)
    leases.grant("d", 1, ttl_s=30, cap_s=300, now=30)


@pytest.mark.parametrize(("ttl_s", "cap_s"), [(0, 1), (-1, 1), (2, 1), (1, float("inf")), (float("nan"), 1)])
def test_a_lease_without_a_bound_is_refused(ttl_s: float, cap_s: float) -> None:
    with pytest.raises(InvalidArgument):
        table().grant("d", 1, ttl_s=ttl_s, cap_s=cap_s, now=0)


def test_the_schedule_stays_bounded_under_grant_and_release() -> None:
    leases = table()
    for _ in range(10_000):
        lease = leases.grant("d", 1, ttl_s=1e6, cap_s=1e6, now=0)
        leases.release(lease.id, "d", 1, now=0)
    assert len(leases._due) <= 100


def test_owners_are_forgotten_past_capacity() -> None:
    leases = table(capacity=4)
    keeper = leases.grant("keeper", 3, ttl_s=1e6, cap_s=1e6, now=0)
    for n in range(1000):
        leases.fence(f"owner-{n}", 1, now=0)
        leases.check()
    with pytest.raises(Fenced):
        leases.renew(keeper.id, "keeper", 2, progress=1, now=0)  # owners with leases are not


OWNERS = st.sampled_from(["a", "b", "c"])


class LeaseMachine(RuleBasedStateMachine):
    """Random histories against a naive model: a dict of live leases and the epoch of each owner."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.table = table(capacity=5)
        self.now = 0.0
        self.alive: dict[LeaseId, Lease] = {}  # by the model's own rules
        self.ended: set[LeaseId] = set()  # released, or to be handed out by `expire`
        self.epochs: dict[str, int] = {}

    def fence(self, owner: str, epoch: int) -> bool:
        if epoch < self.epochs.get(owner, epoch):
            return False
        self.epochs[owner] = epoch
        self.alive = {k: v for k, v in self.alive.items() if v.owner != owner or v.epoch == epoch}
        return True

    @rule(target=ids, owner=OWNERS, epoch=st.integers(1, 4), ttl_s=st.floats(1, 20), extra_s=st.floats(0, 30))
    def grant(self, owner: str, epoch: int, ttl_s: float, extra_s: float) -> object:
        allowed = self.fence(owner, epoch)
        try:
            lease = self.table.grant(owner, epoch, ttl_s=ttl_s, cap_s=ttl_s + extra_s, now=self.now)
        except Fenced:
            assert not allowed
            return multiple()
        except Overloaded:
            assert len(self.table) == 5
            return multiple()
        assert allowed
        assert lease.id not in self.alive.keys() | self.ended, "an id was used twice"
        self.alive[lease.id] = lease
        return lease

    @rule(lease=ids, epoch=st.integers(0, 1), progress=st.integers(0, 50))
    def renew(self, lease: Lease, epoch: int, progress: int) -> None:
        epoch += lease.epoch
        allowed = self.fence(lease.owner, epoch)
        held = self.alive.get(lease.id)
        try:
            renewed = self.table.renew(lease.id, lease.owner, epoch, progress=progress, now=self.now)
        except Fenced:
            assert not allowed or epoch != lease.epoch
        except LeaseExpired:
            assert held is None or self.now >= held.expires_at
        else:
            assert allowed
            assert held is not None
            assert held.expires_at <= renewed.expires_at <= held.cap_at
            assert renewed.expires_at == held.expires_at or progress > held.progress
            self.alive[lease.id] = renewed

    @rule(lease=consumes(ids))
    def release(self, lease: Lease) -> None:
        held = self.alive.get(lease.id)
        try:
            self.table.release(lease.id, lease.owner, lease.epoch, now=self.now)
        except (Fenced, LeaseExpired):
            assert held is None or self.now >= held.expires_at
        else:
            assert held is not None
            assert self.now < held.expires_at
            del self.alive[lease.id]
            self.ended.add(lease.id)

    @rule(seconds=st.floats(0, 15))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        gone = self.table.expire(self.now)
        for lease in gone:
            assert lease.id not in self.ended, "a lease ended twice"
            self.ended.add(lease.id)
            held = self.alive.pop(lease.id, None)
            assert held is None or held.expires_at <= self.now, "a live lease was ended"
        assert all(lease.expires_at > self.now for lease in self.alive.values()), "a lease outlived its deadline"
        assert {lease.id for lease in self.table.leases()} == self.alive.keys()

    @invariant()
    def holds_together(self) -> None:
        self.table.check()
        due = self.table.next_expiry()
        assert all(due is not None and due <= lease.expires_at for lease in self.alive.values())


LeaseMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestLeaseMachine = LeaseMachine.TestCase
