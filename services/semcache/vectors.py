"""Nearest neighbours among the unit vectors of one shelf: exact while few, hnswlib generations above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import hnswlib
import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]

HNSW_M = 16
HNSW_EF_BUILD = 200
HNSW_EF = 64
SEED = 100
DEAD_SHARE_MAX = 0.3
"""A generation with more removed entries than this is built again: they are still walked through."""
NORM_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    label: int
    similarity: float


class Generation:
    """An hnswlib index that is never changed once built, so that any thread may search it (hnswlib#562)."""

    def __init__(self, labels: Sequence[int], vectors: Vectors) -> None:
        """Build it over `vectors`; takes about 1 ms an entry: call it in a thread."""
        index: Any = hnswlib.Index(space="ip", dim=vectors.shape[1])
        index.init_index(len(labels), M=HNSW_M, ef_construction=HNSW_EF_BUILD, random_seed=SEED)
        index.add_items(vectors, np.asarray(labels, dtype=np.int64), num_threads=1)
        index.set_ef(HNSW_EF)
        self._index = index
        self.labels = frozenset(labels)

    def search(self, vector: Vectors, k: int, dead: frozenset[int] | set[int]) -> list[Neighbour]:
        """Return up to `k` nearest entries that are not in `dead`, by falling similarity."""
        live = len(self.labels) - len(dead)
        wanted = min(k, live)
        asked = min(len(self.labels), wanted + 8)
        while wanted > 0:
            labels, distances = self._index.knn_query(vector, k=asked, num_threads=1)
            found = [
                Neighbour(label=int(label), similarity=1.0 - float(distance))
                for label, distance in zip(labels[0], distances[0], strict=True)
                if int(label) not in dead
            ]
            if len(found) >= wanted or asked == len(self.labels):
                return found[:wanted]
            asked = min(len(self.labels), 4 * asked)
        return []

    def vectors(self, labels: Sequence[int]) -> Vectors:
        """Return the stored vectors of `labels`, for the next generation."""
        return np.asarray(self._index.get_items(labels), dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """What the next generation will hold; `build` runs in a thread, on copies only."""

    source: Generation | None
    kept: tuple[int, ...]
    tail_labels: tuple[int, ...]
    tail: Vectors

    def build(self) -> Generation:
        parts = [self.tail]
        if self.source is not None and self.kept:
            parts.insert(0, self.source.vectors(self.kept))
        return Generation((*self.kept, *self.tail_labels), np.concatenate(parts))


class VectorIndex:
    """The vectors of one shelf: an unchanging generation plus a short tail that is searched exactly.

    Owned by the event loop: every method here is quick and synchronous; `generation.search` and
    `Rebuild.build` are what threads run. Nothing is ever resized in place: the tail is copied into a larger
    array, and a full tail becomes part of the next generation (hnswlib's `resize_index` crashes under queries).
    """

    def __init__(self, dim: int, *, tail_max: int) -> None:
        self._dim = dim
        self._tail_max = tail_max
        self._rows = np.empty((8, dim), dtype=np.float32)
        self._labels: list[int] = []
        self._at: dict[int, int] = {}
        self._generation: Generation | None = None
        self._dead: set[int] = set()

    def __len__(self) -> int:
        return len(self._labels) + self.sealed

    def __contains__(self, label: int) -> bool:
        return label in self._at or self._is_sealed(label)

    @property
    def sealed(self) -> int:
        """Live entries in the generation."""
        return len(self._generation.labels) - len(self._dead) if self._generation is not None else 0

    @property
    def generation(self) -> Generation | None:
        """What to search besides the tail."""
        return self._generation

    @property
    def dead(self) -> frozenset[int]:
        """Removed entries that the generation still holds."""
        return frozenset(self._dead)

    @property
    def rows(self) -> Mapping[int, int]:
        """Where in the tail each of its labels stands."""
        return MappingProxyType(self._at)

    def add(self, label: int, vector: Vectors) -> None:
        """Add a unit vector under a new label; raises `ValueError` for another dimension, NaN or zero."""
        if vector.shape != (self._dim,):
            raise ValueError(f"a vector has {self._dim} dimensions here, not {vector.shape}")
        if not abs(float(np.linalg.norm(vector)) - 1.0) <= NORM_TOLERANCE:  # NaN fails too
            raise ValueError("only finite vectors of length 1 are indexed")
        if label in self:
            raise ValueError(f"label {label} is taken")
        row = len(self._labels)
        if row == len(self._rows):
            grown = np.empty((2 * row, self._dim), dtype=np.float32)
            grown[:row] = self._rows
            self._rows = grown
        self._rows[row] = vector
        self._labels.append(label)
        self._at[label] = row

    def remove(self, label: int) -> bool:
        """Remove an entry; False when it is not here."""
        row = self._at.pop(label, None)
        if row is not None:
            last = self._labels.pop()
            if last != label:  # the last row moves into the gap
                self._rows[row] = self._rows[len(self._labels)]
                self._labels[row] = last
                self._at[last] = row
            return True
        if self._is_sealed(label):
            self._dead.add(label)
            return True
        return False

    def search_tail(self, vector: Vectors, k: int) -> list[Neighbour]:
        """Compare with every vector of the tail; about 0.1 ms for a thousand."""
        count = len(self._labels)
        wanted = min(k, count)
        if wanted == 0:
            return []
        similarities = self._rows[:count] @ vector
        best = np.argpartition(-similarities, wanted - 1)[:wanted]
        ordered = best[np.argsort(-similarities[best])]
        return [Neighbour(label=self._labels[row], similarity=float(similarities[row])) for row in ordered]

    @property
    def crowded(self) -> bool:
        """Whether a new generation is due: the tail is full, or too much of the old generation is dead."""
        held = len(self._generation.labels) if self._generation is not None else 0
        return len(self) > 0 and (len(self._labels) > self._tail_max or len(self._dead) > DEAD_SHARE_MAX * held)

    def rebuild(self) -> Rebuild:
        """Return the work of a new generation over what lives now; there must be something."""
        kept = tuple(sorted(self._generation.labels - self._dead)) if self._generation is not None else ()
        return Rebuild(
            source=self._generation,
            kept=kept,
            tail_labels=tuple(self._labels),
            tail=self._rows[: len(self._labels)].copy(),
        )

    def adopt(self, rebuild: Rebuild, generation: Generation) -> None:
        """Swap in what `rebuild` has built; entries removed meanwhile stay removed, added ones stay in the tail."""
        built = generation.labels
        removed = {label for label in built if label not in self}
        for label in rebuild.tail_labels:
            if label in self._at:
                self.remove(label)
        self._rows = self._rows[: max(8, len(self._labels))].copy()
        self._generation = generation
        self._dead = removed

    def _is_sealed(self, label: int) -> bool:
        return self._generation is not None and label in self._generation.labels and label not in self._dead
