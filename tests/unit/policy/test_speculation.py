"""Prompt-lookup guesses: what they are, their bounds, and that they are made only where they pay."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.policy.speculation import Candidate, Lookup, Speculation, SpeculationLimits
from covey.policy.step_times import FORGET_STEPS, StepTimes

LIMITS = SpeculationLimits()
TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def naive(tokens: list[int], count: int) -> tuple[int, tuple[int, ...]]:
    """The most recent earlier place where the longest possible end of the text stands."""
    for size in range(min(LIMITS.ngram_max, len(tokens) - 1), LIMITS.ngram_min - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[end + i])
                return size, tuple(text[len(tokens) :])
    return 0, ()


@given(text=TEXTS, cuts=st.sets(st.integers(1, 40)), count=st.integers(0, 9))
def test_a_guess_is_what_followed_the_longest_match_last(text: list[int], cuts: set[int], count: int) -> None:
    lookup = Lookup(LIMITS)
    for cut in sorted(cuts | {len(text)}):
        if cut <= len(text):
            lookup.extend(text[:cut])
            assert lookup.guess(text[:cut], count) == naive(text[:cut], count)


@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12), st.floats(0, 1), st.floats(0, 1)), max_size=30),
    texts=st.lists(TEXTS, min_size=6, max_size=6),
)
def test_guesses_keep_their_bounds_whatever_the_times(
    steps: list[tuple[int, int, float, float]], texts: list[list[int]]
) -> None:
    speculation = Speculation(LIMITS)
    for seq, room, elapsed_s, share in steps:
        candidates = [Candidate(seq=i, tokens=texts[i], room=room) for i in range(seq)]
        guesses = speculation.plan(candidates, tokens=seq, draws=seq)
        assert all(0 < len(guess) <= min(room, LIMITS.guess_max) for guess in guesses.values())
        held = {i: (len(guess), int(share * len(guess))) for i, guess in guesses.items()}
        speculation.apply(held, tokens=seq + sum(map(len, guesses.values())), elapsed_s=elapsed_s)
        speculation.check()
        speculation.forget(seq - 1)
    assert speculation.accepted <= speculation.drafted


def run(
    step_s: Callable[[int], float], *, holds: float, rows: int = 1, steps: int = 200, speculation: Speculation
) -> float:
    """Decode `rows` texts that repeat themselves, whose guesses hold with a chance; the share of steps that guess."""
    rng = Random(5)
    texts = [[row, 7, 8, 9] * 4 for row in range(rows)]
    guessed = 0
    for _ in range(steps):
        candidates = [Candidate(seq=i, tokens=text, room=8) for i, text in enumerate(texts)]
        guesses = speculation.plan(candidates, tokens=rows, draws=rows)
        held = {}
        for seq, guess in guesses.items():
            held[seq] = len(guess), next((i for i in range(len(guess)) if rng.random() >= holds), len(guess))
        guessed += bool(guesses)
        tokens = rows + sum(map(len, guesses.values()))
        speculation.apply(held, tokens=tokens, elapsed_s=step_s(tokens))
    return guessed / steps


@pytest.mark.parametrize(
    ("rows", "holds", "step_s", "is_on"),
    [
        (1, 0.8, lambda tokens: 0.01 + 0.001 * tokens, True),  # a step costs what reading the weights costs
        (1, 0.05, lambda tokens: 0.01 + 0.001 * tokens, False),  # text that does not repeat itself
        (1, 0.8, lambda tokens: 0.01 * tokens, False),  # each token costs as much as the first
        (16, 0.5, lambda tokens: 0.01 + 0.004 * tokens, False),  # a full batch has no cheap place left
        (16, 0.95, lambda tokens: 0.01 + 0.0003 * tokens, True),
    ],
)
def test_guesses_are_made_where_they_pay(rows: int, holds: float, step_s: Callable[[int], float], is_on: bool) -> None:
    share = run(step_s, holds=holds, rows=rows, speculation=Speculation(LIMITS))
    assert share > 0.9 if is_on else share < 0.2


def test_what_did_not_pay_is_tried_again() -> None:
    speculation = Speculation(LIMITS)
    run(lambda tokens: 0.01 + 0.001 * tokens, holds=0.0, speculation=speculation)
    assert run(lambda tokens: 0.01 + 0.001 * tokens, holds=0.9, steps=1000, speculation=speculation) > 0.5


def test_off_means_off() -> None:
    speculation = Speculation(SpeculationLimits(guess_max=0))
    assert run(lambda _: 0.01, holds=1.0, speculation=speculation) == 0.0


@given(st.lists(st.tuples(st.integers(1, 600), st.floats(0, 10)), max_size=60), st.integers(1, 700))
def test_times_never_fall_with_the_size(steps: list[tuple[int, float]], tokens: int) -> None:
    times = StepTimes()
    for size, elapsed_s in steps:
        times.note(size, elapsed_s)
        times.check()
    assert 0 <= times.estimate(tokens) <= times.estimate(tokens + 1)


def test_times_are_forgotten() -> None:
    times = StepTimes()
    times.note(8, 5.0)
    for _ in range(FORGET_STEPS + 1):
        times.note(1, 1.0)
    assert times.estimate(8) == 1.0
