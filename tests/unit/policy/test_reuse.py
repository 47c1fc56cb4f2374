"""The reuse policy and its guard: what may never be served, whatever the candidates look like."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.errors import InvalidArgument
from covey.policy.reuse import (
    DEFAULT_CATEGORIES,
    Candidate,
    CategoryPolicy,
    ReuseDecision,
    ReuseMode,
    ReusePolicy,
    ReuseView,
)
from covey.policy.reuse_guard import disagreement
from covey.types.program import CacheOutcome

VOCABULARY = "sort list dog cat euros dollars to from not 3 7 'x' never large before after the"
WORDS = st.sampled_from(VOCABULARY.split())
TEXTS = st.lists(WORDS, max_size=8).map(" ".join)
CANDIDATES = st.builds(
    Candidate,
    entry=st.uuids().map(str),
    text=TEXTS,
    stored_at=st.floats(0, 1000),
    similarity=st.one_of(st.floats(-1, 1), st.just(float("nan"))),
)
POLICIES = st.builds(
    CategoryPolicy,
    name=st.just("general"),
    mode=st.sampled_from(ReuseMode),
    tau=st.floats(0.01, 1),
    ttl_s=st.floats(0.1, 2000),
    guard=st.booleans(),
)
VIEWS = st.builds(
    ReuseView,
    category=st.just("general"),
    text=TEXTS,
    max_age_s=st.one_of(st.just(0.0), st.floats(0.1, 500)),
    exact=st.none() | CANDIDATES,
    nearest=st.lists(CANDIDATES, max_size=5).map(tuple),
    searched_exact=st.booleans(),
    searched_semantic=st.booleans(),
)


@given(POLICIES, VIEWS, st.floats(1000, 2000))
def test_what_is_served_passed_every_condition(policy: CategoryPolicy, view: ReuseView, now: float) -> None:
    reuse = ReusePolicy([policy])
    reuse.check()
    decision = reuse.choose(view, now)
    assert decision.why
    if not decision.serves:
        return
    assert policy.mode is not ReuseMode.OFF
    served = view.exact if decision.outcome is CacheOutcome.EXACT else _find(view, decision)
    assert served is not None
    age_s = now - served.stored_at
    assert age_s < policy.ttl_s
    assert not view.max_age_s or age_s <= view.max_age_s
    if decision.outcome is CacheOutcome.SEMANTIC:
        assert policy.mode is ReuseMode.SEMANTIC
        assert view.searched_semantic
        assert served.similarity >= policy.tau
        assert not policy.guard or not disagreement(view.text, served.text)


@given(VIEWS, st.floats(1000, 2000))
def test_no_better_candidate_is_passed_over_without_a_reason(view: ReuseView, now: float) -> None:
    policy = CategoryPolicy(name="general", mode=ReuseMode.SEMANTIC, tau=0.5, ttl_s=1e9, guard=False)
    decision = ReusePolicy([policy]).choose(view, now)
    oldest_s = view.max_age_s or 1e9
    fit = [c for c in view.nearest if c.similarity >= 0.5 and now - c.stored_at <= oldest_s]
    if decision.outcome is CacheOutcome.SEMANTIC:
        assert decision.similarity == max(c.similarity for c in fit)
    elif decision.outcome is CacheOutcome.MISS and view.searched_semantic:
        assert not fit


@given(TEXTS, TEXTS)
def test_the_guard_is_symmetric_and_agrees_with_itself(left: str, right: str) -> None:
    assert bool(disagreement(left, right)) == bool(disagreement(right, left))
    assert disagreement(left, left) == ""


@given(st.text(max_size=40), st.text(max_size=40))
def test_the_guard_takes_any_text(left: str, right: str) -> None:
    assert bool(disagreement(left, right)) == bool(disagreement(right, left))


@given(TEXTS, st.integers(0, 10**6), st.integers(0, 10**6))
def test_another_number_never_passes(text: str, one: int, other: int) -> None:
    assert bool(disagreement(f"{text} room {one}", f"{text} room {other}")) == (one != other)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("how do I convert euros to dollars", "how do I convert dollars to euros"),
        ("translate this from English to French", "translate this from French into English"),
        ("Can a dog eat a cat?", "Can a cat eat a dog?"),
        ("is python faster than java", "is java really much faster than python"),
        ("sort the list in ascending order", "sort the list in descending order"),
        ("which cards work abroad", "which cards don't work abroad"),
        ("what is 15% of 80", "what is 80% of 15"),
        ("give me two examples", "give me three examples"),
        ("install python 3.1", "install python 3.10"),
        ("what does 'grep' do", "what does 'sed' do"),
        ("is it -5 degrees", "is it 5 degrees"),
        ("run `ls -l`", "run `ls -a`"),
        ("log in without a password", "log in with a password"),
    ],
)
def test_the_guard_sees_what_an_embedding_overlooks(left: str, right: str) -> None:
    assert disagreement(left, right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("How can I reset my password?", "How do I reset the password of mine?"),
        ("What are your opening hours?", "When do you open?"),
        ("my card has not arrived", "I have not got my card"),
        ("transfer 1,000 euros", "transfer 1000 euros, please"),
        ("give me two examples", "give me 2 examples"),
        ("What’s the exchange rate?", "what's the exchange rate now"),
    ],
)
def test_the_guard_lets_paraphrases_pass(left: str, right: str) -> None:
    assert disagreement(left, right) == ""


def test_the_guard_errs_towards_a_miss() -> None:
    assert disagreement("the exchange rate", "the rate of exchange") == "the order of arguments differs"


def test_defaults_switch_no_semantic_reuse_on() -> None:
    assert all(category.mode is not ReuseMode.SEMANTIC for category in DEFAULT_CATEGORIES)


def test_an_unknown_category_is_named_as_the_wrong_field() -> None:
    with pytest.raises(InvalidArgument, match="known are code, faq, general, math") as caught:
        ReusePolicy().category("nope")
    assert caught.value.field == "category"


@pytest.mark.parametrize("wrong", [{"tau": 0.0}, {"tau": 1.1}, {"ttl_s": 0.0}, {"quota_entries": -1}, {"name": ""}])
def test_a_wrong_policy_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        CategoryPolicy(**({"name": "x"} | wrong))  # type: ignore[arg-type]


def test_off_when_no_tier_could_be_asked() -> None:
    decision = ReusePolicy().choose(ReuseView(category="", searched_exact=False), 0.0)
    assert decision.outcome is CacheOutcome.OFF


def _find(view: ReuseView, decision: ReuseDecision) -> Candidate | None:
    return next((c for c in view.nearest if c.entry == decision.entry), None)
