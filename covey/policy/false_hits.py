"""How many of a category's semantic hits are wrong, as far as a judged sample of them tells."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z_95 = 1.96
COUNT_MAX = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A share of wrong hits with its 95 % interval (Wilson's score interval: it is honest at 0 of few)."""

    share: float
    low: float
    high: float
    judged: float


def wilson(wrong: float, judged: float, *, z: float = Z_95) -> Estimate:
    """Estimate a share from `wrong` of `judged`; without any judged it may be anything from 0 to 1."""
    if judged <= 0:
        return Estimate(share=0.0, low=0.0, high=1.0, judged=0.0)
    share = min(1.0, wrong / judged)
    scale = 1.0 + z * z / judged
    middle = (share + z * z / (2.0 * judged)) / scale
    # Rounding must not make a variance negative.
    half = z * math.sqrt(max(0.0, share * (1.0 - share) / judged + z * z / (4.0 * judged * judged))) / scale
    low = 0.0 if share == 0.0 else max(0.0, min(middle - half, share))
    high = 1.0 if share == 1.0 else min(1.0, max(middle + half, share))
    return Estimate(share=share, low=low, high=high, judged=judged)


class FalseHits:
    """The running estimate of one category: verdicts fade, so that it follows what the traffic is now.

    Hits are sampled for judging with probability `sample`; what a user reports is a verdict as well. Verdicts are
    worth half after `half_life` others, which bounds how much evidence is ever held.
    """

    def __init__(self, *, sample: float = 0.02, half_life: float = 500.0) -> None:
        if not 0.0 <= sample <= 1.0:
            raise ValueError(f"sample must lie in [0, 1], is {sample}")
        if not half_life > 0:
            raise ValueError(f"half_life must be over 0, is {half_life}")
        self._sample = sample
        self._fade = 0.5 ** (1.0 / half_life)
        self._wrong = 0.0
        self._judged = 0.0
        self._verdicts = 0

    @property
    def verdicts(self) -> int:
        """How many there were, faded or not."""
        return self._verdicts

    def is_sampled(self, draw: float) -> bool:
        """Whether the hit that is being served is to be judged in the background; `draw` is random in [0, 1)."""
        return draw < self._sample

    def observe(self, *, wrong: bool) -> None:
        """Take the verdict on one served hit."""
        self._wrong = self._wrong * self._fade + wrong
        self._judged = min(COUNT_MAX, self._judged * self._fade + 1.0)
        self._verdicts += 1

    def estimate(self) -> Estimate:
        """The share of wrong ones among this category's semantic hits."""
        return wilson(self._wrong, self._judged)

    def check(self) -> None:
        """Assert the invariants."""
        assert 0.0 <= self._wrong <= self._judged + 1e-9
        found = self.estimate()
        assert 0.0 <= found.low <= found.share <= found.high <= 1.0
