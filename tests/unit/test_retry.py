"""Backoff stays in bounds, the budget bounds retries, the breaker sends one probe."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.retry import Attempt, Backoff, Breaker, BreakerState, RetryBudget


@given(attempt=st.integers(0, 10_000), seed=st.integers(), hint=st.none() | st.integers(0, 60_000))
def test_a_delay_lies_between_the_hint_and_the_ceiling_above_it(attempt: int, seed: int, hint: int | None) -> None:
    backoff = Backoff(base_s=0.1, ceiling_s=3)
    delay_s = backoff.delay_s(attempt, Random(seed), retry_after_ms=hint)
    floor_s = (hint or 0) / 1000
    assert floor_s <= delay_s <= floor_s + min(3, 0.1 * 2.0 ** min(attempt, 100))


def test_bounds_double_up_to_the_ceiling() -> None:
    backoff = Backoff(base_s=0.5, ceiling_s=3)
    assert [backoff.bound_s(n) for n in range(5)] == [0.5, 1, 2, 3, 3]


def test_jitter_is_full() -> None:
    rng = Random(7)
    delays = [Backoff(base_s=1, ceiling_s=1).delay_s(0, rng) for _ in range(1000)]
    assert min(delays) < 0.05
    assert max(delays) > 0.95
    assert 0.45 < sum(delays) / 1000 < 0.55


@pytest.mark.parametrize("wrong", [{"base_s": 0.0}, {"base_s": 3.0, "ceiling_s": 2.0}, {"factor": 0.5}])
def test_a_backoff_makes_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="backoff"):
        Backoff(**wrong)


@given(st.lists(st.booleans(), max_size=400), st.floats(0, 1), st.floats(0, 20))
def test_retries_never_exceed_their_share(events: list[bool], ratio: float, burst: float) -> None:
    budget = RetryBudget(ratio=ratio, burst=burst)
    requests = retries = 0
    for is_request in events:
        if is_request:
            budget.record_request()
            requests += 1
        else:
            allowed = budget.can_retry()
            assert budget.retry() is allowed
            retries += allowed
        assert 0 <= budget.tokens <= burst
        assert retries <= burst + ratio * requests + 1e-6


def test_the_budget_recovers_with_traffic() -> None:
    budget = RetryBudget(ratio=0.25, burst=1)
    assert budget.retry()
    assert not budget.retry()
    for _ in range(4):
        budget.record_request()
    assert budget.retry()


def opened(breaker: Breaker, now: float = 0) -> Breaker:
    while breaker.state(now) is BreakerState.CLOSED:
        attempt = breaker.attempt(now)
        assert attempt is not None
        breaker.fail(attempt, now)
    return breaker


def take(breaker: Breaker, now: float) -> Attempt:
    attempt = breaker.attempt(now)
    assert attempt is not None
    return attempt


def test_consecutive_failures_open_it_and_a_success_resets_the_count() -> None:
    breaker = Breaker(failures=2)
    breaker.fail(take(breaker, 0), 0)
    breaker.succeed(take(breaker, 0))
    breaker.fail(take(breaker, 0), 0)
    assert breaker.state(0) is BreakerState.CLOSED
    breaker.fail(take(breaker, 0), 0)
    assert breaker.state(0) is BreakerState.OPEN
    assert breaker.attempt(0.5) is None


def test_one_probe_decides() -> None:
    breaker = opened(Breaker(failures=2, open_s=1))
    probe = take(breaker, 1)
    assert breaker.state(1) is BreakerState.HALF_OPEN
    assert breaker.attempt(1) is None, "one probe at a time"
    breaker.fail(probe, 1.5)
    assert breaker.attempt(2.4) is None, "a failed probe opens it for the whole time again"
    breaker.succeed(take(breaker, 2.5))
    assert breaker.state(2.5) is BreakerState.CLOSED


def test_a_lost_probe_frees_its_slot() -> None:
    breaker = opened(Breaker(open_s=1, probe_s=5))
    lost = take(breaker, 1)
    assert breaker.attempt(5.9) is None
    second = take(breaker, 6)
    breaker.fail(lost, 6.1)
    assert breaker.state(6.1) is BreakerState.HALF_OPEN, "the lost probe's answer comes too late to count"
    breaker.succeed(second)
    assert breaker.state(6.2) is BreakerState.CLOSED


def test_a_cancelled_probe_may_be_sent_again_at_once() -> None:
    breaker = opened(Breaker(open_s=1))
    breaker.cancel(take(breaker, 1))
    assert breaker.attempt(1) is not None


def test_answers_from_before_a_change_are_ignored() -> None:
    breaker = Breaker(failures=1, open_s=1)
    early, late = take(breaker, 0), take(breaker, 0)
    breaker.fail(early, 0)
    breaker.succeed(late)
    assert breaker.state(0.5) is BreakerState.OPEN
    breaker.succeed(take(breaker, 1))
    breaker.fail(late, 1)
    assert breaker.state(1) is BreakerState.CLOSED


@given(st.lists(st.tuples(st.sampled_from(["attempt", "succeed", "fail", "cancel"]), st.floats(0, 2)), max_size=80))
def test_at_most_one_probe_is_out(history: list[tuple[str, float]]) -> None:
    breaker = Breaker(failures=2, open_s=1, probe_s=3)
    out: list[Attempt] = []
    now, last_probe_at = 0.0, float("-inf")
    for act, wait_s in history:
        now += wait_s
        if act == "attempt":
            before = breaker.state(now)
            attempt = breaker.attempt(now)
            if attempt is None:
                assert before is not BreakerState.CLOSED
            else:
                out.append(attempt)
                if before is BreakerState.HALF_OPEN:
                    last_probe_at = now
        elif out:
            reported = out.pop(0)
            if act == "succeed":
                breaker.succeed(reported)
            elif act == "fail":
                breaker.fail(reported, now)
            else:
                breaker.cancel(reported)
        if breaker._state is BreakerState.HALF_OPEN and now < last_probe_at + 3:
            assert not breaker.can_attempt(now)
