"""Parts of a shelf's vectors that never change: an hnswlib graph, or rows that wait to become one."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import hnswlib
import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

SPACE = "ip"
HNSW_M = 16
HNSW_EF_BUILD = 200
HNSW_EF = 64
SEED = 100
CHUNK = 64
"""Vectors copied out of a graph at once: `get_items` holds the interpreter, about 1 ms for these."""
SPARE = 8
"""Neighbours asked for beyond `k`, in case some are dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    label: int
    similarity: float


class Segment(Protocol):
    """Vectors under labels, all of them there from the start; any thread may read it."""

    @property
    def dim(self) -> int: ...

    def __len__(self) -> int: ...

    def __contains__(self, label: int) -> bool: ...

    def live(self, dead: AbstractSet[int]) -> Labels:
        """All labels but those in `dead`."""
        ...

    def search(self, vector: Vectors, k: int, dead: AbstractSet[int]) -> list[Neighbour]:
        """Up to `k` nearest entries that are not in `dead`, by falling similarity."""
        ...

    def chunks(self, labels: Labels) -> Iterator[tuple[Labels, Vectors]]:
        """The vectors of `labels`, a few at a time."""
        ...


class Slab:
    """Rows searched one by one."""

    def __init__(self, labels: Labels, rows: Vectors) -> None:
        """Take both over: nobody may write to them any more."""
        self._labels = labels
        self._rows = rows
        self._sorted = np.sort(labels)

    @property
    def dim(self) -> int:
        return int(self._rows.shape[1])

    def __len__(self) -> int:
        return len(self._labels)

    def __contains__(self, label: int) -> bool:
        return _is_in(self._sorted, label)

    def live(self, dead: AbstractSet[int]) -> Labels:
        return _without(self._labels, dead)

    def search(self, vector: Vectors, k: int, dead: AbstractSet[int]) -> list[Neighbour]:
        similarities = self._rows @ vector
        if dead:
            similarities[np.isin(self._labels, _array(dead))] = -np.inf
        wanted = min(k, len(self) - len(dead))
        return [
            Neighbour(label=int(self._labels[row]), similarity=float(similarities[row]))
            for row in best_rows(similarities, wanted)
        ]

    def chunks(self, labels: Labels) -> Iterator[tuple[Labels, Vectors]]:
        rows = np.flatnonzero(np.isin(self._labels, labels))
        for at in range(0, len(rows), 16 * CHUNK):
            some = rows[at : at + 16 * CHUNK]
            yield self._labels[some], self._rows[some]


class Graph:
    """An hnswlib index that is filled once and never changed after, so that any thread may search it (hnswlib#562)."""

    def __init__(self, capacity: int, dim: int) -> None:
        self.dim = dim
        index: Any = hnswlib.Index(space=SPACE, dim=dim)
        index.init_index(capacity, M=HNSW_M, ef_construction=HNSW_EF_BUILD, random_seed=SEED)
        self._index = index
        self._sorted: Labels = np.empty(0, dtype=np.int64)

    @classmethod
    def of(cls, labels: Labels, vectors: Vectors) -> Graph:
        """Build a graph of all these; takes about 1 ms an entry: call it in a thread."""
        graph = cls(len(labels), int(vectors.shape[1]))
        graph.fill(labels, vectors)
        graph.seal(labels)
        return graph

    def fill(self, labels: Labels, vectors: Vectors) -> None:
        """Add vectors while nobody else has this graph yet; releases the interpreter."""
        self._index.add_items(vectors, labels, num_threads=1)

    def seal(self, labels: Labels) -> None:
        """Make it ready to be searched; `labels` are all that it was filled with."""
        self._index.set_ef(HNSW_EF)  # hnswlib does not save it either
        self._sorted = np.sort(labels)

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, label: int) -> bool:
        return _is_in(self._sorted, label)

    def live(self, dead: AbstractSet[int]) -> Labels:
        return _without(self._sorted, dead)

    def search(self, vector: Vectors, k: int, dead: AbstractSet[int]) -> list[Neighbour]:
        wanted = min(k, len(self) - len(dead))
        asked = min(len(self), wanted + (SPARE if dead else 0))
        while wanted > 0:
            try:
                labels, distances = self._index.knn_query(vector, k=asked, num_threads=1)
            except RuntimeError:  # fewer can be reached than were asked for
                if asked == 1:
                    return []
                asked //= 2
                wanted = min(wanted, asked)
                continue
            found = [
                Neighbour(label=label, similarity=1.0 - distance)
                for label, distance in zip(labels[0].astype(np.int64).tolist(), distances[0].tolist(), strict=True)
                if label not in dead
            ]
            if len(found) >= wanted or asked == len(self):
                return found[:wanted]
            asked = min(len(self), 4 * asked)
        return []

    def chunks(self, labels: Labels) -> Iterator[tuple[Labels, Vectors]]:
        for at in range(0, len(labels), CHUNK):
            some = labels[at : at + CHUNK]
            yield some, np.asarray(self._index.get_items(some), dtype=np.float32)

    @property
    def labels(self) -> Labels:
        """All labels, sorted."""
        return self._sorted

    def save(self, path: Path) -> None:
        """Write hnswlib's file; holds the interpreter for about 1.6 µs a vector, and reports no failure."""
        self._index.save_index(str(path))

    @classmethod
    def load(cls, path: Path, labels: Labels, dim: int) -> Graph:
        """Read a file whose checksum was compared; raises `RuntimeError` for one that hnswlib refuses."""
        graph = cls.__new__(cls)
        graph.dim = dim
        index: Any = hnswlib.Index(space=SPACE, dim=dim)
        index.load_index(str(path), max_elements=len(labels))
        graph._index = index  # noqa: SLF001 - its own
        graph.seal(labels)
        return graph


def best_rows(similarities: Vectors, k: int) -> list[int]:
    """The rows of the `k` highest similarities, by falling similarity."""
    wanted = min(k, len(similarities))
    if wanted <= 0:
        return []
    best = np.argpartition(-similarities, wanted - 1)[:wanted] if wanted < len(similarities) else np.arange(wanted)
    ordered: list[int] = best[np.argsort(-similarities[best])].tolist()
    return ordered


def _is_in(ordered: Labels, label: int) -> bool:
    at = int(np.searchsorted(ordered, label))
    return at < len(ordered) and int(ordered[at]) == label


def _without(labels: Labels, dead: AbstractSet[int]) -> Labels:
    return labels[~np.isin(labels, _array(dead))] if dead else labels


def _array(labels: AbstractSet[int]) -> Labels:
    return np.fromiter(labels, dtype=np.int64, count=len(labels))
