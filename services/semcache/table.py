"""What memory holds of every entry beside its vector: some sixty bytes in columns, and three small tables."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FIRST = 64
SCAN_MAX = 4096
"""Members of a partition that are compared for eviction; of more, a sample of so many."""


class Table:
    """Columns of numbers by slot; a slot is used again when its entry has gone. Knows nothing of what they mean."""

    def __init__(self) -> None:
        self.label: npt.NDArray[np.int64] = np.zeros(FIRST, dtype=np.int64)
        self.exact: npt.NDArray[np.uint64] = np.zeros(FIRST, dtype=np.uint64)
        self.stored_at: npt.NDArray[np.float64] = np.zeros(FIRST, dtype=np.float64)
        self.expires_at: npt.NDArray[np.float64] = np.zeros(FIRST, dtype=np.float64)
        self.used_at: npt.NDArray[np.float64] = np.zeros(FIRST, dtype=np.float64)
        self.value: npt.NDArray[np.float64] = np.zeros(FIRST, dtype=np.float64)
        self.cost: npt.NDArray[np.float32] = np.zeros(FIRST, dtype=np.float32)
        self.uses: npt.NDArray[np.uint32] = np.zeros(FIRST, dtype=np.uint32)
        self.size_bytes: npt.NDArray[np.uint32] = np.zeros(FIRST, dtype=np.uint32)
        self.shelf: npt.NDArray[np.uint32] = np.zeros(FIRST, dtype=np.uint32)
        self.place: npt.NDArray[np.uint32] = np.zeros(FIRST, dtype=np.uint32)
        self.indexed: npt.NDArray[np.bool_] = np.zeros(FIRST, dtype=np.bool_)
        self._free: list[int] = []
        self._used = 0

    def take(self) -> int:
        """Return a free slot; its columns hold anything."""
        if self._free:
            return self._free.pop()
        if self._used == len(self.label):
            self._grow(self._used + self._used // 8 + FIRST)
        self._used += 1
        return self._used - 1

    def give(self, slot: int) -> None:
        """Free a slot."""
        self._free.append(slot)

    def _grow(self, count: int) -> None:
        for name, column in list(vars(self).items()):
            if isinstance(column, np.ndarray):
                grown = np.zeros(count, dtype=column.dtype)
                grown[: len(column)] = column
                setattr(self, name, grown)
