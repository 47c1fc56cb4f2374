"""Draws follow their distribution, obey every filter, and depend on nothing but row, spec, seed and position."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from covey.model.plan import SampleSpec, StepPlan
from covey.model.runner import TorchRunner
from covey.model.sampler import draw, uniform

from .driving import row

LOGITS = hnp.arrays(np.float32, st.integers(2, 60), elements=st.floats(-12, 12, width=32))
SPECS = st.builds(
    SampleSpec,
    temperature=st.floats(0.05, 3.0),
    top_p=st.floats(0.01, 1.0),
    top_k=st.integers(0, 70),
    min_p=st.floats(0.0, 1.0),
    seed=st.integers(-(2**63), 2**64 - 1),
    position=st.integers(0, 10**6),
)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    chances: np.ndarray = weights / weights.sum()
    return chances


@given(LOGITS, SPECS)
def test_a_draw_obeys_its_filters(logits: np.ndarray, spec: SampleSpec) -> None:
    before = logits.copy()
    token = draw(logits, spec).token
    assert np.array_equal(logits, before)
    chances = softmax(logits, spec.temperature)
    if spec.top_k:
        assert np.sum(logits > logits[token]) < spec.top_k
    if not spec.top_k:
        # All that is strictly more likely must not fill the nucleus by itself.
        assert chances[chances > chances[token]].sum() < spec.top_p + 1e-9
    assert chances[token] >= spec.min_p * chances.max() - 1e-12


@given(LOGITS, SPECS)
def test_a_draw_repeats_and_the_seed_matters(logits: np.ndarray, spec: SampleSpec) -> None:
    assert draw(logits, spec) == draw(logits, spec)
    assert uniform(spec.seed, spec.position) != uniform(spec.seed, spec.position + 1)
    assert uniform(spec.seed, spec.position) != uniform(spec.seed + 1, spec.position)


@pytest.mark.parametrize("extra", [{}, {"top_p": 0.999999}, {"top_k": 5}, {"temperature": 0.7}])
def test_frequencies_are_the_probabilities(extra: dict[str, float]) -> None:
    logits = np.array([1.0, 0.0, -1.0, 2.0, 0.5], dtype=np.float32)
    spec = SampleSpec(**{"temperature": 1.0, "seed": 11, **extra})  # type: ignore[arg-type]
    count = 4000
    tokens = [draw(logits, dataclasses.replace(spec, position=i)).token for i in range(count)]
    found = np.bincount(tokens, minlength=5) / count
    expected = softmax(logits, spec.temperature)
    # Five standard deviations of a binomial share.
    assert np.all(np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / count))


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], dtype=np.float32))
    seen = {draw(logits, SampleSpec(temperature=1.0, top_p=0.7, position=i)).token for i in range(300)}
    assert seen == {1, 3}
    assert draw(logits, SampleSpec(temperature=1.0, top_p=0.0)).token == 1


def test_penalties_bias_and_bans() -> None:
    logits = np.array([2.0, 1.9, 1.8, -1.0], dtype=np.float32)

    def greedy(**settings: object) -> int:
        return draw(logits, SampleSpec(**settings)).token  # type: ignore[arg-type]

    assert greedy() == 0
    assert greedy(banned=(0,)) == 1
    assert greedy(logit_bias=((3, 5.0), (0, -1.0))) == 3
    assert greedy(history=(0,), prompt_len=1, presence_penalty=1.0) == 0, "the prompt is not penalised for presence"
    assert greedy(history=(9 % 4, 0), prompt_len=1, presence_penalty=0.15) == 1
    assert greedy(history=(0, 0, 1), prompt_len=0, frequency_penalty=0.15) == 2
    assert greedy(history=(0, 1), prompt_len=2, repetition_penalty=1.5) == 2, "repetition looks at the prompt too"
    assert greedy(history=(3,), prompt_len=1, repetition_penalty=0.1, logit_bias=((3, 2.05),)) == 0
    # -1 * 0.1 + 2.05 = 1.95 lies between the first two.
    assert greedy(history=(3,), prompt_len=1, repetition_penalty=0.1, logit_bias=((3, 2.05),), banned=(0,)) == 3


def test_log_probabilities_are_the_models_own() -> None:
    logits = np.array([2.0, 1.0, 3.0, -4.0], dtype=np.float32)
    expected = np.log(softmax(logits))
    sampled = draw(logits, SampleSpec(logprobs=2, banned=(2,), temperature=0.0))
    assert sampled.token == 0
    assert sampled.logprob == pytest.approx(expected[0], abs=1e-6)
    assert [i for i, _ in sampled.top] == [2, 0]
    assert [p for _, p in sampled.top] == pytest.approx([expected[2], expected[0]], abs=1e-6)
    assert draw(logits, SampleSpec(logprobs=0)).top == ()


def test_sampled_rows_do_not_depend_on_the_batch(tiny: TorchRunner) -> None:
    spec = SampleSpec(temperature=0.9, top_p=0.95, seed=3, position=21)
    rows = [row(i, list(range(i, i + 21)), 0, [4 * i, 4 * i + 1, 4 * i + 2], spec) for i in range(4)]
    together = {s.seq: s.draws[0].token for s in tiny.step(StepPlan(rows=tuple(rows))).sampled}
    alone = {r.seq: tiny.step(StepPlan(rows=(r,))).sampled[0].draws[0].token for r in rows}
    assert together == alone


class Mask:
    """A mask that is there already."""

    def __init__(self, tokens: list[int], vocab: int) -> None:
        bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
        bits[tokens] = 1
        self._words = np.packbits(bits, bitorder="little").view(np.int32)

    def words(self) -> np.ndarray:
        return self._words


@pytest.mark.parametrize("allowed", [1, 3, 900, 1900])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_is_obeyed_however_much_it_allows(allowed: int, temperature: float) -> None:
    rng = np.random.default_rng(allowed)
    logits = rng.standard_normal(2000).astype(np.float32)
    tokens = sorted(rng.choice(2000, allowed, replace=False).tolist())
    spec = SampleSpec(temperature=temperature, mask=Mask(tokens, 2000))
    seen = {draw(logits, dataclasses.replace(spec, position=i)).token for i in range(50)}
    assert seen <= set(tokens)
    if not temperature:
        assert seen == {max(tokens, key=lambda token: logits[token])}


@pytest.mark.parametrize("vocab", [20, 2000])
def test_bans_hold_within_a_mask(vocab: int) -> None:
    logits = np.linspace(0, 1, vocab, dtype=np.float32)
    assert draw(logits, SampleSpec(mask=Mask([1, 2], vocab), banned=(2,))).token == 1
    most = list(range(vocab // 2))
    assert draw(logits, SampleSpec(mask=Mask(most, vocab), banned=tuple(most[1:]))).token == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"top_p": 0.8},
        {"top_p": 0.3, "min_p": 0.01},
        {"min_p": 0.2},
        {"top_k": 40},
        {"top_k": 9000},
    ],
)
def test_a_large_vocabulary_is_drawn_from_like_a_small_one(settings: dict[str, float]) -> None:
    """The quick ways of many values against the definition, in double precision."""
    rng = np.random.default_rng(5)
    for position in range(60):
        logits = (rng.standard_normal(9000) * 3).astype(np.float32)
        spec = SampleSpec(**{"temperature": 1.0, "position": position, **settings})  # type: ignore[arg-type]
        assert draw(logits, spec).token == _by_definition(logits, spec)


def _by_definition(logits: np.ndarray, spec: SampleSpec) -> int:
    chances = softmax(logits, spec.temperature)
    order = np.argsort(-logits, kind="stable")
    if spec.top_k:
        chances[order[spec.top_k :]] = 0.0
        chances /= chances.sum()
    if spec.top_p < 1.0:
        reach = np.cumsum(chances[order])
        chances[order[int(np.searchsorted(reach, spec.top_p)) + 1 :]] = 0.0
    chances[chances < spec.min_p * chances.max()] = 0.0
    cumulative = np.cumsum(chances)
    return int(np.searchsorted(cumulative, uniform(spec.seed, spec.position) * cumulative[-1], side="right"))
