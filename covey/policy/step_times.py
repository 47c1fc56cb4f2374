"""How long a step takes by its number of tokens, learned from the steps that ran."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from dataclasses import dataclass

FORGET_STEPS = 512
"""What was not seen for so many steps is not believed any more: contexts have grown, neighbours have come or gone."""


@dataclass(slots=True)
class _Seen:
    tokens: float
    elapsed_s: float
    step: int


class StepTimes:
    """Moving averages over classes of similar sizes, with straight lines between them.

    Beyond the largest size seen the time is taken to stay as it is: trying is how a larger size comes to be seen.
    """

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        self._steps = 0
        self._points: list[tuple[float, float]] | None = None

    def note(self, tokens: int, elapsed_s: float) -> None:
        """Book a step."""
        self._steps += 1
        kind = _kind(tokens)
        seen = self._seen.get(kind)
        if seen is None or self._steps - seen.step > FORGET_STEPS:
            self._seen[kind] = _Seen(tokens, elapsed_s, self._steps)
        else:
            seen.tokens += 0.2 * (tokens - seen.tokens)
            seen.elapsed_s += 0.2 * (elapsed_s - seen.elapsed_s)
            seen.step = self._steps
        self._points = None

    def estimate(self, tokens: int) -> float:
        """Seconds for a step of so many tokens; never falling with the tokens; 0 when nothing is known."""
        points = self._known()
        at = bisect_left(points, (tokens, 0.0))
        if at == len(points):
            return points[-1][1] if points else 0.0
        high, high_s = points[at]
        if at == 0:
            return high_s
        low, low_s = points[at - 1]
        return low_s + (high_s - low_s) * (tokens - low) / (high - low)

    def check(self) -> None:
        """Assert the invariants."""
        points = self._known()
        assert all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(points))

    def _known(self) -> list[tuple[float, float]]:
        if self._points is None:
            fresh = [s for _, s in sorted(self._seen.items()) if self._steps - s.step <= FORGET_STEPS]
            self._points, least_s = [], 0.0
            for seen in fresh:
                least_s = max(least_s, seen.elapsed_s)
                self._points.append((seen.tokens, least_s))
        return self._points


def _kind(tokens: int) -> int:
    """The class of a size: one each up to 8, then four for each doubling."""
    if tokens <= 8:
        return tokens
    doubling = tokens.bit_length() - 3
    return 4 * doubling + (tokens >> doubling)
