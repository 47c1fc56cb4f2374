"""Nearest neighbours among the unit vectors of one shelf: exact while few, generations of hnswlib graphs above."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from .graph import Graph, Neighbour, Segment, Slab, Vectors, best_rows

__all__ = ["Neighbour", "Rebuild", "VectorIndex", "Vectors"]

DEAD_SHARE_MAX = 0.3
"""A segment with more removed entries than this is built again: they are still walked through."""
NORM_TOLERANCE = 1e-3
MERGE_RATIO = 3
"""Segments shrink by at least this factor from one to the next, so there are few and each entry is built rarely."""
GRAPH_MAX = 65_536
"""Entries of one graph: bounds how long a build takes, what memory it needs, and the 0.2 µs an entry for which hnswlib
holds the interpreter when a graph begins and ends. A larger shelf has several."""
ROWS_FIRST = 2
RESEALED = 4
"""Once a shelf has a graph, its tail is sealed at this fraction of the limit: both are searched each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """What the next generation will hold; `build` runs in a thread, on what never changes only."""

    sources: tuple[Segment, ...]
    dead: tuple[frozenset[int], ...]

    def build(self) -> Graph | None:
        """Build the graph of everything that lived when this was planned; None when that is nothing."""
        kept = [source.live(dead) for source, dead in zip(self.sources, self.dead, strict=True)]
        if not sum(map(len, kept)):
            return None
        graph = Graph(sum(map(len, kept)), self.sources[0].dim)
        for source, labels in zip(self.sources, kept, strict=True):
            for some, vectors in source.chunks(labels):
                graph.fill(some, vectors)
        graph.seal(np.concatenate(kept))
        return graph


class VectorIndex:
    """The vectors of one shelf: segments that never change once built, plus a short tail that is searched exactly.

    Owned by the event loop: every method here is quick and synchronous; only `Rebuild.build` is for a thread. A full
    tail is sealed as it is, serves on as a slab, and becomes part of a graph in the background; small graphs merge
    into larger ones, so an entry is built a logarithmic number of times. Nothing is resized in place, nothing is
    added to a graph that may be searched (hnswlib's `resize_index` crashes under queries), and a removed entry of a
    segment stands in a side table until a third of the segment is dead.
    """

    def __init__(self, dim: int, *, tail_max: int) -> None:
        self.dim = dim
        self._tail_max = tail_max
        self._rows = np.empty((ROWS_FIRST, dim), dtype=np.float32)
        self._labels = np.empty(ROWS_FIRST, dtype=np.int64)
        self._at: dict[int, int] = {}
        self._segments: list[Segment] = []
        self._dead: dict[Segment, set[int]] = {}

    def __len__(self) -> int:
        return len(self._at) + self.sealed

    def __contains__(self, label: int) -> bool:
        return label in self._at or self._segment_of(label) is not None

    @property
    def sealed(self) -> int:
        """Live entries in the segments."""
        return sum(len(segment) - len(self._dead[segment]) for segment in self._segments)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What is searched besides the tail, the largest first."""
        return tuple(self._segments)

    @property
    def rows(self) -> Mapping[int, int]:
        """Where in the tail each of its labels stands."""
        return MappingProxyType(self._at)

    def add(self, label: int, vector: Vectors) -> None:
        """Add a unit vector under a new label; raises `ValueError` for another dimension, NaN or zero."""
        check_vector(vector, self.dim)
        if label in self:
            raise ValueError(f"label {label} is taken")
        row = len(self._at)
        if row == len(self._rows):
            self._grow(row + row // 8 + 1)
        self._rows[row] = vector
        self._labels[row] = label
        self._at[label] = row

    def adopt_segment(self, segment: Segment, dead: AbstractSet[int] = frozenset()) -> None:
        """Take in a segment that was built or loaded elsewhere; its labels must be new, but for the `dead` ones."""
        self._segments.append(segment)
        self._segments.sort(key=len, reverse=True)
        self._dead[segment] = set(dead)

    def remove(self, label: int) -> bool:
        """Remove an entry; False when it is not here."""
        row = self._at.pop(label, None)
        if row is not None:
            last = len(self._at)
            if row != last:  # the last row moves into the gap
                self._rows[row] = self._rows[last]
                self._labels[row] = self._labels[last]
                self._at[int(self._labels[row])] = row
            return True
        segment = self._segment_of(label)
        if segment is None:
            return False
        self._dead[segment].add(label)
        if len(self._dead[segment]) == len(segment):
            self._drop(segment)
        return True

    def search(self, vector: Vectors, k: int) -> list[Neighbour]:
        """Return up to `k` nearest entries by falling similarity; none for an empty index or a strange vector."""
        return merged(list(self.parts(vector, k)), k)

    def parts(self, vector: Vectors, k: int) -> Iterator[list[Neighbour]]:
        """Search the tail, then every segment, about 0.1 ms each, so that a caller may yield in between."""
        if vector.shape != (self.dim,) or not np.isfinite(vector).all():
            return
        count = len(self._at)
        similarities = self._rows[:count] @ vector
        yield [
            Neighbour(label=int(self._labels[row]), similarity=float(similarities[row]))
            for row in best_rows(similarities, k)
        ]
        for segment in tuple(self._segments):
            dead = self._dead.get(segment)
            if dead is not None:
                yield segment.search(vector, k, dead)

    def seal(self) -> None:
        """Turn the tail into a slab as it is, and start another one."""
        count = len(self._at)
        self.adopt_segment(Slab(self._labels[:count], self._rows[:count]))
        self._at = {}
        self._rows, self._labels = self._rows[:0], self._labels[:0]
        self._grow(ROWS_FIRST)

    @property
    def crowded(self) -> bool:
        """Whether a new generation is due: the tail is full, a slab waits, or too much of a segment is dead."""
        return len(self) > 0 and (self._is_tail_full() or bool(self._due()))

    def rebuild(self) -> Rebuild:
        """Seal the tail if it is full and return the work of a new generation; `crowded` must hold."""
        if self._is_tail_full():
            self.seal()
        due = tuple(self._due())
        return Rebuild(sources=due, dead=tuple(frozenset(self._dead[segment]) for segment in due))

    def adopt(self, rebuild: Rebuild, graph: Graph | None) -> None:
        """Swap in what `rebuild` has built; entries removed meanwhile stay removed."""
        removed: set[int] = set()
        for source, dead in zip(rebuild.sources, rebuild.dead, strict=True):
            if source in self._dead:
                removed |= self._dead[source] - dead
                self._drop(source)
            elif graph is not None:  # it died out meanwhile
                removed.update(int(label) for label in source.live(dead))
        if graph is not None and len(removed) < len(graph):
            self.adopt_segment(graph, removed)

    def labels(self) -> Iterator[int]:
        """Every live label."""
        yield from self._at
        for segment in self._segments:
            yield from (int(label) for label in segment.live(self._dead[segment]))

    def _is_tail_full(self) -> bool:
        return len(self._at) > (self._tail_max // RESEALED if self._segments else self._tail_max)

    def _due(self) -> Sequence[Segment]:
        """Segments to build into one: a slab, one too dead, or a small one beside others, with what fits beside it."""
        sizes = [len(segment) - len(self._dead[segment]) for segment in self._segments]
        for at, segment in enumerate(self._segments):
            rest = sum(sizes[at + 1 :])
            is_dead = len(self._dead[segment]) > DEAD_SHARE_MAX * len(segment)
            is_small = 0 < len(segment) < MERGE_RATIO * rest and len(segment) <= GRAPH_MAX // 2
            if is_dead or is_small or isinstance(segment, Slab):
                return self._group(at, sizes)
        return ()

    def _group(self, at: int, sizes: list[int]) -> list[Segment]:
        group, total = [self._segments[at]], sizes[at]
        for segment, size in zip(self._segments[at + 1 :], sizes[at + 1 :], strict=True):
            if total + size <= GRAPH_MAX:
                group.append(segment)
                total += size
        return group

    def _segment_of(self, label: int) -> Segment | None:
        return next((s for s in self._segments if label in s and label not in self._dead[s]), None)

    def _drop(self, segment: Segment) -> None:
        self._segments.remove(segment)
        del self._dead[segment]

    def _grow(self, count: int) -> None:
        rows, labels = np.empty((count, self.dim), dtype=np.float32), np.empty(count, dtype=np.int64)
        held = len(self._at)
        rows[:held], labels[:held] = self._rows[:held], self._labels[:held]
        self._rows, self._labels = rows, labels


def check_vector(vector: npt.NDArray[np.float32], dim: int) -> None:
    """Raise `ValueError` unless this is a finite vector of length 1 and of `dim` dimensions."""
    if vector.shape != (dim,):
        raise ValueError(f"a vector has {dim} dimensions here, not {vector.shape}")
    if not abs(float(np.linalg.norm(vector)) - 1.0) <= NORM_TOLERANCE:  # NaN fails too
        raise ValueError("only finite vectors of length 1 are indexed")


def merged(parts: Sequence[list[Neighbour]], k: int) -> list[Neighbour]:
    """The `k` best of several searches."""
    return sorted((n for part in parts for n in part), key=lambda n: n.similarity, reverse=True)[:k]
