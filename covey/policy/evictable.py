"""The blocks that may be evicted now, and which of them go: the worst of a sample, which is all of them when few."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from covey.policy.block_columns import BlockColumns, Rows

SAMPLE = 1024
"""Out of so many, spread evenly over a pool, the worst are taken: of a million, from about the worst thousandth."""
AT_ONCE_MAX = 32

Worth = Callable[[Rows], NDArray[np.float64]]
"""What it is worth to keep each of some blocks; the least goes first."""


class Pool:
    """Rows in no order, each at the place (plus one) that a column says, so that any can be taken out at once."""

    __slots__ = ("_place", "_rows", "_turn")

    def __init__(self, place: memoryview) -> None:
        self._place = place
        self._rows = array("i")
        self._turn = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: int) -> None:
        self._rows.append(row)
        self._place[row] = len(self._rows)

    def remove(self, row: int) -> None:
        at = self._place[row] - 1
        last = self._rows.pop()
        if last != row:
            self._rows[at] = last
            self._place[last] = at + 1
        self._place[row] = 0

    def worst(self, count: int, worth: Worth, *, sample: int = SAMPLE) -> list[int]:
        """Return up to `count` rows, worst first."""
        rows = self._sample(sample)
        if not len(rows):
            return []
        values = worth(rows)
        if count == 1:
            return [int(rows[values.argmin()])]
        return [int(row) for row in rows[np.argsort(values, kind="stable")[:count]]]

    def rows(self) -> Rows:
        return np.array(self._rows, np.int32)

    def _sample(self, sample: int) -> Rows:
        rows = np.frombuffer(self._rows, np.int32) if self._rows else np.empty(0, np.int32)
        stride = len(rows) // sample
        if stride <= 1:
            return rows.copy()
        self._turn = (self._turn + 1) % stride
        return rows[self._turn :: stride].copy()


class Evictable:
    """Pools of all evictable blocks, and of those of each slot size and each tenant."""

    def __init__(self, columns: BlockColumns) -> None:
        self._columns = columns
        self.all = Pool(columns.at_place)
        self._by_size: dict[int, Pool] = {}  # by pages; bounded, as the next, by the blocks there are
        self._by_tenant: dict[int, Pool] = {}

    def __len__(self) -> int:
        return len(self.all)

    def __contains__(self, row: int) -> bool:
        return self._columns.at_place[row] != 0

    def add(self, row: int) -> None:
        columns = self._columns
        self.all.add(row)
        self._pool(self._by_size, columns.at_pages[row], columns.at_place_by_size).add(row)
        self._pool(self._by_tenant, columns.at_tenant[row], columns.at_place_by_tenant).add(row)

    def discard(self, row: int) -> None:
        """Take a row out, if it is here."""
        if row not in self:
            return
        self.all.remove(row)
        self._leave(self._by_size, self._columns.at_pages[row], row)
        self._leave(self._by_tenant, self._columns.at_tenant[row], row)

    def of_size(self, pages: int) -> Pool | None:
        return self._by_size.get(pages)

    def of_tenant(self, tenant: int) -> Pool | None:
        return self._by_tenant.get(tenant)

    @property
    def memory_bytes(self) -> int:
        pools = 1 + len(self._by_size) + len(self._by_tenant)
        return 3 * 5 * len(self.all) + 256 * pools  # an array grows by an eighth ahead of need

    def check(self, expected: Rows) -> None:
        """Assert that exactly these rows are in the pools."""
        columns = self._columns
        assert sorted(self.all.rows().tolist()) == sorted(expected.tolist())
        for pools, key in ((self._by_size, columns.pages), (self._by_tenant, columns.tenant)):
            assert sum(map(len, pools.values())) == len(self.all)
            for name, pool in pools.items():
                assert len(pool), "an empty pool was kept"
                assert (key[pool.rows()] == name).all()
        for column in (columns.place, columns.place_by_size, columns.place_by_tenant):
            assert np.count_nonzero(column[: columns.touched]) == len(self.all)

    def _pool(self, pools: dict[int, Pool], key: int, place: memoryview) -> Pool:
        pool = pools.get(key)
        if pool is None:
            pool = pools[key] = Pool(place)
        return pool

    def _leave(self, pools: dict[int, Pool], key: int, row: int) -> None:
        pool = pools[key]
        pool.remove(row)
        if not len(pool):
            del pools[key]
