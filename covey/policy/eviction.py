"""Which blocks go when room is needed: by tenant, by slot size, by worth; a whole extent when another size needs it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from covey.policy.arena import PAGE_BYTES, Arena
from covey.policy.block_columns import BlockColumns, BlockState, Rows
from covey.policy.evictable import AT_ONCE_MAX, Evictable, Pool, Worth
from covey.policy.lineage import Lineage
from covey.policy.retention import Candidates, Retention
from covey.policy.tenant_ledger import TenantLedger
from covey.types.ids import TenantId

EXTENTS_WEIGHED = 3
READS_MAX = np.uint16(60_000)
"""Further reads are not counted."""


class Eviction:
    """Chooses victims and learns from what is read and what went; evicts nothing itself."""

    def __init__(
        self, *, columns: BlockColumns, arena: Arena, evictable: Evictable, lineage: Lineage, tenants: TenantLedger,
        retention: Retention,
    ) -> None:  # fmt: skip
        self._columns = columns
        self._arena = arena
        self._evictable = evictable
        self._lineage = lineage
        self._tenants = tenants
        self._retention = retention

    def read(self, rows: Rows, now: float) -> None:
        """Somebody asked for blocks, each named once."""
        reads = self._columns.reads.take(rows)
        self._retention.read(now - self._columns.last_used.take(rows), reads)
        self._columns.reads[rows] = reads + (reads < READS_MAX)

    def evicted(self, row: int, now: float) -> None:
        """A block goes."""
        self._retention.evicted(now - self._columns.at_last_used[row], self._columns.at_reads[row])

    def coldest(self, count: int, now: float) -> list[int]:
        """Return the blocks that would go next, worst first."""
        return self._evictable.all.worst(count, self._worth(now), sample=max(4 * count, 1024))

    def of_tenant(self, tenant: TenantId, wanted: int, now: float) -> list[int]:
        """Return blocks of a tenant to evict, worst first; none when all are needed."""
        pool = self._evictable.of_tenant(self._tenants.account(tenant).number)
        return [] if pool is None else self._worst(pool, wanted, now)

    def for_room(self, size: int, wanted: int, now: float) -> list[int]:
        """Return blocks to evict, in this order, so that a slot of `size` may come free; none when all are needed.

        Tenants over their quota lose theirs first; then it is blocks of this size once it has its fair share, else
        any. Slots of another size help only when a whole extent of them is empty: then that goes.
        """
        pool = self._pool(size)
        if pool is None:
            return []
        worst = self._worst(pool, wanted, now)
        same = [row for row in worst if self._columns.slot_bytes(row) == size]
        return same or self._extent(worst, now) or worst

    def _pool(self, size: int) -> Pool | None:
        for number in self._tenants.over:
            pool = self._evictable.of_tenant(number)
            if pool is not None:
                return pool
        arena, own = self._arena, self._evictable.of_size(size // PAGE_BYTES)
        if own is not None and arena.bytes_of(size) >= arena.capacity_bytes // max(1, arena.sizes):
            return own
        return self._evictable.all if len(self._evictable) else None

    def _worst(self, pool: Pool, wanted: int, now: float) -> list[int]:
        return pool.worst(max(1, min(wanted, AT_ONCE_MAX, len(pool) // 8)), self._worth(now))

    def _extent(self, worst: list[int], now: float) -> list[int]:
        """Return all blocks of the least worthy of some extents and what grows from them, leaves first."""
        best: list[int] = []
        least = np.inf
        extents = dict.fromkeys(self._arena.extent_of(self._columns.offset(row)) for row in worst)
        for first, end, taken in list(extents)[:EXTENTS_WEIGHED]:
            rows = self._within(first, end)
            family = self._family(rows) if len(rows) == taken else []
            if family:
                worth = float(self._worth(now)(np.array(family, np.int32)).sum())
                best, least = (family, worth) if worth < least else (best, least)
        return sorted(best, key=lambda row: -self._columns.at_depth[row])

    def _within(self, first: int, end: int) -> Rows:
        columns = self._columns
        page = columns.page[: columns.touched]
        here = (page >= first // PAGE_BYTES) & (page < end // PAGE_BYTES)
        here &= columns.state[: columns.touched] != BlockState.FREE
        return np.flatnonzero(here).astype(np.int32)

    def _family(self, rows: Rows) -> list[int]:
        """Return rows and all that grows from them, or nothing if somebody needs one of them."""
        columns = self._columns
        family = dict.fromkeys(rows.tolist())
        queue = list(family)
        for row in queue:  # grows while it is walked
            if columns.at_held[row] or columns.at_private[row] or columns.at_state[row] != BlockState.COMMITTED:
                return []
            for child in self._lineage.children(row):
                if child not in family:
                    family[child] = None
                    queue.append(child)
        return queue

    def _worth(self, now: float) -> Worth:
        columns = self._columns

        def worth(rows: Rows) -> NDArray[np.float64]:
            blocks = Candidates(
                idle_s=now - columns.last_used[rows],
                reads=columns.reads[rows].astype(np.int64),
                depth=columns.depth[rows].astype(np.int64),
                slot_bytes=columns.pages[rows].astype(np.int64) * PAGE_BYTES,
                below=columns.below[rows] == 1,
            )
            return self._retention.worth(blocks)

        return worth
