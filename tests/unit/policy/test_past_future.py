"""Past-Future admission against a simulation step by step."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.policy.past_future import Footprint, PastFuture


def held(tokens: int, left: int, generated: int = 0) -> Footprint:
    return Footprint(tokens=tokens, generated=generated, output_max=generated + left)


footprints = st.lists(st.builds(held, st.integers(0, 200), st.integers(0, 100)), max_size=12)


def simulate(running: list[Footprint], block_size: int) -> int:
    """The most blocks at once, found by growing everybody token by token until all have ended."""
    peak = 0
    for step in range(max((f.output_max for f in running), default=-1) + 1):
        alive = [f for f in running if f.output_max >= step]
        peak = max(peak, sum(-(-(f.tokens + step) // block_size) for f in alive))
    return peak


@given(running=footprints, block_size=st.integers(1, 40))
def test_the_peak_is_the_one_of_the_simulation(running: list[Footprint], block_size: int) -> None:
    assert PastFuture(block_size=block_size).peak(running) == simulate(running, block_size)


@given(running=footprints)
def test_with_blocks_of_one_token_it_is_the_published_formula(running: list[Footprint]) -> None:
    left = sorted(((f.output_max, f.tokens) for f in running), reverse=True)
    formula = [b * (i + 1) + sum(a for _, a in left[: i + 1]) for i, (b, _) in enumerate(left)]
    assert PastFuture(block_size=1).peak(running) == max(formula, default=0)


@given(running=footprints, candidate=st.builds(held, st.integers(0, 200), st.integers(0, 100)))
def test_it_admits_no_more_than_fits_and_no_less_than_worst_cases(
    running: list[Footprint], candidate: Footprint
) -> None:
    policy = PastFuture(block_size=16)
    fits = simulate([*running, candidate], 16)
    assert policy.admits(running, candidate, fits)
    assert not policy.admits(running, candidate, fits - 1)
    assert fits <= sum(-(-(f.tokens + f.output_max) // 16) for f in (*running, candidate))
    assert policy.promise(candidate) == (candidate.tokens + 16) // 16


@given(
    lengths=st.lists(st.integers(0, 60), max_size=80),
    generated=st.integers(0, 60),
    output_max=st.integers(0, 80),
    quantile=st.floats(0.01, 1),
)
def test_predictions_are_quantiles_of_the_longer_outputs_of_the_window(
    lengths: list[int], generated: int, output_max: int, quantile: float
) -> None:
    policy = PastFuture(block_size=16, window=40, quantile=quantile, history_min=5)
    for length in lengths:
        policy.observe(length)
        policy.check()
    longer = sorted(length for length in lengths[-40:] if length > generated)
    left = policy.left(Footprint(tokens=0, generated=generated, output_max=output_max))
    longest = max(0, output_max - generated)
    if len(longer) < 5:
        assert left == longest
    else:
        share = sum(length <= left + generated for length in longer) / len(longer)
        assert left == longest or share >= quantile
        assert left == longest or left + generated in longer
        assert left <= longest


def test_short_outputs_let_more_in_than_worst_cases_would() -> None:
    policy, dice = PastFuture(block_size=16), random.Random(0)
    candidate = Footprint(tokens=64, generated=0, output_max=1024)
    running: list[Footprint] = []
    while policy.admits(running, candidate, 680):
        running.append(candidate)
    assert len(running) == 10  # 68 blocks each
    for _ in range(500):
        policy.observe(dice.randint(20, 60))
    while policy.admits(running, candidate, 680):
        running.append(candidate)
    assert len(running) > 80


@pytest.mark.parametrize("wrong", [{"quantile": 0.0}, {"window": 4}, {"block_size": 0}])
def test_bounds_without_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needed"):
        PastFuture(**({"block_size": 16} | wrong))  # type: ignore[arg-type]
