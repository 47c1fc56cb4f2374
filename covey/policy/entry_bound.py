"""A bound on the error rate of each cached entry, learnt from verdicts about it (after vCache, arXiv 2502.03771)."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from statistics import NormalDist

OBSERVATIONS_MIN = 6
OBSERVATIONS_MAX = 64
GRID = tuple((index + 0.5) / 50.0 for index in range(50))
QUANTILES = tuple(NormalDist().inv_cdf(1.0 - epsilon) for epsilon in GRID)
NEWTON_STEPS = 25
RIDGE = 1e-2
"""Weight of the prior on both coefficients: perfectly separated observations would drive them to infinity."""
SLOPE = 1.0
"""The slope, in tenths of similarity, that observations at one and the same similarity cannot tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryFit:
    """p(right | similarity s) = sigmoid(gamma (s - threshold)), and how uncertain the threshold is."""

    gamma: float
    threshold: float
    variance: float

    def explore(self, similarity: float, delta: float) -> float:
        """The probability with which to ask the model, so that at most `delta` of the answers are wrong.

        tau = min over epsilon of 1 - delta / (1 - alpha), with alpha = (1 - epsilon) sigmoid(gamma (s - t')) and
        t' the upper (1 - epsilon) bound of the threshold.
        """
        spread = math.sqrt(self.variance)
        best = 1.0
        for epsilon, quantile in zip(GRID, QUANTILES, strict=True):
            alpha = (1.0 - epsilon) * _sigmoid(self.gamma * (similarity - self.threshold - quantile * spread))
            if alpha >= 1.0 - delta:
                return 0.0
            best = min(best, 1.0 - delta / (1.0 - alpha))
        return max(0.0, best)


def fit_entry(observations: tuple[tuple[float, bool], ...]) -> EntryFit | None:
    """Fit one entry's observations (similarity, was right); None when similarity does not speak for rightness.

    Logistic regression by Newton's method with a weak ridge, in similarities centred and scaled to about 1; the
    threshold's variance by the delta method.
    """
    if len(observations) < OBSERVATIONS_MIN:
        return None
    scale, centre = 10.0, sum(s for s, _ in observations) / len(observations)
    a, b = 0.0, SLOPE
    haa = hab = hbb = 1.0
    for _ in range(NEWTON_STEPS):
        ga, gb, haa, hab, hbb = -RIDGE * a, RIDGE * (SLOPE - b), RIDGE, 0.0, RIDGE
        for similarity, right in observations:
            x = (similarity - centre) * scale
            p = _sigmoid(a + b * x)
            w = p * (1.0 - p)
            ga, gb = ga + right - p, gb + (right - p) * x
            haa, hab, hbb = haa + w, hab + w * x, hbb + w * x * x
        determinant = haa * hbb - hab * hab
        step_a, step_b = (hbb * ga - hab * gb) / determinant, (haa * gb - hab * ga) / determinant
        largest = max(abs(step_a), abs(step_b))
        damp = min(1.0, 5.0 / largest) if largest > 0 else 1.0
        a, b = a + damp * step_a, b + damp * step_b
        if largest < 1e-6:
            break
    if b <= 1e-6:
        return None
    determinant = haa * hbb - hab * hab
    # t = -a/b in scaled units; its gradient is (-1/b, a/b^2), the covariance the inverse of the information.
    da, db = -1.0 / b, a / (b * b)
    variance = (da * da * hbb - 2.0 * da * db * hab + db * db * haa) / determinant
    return EntryFit(gamma=b * scale, threshold=centre - a / b / scale, variance=max(0.0, variance) / (scale * scale))


class EntryBounds:
    """Verdicts by entry, bounded in entries and in verdicts each, and the decision to serve or to ask.

    `delta` is the share of wrong answers that is allowed. An entry with fewer than six verdicts is never served.
    """

    def __init__(self, delta: float, *, entries_max: int = 100_000) -> None:
        if not 0.0 < delta < 1.0:
            raise ValueError(f"delta must lie in (0, 1), is {delta}")
        self._delta = delta
        self._entries_max = entries_max
        self._observed: OrderedDict[str, list[tuple[float, bool]]] = OrderedDict()
        self._fits: dict[str, EntryFit | None] = {}

    def observe(self, entry: str, similarity: float, *, right: bool) -> None:
        """Take a verdict: whether the entry's answer is right for a query at this similarity."""
        observations = self._observed.setdefault(entry, [])
        observations.append((min(1.0, max(-1.0, similarity)), right))
        del observations[:-OBSERVATIONS_MAX]
        self._observed.move_to_end(entry)
        self._fits.pop(entry, None)
        while len(self._observed) > self._entries_max:
            oldest, _ = self._observed.popitem(last=False)
            self._fits.pop(oldest, None)

    def forget(self, entry: str) -> None:
        """Drop what is known of an entry that is gone."""
        self._observed.pop(entry, None)
        self._fits.pop(entry, None)

    def explore(self, entry: str, similarity: float) -> float:
        """The probability with which the model must be asked although the entry is near."""
        observations = self._observed.get(entry)
        if observations is None or len(observations) < OBSERVATIONS_MIN or math.isnan(similarity):
            return 1.0
        if entry not in self._fits:
            self._fits[entry] = fit_entry(tuple(observations))
        fitted = self._fits[entry]
        return 1.0 if fitted is None else fitted.explore(similarity, self._delta)

    def serves(self, entry: str, similarity: float, draw: float) -> bool:
        """Whether to serve the entry now; `draw` is random in [0, 1)."""
        return draw >= self.explore(entry, similarity)

    def check(self) -> None:
        """Assert the bounds."""
        assert len(self._observed) <= self._entries_max
        assert self._fits.keys() <= self._observed.keys()
        assert all(0 < len(observations) <= OBSERVATIONS_MAX for observations in self._observed.values())


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
