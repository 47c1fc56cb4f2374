"""What loading keys and values costs, in tokens of prefill work, as requests of late have shown."""

from __future__ import annotations

from dataclasses import dataclass

KEEP = 0.97
"""The weight that an observation keeps when the next one comes: about thirty count."""
PRIOR_TOKENS = (64.0, 1024.0)
PRIOR_WEIGHT = 4.0
COST_MAX = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Took:
    """Where the time of one worker's part in a request went."""

    computed_tokens: int
    prefill_s: float
    loaded_tokens: int
    kv_wait_s: float


class KvCost:
    """A line `fixed + factor * tokens`, fitted by least squares in which old observations fade.

    Only the wait counts that computing did not overlap. The start values stand for some observations of their own, so
    that a few odd ones do not turn the decision; they come from `benchmarks/kv_break_even.py`.
    """

    def __init__(self, *, fixed_tokens: float, factor: float) -> None:
        """`fixed_tokens` and `factor` are the line to start with."""
        self._s_per_token = 0.0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        for tokens in PRIOR_TOKENS:
            self._add(tokens, fixed_tokens + factor * tokens, PRIOR_WEIGHT)

    def load_tokens(self, tokens: float) -> float:
        """What loading the keys and values of `tokens` costs; nothing for none."""
        fixed, factor = self._line()
        return fixed + factor * tokens if tokens > 0 else 0.0

    def saved_tokens(self, tokens: float) -> float:
        """What loading saves against computing; below nothing is nothing, for then it is computed."""
        return max(0.0, tokens - self.load_tokens(tokens))

    @property
    def break_even_tokens(self) -> float:
        """Tokens from which loading costs less than computing; infinite when it never does."""
        fixed, factor = self._line()
        return fixed / (1.0 - factor) if factor < 1.0 else float("inf")

    def observe(self, took: Took) -> None:
        """Learn from a part of a request that has ended."""
        if took.computed_tokens > 0 and took.prefill_s > 0 and not took.loaded_tokens:
            measured = took.prefill_s / took.computed_tokens
            self._s_per_token = 0.9 * self._s_per_token + 0.1 * measured if self._s_per_token else measured
        if took.loaded_tokens > 0 and took.kv_wait_s > 0 and self._s_per_token > 0:
            cost = min(COST_MAX, took.kv_wait_s / self._s_per_token)
            self._weight, self._x, self._y = KEEP * self._weight, KEEP * self._x, KEEP * self._y
            self._xx, self._xy = KEEP * self._xx, KEEP * self._xy
            self._add(float(took.loaded_tokens), cost, 1.0)

    def check(self) -> None:
        """Invariants; raises AssertionError."""
        fixed, factor = self._line()
        assert fixed >= 0
        assert factor >= 0
        assert self._weight > 0

    def _add(self, tokens: float, cost: float, weight: float) -> None:
        self._weight += weight
        self._x += weight * tokens
        self._y += weight * cost
        self._xx += weight * tokens * tokens
        self._xy += weight * tokens * cost

    def _line(self) -> tuple[float, float]:
        """Intercept and slope, neither below zero: then the line goes through the origin, or is level."""
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        if spread <= 1e-6 * mean_x * mean_x:
            return 0.0, mean_y / mean_x
        slope = (self._xy / self._weight - mean_x * mean_y) / spread
        fixed = mean_y - slope * mean_x
        if slope < 0:
            return mean_y, 0.0
        return (fixed, slope) if fixed >= 0 else (0.0, mean_y / mean_x)
