"""Rates: never more than the limit in any window, the hint is right, and others are not touched."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.errors import QuotaExceeded
from covey.policy.rates import Rate, Rates
from covey.types.ids import TenantId

A, B = TenantId("a"), TenantId("b")


@given(st.integers(1, 20), st.lists(st.floats(0, 30), max_size=60))
def test_a_window_never_holds_more_than_twice_the_limit_and_the_hint_is_right(limit: int, steps: list[float]) -> None:
    """A bucket of a minute's worth passes at most what it holds and what flows in during the window."""
    rates = Rates({A: Rate(requests_per_minute=limit)}, now=0.0)
    now, passed = 0.0, []
    for step in steps:
        now += step
        try:
            rates.admit(A, now)
            passed.append(now)
        except QuotaExceeded as error:
            now += (error.retry_after_ms or 0) / 1000
            rates.admit(A, now)
            passed.append(now)
        rates.check()
    for start in passed:
        assert sum(start <= at < start + 60 for at in passed) <= 2 * limit + 1


def test_tokens_are_paid_afterwards() -> None:
    rates = Rates({A: Rate(tokens_per_minute=600)}, now=0.0)
    rates.admit(A, 0.0)
    rates.spend(A, 1200, 0.0)
    with pytest.raises(QuotaExceeded) as caught:
        rates.admit(A, 0.0)
    assert caught.value.retry_after_ms == 60_001
    rates.admit(A, 60.0)
    rates.admit(B, 0.0)
