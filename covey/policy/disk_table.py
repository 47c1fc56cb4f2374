"""Row numbers by 64-bit fingerprint in a few bytes each: open addressing over shards that grow one at a time."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

SHARDS = 256
_START = 8


class FingerprintTable:
    """Finds the row that has a fingerprint; the rows themselves keep the fingerprints, in a column of the caller's.

    A shard doubles when it is two thirds full, so that no insertion rebuilds more than a 256th of the table.
    """

    def __init__(self, fingerprints: Sequence[int]) -> None:
        self._fingerprints = fingerprints
        self._shards = [array("I", bytes(4 * _START)) for _ in range(SHARDS)]  # row + 1; 0 is empty
        self._counts = [0] * SHARDS

    def __len__(self) -> int:
        return sum(self._counts)

    @property
    def size_bytes(self) -> int:
        """Memory that the shards take."""
        return sum(4 * len(shard) for shard in self._shards)

    def find(self, fingerprint: int) -> int:
        """Return the row, or -1."""
        shard = self._shards[fingerprint >> 56]
        mask = len(shard) - 1
        at = fingerprint & mask
        while row := shard[at]:
            if self._fingerprints[row - 1] == fingerprint:
                return row - 1
            at = (at + 1) & mask
        return -1

    def add(self, row: int) -> None:
        """Enter a row whose fingerprint is in the column, and not in the table."""
        number = self._fingerprints[row] >> 56
        if 3 * (self._counts[number] + 1) > 2 * len(self._shards[number]):
            old = self._shards[number]
            self._shards[number] = array("I", bytes(8 * len(old)))
            for entry in old:
                if entry:
                    self._place(number, entry)
        self._place(number, row + 1)
        self._counts[number] += 1

    def discard(self, row: int) -> None:
        """Take a row out; those behind it move up, so that no search ends early."""
        number = self._fingerprints[row] >> 56
        shard = self._shards[number]
        mask = len(shard) - 1
        gap = self._fingerprints[row] & mask
        while shard[gap] != row + 1:
            gap = (gap + 1) & mask
        at = gap
        while entry := shard[at := (at + 1) & mask]:
            home = self._fingerprints[entry - 1] & mask
            if (at - home) & mask >= (at - gap) & mask:
                shard[gap] = entry
                gap = at
        shard[gap] = 0
        self._counts[number] -= 1

    def check(self) -> None:
        """Assert that every entry is found and counted."""
        for shard, count in zip(self._shards, self._counts, strict=True):
            entries = [entry for entry in shard if entry]
            assert len(entries) == count <= 2 * len(shard) // 3 + 1
            assert all(self.find(self._fingerprints[entry - 1]) == entry - 1 for entry in entries)

    def _place(self, number: int, entry: int) -> None:
        shard = self._shards[number]
        mask = len(shard) - 1
        at = self._fingerprints[entry - 1] & mask
        while shard[at]:
            at = (at + 1) & mask
        shard[at] = entry
