"""What loading costs: the start values hold until requests say otherwise, and the line finds what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.policy.kv_cost import KvCost, Took
from covey.policy.routing import Candidate, RouteConfig, Router
from covey.types.ids import WorkerId

S_PER_TOKEN = 0.002
PREFILL = Took(computed_tokens=1000, prefill_s=1000 * S_PER_TOKEN, loaded_tokens=0, kv_wait_s=0.0)


def loaded(tokens: int, cost: float) -> Took:
    """A load of `tokens` that took as long as computing `cost` tokens."""
    return replace(PREFILL, computed_tokens=1, loaded_tokens=tokens, kv_wait_s=cost * S_PER_TOKEN)


@given(fixed=st.floats(0, 200), factor=st.floats(0, 0.9))
def test_it_starts_with_what_it_is_told(fixed: float, factor: float) -> None:
    cost = KvCost(fixed_tokens=fixed, factor=factor)
    assert cost.load_tokens(500) == pytest.approx(fixed + 500 * factor, abs=1e-3)
    assert cost.break_even_tokens == pytest.approx(fixed / (1 - factor), abs=0.01)
    assert cost.load_tokens(0) == 0
    cost.check()


@given(fixed=st.floats(0.5, 200), factor=st.floats(0, 2), start=st.floats(0, 1))
def test_it_finds_the_line_that_requests_show(fixed: float, factor: float, start: float) -> None:
    cost = KvCost(fixed_tokens=4, factor=start)
    cost.observe(PREFILL)
    for index in range(300):
        tokens = (37 * index) % 900 + 32
        cost.observe(loaded(tokens, fixed + factor * tokens))
    assert cost.load_tokens(500) == pytest.approx(fixed + 500 * factor, rel=0.02, abs=2)
    assert (cost.break_even_tokens == float("inf")) <= (factor > 0.95)
    cost.check()


@given(st.lists(st.builds(Took, computed_tokens=st.integers(0, 10**6), prefill_s=st.floats(0, 1e4),
                          loaded_tokens=st.integers(0, 10**6), kv_wait_s=st.floats(0, 1e4)), max_size=60))  # fmt: skip
def test_whatever_is_observed_the_cost_is_sane(seen: list[Took]) -> None:
    cost = KvCost(fixed_tokens=4, factor=0.05)
    for took in seen:
        cost.observe(took)
        cost.check()
    costs = [cost.load_tokens(tokens) for tokens in (0, 1, 64, 1000, 100_000)]
    assert costs == sorted(costs)
    assert all(0 <= cost.saved_tokens(tokens) <= tokens for tokens in (0, 1, 64, 1000))


def test_a_split_waits_for_the_length_from_which_loading_pays() -> None:
    router = Router(RouteConfig(split_min_tokens=0, handover_tokens=0, load_tokens=300, load_factor=0.1))
    busy = [Candidate(worker=WorkerId("d"), running=8)]
    idle = [Candidate(worker=WorkerId("p"))]

    def is_split(prompt: int) -> bool:
        route = router.choose(prefill=idle, decode=busy, prompt_tokens=prompt)
        assert route is not None
        return route.prefill is not None

    assert router.kv.break_even_tokens == pytest.approx(333.3, abs=1)
    assert not is_split(330)
    assert is_split(1500)
    router.observe(PREFILL)
    for index in range(200):
        router.observe(loaded(100 + 10 * (index % 50), 1.0))
    assert is_split(100), "loading has become cheap"


def test_what_is_stored_counts_less_than_what_is_cached_and_nothing_when_loading_is_dear() -> None:
    cheap = Router(RouteConfig(load_tokens=4, load_factor=0.05))
    dear = Router(RouteConfig(load_tokens=0, load_factor=1.5))
    plain, stored, cached = (
        Candidate(worker=WorkerId("a")),
        Candidate(worker=WorkerId("b"), stored_tokens=640),
        Candidate(worker=WorkerId("c"), cached_tokens=640),
    )
    assert cheap.work(cached, 1000) == 360
    assert cheap.work(stored, 1000) == pytest.approx(360 + 4 + 32, abs=0.1)
    assert cheap.work(plain, 1000) == dear.work(stored, 1000) == 1000
    assert cheap.best([plain, stored], 1000) == stored
