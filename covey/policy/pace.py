"""How long computing a token takes on this machine, as measured."""

from __future__ import annotations

TOKENS_MAX = 1 << 30
"""More than any step; a time too short to measure would ask for endlessly many."""


class Pace:
    """An exponential mean of seconds per token over the steps that were large enough to tell."""

    def __init__(self, *, tokens_min: int) -> None:
        self._tokens_min = tokens_min
        self.s_per_token = 0.0
        """0 until it was measured."""

    def observe(self, tokens: float, elapsed_s: float) -> None:
        """Note a step; smaller ones cost what reading the weights costs, not what tokens cost, and are left out."""
        if tokens >= self._tokens_min:
            measured = elapsed_s / tokens
            self.s_per_token = 0.7 * self.s_per_token + 0.3 * measured if self.s_per_token else measured

    def predict_s(self, tokens: float) -> float:
        """Seconds that computing `tokens` takes; 0 before the first measurement."""
        return tokens * self.s_per_token

    def fits(self, seconds: float) -> int | None:
        """Tokens that can be computed in `seconds`; None before the first measurement."""
        return int(min(seconds / self.s_per_token, TOKENS_MAX)) if self.s_per_token else None
