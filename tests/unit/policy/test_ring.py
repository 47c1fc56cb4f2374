"""Who owns blocks: steady nodes come in, lost ones go, flapping ones wait longer each time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from covey.policy.ring import Membership, RingLimits, is_newer
from covey.types.ids import WorkerId
from covey.types.kv_state import RingMember, RingVersion

LIMITS = RingLimits(join_s=1.0, leave_s=1.0, join_max_s=8.0, forgive_s=100.0)
A, B, C = (RingMember(worker=WorkerId(name), epoch=1, capacity_bytes=1) for name in "abc")


def ring(*members: RingMember, version: int = 1, proposer: str = "a") -> RingVersion:
    return RingVersion(version=version, proposer=WorkerId(proposer), members=members)


def seen(*members: RingMember, until: float = 0.0) -> Membership:
    membership = Membership(LIMITS)
    membership.observe(members, until)
    return membership


def test_the_first_ring_takes_all_at_once() -> None:
    assert Membership(LIMITS).proposal(None, 0.0) is None
    assert seen(B, A).proposal(None, 0.0) == (A, B)


def test_a_node_comes_in_once_it_stayed_and_goes_once_it_stayed_away() -> None:
    membership = seen(A, B)
    membership.observe((A, B, C), 10.0)
    assert membership.proposal(ring(A, B), 10.9) is None
    assert membership.proposal(ring(A, B), 11.0) == (A, B, C)
    membership.observe((A, B), 20.0)
    assert membership.proposal(ring(A, B, C), 20.9) is None
    assert membership.proposal(ring(A, B, C), 21.0) == (A, B)


def test_a_node_that_comes_and_goes_waits_longer_each_time_up_to_a_bound() -> None:
    membership = seen(A, B)
    now, waits = 10.0, []
    for _ in range(5):
        membership.observe((A,), now)
        now += 2.0
        membership.observe((A, B), now)
        back = now
        while membership.proposal(ring(A), now) is None:
            now += 0.5
        waits.append(now - back)
    assert waits == [2.0, 4.0, 8.0, 8.0, 8.0]
    membership.observe((A, B), back + LIMITS.forgive_s)
    membership.observe((A,), back + LIMITS.forgive_s + 1)
    membership.observe((A, B), back + LIMITS.forgive_s + 3)
    assert membership.proposal(ring(A), back + LIMITS.forgive_s + 5) == (A, B)


def test_a_new_life_of_a_node_is_a_new_ring_once_it_is_steady() -> None:
    membership = seen(A, B)
    again = RingMember(worker=B.worker, epoch=2, capacity_bytes=1)
    membership.observe((A, again), 10.0)
    assert membership.proposal(ring(A, B), 10.5) is None
    assert membership.proposal(ring(A, B), 12.0) == (A, again)


def test_a_member_that_was_never_seen_goes_too() -> None:
    membership = seen(A)
    assert membership.proposal(ring(A, C), 5.0) is None
    assert membership.proposal(ring(A, C), 6.0) == (A,)


def test_rings_of_one_number_are_ordered_by_their_proposers() -> None:
    assert is_newer(ring(A), None)
    assert is_newer(ring(A, version=2), ring(A, version=1, proposer="z"))
    assert is_newer(ring(A, proposer="b"), ring(B, proposer="a"))
    assert not is_newer(ring(A), ring(A))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.sets(st.sampled_from([A, B, C])), st.floats(0.0, 3.0)),
        min_size=1,
        max_size=30,
    )
)
def test_two_that_see_the_same_agree_and_do_not_change_what_is_settled(
    course: list[tuple[set[RingMember], float]],
) -> None:
    first, second = Membership(LIMITS), Membership(LIMITS)
    current: RingVersion | None = None
    now = 0.0
    for present, gap_s in course:
        now += gap_s
        for membership in (first, second):
            membership.observe(present, now)
            membership.check()
        proposed = first.proposal(current, now)
        assert proposed == second.proposal(current, now)
        if proposed is not None:
            current = ring(*proposed, version=(current.version if current else 0) + 1)
            assert second.proposal(current, now) is None, "what was just agreed is no reason for another change"
    for wait_s in (0.0, LIMITS.join_max_s + 0.001):  # a sum and a difference of floats may fall short by the last bit
        now += wait_s
        first.observe(course[-1][0], now)
        proposed = first.proposal(current, now)
        if proposed is not None:
            current = ring(*proposed, version=(current.version if current else 0) + 1)
    assert set(current.members if current else ()) == course[-1][0], "in the end those own blocks who are there"
