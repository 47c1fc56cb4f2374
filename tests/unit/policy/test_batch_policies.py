"""What every batching policy keeps to: one machine for all of them, with drafts, interrupts and preemption."""

from __future__ import annotations

import random
from time import perf_counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from covey.errors import Overloaded
from covey.policy.batch_limits import Batching, BatchLimits
from covey.policy.batch_policies import make_batcher
from covey.policy.batching import Batcher
from covey.policy.chunk import Chunk
from covey.policy.ledger import Demand

N_LAYERS = 6
NAMES: tuple[Batching, ...] = get_args(Batching)


def make(name: Batching, *, max_tokens: int = 40, max_running: int = 5, patience_s: float = 30.0) -> Batcher:
    limits = BatchLimits(
        batching=name,
        max_tokens=max_tokens,
        max_running=max_running,
        queue_max=8,
        chunk_min=4,
        step_target_s=0.02,
        prompt_tokens_max=64,
        patience_s=patience_s,
    )
    return make_batcher(limits, n_layers=N_LAYERS)


class Sequences:
    """What a runner and an engine know: tokens, what is computed, what stopped between layers."""

    def __init__(self, policy: Batcher) -> None:
        self.policy = policy
        self.known: dict[int, int] = {}
        self.computed: dict[int, int] = {}
        self.drawn: dict[int, int] = {}
        self.stopped: dict[int, Chunk] = {}

    def step(self, now: float, drafts: dict[int, int], *, stop_at: int | None, hits: int, seconds: float) -> None:
        """Check a plan against what a runner accepts, then run it, stopping prefills after `stop_at` layers."""
        plan = self.policy.plan(now, drafts)
        assert len({chunk.seq for chunk in plan}) == len(plan)
        assert sum(chunk.tokens for chunk in plan) <= self.policy.limits.step_tokens_max
        ranges = {(c.first_layer, c.last_layer) for c in plan} - {(0, None)}
        assert len(ranges) <= 1, "partial rows share a range"
        drawn: dict[int, int] = {}
        suspended: dict[int, int] = {}
        for chunk in plan:
            self._check(chunk, drafts)
            end = N_LAYERS if chunk.last_layer is None else chunk.last_layer
            stop = chunk.first_layer + stop_at if stop_at and chunk.count > 1 else N_LAYERS
            if min(stop, end) < N_LAYERS:
                self.stopped[chunk.seq] = chunk
                suspended[chunk.seq] = min(stop, end)
                continue
            self.stopped.pop(chunk.seq, None)
            draws = 1 + min(hits, chunk.draft) if chunk.is_last else 0
            if draws:
                drawn[chunk.seq] = draws
                self.drawn[chunk.seq] += draws
            self.known[chunk.seq] += draws
            self.computed[chunk.seq] = chunk.start + chunk.count + max(0, draws - 1)
        self.policy.apply(plan, drawn, seconds, suspended=suspended)
        for seq, computed in self.computed.items():
            assert self.policy.computed(seq) == computed

    def forget(self, seq: int) -> None:
        for place in (self.computed, self.stopped, self.drawn, self.known):
            place.pop(seq, None)

    def _check(self, chunk: Chunk, drafts: dict[int, int]) -> None:
        assert chunk.start == self.computed[chunk.seq]
        assert chunk.count >= 1
        assert chunk.is_last == (chunk.start + chunk.count == self.known[chunk.seq])
        assert 0 <= chunk.draft <= drafts.get(chunk.seq, 0)
        is_partial = (chunk.first_layer, chunk.last_layer) != (0, None)
        assert not chunk.draft or (chunk.is_last and chunk.count == 1 and not is_partial)
        assert 0 <= chunk.first_layer < (N_LAYERS if chunk.last_layer is None else chunk.last_layer) <= N_LAYERS
        before = self.stopped.get(chunk.seq)
        assert (before is None) == (chunk.first_layer == 0)
        assert before is None or (before.start, before.count, before.is_last) == (
            chunk.start,
            chunk.count,
            chunk.is_last,
        )


class PolicyMachine(RuleBasedStateMachine):
    """Sequences come, run, are cut short by interrupts, swapped out, paused and removed in any order."""

    @initialize(name=st.sampled_from(NAMES), max_tokens=st.integers(8, 48))
    def begin(self, name: Batching, max_tokens: int) -> None:
        self.policy = make(name, max_tokens=max_tokens)
        self.runner = Sequences(self.policy)
        self.count = 0
        self.now = 0.0
        self.waiting: set[int] = set()
        self.admitted: set[int] = set()
        self.paused: set[int] = set()

    @rule(length=st.integers(1, 90), due=st.none() | st.floats(-1, 3), priority=st.integers(0, 2))
    def submit(self, length: int, due: float | None, priority: int) -> None:
        self.count += 1
        demand = Demand(
            tokens=length,
            arrived_at=self.now,
            first_token_by=None if due is None else self.now + due,
            priority=priority,
        )
        try:
            self.policy.submit(self.count, demand)
        except Overloaded:
            assert self.policy.waiting >= 8
        else:
            self.runner.known[self.count], self.runner.drawn[self.count] = length, 0
            self.waiting.add(self.count)

    @rule(limit=st.integers(0, 4))
    def admit(self, limit: int) -> None:
        left = iter(range(limit))
        admitted = self.policy.admit(lambda _seq: next(left, None) is not None, self.now)
        assert set(admitted) <= self.waiting
        self.waiting -= set(admitted)
        self.admitted |= set(admitted)

    @precondition(lambda self: self.admitted)
    @rule(share=st.floats(0, 0.99))
    def start(self, share: float) -> None:
        seq = min(self.admitted)
        self.admitted.discard(seq)
        self.runner.computed[seq] = int(share * self.runner.known[seq])
        self.policy.start(seq, computed=self.runner.computed[seq], known=self.runner.known[seq])

    @rule(
        seconds=st.floats(0, 0.5),
        stop_at=st.none() | st.integers(1, N_LAYERS),
        offer=st.integers(0, 6),
        hits=st.integers(0, 6),
    )
    def step(self, seconds: float, stop_at: int | None, offer: int, hits: int) -> None:
        self.now += seconds
        self.runner.step(self.now, dict.fromkeys(self.runner.known, offer), stop_at=stop_at, hits=hits, seconds=seconds)

    @rule()
    def preempt(self) -> None:
        for seq in self.policy.preempt(self.now):
            assert self.policy.waiting
            self._swap_out(seq)

    @precondition(lambda self: self.runner.computed)
    @rule(spare=st.booleans())
    def run_out(self, spare: bool) -> None:
        running = set(self.runner.computed)
        seq = self.policy.victim({min(running)} if spare else ())
        assert (seq is None) == (spare and len(running) == 1)
        if seq is not None:
            self._swap_out(seq)

    @precondition(lambda self: self.runner.computed)
    @rule(index=st.integers(0, 9))
    def toggle_pause(self, index: int) -> None:
        seq = sorted(self.runner.computed)[index % len(self.runner.computed)]
        self.paused ^= {seq}
        self.policy.pause(seq, is_paused=seq in self.paused)

    @precondition(lambda self: self.runner.known)
    @rule(index=st.integers(0, 99))
    def remove(self, index: int) -> None:
        seq = sorted(self.runner.known)[index % len(self.runner.known)]
        self.policy.remove(seq)
        self.runner.forget(seq)
        for place in (self.waiting, self.admitted, self.paused):
            place.discard(seq)

    @invariant()
    def holds(self) -> None:
        self.policy.check()
        assert self.policy.waiting == len(self.waiting)
        assert self.policy.waiting + self.policy.running == len(self.runner.known)
        computed = self.runner.computed
        left = sum(self.runner.known[seq] for seq in self.runner.known if seq not in computed)
        left += sum(n for seq in computed if (n := self.runner.known[seq] - computed[seq]) > 1)
        assert self.policy.queued_tokens == left
        self.policy.should_interrupt(self.now)

    def _swap_out(self, seq: int) -> None:
        self.policy.requeue(seq)
        self.runner.computed.pop(seq)
        self.runner.stopped.pop(seq, None)
        self.paused.discard(seq)
        self.waiting.add(seq)


PolicyMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestPolicies = PolicyMachine.TestCase

jobs = st.tuples(st.integers(1, 150), st.none() | st.floats(0.01, 3), st.integers(0, 2))


@pytest.mark.parametrize("name", NAMES)
@given(work=st.lists(jobs, min_size=1, max_size=8), seed=st.integers(0, 999), unrest=st.floats(0, 0.5))
@settings(max_examples=40)
def test_everybody_finishes_whatever_is_interrupted_and_swapped(
    name: Batching, work: list[tuple[int, float | None, int]], seed: int, unrest: float
) -> None:
    dice = random.Random(seed)
    policy = make(name, max_running=3)
    runner = Sequences(policy)
    now = 0.0
    for seq, (length, due, priority) in enumerate(work):
        policy.submit(seq, Demand(tokens=length, first_token_by=due, priority=priority))
        runner.known[seq], runner.drawn[seq] = length, 0
    swaps = 8
    for _ in range(4000):
        for seq in policy.admit(lambda _seq: True, now):
            runner.computed[seq] = 0
            policy.start(seq, computed=0, known=runner.known[seq])
        stop_at = dice.randint(1, N_LAYERS) if dice.random() < unrest else None
        runner.step(now, {}, stop_at=stop_at, hits=0, seconds=0.01)
        now += 0.01
        for seq in [seq for seq, drawn in runner.drawn.items() if drawn >= 3]:
            policy.remove(seq)
            runner.forget(seq)
        chosen = (*policy.preempt(now), *([policy.victim()] if swaps and dice.random() < unrest else []))
        for loser in dict.fromkeys(chosen):
            if loser is not None:
                swaps -= 1
                policy.requeue(loser)
                runner.computed.pop(loser)
                runner.stopped.pop(loser, None)
        policy.check()
        if not runner.known:
            break
    assert not runner.known, "somebody starves"
    assert policy.waiting == policy.running == 0


def plan_s(name: Batching, *, running: int, waiting: int) -> float:
    """Seconds of a plan, the best of several, with half of the running decoding."""
    limits = BatchLimits(batching=name, max_tokens=2 * running, max_running=running, queue_max=waiting)
    policy = make_batcher(limits, n_layers=N_LAYERS)
    for seq in range(running + waiting):
        policy.submit(seq, Demand(tokens=1 + 99 * (seq % 2), first_token_by=float(seq)))
        for admitted in policy.admit(lambda seq: seq < running, 0.0):
            policy.start(admitted, computed=0, known=1 + 99 * (admitted % 2))
    took = []
    for _ in range(15):
        began = perf_counter()
        policy.plan(0.0)
        took.append(perf_counter() - began)
    return min(took)


@pytest.mark.parametrize("name", NAMES)
def test_planning_grows_no_faster_than_what_is_planned(name: Batching) -> None:
    small = plan_s(name, running=64, waiting=256)
    large = plan_s(name, running=640, waiting=2560)
    assert large <= 40 * small, f"10 times the work took {large / small:.0f} times as long"
