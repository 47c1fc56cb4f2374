"""LAPS: the window of short prompts, early dispatch, adaptation, and turns for the long ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.policy.batch_limits import BatchLimits
from covey.policy.batch_policies import make_batcher
from covey.policy.batching import Batcher
from covey.policy.laps import LapsLimits
from covey.policy.ledger import Demand

LAPS = LapsLimits(short_max=50, depth_max=4, wait_max_s=1.0, guard_s=0.0, hurry_s=0.1, turns_max=2)


def make() -> Batcher:
    limits = BatchLimits(batching="laps", max_tokens=300, max_running=40, chunk_min=100, queue_max=99)
    return make_batcher(limits, n_layers=4, laps=LAPS)


def enter(policy: Batcher, seq: int, tokens: int, *, now: float = 0.0, due: float | None = None) -> None:
    policy.submit(seq, Demand(tokens=tokens, arrived_at=now, first_token_by=due))
    for admitted in policy.admit(lambda _seq: True, now):
        policy.start(admitted, computed=0, known=tokens)


def step(policy: Batcher, now: float) -> list[int]:
    plan = policy.plan(now)
    policy.apply(plan, {chunk.seq: 1 for chunk in plan if chunk.is_drawn}, 0.0)
    for chunk in plan:
        if chunk.is_drawn:
            policy.remove(chunk.seq)
    return [chunk.seq for chunk in plan]


def test_short_ones_gather_until_the_window_closes() -> None:
    policy = make()
    enter(policy, 1, 10)
    assert step(policy, 0.0) == []
    assert policy.wakes_at() == 1.0
    enter(policy, 2, 10, now=0.5)
    assert step(policy, 0.9) == []
    assert step(policy, 1.0) == [1, 2]
    assert policy.wakes_at() is None


def test_a_deep_enough_batch_goes_at_once() -> None:
    policy = make()
    for seq in range(4):
        enter(policy, seq, 10)
    assert step(policy, 0.0) == [0, 1, 2, 3]


def test_a_near_deadline_sends_the_batch_early() -> None:
    policy = make()
    enter(policy, 1, 10)
    assert step(policy, 0.0) == []
    enter(policy, 2, 10, now=0.1, due=0.4)
    assert step(policy, 0.1) == []
    assert policy.wakes_at() == pytest.approx(0.3)
    assert step(policy, 0.31) == [1, 2]


def test_what_does_not_fit_goes_in_the_next_step_without_waiting() -> None:
    policy = make()
    for seq in range(4):
        enter(policy, seq, 40)
    assert step(policy, 0.0) == [0, 1, 2]
    assert step(policy, 0.0) == [2, 3]


def test_long_ones_run_while_the_window_is_open_and_get_their_turn_between_batches() -> None:
    policy = make()
    enter(policy, 1, 5000)
    enter(policy, 2, 10)
    assert step(policy, 0.0) == [1]
    prefilled = []
    for turn in range(1, 20):
        for seq in range(10 * turn, 10 * turn + 4):
            enter(policy, seq, 20, now=1.0 + turn)
        prefilled.append(step(policy, 1.0 + turn))
    streaks = "".join("L" if seqs == [1] else "S" for seqs in prefilled)
    assert "SSS" not in streaks
    assert "L" in streaks
    assert "SS" in streaks


def test_the_aim_follows_how_many_come() -> None:
    policy = make()
    enter(policy, 1, 10)
    step(policy, 0.0)
    assert step(policy, 1.0) == [1]  # one came in a whole window: the next one does not wait for more
    enter(policy, 2, 10, now=2.0)
    assert step(policy, 2.0) == [2]


def test_short_ones_enter_first_until_a_long_one_has_waited_long_enough() -> None:
    policy = make()
    policy.submit(1, Demand(tokens=5000, arrived_at=0.0))
    policy.submit(2, Demand(tokens=10, arrived_at=20.0))
    assert policy.admit(lambda seq: seq == 2, 21.0) == (2,)
    policy.submit(3, Demand(tokens=10, arrived_at=31.0))
    assert policy.admit(lambda seq: seq == 3, 31.0) == ()
    assert policy.admit(lambda _seq: True, 31.0) == (1, 3)


@given(st.lists(st.tuples(st.floats(0, 0.5), st.integers(2, 50)), min_size=1, max_size=30))
def test_nobody_short_waits_longer_than_the_window(arrivals: list[tuple[float, int]]) -> None:
    policy = make()
    now = 0.0
    came: dict[int, float] = {}
    for seq, (gap_s, tokens) in enumerate(arrivals):
        until = now + gap_s
        while (wakes_at := policy.wakes_at()) is not None and wakes_at <= until:
            now = max(now, wakes_at)
            for done in step(policy, now):
                assert now - came.pop(done, now) <= LAPS.wait_max_s + 1e-9
        now = until
        enter(policy, seq, tokens, now=now)
        came[seq] = now
        while done_now := step(policy, now):
            for done in done_now:
                came.pop(done, None)
    while came:
        wakes_at = policy.wakes_at()
        assert wakes_at is not None, "a short prompt is forgotten"
        for done in step(policy, wakes_at):
            came.pop(done, None)
