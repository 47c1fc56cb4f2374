"""The batcher: order, budget, progress; as a machine whose sequences come, run, pause and go."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from covey.errors import Overloaded
from covey.policy.batch_limits import BatchLimits
from covey.policy.batch_policies import make_batcher
from covey.policy.batching import Batcher
from covey.policy.ledger import Demand


def batcher(*, max_tokens: int = 32, max_running: int = 4, queue_max: int = 4, chunk_min: int = 64) -> Batcher:
    limits = BatchLimits(max_tokens=max_tokens, max_running=max_running, queue_max=queue_max, chunk_min=chunk_min)
    return make_batcher(limits, n_layers=4)


def admit_all(policy: Batcher) -> tuple[int, ...]:
    return policy.admit(lambda _seq: True, 0.0)


def test_limits_that_would_starve_prefill_are_refused() -> None:
    with pytest.raises(ValueError, match="starve"):
        BatchLimits(max_tokens=8, max_running=8)
    with pytest.raises(ValueError, match="positive"):
        BatchLimits(chunk_min=0)


def test_admission_keeps_the_order_and_stops_at_the_first_without_room() -> None:
    policy = batcher()
    for seq in (1, 2, 3):
        policy.submit(seq, Demand(tokens=10))
    assert policy.admit(lambda seq: seq != 2, 0.0) == (1,)
    assert policy.admit(lambda _seq: True, 0.0) == (2, 3)


def test_a_full_queue_refuses_with_a_hint() -> None:
    policy = batcher(queue_max=2)
    policy.submit(1, Demand(tokens=10))
    policy.submit(2, Demand(tokens=10))
    with pytest.raises(Overloaded) as caught:
        policy.submit(3, Demand(tokens=10))
    assert caught.value.retry_after_ms is not None
    assert caught.value.retry_after_ms > 0


def test_decoding_goes_first_and_prefill_gets_the_rest_in_order() -> None:
    policy = batcher()
    for seq, (computed, known) in {1: (9, 10), 2: (0, 20), 3: (0, 30)}.items():
        policy.submit(seq, Demand(tokens=known))
        admit_all(policy)
        policy.start(seq, computed=computed, known=known)
    plan = policy.plan(0.0)
    assert [(c.seq, c.start, c.count, c.is_last) for c in plan] == [
        (1, 9, 1, True),
        (2, 0, 20, True),
        (3, 0, 11, False),
    ]
    policy.apply(plan, {1: 1, 2: 1}, 0.01)
    assert [(c.seq, c.start, c.count) for c in policy.plan(0.0)] == [(1, 10, 1), (2, 20, 1), (3, 11, 19)]


def test_paused_sequences_are_left_out() -> None:
    policy = batcher()
    policy.submit(1, Demand(tokens=5))
    admit_all(policy)
    policy.start(1, computed=0, known=5)
    policy.pause(1, is_paused=True)
    assert policy.plan(0.0) == ()
    policy.pause(1, is_paused=False)
    assert policy.plan(0.0)[0].count == 5


def test_chunks_shrink_to_the_target_of_a_slow_machine() -> None:
    policy = make_batcher(BatchLimits(max_tokens=512, max_running=8, step_target_s=0.1, chunk_min=16), n_layers=4)
    policy.submit(1, Demand(tokens=5000))
    admit_all(policy)
    policy.start(1, computed=0, known=5000)
    for _ in range(20):
        plan = policy.plan(0.0)
        policy.apply(plan, {}, sum(c.count for c in plan) / 400)  # 400 tokens a second
    assert 35 <= policy.plan(0.0)[0].count <= 45


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(5, 40), st.integers(1, 4))
def test_everybody_finishes_within_the_work_there_is(lengths: list[int], max_tokens: int, max_running: int) -> None:
    policy = batcher(max_tokens=max_tokens, max_running=max_running, queue_max=99, chunk_min=1)
    for seq, length in enumerate(lengths):
        policy.submit(seq, Demand(tokens=length))
    outputs = dict.fromkeys(range(len(lengths)), 0)
    steps = 0
    while policy.waiting or policy.running:
        for seq in admit_all(policy):
            policy.start(seq, computed=0, known=lengths[seq])
        plan = policy.plan(0.0)
        assert plan
        assert sum(chunk.count for chunk in plan) <= max_tokens
        sampled = {chunk.seq for chunk in plan if chunk.is_last}
        policy.apply(plan, dict.fromkeys(sampled, 1), 0.0)
        for seq in sampled:
            outputs[seq] += 1
            if outputs[seq] == 3:
                policy.remove(seq)
        policy.check()
        steps += 1
        assert steps <= sum(lengths) + 3 * len(lengths)
    assert set(outputs.values()) == {3}


class BatchMachine(RuleBasedStateMachine):
    """Any interleaving keeps every sequence in one place and every chunk in line with what was computed."""

    @initialize(max_tokens=st.integers(6, 40))
    def make(self, max_tokens: int) -> None:
        self.policy = batcher(max_tokens=max_tokens, max_running=5, queue_max=6, chunk_min=2)
        self.count = 0
        self.known: dict[int, int] = {}
        self.computed: dict[int, int] = {}
        self.admitted: set[int] = set()

    @rule(length=st.integers(1, 50))
    def submit(self, length: int) -> None:
        self.count += 1
        try:
            self.policy.submit(self.count, Demand(tokens=length))
        except Overloaded:
            assert self.policy.waiting >= 6
        else:
            self.known[self.count] = length

    @rule(limit=st.integers(0, 3))
    def admit(self, limit: int) -> None:
        left = iter(range(limit))
        self.admitted |= set(self.policy.admit(lambda _seq: next(left, None) is not None, 0.0))

    @precondition(lambda self: self.admitted)
    @rule(share=st.floats(0, 0.99))
    def start(self, share: float) -> None:
        seq = min(self.admitted)
        self.admitted.discard(seq)
        self.computed[seq] = int(share * self.known[seq])
        self.policy.start(seq, computed=self.computed[seq], known=self.known[seq])

    @precondition(lambda self: self.known)
    @rule(index=st.integers(0, 99))
    def remove(self, index: int) -> None:
        seq = sorted(self.known)[index % len(self.known)]
        self.policy.remove(seq)
        self.known.pop(seq)
        self.computed.pop(seq, None)
        self.admitted.discard(seq)

    @rule(seconds=st.floats(0, 1))
    def step(self, seconds: float) -> None:
        plan = self.policy.plan(0.0)
        assert len({chunk.seq for chunk in plan}) == len(plan)
        assert sum(chunk.count for chunk in plan) <= self.policy.limits.max_tokens
        assert bool(plan) == bool(self.computed)
        for chunk in plan:
            assert chunk.start == self.computed[chunk.seq]
            assert chunk.count >= 1
            self.computed[chunk.seq] += chunk.count
            assert chunk.is_last == (self.computed[chunk.seq] == self.known[chunk.seq])
            self.known[chunk.seq] += chunk.is_last
        self.policy.apply(plan, {chunk.seq: 1 for chunk in plan if chunk.is_last}, seconds)

    @invariant()
    def holds(self) -> None:
        self.policy.check()
        assert self.policy.waiting + self.policy.running == len(self.known)


BatchMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBatch = BatchMachine.TestCase


def test_drafts_fill_what_decoding_leaves_and_leave_prefill_its_least() -> None:
    policy = batcher(max_tokens=16, max_running=4, chunk_min=6)
    for seq in (1, 2, 3):
        policy.submit(seq, Demand(tokens=10))
        admit_all(policy)
        policy.start(seq, computed=9, known=10)
    offers = {1: 8, 2: 8, 3: 8}
    assert [(c.seq, c.draft) for c in policy.plan(0.0, offers)] == [(1, 8), (2, 5), (3, 0)]
    policy.submit(4, Demand(tokens=20))
    admit_all(policy)
    policy.start(4, computed=0, known=20)
    plan = policy.plan(0.0, offers)
    assert [(c.seq, c.count, c.draft) for c in plan] == [(1, 1, 7), (2, 1, 0), (3, 1, 0), (4, 6, 0)]
    policy.apply(plan, {1: 5, 2: 1, 3: 1}, 0.01)
    assert [policy.computed(seq) for seq in (1, 2, 3, 4)] == [14, 10, 10, 6]
    assert [(c.seq, c.start, c.count) for c in policy.plan(0.0)][:2] == [(1, 14, 1), (2, 10, 1)]


def test_a_draw_that_got_lost_is_drawn_again() -> None:
    policy = batcher()
    policy.submit(1, Demand(tokens=5))
    admit_all(policy)
    policy.start(1, computed=0, known=5)
    policy.apply(policy.plan(0.0), {}, 0.01)
    assert [(c.start, c.count, c.is_drawn) for c in policy.plan(0.0)] == [(4, 1, True)]


def test_what_was_suspended_comes_again_as_it_was_even_when_the_budget_shrank() -> None:
    policy = batcher(max_tokens=32, max_running=4, chunk_min=4)
    for seq in (1, 2):
        policy.submit(seq, Demand(tokens=100))
        admit_all(policy)
    policy.start(1, computed=0, known=100)
    plan = policy.plan(0.0)
    assert [(c.start, c.count) for c in plan] == [(0, 32)]
    policy.start(2, computed=99, known=100)
    policy.apply(plan, {}, 10.0, suspended={1: 2})
    plan = policy.plan(0.0)
    assert [(c.seq, c.start, c.count, c.first_layer) for c in plan] == [(2, 99, 1, 0), (1, 0, 32, 2)]
    assert sum(c.tokens for c in plan) <= policy.limits.step_tokens_max
    policy.apply(plan, {2: 1}, 10.0)
    assert policy.computed(1) == 32
