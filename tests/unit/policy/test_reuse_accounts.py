"""False-hit estimate, break-even, relaxation and the bound of an entry, whatever happens to them."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.policy.break_even import BreakEven, BreakEvenConfig, break_even
from covey.policy.entry_bound import OBSERVATIONS_MIN, EntryBounds, fit_entry
from covey.policy.false_hits import FalseHits, wilson
from covey.policy.relaxation import Relaxation, RelaxationBudget, RelaxationConfig
from covey.policy.reuse import Candidate, CategoryPolicy, ReuseMode, ReusePolicy, ReuseView


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_the_interval_holds_the_share_and_shrinks(wrong: int, more: int) -> None:
    few, many = wilson(wrong, wrong + more), wilson(10 * wrong, 10 * (wrong + more))
    assert 0.0 <= few.low <= few.share <= few.high <= 1.0
    assert many.high - many.low <= few.high - few.low


def test_wilson_is_the_known_interval_and_honest_without_verdicts() -> None:
    found = wilson(3, 100)
    assert found.low == pytest.approx(0.01025, abs=1e-4)
    assert found.high == pytest.approx(0.08452, abs=1e-4)
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, covered = Random(5), 0
    for _ in range(400):
        wrong = sum(rng.random() < 0.03 for _ in range(200))
        found = wilson(wrong, 200)
        covered += found.low <= 0.03 <= found.high
    assert covered >= 0.92 * 400


@given(st.lists(st.booleans(), max_size=300))
def test_the_estimate_follows_what_the_traffic_is_now(verdicts: list[bool]) -> None:
    hits = FalseHits(half_life=20.0)
    for wrong in verdicts:
        hits.observe(wrong=wrong)
        hits.check()
    for _ in range(200):
        hits.observe(wrong=True)
    assert hits.estimate().share > 0.95


def test_break_even_is_the_published_range() -> None:
    assert break_even(0.030, 0.200) == pytest.approx(0.15)
    assert break_even(0.0125, 2.0) == pytest.approx(0.00625)
    assert break_even(0.01, 0.001, fetch_s=0.002) == math.inf


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.floats(0, 10)), max_size=400))
def test_break_even_keeps_its_invariants(course: list[tuple[bool, float, float]]) -> None:
    account = BreakEven(BreakEvenConfig(lookups_min=10, trial_every=3))
    for hit, overhead_s, model_s in course:
        if account.can_look_up():
            account.looked_up(hit=hit, overhead_s=overhead_s)
            account.answered(model_s=model_s)
        account.check()


def test_a_category_that_does_not_pay_is_suspended_and_comes_back() -> None:
    account = BreakEven(BreakEvenConfig(lookups_min=50, half_life=100.0, trial_every=5))
    for _ in range(60):  # no hit at all
        account.looked_up(hit=False, overhead_s=0.01)
        account.answered(model_s=0.1)
    suspended = [account.is_suspended]
    trials = [account.can_look_up() for _ in range(10)]
    assert trials.count(True) == 2
    for number in range(60):  # the trials hit half of the time
        account.looked_up(hit=number % 2 == 0, overhead_s=0.01)
    suspended.append(account.is_suspended)
    assert suspended == [True, False]
    assert account.can_look_up()


def test_a_hit_rate_at_the_boundary_does_not_flap() -> None:
    account, rng, changes, before = BreakEven(BreakEvenConfig(lookups_min=100)), Random(3), 0, False
    for _ in range(20_000):
        if account.can_look_up():
            account.looked_up(hit=rng.random() < 0.1, overhead_s=0.01)  # needs exactly 0.1
            account.answered(model_s=0.1)
        changes += account.is_suspended != before
        before = account.is_suspended
    assert changes <= 4


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 30)), max_size=100))
def test_relaxation_stays_within_its_bounds(course: list[tuple[float, float]]) -> None:
    relaxation, now = Relaxation(), 0.0
    for load, pause in course:
        now += pause
        assert 0.0 <= relaxation.observe(load, now) <= 1.0
        relaxation.check()
    assert relaxation.observe(math.nan, now) <= 1.0
    for _ in range(50):
        now += 100.0
        relaxation.observe(0.0, now)
    assert relaxation.degree == 0.0


def test_relaxation_ignores_noise_and_follows_load() -> None:
    relaxation = Relaxation(RelaxationConfig(load_low=0.5, load_high=1.5, smooth_s=1.0))
    degrees = {relaxation.observe(1.0 + (0.02 if n % 2 else -0.02), n * 10.0) for n in range(1, 50)}
    assert len(degrees) == 1
    assert relaxation.observe(5.0, 1000.0) == 1.0


def test_the_budget_stops_relaxation_and_lets_it_resume() -> None:
    budget = RelaxationBudget(0.05)
    assert budget.observe(wilson(3, 5))  # too few verdicts to say
    assert not budget.observe(wilson(6, 100))
    assert not budget.observe(wilson(4, 100))  # hysteresis
    assert budget.observe(wilson(3, 100))


def test_load_lowers_thresholds_within_bounds_and_marks_the_hit() -> None:
    policy = CategoryPolicy(
        name="general", mode=ReuseMode.SEMANTIC, tau=0.9, tau_min=0.87, d_tau=0.1, ttl_s=10, ttl_max_s=15, beta=9.0
    )
    reuse = ReusePolicy([policy])

    def served(similarity: float, age_s: float, degree: float) -> tuple[bool, bool]:
        stored = Candidate(entry="e", text="x", stored_at=0.0, similarity=similarity)
        view = ReuseView(category="general", text="x", nearest=(stored,), searched_semantic=True, degree=degree)
        decision = reuse.choose(view, age_s)
        return decision.serves, decision.relaxed

    assert served(0.88, 1.0, 0.0) == (False, False)
    assert served(0.88, 1.0, 1.0) == (True, True)
    assert served(0.86, 1.0, 1.0) == (False, False)  # tau_min
    assert served(0.95, 12.0, 0.0) == (False, False)
    assert served(0.95, 12.0, 1.0) == (True, True)
    assert served(0.95, 16.0, 1.0) == (False, False)  # ttl_max_s
    assert served(0.95, 1.0, 1.0) == (True, False)  # it would have been one anyway


def test_an_entry_earns_its_hits_by_verdicts() -> None:
    bounds = EntryBounds(0.05)
    for number in range(OBSERVATIONS_MIN - 1):
        bounds.observe("e", 0.9 + 0.01 * number, right=True)
    assert bounds.explore("e", 0.99) == 1.0
    for _ in range(20):
        bounds.observe("e", 0.95, right=True)
        bounds.observe("e", 0.6, right=False)
    assert bounds.explore("e", 0.97) < bounds.explore("e", 0.75)
    assert bounds.explore("e", 0.55) > 0.9
    bounds.forget("e")
    assert bounds.explore("e", 0.99) == 1.0
    bounds.check()


@given(st.lists(st.tuples(st.floats(-1, 1), st.booleans()), max_size=40), st.floats(-1, 1), st.floats(0.001, 0.5))
def test_exploring_is_a_probability_and_a_looser_bound_explores_less(
    observed: list[tuple[float, bool]], similarity: float, delta: float
) -> None:
    fitted = fit_entry(tuple(observed))
    if fitted is None:
        return
    chance = fitted.explore(similarity, delta)
    assert 0.0 <= chance <= 1.0
    assert fitted.explore(similarity, min(0.99, 2 * delta)) <= chance + 1e-9


def test_the_bound_keeps_the_error_it_promises() -> None:
    rng, bounds, served, wrong = Random(11), EntryBounds(0.05), 0, 0
    for _ in range(4000):
        entry, similarity = str(rng.randrange(5)), rng.uniform(0.5, 1.0)
        right = rng.random() < 1.0 / (1.0 + math.exp(-40.0 * (similarity - 0.8)))
        if bounds.serves(entry, similarity, rng.random()):
            served, wrong = served + 1, wrong + (not right)
        else:
            bounds.observe(entry, similarity, right=right)
    assert served > 400
    assert wrong / 4000 <= 0.05


def test_an_entry_that_wants_exploring_is_not_served() -> None:
    reuse = ReusePolicy([CategoryPolicy(name="general", mode=ReuseMode.SEMANTIC, tau=0.5)])
    stored = Candidate(entry="e", text="x", stored_at=0.0, similarity=0.9, explore=0.4)
    for draw, serves in ((0.39, False), (0.41, True)):
        view = ReuseView(category="general", text="x", nearest=(stored,), searched_semantic=True, draw=draw)
        decision = reuse.choose(view, 1.0)
        assert (decision.serves, decision.explored) == (serves, not serves)
