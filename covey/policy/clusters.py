"""Clusters of vectors, so that examples are looked for in a few of them only: K = sqrt(N) (IC-Cache, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
ROUNDS = 12


class Clusters:
    """Spherical k-means over unit vectors. Fitting costs N K: it is for a thread, off the path of requests."""

    def __init__(self, centres: Vectors, members: Sequence[NDArray[np.int64]]) -> None:
        self._centres = centres
        self._members = members

    @classmethod
    def fit(cls, vectors: Vectors, rng: np.random.Generator) -> Clusters:
        """Cluster unit vectors [N, dim] into about sqrt(N); K + N / K, the work of a search, is least there."""
        count = len(vectors)
        if not count:
            return cls(vectors, [])
        k = max(1, round(count**0.5))
        centres = vectors[rng.choice(count, size=k, replace=False)].copy()
        nearest = np.zeros(count, dtype=np.int64)
        for _ in range(ROUNDS):
            found = (vectors @ centres.T).argmax(axis=1)
            moved = _means(vectors, found, centres)
            is_settled = bool((found == nearest).all()) and np.allclose(moved, centres)
            nearest, centres = found, moved
            if is_settled:
                break
        nearest = (vectors @ centres.T).argmax(axis=1)
        return cls(centres, [np.flatnonzero(nearest == i) for i in range(k)])

    def __len__(self) -> int:
        return len(self._members)

    def near(self, vector: Vectors, count: int) -> NDArray[np.int64]:
        """Return the places of at least `count` vectors: all members of the nearest clusters, nearest first."""
        if not self._members:
            return np.empty(0, dtype=np.int64)
        found: list[NDArray[Any]] = []
        total = 0
        for i in np.argsort(-(self._centres @ vector), kind="stable"):
            found.append(self._members[i])
            total += len(self._members[i])
            if total >= count:
                break
        return np.concatenate(found)

    def check(self) -> None:
        """Assert that every vector is in exactly one cluster."""
        places = np.concatenate(self._members) if self._members else np.empty(0, dtype=np.int64)
        assert np.array_equal(np.sort(places), np.arange(len(places)))


def _means(vectors: Vectors, nearest: NDArray[np.int64], centres: Vectors) -> Vectors:
    sums = np.zeros_like(centres)
    np.add.at(sums, nearest, vectors)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), centres)  # an empty cluster stays where it was
