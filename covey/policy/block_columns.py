"""What the index of a store knows of each block, as columns: about a hundred bytes a block, whole prefixes at once."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from covey.errors import InvalidArgument
from covey.policy.arena import PAGE_BYTES
from covey.types.ids import BlockHash

HASH_BYTES = 16
NONE = -1
"""No row: the parent of a first block, the end of a list."""
LOST = -2
"""The parent of a reservation whose parent went; it can no longer be committed."""

Rows: TypeAlias = NDArray[np.int32]


class BlockState(IntEnum):
    FREE = 0
    """The row is not in use."""
    RESERVED = 1
    """A writer fills its slot; nobody sees it."""
    COMMITTED = 2
    """Visible and immutable."""
    DRAFT = 3
    """The slot of a new version of a visible block, which its writer fills; not in the table."""
    DOOMED = 4
    """No longer visible; its slot waits for the last lease to end."""


class BlockColumns:
    """Columns for `capacity` blocks. Memory is taken when rows are first used: what was never full costs nothing.

    Each column exists twice over the same memory: as an array for many rows, and under `at_…` as a view that reads
    and writes one row several times faster than an array does.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._columns: list[NDArray[np.generic]] = []
        self._views: list[memoryview] = []
        self.low, self.at_low = self._column(np.uint64)
        self.high, self.at_high = self._column(np.uint64)
        self.digest, self.at_digest = self._column(np.uint64)
        self.generation, self.at_generation = self._column(np.uint64)
        self.last_used, seconds = self._column(np.float64)
        self.at_last_used = cast("memoryview[float]", seconds)
        self.page, self.at_page = self._column(np.uint32)
        self.pages, self.at_pages = self._column(np.uint32)
        self.size_bytes, self.at_size_bytes = self._column(np.uint32)
        self.space, self.at_space = self._column(np.int32)
        self.tenant, self.at_tenant = self._column(np.int32)
        self.parent, self.at_parent = self._column(np.int32)
        self.first_child, self.at_first_child = self._column(np.int32)
        self.next_sibling, self.at_next_sibling = self._column(np.int32)
        self.prev_sibling, self.at_prev_sibling = self._column(np.int32)
        self.depth, self.at_depth = self._column(np.int32)
        self.held, self.at_held = self._column(np.int32)
        self.pins, self.at_pins = self._column(np.int32)
        self.place, self.at_place = self._column(np.int32)
        self.place_by_size, self.at_place_by_size = self._column(np.int32)
        self.place_by_tenant, self.at_place_by_tenant = self._column(np.int32)
        self.reads, self.at_reads = self._column(np.uint16)
        self.state, self.at_state = self._column(np.uint8)
        self.codec, self.at_codec = self._column(np.uint8)
        self.private, self.at_private = self._column(np.uint8)
        self.below, self.at_below = self._column(np.uint8)
        self.row_bytes = sum(column.itemsize for column in self._columns)
        self.touched = 0
        """Rows that were ever used."""
        self._free = array("i")

    def take(self) -> int:
        """Return an unused row with all columns zero and all links `NONE`; `NONE` when there is none."""
        if self._free:
            row = self._free.pop()
            for view in self._views:
                view[row] = 0
        elif self.touched < self.capacity:
            row = self.touched
            self.touched += 1
        else:
            return NONE
        self.at_parent[row] = self.at_first_child[row] = NONE
        self.at_next_sibling[row] = self.at_prev_sibling[row] = NONE
        return row

    def give_back(self, row: int) -> None:
        self.at_state[row] = BlockState.FREE
        self._free.append(row)

    @property
    def used(self) -> int:
        """How many rows are in use."""
        return self.touched - len(self._free)

    @property
    def memory_bytes(self) -> int:
        """Bytes that the rows have ever touched."""
        return self.touched * self.row_bytes + self._free.itemsize * len(self._free)

    def live(self, *states: BlockState) -> Rows:
        """Return the rows in any of these states: walks all columns, for checks and rare work."""
        return np.flatnonzero(np.isin(self.state[: self.touched], states)).astype(np.int32)

    def offset(self, row: int) -> int:
        return self.at_page[row] * PAGE_BYTES

    def slot_bytes(self, row: int) -> int:
        return self.at_pages[row] * PAGE_BYTES

    def name(self, row: int) -> BlockHash:
        """The hash of a block."""
        return BlockHash(self.at_low[row].to_bytes(8, "little") + self.at_high[row].to_bytes(8, "little"))

    def packed_names(self, rows: Rows) -> bytes:
        """The hashes of blocks in a row."""
        words = np.empty((len(rows), 2), "<u8")
        words[:, 0], words[:, 1] = self.low.take(rows), self.high.take(rows)
        return words.tobytes()

    def names(self, rows: Rows) -> tuple[BlockHash, ...]:
        """The hashes of blocks."""
        data = self.packed_names(rows)
        return tuple([BlockHash(data[at : at + HASH_BYTES]) for at in range(0, len(data), HASH_BYTES)])

    def _column(self, dtype: DTypeLike) -> tuple[NDArray, memoryview]:  # type: ignore[type-arg]
        column = np.zeros(self.capacity, dtype)
        view = column.data
        self._columns.append(column)
        self._views.append(view)
        return column, view


def keys_of(hashes: Sequence[BlockHash], field: str = "hashes") -> NDArray[np.uint64]:
    """Return hashes as rows of two words. Raises `InvalidArgument` unless each has 16 bytes."""
    data = b"".join(hashes)
    if len(data) != HASH_BYTES * len(hashes):
        raise InvalidArgument(f"a hash has {HASH_BYTES} bytes", field=field)
    return np.frombuffer(data, "<u8").reshape(-1, 2)


def words_of(name: BlockHash, field: str = "hash") -> tuple[int, int]:
    """Return a hash as two words. Raises `InvalidArgument` unless it has 16 bytes."""
    if len(name) != HASH_BYTES:
        raise InvalidArgument(f"a hash has {HASH_BYTES} bytes", field=field)
    return int.from_bytes(name[:8], "little"), int.from_bytes(name[8:], "little")
