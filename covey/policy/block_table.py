"""Where a block's row is, by namespace and hash: open addressing, a whole prefix probed at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from covey.policy.block_columns import NONE, BlockColumns, Rows

FILL_MAX = 4
"""A table has at least this many entries for each block: short probes, 16 bytes a block."""
SCALAR_MAX = 6
"""So few keys are probed faster one by one."""
_ODD = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


class BlockTable:
    """Linear probing without tombstones. Entries are rows plus one; 0 is empty, so that fresh memory is an empty table.

    Sized once for all rows that there can be: it never grows, and so no call waits for it to grow.
    """

    def __init__(self, columns: BlockColumns) -> None:
        bits = max(4, (FILL_MAX * columns.capacity - 1).bit_length())
        self._columns = columns
        self._entries: NDArray[np.int32] = np.zeros(1 << bits, np.int32)
        self._at = self._entries.data
        self._mask = (1 << bits) - 1
        self._shift = 64 - bits

    @property
    def memory_bytes(self) -> int:
        return self._entries.nbytes

    def find(self, space: int, keys: NDArray[np.uint64]) -> Rows:
        """Return the row of each key, `NONE` where there is none."""
        if len(keys) <= SCALAR_MAX:
            return np.array([self.find_one(space, low, high) for low, high in keys.tolist()], np.int32)
        columns = self._columns
        low, high = keys[:, 0], keys[:, 1]
        mixed = (low ^ np.uint64(_salt(space))) * np.uint64(_ODD)
        slots = (mixed >> np.uint64(self._shift)).astype(np.int64)
        rows = self._entries.take(slots) - 1  # of an empty entry NONE, which takes some row and is ruled out below
        hit = columns.low.take(rows) == low
        hit &= columns.high.take(rows) == high
        hit &= columns.space.take(rows) == space
        hit &= rows != NONE
        if hit.all():
            return rows
        found = np.where(hit, rows, np.int32(NONE))
        left = np.flatnonzero(~hit & (rows != NONE))
        while len(left) > SCALAR_MAX:
            slots[left] = (slots[left] + 1) & self._mask
            entries = self._entries[slots[left]]
            rows = entries - 1
            hit = (columns.low[rows] == low[left]) & (columns.high[rows] == high[left]) & (columns.space[rows] == space)
            hit &= entries != 0
            found[left[hit]] = rows[hit]
            left = left[~hit & (entries != 0)]
        for i in left.tolist():
            found[i] = self._probe(int(slots[i]) + 1, space, int(low[i]), int(high[i]))
        return found

    def find_one(self, space: int, low: int, high: int) -> int:
        """Return the row of one key, `NONE` when there is none."""
        return self._probe(self._home(space, low), space, low, high)

    def insert(self, row: int) -> None:
        """Enter a row by its columns; the key must not be there yet."""
        columns, at = self._columns, self._at
        slot = self._home(columns.at_space[row], columns.at_low[row])
        while at[slot]:
            slot = (slot + 1) & self._mask
        at[slot] = row + 1

    def swap(self, old: int, new: int) -> None:
        """Let the key of one row lead to another row with the same key."""
        self._at[self._slot(old)] = new + 1

    def remove(self, row: int) -> None:
        """Take a row out and close the gap: entries behind it move up, so that no probe ends early."""
        columns, at, mask = self._columns, self._at, self._mask
        gap = slot = self._slot(row)
        while True:
            slot = (slot + 1) & mask
            entry = at[slot]
            if not entry:
                break
            home = self._home(columns.at_space[entry - 1], columns.at_low[entry - 1])
            if (slot - home) & mask >= (slot - gap) & mask:
                at[gap] = entry
                gap = slot
        at[gap] = 0

    def check(self, rows: Rows) -> None:
        """Assert that exactly these rows can be found."""
        assert np.count_nonzero(self._entries) == len(rows)
        columns = self._columns
        for row in rows.tolist():
            assert self.find_one(columns.at_space[row], columns.at_low[row], columns.at_high[row]) == row
        for space in np.unique(columns.space[rows]).tolist():
            own = rows[columns.space[rows] == space]
            keys = np.stack((columns.low[own], columns.high[own]), axis=1)
            assert np.array_equal(self.find(space, keys), own)

    def _probe(self, slot: int, space: int, low: int, high: int) -> int:
        columns, at, mask = self._columns, self._at, self._mask
        slot &= mask
        while entry := at[slot]:
            row = entry - 1
            if columns.at_low[row] == low and columns.at_high[row] == high and columns.at_space[row] == space:
                return row
            slot = (slot + 1) & mask
        return NONE

    def _slot(self, row: int) -> int:
        columns, at = self._columns, self._at
        slot = self._home(columns.at_space[row], columns.at_low[row])
        while at[slot] != row + 1:
            if not at[slot]:
                raise KeyError(row)
            slot = (slot + 1) & self._mask
        return slot

    def _home(self, space: int, low: int) -> int:
        return (((low ^ _salt(space)) * _ODD) & _WORD) >> self._shift


def _salt(space: int) -> int:
    return ((space + 1) * _ODD) & _WORD
