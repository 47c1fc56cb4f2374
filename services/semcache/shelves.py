"""The shelves that entries are filed under, and the vectors of each."""

from __future__ import annotations

from dataclasses import dataclass

from .entry import Shelf
from .graph import Graph, Segment
from .vectors import Rebuild, VectorIndex, Vectors

SLAB_ROWS = 16_384


@dataclass(slots=True)
class Place:
    """A shelf, the number that the table files it under, its vectors if it has any, and how many entries it has."""

    shelf: Shelf
    number: int
    index: VectorIndex | None = None
    entries: int = 0


class Shelves:
    """Every shelf that has entries, and which of them are due for a new generation."""

    def __init__(self, *, tail_max: int) -> None:
        self._tail_max = tail_max
        self._places: dict[Shelf, Place] = {}
        self._numbered: list[Place | None] = []
        self._free: list[int] = []
        self._crowded: dict[Shelf, None] = {}

    def find(self, shelf: Shelf) -> Place | None:
        """Return the place of a shelf that has entries."""
        return self._places.get(shelf)

    def numbered(self, number: int) -> Place:
        """Return the place of a number that an entry stands under."""
        place = self._numbered[number]
        assert place is not None
        return place

    def places(self) -> tuple[Place, ...]:
        """Every shelf that has entries."""
        return tuple(self._places.values())

    def enter(self, shelf: Shelf) -> Place:
        """Count one more entry of a shelf."""
        place = self._places.get(shelf)
        if place is None:
            number = self._free.pop() if self._free else len(self._numbered)
            if number == len(self._numbered):
                self._numbered.append(None)
            place = self._places[shelf] = self._numbered[number] = Place(shelf=shelf, number=number)
        place.entries += 1
        return place

    def leave(self, place: Place) -> None:
        """Count one entry less; the shelf goes with the last one."""
        place.entries -= 1
        if not place.entries:
            del self._places[place.shelf]
            self._numbered[place.number] = None
            self._free.append(place.number)
            self._crowded.pop(place.shelf, None)

    def add(self, place: Place, label: int, vector: Vectors) -> None:
        """File a vector; raises what `VectorIndex.add` raises."""
        index = place.index if place.index is not None else VectorIndex(len(vector), tail_max=self._tail_max)
        index.add(label, vector)
        place.index = index
        self._note(place)

    def load(self, place: Place, label: int, vector: Vectors) -> None:
        """File a vector when a process starts: thousands arrive at once, and a long tail is slow to grow."""
        self.add(place, label, vector)
        if place.index is not None and len(place.index.rows) >= SLAB_ROWS:
            place.index.seal()
            self._note(place)

    def remove(self, place: Place, label: int) -> None:
        """Take a vector out."""
        if place.index is not None:
            place.index.remove(label)
            if not place.index:
                place.index = None
            self._note(place)

    def take_crowded(self) -> tuple[Shelf, VectorIndex] | None:
        """Return a shelf that needs a new generation, each once; None when there is none."""
        while self._crowded:
            shelf = self._crowded.popitem()[0]
            place = self._places.get(shelf)
            if place is not None and place.index is not None and place.index.crowded:
                return shelf, place.index
        return None

    def adopt(self, shelf: Shelf, index: VectorIndex, rebuild: Rebuild, graph: Graph | None) -> bool:
        """Swap in a new generation; False when `index` has left its shelf meanwhile."""
        index.adopt(rebuild, graph)
        place = self._places.get(shelf)
        if place is None or place.index is not index:
            return False
        self._note(place)
        return True

    def adopt_segment(self, place: Place, segment: Segment, strangers: frozenset[int]) -> None:
        """Take in a segment read from disk; `strangers` are labels of it that have no entry here."""
        if len(strangers) == len(segment):
            return
        place.index = place.index if place.index is not None else VectorIndex(segment.dim, tail_max=self._tail_max)
        place.index.adopt_segment(segment, strangers)
        self._note(place)

    def check(self) -> None:
        """Assert that numbers, shelves and crowded ones agree."""
        assert all(self._numbered[place.number] is place and place.entries for place in self._places.values())
        assert len(self._numbered) == len(self._places) + len(self._free)
        assert self._crowded.keys() <= self._places.keys()

    def _note(self, place: Place) -> None:
        if place.index is not None and place.index.crowded:
            self._crowded[place.shelf] = None
        else:
            self._crowded.pop(place.shelf, None)
