"""Prompt-lookup speculation: guess that a text goes on as it did after the same words before, where that pays.

Guessing more tokens of one sequence in a step is worth it while a token is likelier to hold, per second that it adds to
the step, than the step yields tokens per second without it (the marginal rule of SpecInfer-like schedulers).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .step_times import StepTimes

CHANCE_MIN = 0.05
"""Guesses less likely to hold are never tried, however cheap they look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationLimits:
    """Bounds of guesses. Raises ValueError when they contradict each other."""

    guess_max: int = 8
    """Guesses a sequence and step; 0 turns speculation off."""
    ngram_min: int = 2
    ngram_max: int = 4
    """How many last tokens must stand earlier in the sequence for a guess; the longest match counts."""

    def __post_init__(self) -> None:
        if self.guess_max < 0 or not 1 <= self.ngram_min <= self.ngram_max:
            raise ValueError("guess_max must not be negative, and 1 <= ngram_min <= ngram_max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A sequence that decodes in the next step: its tokens so far, and how many guesses it has room for."""

    seq: int
    tokens: Sequence[int]
    room: int


class Lookup:
    """Where each n-gram of one growing sequence was followed by something, most recently."""

    def __init__(self, limits: SpeculationLimits) -> None:
        self._sizes = range(limits.ngram_max, limits.ngram_min - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}
        self._known = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Enter the n-grams that another token follows now; earlier tokens have not changed."""
        for end in range(max(1, self._known), len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._known = max(self._known, len(tokens))

    def guess(self, tokens: Sequence[int], count: int) -> tuple[int, tuple[int, ...]]:
        """The length of the longest match, and `count` tokens that came after it; (0, ()) without a match.

        A match near the end goes on with what was just guessed: text that repeats itself is guessed to go on repeating.
        """
        for size in self._sizes:
            end = self._ends.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if end is not None:
                found = list(tokens[end : end + count])
                while len(found) < count:
                    found.append(found[end + len(found) - len(tokens)])
                return size, tuple(found)
        return 0, ()


class _Rate:
    """How often a guess held, recent ones more than old ones."""

    __slots__ = ("held", "tried")

    def __init__(self) -> None:
        self.held = 0.0
        self.tried = 0.0

    def note(self, held: int, tried: int) -> None:
        self.held, self.tried = 0.9 * self.held + held, 0.9 * self.tried + tried

    def fade(self, share: float) -> None:
        """Trust what was seen a little less: nothing stays off for good because of how it once went."""
        self.held, self.tried = share * self.held, share * self.tried

    def estimate(self, prior: float, weight: float) -> float:
        return (self.held + weight * prior) / (self.tried + weight)


@dataclass(slots=True)
class _Followed:
    lookup: Lookup
    rate: _Rate
    matched: int = 0
    """The length of the match that its last guesses came from."""


class Speculation:
    """Which guesses the next step tries. Pure: times are passed in.

    `plan` before each step and `apply` after it; `forget` when a sequence ends.
    """

    def __init__(self, limits: SpeculationLimits) -> None:
        self.limits = limits
        self.drafted = 0
        """Guesses so far."""
        self.accepted = 0
        """Guesses that held, so far."""
        self._times = StepTimes()
        self._rates = {size: _Rate() for size in range(limits.ngram_min, limits.ngram_max + 1)}
        self._followed: dict[int, _Followed] = {}

    def plan(self, candidates: Iterable[Candidate], *, tokens: int, draws: int) -> dict[int, tuple[int, ...]]:
        """Guesses by sequence for a step that without them has `tokens` tokens and yields `draws` new ones."""
        guesses: dict[int, tuple[int, ...]] = {}
        expected = float(draws)
        for rate in self._rates.values():
            rate.fade(0.999)
        for candidate in candidates:
            followed = self._follow(candidate)
            room = min(candidate.room, self.limits.guess_max)
            size, guess = followed.lookup.guess(candidate.tokens, room) if room > 0 else (0, ())
            held = self._chance(followed, size) if size else 0.0
            count, gain = self._length(held, len(guess), tokens, expected)
            if count:
                guesses[candidate.seq] = guess[:count]
                followed.matched = size
                tokens, expected = tokens + count, expected + gain
        return guesses

    def apply(self, drafts: Mapping[int, tuple[int, int]], *, tokens: int, elapsed_s: float) -> None:
        """Book a step of `tokens` tokens: for each sequence with guesses, how many were tried and how many held."""
        self._times.note(tokens, elapsed_s)
        for seq, (tried, held) in drafts.items():
            assert 0 <= held <= tried
            self.drafted += tried
            self.accepted += held
            if (followed := self._followed.get(seq)) is not None:
                looked_at = min(held + 1, tried)
                followed.rate.note(held, looked_at)
                self._rates[followed.matched].note(held, looked_at)

    def forget(self, seq: int) -> None:
        """Drop what is known of a sequence; without effect when nothing is."""
        self._followed.pop(seq, None)

    def check(self) -> None:
        """Assert the invariants."""
        assert 0 <= self.accepted <= self.drafted
        for followed in self._followed.values():
            assert 0 <= followed.rate.held <= followed.rate.tried + 1e-9
        self._times.check()

    def _follow(self, candidate: Candidate) -> _Followed:
        followed = self._followed.get(candidate.seq)
        if followed is None:
            followed = self._followed[candidate.seq] = _Followed(Lookup(self.limits), _Rate())
        followed.lookup.extend(candidate.tokens)
        followed.rate.fade(0.99)
        return followed

    def _chance(self, followed: _Followed, size: int) -> float:
        """How likely the next guess after a match of `size` tokens is right."""
        return followed.rate.estimate(self._rates[size].estimate(0.5, 2.0), 2.0)

    def _length(self, held: float, count_max: int, tokens: int, expected: float) -> tuple[int, float]:
        """How many guesses pay, and the tokens that they are expected to add."""
        now_s = self._times.estimate(tokens)
        count, gain, chance = 0, 0.0, 1.0
        while count < count_max:
            chance *= held
            added_s = self._times.estimate(tokens + count + 1) - self._times.estimate(tokens + count)
            if chance * now_s <= (expected + gain) * added_s or chance < CHANCE_MIN:
                break
            count, gain = count + 1, gain + chance
            now_s += added_s
        return count, gain
