"""Free blocks as runs of neighbours, so that what is swapped or copied together lies together (FastSwitch §4.1)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import pairwise


class FreeRuns:
    """The maximal runs of free blocks. A sequence gets one run where there is one, and room to grow behind it.

    Taking and giving cost O(number of different run lengths), which is at most the root of twice the blocks.
    """

    def __init__(self, count: int) -> None:
        self._length_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}  # end (not included) -> start
        self._by_length: dict[int, dict[int, None]] = {}
        self._lengths: list[int] = []
        self._count = count
        self._add(0, count)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return (block for start, length in self._length_at.items() for block in range(start, start + length))

    @property
    def runs(self) -> int:
        """Runs, whatever their length."""
        return len(self._length_at)

    def take(self, count: int, *, after: int | None = None, room: int = 0) -> list[int]:
        """Take `count` blocks: those behind `after` if they are free, else the end of the run that fits best.

        `room` is how many blocks their owner may come to hold: it is left free behind them while there is space enough.
        When no run is long enough, the longest ones are split.
        """
        assert 0 <= count <= self._count
        taken: list[int] = []
        if after is not None and (length := self._length_at.get(after + 1)) is not None:
            taken += self._cut(after + 1, after + 1, min(length, count))
        while (missing := count - len(taken)) > 0:
            wanted = max(missing, room - len(taken))
            at = bisect_left(self._lengths, wanted)
            length = self._lengths[min(at, len(self._lengths) - 1)]
            start = next(iter(self._by_length[length]))
            size = min(wanted, length)
            taken += self._cut(start, start + length - size, min(missing, size))
        return taken

    def give(self, block: int) -> None:
        """Put a block back; neighbours become one run."""
        start, end = block, block + 1
        if (length := self._length_at.get(end)) is not None:
            self._drop(end)
            end += length
        if (before := self._start_before.get(block)) is not None:
            self._drop(before)
            start = before
        self._add(start, end - start)
        self._count += 1

    def check(self) -> None:
        """Assert that runs are disjoint, maximal and found by every index."""
        runs = sorted(self._length_at.items())
        assert all(a + length < b for (a, length), (b, _) in pairwise(runs))
        assert sum(length for _, length in runs) == self._count
        assert self._start_before == {start + length: start for start, length in runs}
        assert self._lengths == sorted({length for _, length in runs})
        assert {(start, length) for length, starts in self._by_length.items() for start in starts} == set(runs)

    def _cut(self, start: int, at: int, count: int) -> range:
        length = self._length_at[start]
        self._drop(start)
        self._add(start, at - start)
        self._add(at + count, start + length - at - count)
        self._count -= count
        return range(at, at + count)

    def _add(self, start: int, length: int) -> None:
        if length <= 0:
            return
        self._length_at[start] = length
        self._start_before[start + length] = start
        starts = self._by_length.setdefault(length, {})
        if not starts:
            insort(self._lengths, length)
        starts[start] = None

    def _drop(self, start: int) -> None:
        length = self._length_at.pop(start)
        del self._start_before[start + length]
        starts = self._by_length[length]
        del starts[start]
        if not starts:
            del self._by_length[length]
            del self._lengths[bisect_left(self._lengths, length)]
