"""The decision function of a category: monotone, explained, learnt within its budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.policy.evidence import FEATURES, NEIGHBOURS, Rarity, evidence, parse
from covey.policy.reuse import Candidate, CategoryPolicy, ReuseMode, ReusePolicy, ReuseView
from covey.policy.reuse_learning import (
    Labelled,
    LearningConfig,
    Replay,
    false_hits_allowed,
    learn_decision,
    learn_threshold,
)
from covey.policy.reuse_model import DecisionModel, fit_weights

WORDS = ["card", "lost", "stolen", "pay", "transfer", "euro", "dollar", "fee", "limit", "close", "account", "open"]
TEXTS = st.lists(st.sampled_from([*WORDS, "not", "7", "'x'", "/etc/x"]), max_size=8).map(" ".join)


def model(cut: float = 0.0, **weights: float) -> DecisionModel:
    return DecisionModel(
        weights=tuple(weights.get(name.replace(" ", "_"), 0.0) for name in FEATURES),
        intercept=0.0,
        cut=cut,
        relaxed_cut=cut - 1.0,
        floor=0.5,
        typical=(1.0,) * len(FEATURES),
        rarity=Rarity(),
    )


@given(TEXTS, TEXTS, st.lists(st.floats(-1, 1), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_evidence_is_finite_and_symmetric_and_equal_texts_have_the_most(
    left: str, right: str, similarities: list[float], rng: np.random.Generator
) -> None:
    ordered = sorted(similarities, reverse=True)
    agrees = [True, *(rng.random() < 0.5 for _ in ordered[1:])]
    one, other = parse(left), parse(right)
    found = evidence(one, other, ordered, agrees, Rarity())
    assert np.isfinite(found).all()
    assert found == pytest.approx(evidence(other, one, ordered, agrees, Rarity()))
    best = evidence(one, one, ordered, agrees, Rarity())
    assert all(same >= other - 1e-9 for same, other in zip(best, found, strict=True))


@given(st.lists(st.floats(0.0, 0.99), min_size=NEIGHBOURS, max_size=NEIGHBOURS), st.integers(1, NEIGHBOURS - 1))
def test_a_neighbour_that_agrees_never_speaks_against(similarities: list[float], position: int) -> None:
    ordered, text = sorted(similarities, reverse=True), parse("how do I pay")
    disputed = [index != position for index in range(len(ordered))]
    agreed = evidence(text, text, ordered, [True] * len(ordered), Rarity())
    against = evidence(text, text, ordered, disputed, Rarity())
    names = dict(zip(FEATURES, zip(agreed, against, strict=True), strict=True))
    assert names["agreement"][0] >= names["agreement"][1]
    assert names["support"][0] >= names["support"][1]


def test_rare_words_weigh_more_and_cannot_be_read_back() -> None:
    rarity = Rarity()
    for number in range(100):
        rarity.add(["card", f"word{number}"])
    assert rarity("card") < 0.1 < rarity("word7") < rarity("never")
    assert all(isinstance(bucket, int) for bucket in rarity.counts)
    again = Rarity(rarity.texts, rarity.counts)
    assert again("card") == rarity("card")


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_fitted_weights_are_never_negative_and_find_what_matters(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(400, 4))
    right = features[:, 0] * 2.0 - features[:, 1] + rng.normal(size=400) * 0.5 > 0
    intercept, weights = fit_weights(features, right)
    assert np.isfinite([intercept, *weights]).all()
    assert (weights >= 0).all()
    assert weights[0] == max(weights)
    assert weights[1] < 0.05 * weights[0]  # it speaks against, so it may say nothing


def test_a_model_says_which_feature_refused() -> None:
    policy = CategoryPolicy(
        name="general", mode=ReuseMode.SEMANTIC, guard=False, model=model(cut=1.5, numbers=1.0, similarity=0.3)
    )
    reuse = ReusePolicy([policy])
    reuse.check()

    def asked(text: str, degree: float = 0.0) -> tuple[bool, bool, str]:
        stored = Candidate(entry="e", text="delete 7 files", stored_at=0.0, similarity=0.9, answer=1)
        view = ReuseView(category="general", text=text, nearest=(stored,), searched_semantic=True, degree=degree)
        decision = reuse.choose(view, 1.0)
        return decision.serves, decision.relaxed, decision.why

    assert asked("delete 7 files")[:2] == (True, False)
    serves, _, why = asked("delete 8 files")
    assert not serves
    assert "most against it: numbers 0.00 where right hits have 1.00" in why
    assert asked("delete 8 files", degree=1.0)[:2] == (True, True)  # score 0.69, relaxed cut 0.5


@given(st.floats(-2, 4), st.floats(0, 1), st.floats(0, 1))
def test_more_similarity_never_turns_a_hit_into_a_miss(cut: float, low: float, high: float) -> None:
    low, high = sorted((low, high))
    decider = model(cut=cut, similarity=1.0)
    text = parse("x")
    scores = [decider.judge(text, text, [similarity], [True])[0] for similarity in (low, high)]
    assert scores[0] <= scores[1]


def questions(count: int, seed: int, *, noise: float) -> list[Labelled]:
    """Answers are directions; a question is its answer's direction with noise."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count // 8, 24))
    found = []
    for _ in range(count):
        answer = int(rng.integers(len(centres)))
        vector = centres[answer] + noise * rng.normal(size=24)
        text = f"word{answer} {WORDS[int(rng.integers(len(WORDS)))]}"
        unit = (vector / np.linalg.norm(vector)).astype(np.float32)
        found.append(Labelled(text=text, answer=answer, vector=unit))
    return found


def test_what_is_learnt_keeps_its_budget_and_beats_a_threshold() -> None:
    config = LearningConfig(floor=0.2)
    learnt = learn_decision(questions(800, 1, noise=0.8), config)
    decider = learnt.model
    assert decider is not None
    decider.check()
    assert learnt.false <= 0.01 * learnt.asked
    fresh = Replay(questions(800, 2, noise=0.8), config)
    played = fresh.stream(lambda _, features: decider.score(features) >= decider.cut, decider.rarity)
    right, false = int((played.served & played.right).sum()), int((played.served & ~played.right).sum())
    assert false <= 0.01 * 800
    _, alone, _ = learn_threshold(questions(800, 2, noise=0.8), [0.3 + 0.05 * step for step in range(14)], config)
    assert right > alone


def test_nothing_to_be_had_is_said_and_nothing_is_served() -> None:
    lonely = [
        Labelled(text=f"t{number}", answer=number, vector=one.vector)
        for number, one in enumerate(questions(200, 3, noise=0.1))
    ]
    assert learn_decision(lonely).model is None
    assert learn_decision([]).model is None
    assert learn_decision([Labelled(text="too long", answer=1, vector=None)] * 3).model is None


@given(st.integers(0, 100_000), st.floats(0.001, 0.1))
def test_the_allowance_is_within_the_budget(asked: int, budget: float) -> None:
    assert 0 <= false_hits_allowed(asked, budget) <= budget * asked


def test_a_model_with_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        model(similarity=-1.0)
