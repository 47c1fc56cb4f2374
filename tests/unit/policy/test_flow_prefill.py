"""FlowPrefill: urgency, batches that keep their deadlines, interrupts, aging, preemption."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from covey.policy.batch_limits import BatchLimits
from covey.policy.batch_policies import make_batcher
from covey.policy.batching import PREEMPTION_GAP_STEPS, Batcher
from covey.policy.chunk import Chunk
from covey.policy.ledger import Demand, Entry
from covey.policy.pace import Pace
from covey.policy.urgency import ByUrgency

PER_S = 100.0
"""Tokens a second, once measured."""


def measured_pace() -> Pace:
    pace = Pace(tokens_min=1)
    pace.observe(100, 100 / PER_S)
    return pace


def measured(*, max_running: int = 4, patience_s: float = 30.0) -> Batcher:
    limits = BatchLimits(batching="flow", max_running=max_running, chunk_min=1, patience_s=patience_s)
    policy = make_batcher(limits, n_layers=4)
    policy.submit(0, Demand(tokens=100))
    policy.admit(lambda _seq: True, 0.0)
    policy.start(0, computed=0, known=100)
    policy.apply(policy.plan(0.0), {0: 1}, 100 / PER_S)
    policy.remove(0)
    return policy


def enter(policy: Batcher, seq: int, tokens: int, due: float | None, *, now: float = 0.0, priority: int = 0) -> None:
    policy.submit(seq, Demand(tokens=tokens, arrived_at=now, first_token_by=due, priority=priority))
    for admitted in policy.admit(lambda _seq: True, now):
        policy.start(admitted, computed=0, known=tokens)


def planned(policy: Batcher, now: float = 0.0) -> list[int]:
    return [chunk.seq for chunk in policy.plan(now)]


entries = st.builds(
    lambda order, tokens, due, priority: Entry(
        seq=order, order=order, known=tokens, demand=Demand(tokens=tokens, first_token_by=due, priority=priority)
    ),
    st.integers(0, 99),
    st.integers(2, 500),
    st.none() | st.floats(-5, 20),
    st.integers(0, 1),
)


@given(first=entries, second=entries)
def test_rescuable_nearest_first_then_no_deadline_then_hopeless(first: Entry, second: Entry) -> None:
    order = ByUrgency(measured_pace(), patience_s=100)
    one, two = (order.is_hopeless(entry, 0.0) for entry in (first, second))
    for entry, is_hopeless in ((first, one), (second, two)):
        assert is_hopeless == (order.due(entry) < entry.left / PER_S)
    if first.demand.priority != second.demand.priority or first.order == second.order:
        return
    sooner = order.rank(first, 0.0) < order.rank(second, 0.0)
    if one != two:
        assert sooner == two
    elif not one and order.due(first) != order.due(second):
        assert sooner == (order.due(first) < order.due(second))


def test_a_batch_grows_while_nobody_in_it_is_late() -> None:
    policy = measured()
    enter(policy, 1, 100, 1.5)
    enter(policy, 2, 100, 2.5)  # beside it the first one would end after 2 s, too late
    enter(policy, 3, 30, 9.0)
    assert planned(policy) == [1]
    policy.remove(1)
    assert planned(policy) == [2, 3]


def test_a_more_urgent_arrival_interrupts_and_goes_first() -> None:
    policy = measured()
    enter(policy, 1, 400, 9.0)
    plan = policy.plan(0.0)
    assert not policy.should_interrupt(0.0)
    policy.submit(2, Demand(tokens=50, arrived_at=1.0, first_token_by=2.0))
    assert policy.should_interrupt(1.0)
    policy.apply(plan, {}, 1.0, suspended={1: 1})
    assert not policy.should_interrupt(1.0), "no step runs"
    policy.admit(lambda _seq: True, 1.0)
    policy.start(2, computed=0, known=50)
    plan = policy.plan(1.0)
    assert [(c.seq, c.first_layer) for c in plan] == [(2, 0)]
    policy.apply(plan, {2: 1}, 0.5)
    assert [(c.seq, c.count, c.first_layer) for c in policy.plan(1.5)] == [(2, 1, 0), (1, 400, 1)]


def test_who_cannot_make_it_or_has_no_room_interrupts_nobody() -> None:
    policy = measured(max_running=2)
    enter(policy, 1, 400, 9.0)
    policy.plan(0.0)
    policy.submit(2, Demand(tokens=300, first_token_by=2.0))  # 3 s of work
    assert not policy.should_interrupt(0.0)
    policy.remove(2)
    enter(policy, 3, 2, 30.0)
    policy.submit(4, Demand(tokens=10, first_token_by=1.0))
    policy.plan(0.0)
    assert not policy.should_interrupt(0.0), "all places are taken"


def test_decoding_bounds_how_long_prefills_run() -> None:
    policy = measured()
    enter(policy, 1, 400, 9.0)
    policy.plan(0.0)
    assert policy.interrupts_at() is None
    enter(policy, 2, 1, None)
    policy.plan(3.0)
    assert policy.interrupts_at() == 3.0 + policy.limits.step_target_s


def test_ranges_that_differ_take_turns() -> None:
    policy = measured()
    for seq in (1, 2):
        enter(policy, seq, 50, 9.0 + seq)
    plan = policy.plan(0.0)
    assert len(plan) == 2
    policy.apply(plan, {}, 0.1, suspended={1: 1, 2: 2})
    assert [(c.seq, c.first_layer) for c in policy.plan(0.1)] == [(1, 1)]


def test_the_hopeless_is_served_after_its_patience_under_a_stream_of_urgent_ones() -> None:
    policy = measured(max_running=1, patience_s=2.0)
    policy.submit(1, Demand(tokens=80, arrived_at=0.0, first_token_by=0.1))
    now, seq = 0.0, 1
    while now < 20:
        seq += 1
        policy.submit(seq, Demand(tokens=10, arrived_at=now, first_token_by=now + 5))
        policy.remove(seq - 5 if seq > 6 else -1)
        for admitted in policy.admit(lambda _seq: True, now):
            policy.start(admitted, computed=0, known=80 if admitted == 1 else 10)
        plan = policy.plan(now)
        policy.apply(plan, {chunk.seq: 1 for chunk in plan}, 0.1)
        if any(chunk.seq == 1 for chunk in plan):
            break
        for chunk in plan:
            policy.remove(chunk.seq)
        now += 0.1
    assert 2.0 < now < 2.5


def test_lower_priority_gives_way_only_when_no_room_is_left_and_not_again_at_once() -> None:
    policy = measured(max_running=2)
    enter(policy, 1, 100, None, priority=1)
    assert policy.preempt(0.0) == (), "nobody waits"
    enter(policy, 2, 100, None, priority=0)
    policy.submit(3, Demand(tokens=10, first_token_by=5.0, priority=1))
    policy.submit(4, Demand(tokens=10, first_token_by=5.0, priority=2))
    assert policy.preempt(0.0) == (2,)
    policy.requeue(2)
    assert policy.admit(lambda _seq: True, 0.0) == (4,)
    policy.submit(5, Demand(tokens=10, first_token_by=5.0, priority=2))
    for _ in range(PREEMPTION_GAP_STEPS):
        assert policy.preempt(0.0) == ()
        policy.apply((), {}, 0.0)
    assert policy.preempt(0.0) == (1,)


def test_the_preempted_go_before_newcomers_and_the_oldest_is_never_the_victim() -> None:
    policy = make_batcher(BatchLimits(max_running=3), n_layers=4)
    for seq in (1, 2, 3):
        enter(policy, seq, 5, None)
    policy.submit(4, Demand(tokens=5))
    assert (policy.victim(), policy.victim({3}), policy.victim({2, 3}), policy.victim({1, 2, 3})) == (3, 2, 1, None)
    policy.requeue(3)
    policy.requeue(2)
    policy.remove(1)
    assert policy.admit(lambda _seq: True, 0.0) == (2, 3, 4)


def test_without_a_deadline_there_is_nothing_to_be_late_for() -> None:
    order = ByUrgency(measured_pace(), patience_s=1)
    entry = Entry(seq=1, order=1, known=10**6, demand=Demand(tokens=10**6))
    assert order.due(entry) == math.inf
    assert not order.is_hopeless(entry, 1e9)
    assert Chunk(seq=1, start=0, count=4, is_last=True, first_layer=1).share(4, until=3) == 0.5
