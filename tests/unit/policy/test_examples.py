"""In-context examples: clusters, predicted help, choice within a budget, worth; and the choice of the model."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.policy.clusters import Clusters
from covey.policy.example_choice import INSTRUCTION, UsefulExample, choose_examples, shown, with_examples
from covey.policy.example_worth import REPLAYS_MAX, ExampleWorth
from covey.policy.helpfulness import ExampleView, Helpfulness, UtilityThreshold
from covey.policy.model_choice import Arm, ModelChoice, ModelChoiceConfig


def _unit(count: int, seed: int, dim: int = 16) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    found: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found


@given(count=st.integers(0, 120), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_every_vector_is_in_one_cluster_and_a_search_returns_enough(count: int, seed: int) -> None:
    clusters = Clusters.fit(_unit(count, seed), np.random.default_rng(seed))
    clusters.check()
    found = clusters.near(_unit(1, seed + 1)[0], min(10, count))
    assert len(found) >= min(10, count)
    assert len(set(found.tolist())) == len(found)


def test_a_search_in_near_clusters_finds_what_a_search_of_all_does() -> None:
    centres = _unit(10, 0)
    vectors = np.repeat(centres, 40, axis=0) + 0.02 * np.random.default_rng(1).normal(size=(400, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    clusters = Clusters.fit(vectors, np.random.default_rng(2))
    hits = 0
    for query in vectors[::7]:
        near = clusters.near(query, 30)
        assert len(near) < 200, "a search looks at a part only"
        hits += int((vectors @ query).argmax()) in near.tolist()
    assert hits == len(vectors[::7])


def _view(similarity: float, overlap: float, **changes: object) -> ExampleView:
    fields: dict[str, object] = {
        "example": "e", "similarity": similarity, "overlap": overlap, "request_chars": 80, "example_chars": 80,
        "answer_chars": 200, "same_category": True,
    }  # fmt: skip
    return ExampleView(**(fields | changes))  # type: ignore[arg-type]


def test_the_proxy_learns_what_helps_where_similarity_does_not() -> None:
    proxy, rng = Helpfulness(), Random(1)
    for _ in range(600):
        view = _view(rng.uniform(0.5, 1.0), rng.random())
        proxy.observe(view, 1.0 if view.overlap > 0.5 else 0.0)
        proxy.check()
    alike_but_useless, useful = _view(0.98, 0.1), _view(0.6, 0.9)
    assert proxy.predict(useful) > 0.7
    assert proxy.predict(alike_but_useless) < 0.3


def test_the_threshold_goes_where_the_gain_is() -> None:
    threshold, rng = UtilityThreshold(every=50), Random(2)
    for _ in range(200):
        utility = rng.random()
        threshold.observe(utility, 0.2 if utility > 0.7 else -0.1)
    assert 0.68 <= threshold.value <= 0.8
    for _ in range(500):
        threshold.observe(rng.random(), -0.1)
    assert threshold.value == 1.0, "no example pays: none is over it"


def _example(name: str, utility: float, vector: np.ndarray, text: str = "q") -> UsefulExample:
    return UsefulExample(id=name, text=text, answer="a", similarity=0.8, utility=utility, vector=vector)


@given(
    utilities=st.lists(st.floats(0, 1), max_size=12),
    count=st.integers(0, 5),
    budget=st.integers(0, 400),
    threshold=st.floats(0, 1),
)
def test_chosen_examples_are_useful_few_and_fit(
    utilities: list[float], count: int, budget: int, threshold: float
) -> None:
    vectors = _unit(max(1, len(utilities)), 3)
    made = [_example(str(i), utility, vectors[i], "q" * (i * 7)) for i, utility in enumerate(utilities)]
    chosen = choose_examples(made, count=count, threshold=threshold, tokens_max=budget, tokens=len)
    assert len(chosen) <= count
    assert all(example.utility > threshold for example in chosen)
    assert not chosen or len(INSTRUCTION) + sum(len(shown(example)) for example in chosen) <= budget
    assert [example.utility for example in chosen] == sorted(example.utility for example in chosen)
    assert with_examples("ask", chosen).endswith("ask" if not chosen else "Request: ask\nAnswer:")


def test_twins_do_not_fill_the_prompt() -> None:
    one, other = _unit(2, 5)
    made = [_example("a", 0.9, one), _example("twin", 0.89, one), _example("b", 0.7, other)]
    chosen = choose_examples(made, count=2, threshold=0.1, tokens_max=10_000, tokens=len)
    assert [example.id for example in chosen] == ["b", "a"]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 50), st.booleans()), max_size=40))
def test_a_pool_stays_within_its_bytes_and_forgets_what_helps_least(steps: list[tuple[str, int, bool]]) -> None:
    pool = ExampleWorth(size_bytes_max=80)
    for now, (name, size, helps) in enumerate(steps):
        pool.add(name, size, float(now))
        pool.used(name, offloaded=helps, quality=0.5, cost=0.5, now=float(now))
        pool.evict(float(now))
        pool.check()
        assert pool.size_bytes <= 80


def test_gain_fades_by_the_hour_and_decides_who_goes() -> None:
    pool = ExampleWorth(size_bytes_max=10)
    pool.add("old", 10, 0.0)
    for _ in range(5):
        pool.used("old", offloaded=True, quality=1.0, cost=1.0, now=0.0)
    pool.add("new", 10, 36_000.0)
    for _ in range(3):
        pool.used("new", offloaded=True, quality=1.0, cost=1.0, now=36_000.0)
    assert pool.evict(36_000.0) == ["old"], "5 x 0.9^10 is less than 3"


def test_replays_are_few_and_go_where_a_better_answer_gains_most() -> None:
    pool = ExampleWorth(size_bytes_max=100)
    for name, quality in (("good", 0.9), ("poor", 0.1)):
        pool.add(name, 1, 0.0)
        pool.used(name, offloaded=False, quality=quality, cost=1.0, now=0.0)
    assert pool.replay() == "poor"
    pool.replayed("poor", improved=False)
    named = [pool.replay() for _ in range(REPLAYS_MAX + 2)]
    assert named == ["good"] * REPLAYS_MAX + [None, None]


def _arms(load_of_large: float = 0.0) -> list[Arm]:
    return [Arm(model="small", cost=0.1), Arm(model="large", cost=1.0, load=load_of_large)]


def _taught(config: ModelChoiceConfig) -> ModelChoice:
    """The small model is right where the second feature is 1, the large one always."""
    choice, rng = ModelChoice(2, config), Random(4)
    for _ in range(300):
        easy = float(rng.random() < 0.5)
        context = np.array([1.0, easy])
        choice.observe(context, "small", easy)
        choice.observe(context, "large", 1.0)
    choice.check()
    return choice


def test_the_small_model_gets_what_it_can_do() -> None:
    choice = _taught(ModelChoiceConfig())
    assert choice.choose(np.array([1.0, 1.0]), _arms(), np.random.default_rng(1)).model == "small"
    assert choice.choose(np.array([1.0, 0.0]), _arms(), np.random.default_rng(1)).model == "large"


def test_load_on_the_large_model_moves_work_to_the_small_one_and_only_over_the_threshold() -> None:
    choice = _taught(ModelChoiceConfig(cost_weight=0.1, load_smoothing=1.0))
    hard = np.array([1.0, 0.0])
    assert choice.choose(hard, _arms(0.99), np.random.default_rng(1)).model == "large"
    assert choice.choose(hard, _arms(50.0), np.random.default_rng(1)).model == "small"


def test_a_second_answer_is_asked_for_only_while_the_scores_are_close() -> None:
    fresh, taught = ModelChoice(2), _taught(ModelChoiceConfig(temperature=0.1))
    free = [Arm(model="small", cost=0.0), Arm(model="large", cost=0.0)]
    assert fresh.choose(np.array([1.0, 1.0]), free, np.random.default_rng(1)).second
    assert not taught.choose(np.array([1.0, 0.0]), free, np.random.default_rng(1)).second
