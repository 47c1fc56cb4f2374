"""The category of a request that names none: the nearest centroid of the categories' examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from covey.policy.reuse import GENERAL

from .vectors import Vectors


class Classifier:
    """Compares a request's vector with one centroid a category; far from all of them it is `general`."""

    def __init__(self, examples: Mapping[str, Sequence[Vectors]], *, floor: float) -> None:
        """`examples` holds unit vectors by category, at least one each; `floor` is the least similarity."""
        self._names = tuple(examples)
        self._floor = floor
        means = np.stack([np.mean(np.stack(list(vectors)), axis=0) for vectors in examples.values()])
        self._centroids = means / np.linalg.norm(means, axis=1, keepdims=True)

    def classify(self, vector: Vectors) -> str:
        """Return the category's name."""
        similarities = self._centroids @ vector
        best = int(np.argmax(similarities))
        return self._names[best] if similarities[best] >= self._floor else GENERAL
