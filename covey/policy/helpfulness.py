"""How much an example will help a model with a request: a small proxy that learns from what came of earlier ones."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEATURES = 8
"""How many numbers describe an example beside a request, the constant included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleView:
    """An example beside a request. `overlap` is the share of the request's words that it has; `quality` in [0, 1]."""

    example: str
    similarity: float
    overlap: float
    request_chars: int
    example_chars: int
    answer_chars: int
    same_category: bool
    quality: float = 0.5
    uses: int = 0

    def features(self) -> NDArray[np.float64]:
        """Numbers of about the size of one."""
        return np.array(
            [
                1.0,
                self.similarity,
                self.similarity**2,
                self.overlap,
                min(2.0, abs(math.log((1 + self.example_chars) / (1 + self.request_chars)))),
                min(2.0, math.log1p(self.answer_chars) / 5.0),
                self.quality * (1.0 if self.same_category else 0.5),
                min(1.0, math.log1p(self.uses) / 5.0),
            ]
        )


class Helpfulness:
    """Recursive least squares from features to help, in [0, 1]; ours where the paper trains a TinyBERT.

    Until it has learnt, an example helps as much as it is similar, times its quality.
    """

    def __init__(self, *, prior: float = 10.0, forgetting: float = 0.999, learnt_after: int = 50) -> None:
        """`prior` is how slowly it leaves its first opinion; `forgetting` under 1 follows what changes."""
        if not 0.9 <= forgetting <= 1.0 or not prior > 0:
            raise ValueError("forgetting must lie in [0.9, 1] and prior be over 0")
        self._covariance = np.eye(FEATURES) / prior
        self._weights = np.zeros(FEATURES)
        self._forgetting = forgetting
        self._ceiling = 1.0 / prior
        self._learnt_after = learnt_after
        self.observed = 0

    def predict(self, view: ExampleView) -> float:
        """Return the expected help."""
        if self.observed < self._learnt_after:
            return max(0.0, min(1.0, view.similarity * view.quality * 2.0))
        return min(1.0, max(0.0, float(self._weights @ view.features())))

    def observe(self, view: ExampleView, helped: float) -> None:
        """Learn that an example helped: 1 where the answer was good with it, 0 where it was not."""
        x = view.features()
        pushed = self._covariance @ x
        gain = pushed / (self._forgetting + x @ pushed)
        self._weights = self._weights + gain * (helped - self._weights @ x)
        covariance = (self._covariance - np.outer(gain, pushed)) / self._forgetting
        # Directions that are never seen would be forgotten for ever: no doubt grows past the first one.
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        self._covariance = (vectors * np.clip(values, 1e-12, self._ceiling)) @ vectors.T
        self.observed += 1

    def check(self) -> None:
        """Assert the invariants that hold between any two calls."""
        assert np.isfinite(self._weights).all()
        assert np.linalg.eigvalsh(self._covariance).max() <= self._ceiling * (1 + 1e-6)


class UtilityThreshold:
    """The utility from which examples are worth their tokens, chosen anew from sampled requests (IC-Cache, 4.1)."""

    def __init__(self, *, start: float = 0.5, samples_max: int = 500, every: int = 50) -> None:
        """`every` so many samples the threshold with the best mean gain among the last `samples_max` is taken."""
        self._samples: deque[tuple[float, float]] = deque(maxlen=samples_max)
        self._every = every
        self._since = 0
        self.value = start

    def observe(self, utility: float, gain: float) -> None:
        """A sampled request saw an example of this utility and gained so much by it, its tokens' cost taken off."""
        self._samples.append((utility, gain))
        self._since += 1
        if self._since >= self._every:
            self._since = 0
            self.value = self._best()

    def _best(self) -> float:
        """The threshold above which the sum of gains is largest; the higher one of equals."""
        ranked = sorted(self._samples, reverse=True)
        best, best_sum, total = 1.0, 0.0, 0.0
        for i, (utility, gain) in enumerate(ranked):
            total += gain
            is_last = i + 1 == len(ranked) or ranked[i + 1][0] < utility
            if is_last and total > best_sum:
                best, best_sum = utility, total
        return best
