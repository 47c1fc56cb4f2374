"""After a change of the ring everybody who must have a chain gets it from somebody who has it, and only they."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from covey.policy.rebalance import duty, holders, without
from covey.types.ids import BlockHash, NamespaceId, WorkerId
from covey.types.kv_state import RingMember, RingVersion

NS = NamespaceId(b"n" * 16)
ROOTS = [BlockHash(i.to_bytes(16, "big")) for i in range(50)]
MEMBERS = [
    RingMember(worker=WorkerId(f"kv-{i}"), epoch=epoch, host=f"h{i % 3}", capacity_bytes=1 << 20)
    for i in range(5)
    for epoch in (1, 2)
]


def ring(members: list[RingMember], replicas: int) -> RingVersion:
    one_life_each = {member.worker: member for member in members}
    return RingVersion(
        version=1, proposer=WorkerId("x"), replicas=replicas, members=tuple(sorted(one_life_each.values(), key=repr))
    )


RINGS = st.lists(st.sampled_from(MEMBERS), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(old=RINGS, new=RINGS, replicas=st.integers(1, 3))
def test_what_survived_the_change_reaches_all_who_must_have_it(
    old: list[RingMember], new: list[RingMember], replicas: int
) -> None:
    before, after = ring(old, replicas), ring(new, replicas)
    lives = {(m.worker, m.epoch) for m in before.members}
    for root in ROOTS:
        have = {m.worker for m in after.members if (m.worker, m.epoch) in lives} & set(holders(before, NS, root))
        leavers = {m.worker for m in before.members} - {m.worker for m in after.members}
        draining = leavers & set(holders(before, NS, root))  # leave in order: they still hold theirs and serve
        duties = {worker: duty(worker, after, NS, root, before=before) for worker in have | draining}
        got = {to for each in duties.values() for to in each.to}
        owners = set(holders(after, NS, root))
        assert got <= owners
        if duties:
            assert owners <= got | {w for w in have if duties[w].keep}
        kept = {worker for worker, each in duties.items() if each.keep}
        assert kept == owners & (have | draining)
        if have and after.members == before.members:
            assert not got, "nothing changed, so nothing is copied"


def test_without_a_settled_ring_all_owners_are_made_sure_of() -> None:
    current = ring(MEMBERS, 2)
    for root in ROOTS:
        owner, second = holders(current, NS, root)
        assert duty(owner, current, NS, root).to == (second,)
        assert duty(WorkerId("stranger"), current, NS, root).to == (owner, second)
        assert not duty(WorkerId("stranger"), current, NS, root).keep


def test_a_ring_without_the_last_node_owes_nothing_to_anybody() -> None:
    alone = ring(MEMBERS[:1], 2)
    assert duty(alone.members[0].worker, without(alone, alone.members[0].worker), NS, ROOTS[0]).to == ()
