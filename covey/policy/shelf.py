"""The blocks that a store has: what is visible, what may go, and what goes first."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from covey.errors import QuotaExceeded
from covey.policy.arena import PAGE_BYTES, Arena
from covey.policy.block_columns import NONE, BlockColumns, BlockState, Rows, words_of
from covey.policy.block_table import BlockTable
from covey.policy.changes import Changes
from covey.policy.evictable import Evictable
from covey.policy.eviction import Eviction
from covey.policy.lineage import Lineage
from covey.policy.retention import Retention
from covey.policy.slot import slot_bytes
from covey.policy.spaces import Space, Spaces
from covey.policy.tenant_ledger import TenantLedger
from covey.types.block import BlockCodec, BlockShape
from covey.types.ids import BlockHash, NamespaceId, TenantId
from covey.types.kv_state import KvEventKind

CODECS = tuple(BlockCodec)
"""By the number that the columns hold."""
RAW = CODECS.index(BlockCodec.RAW)
_COMMITTED = int(BlockState.COMMITTED)


@dataclass(slots=True)
class Counts:
    """What there is of each kind."""

    blocks: int = 0
    """Reserved and visible."""
    reserved: int = 0
    private: int = 0
    held: int = 0
    pinned: int = 0
    pinned_bytes: int = 0
    evictions: int = 0
    quarantined: int = 0


class Shelf:
    """Blocks of all namespaces over one arena, as rows. Knows that blocks are held, not by whom."""

    def __init__(self, *, arena: Arena, blocks_max: int, retention: Retention, tenants: TenantLedger) -> None:
        self.arena = arena
        self.tenants = tenants
        self.counts = Counts()
        self.columns = BlockColumns(min(blocks_max, arena.capacity_bytes // PAGE_BYTES))
        self.changes = Changes(self.columns)
        self.lineage = Lineage(self.columns)
        self.table = BlockTable(self.columns)
        self.evictable = Evictable(self.columns)
        self.eviction = Eviction(
            columns=self.columns, arena=arena, evictable=self.evictable, lineage=self.lineage, tenants=tenants,
            retention=retention,
        )  # fmt: skip
        self.spaces = Spaces()
        self._cooling: deque[tuple[float, int]] = deque()
        self._generation = 0

    # -- finding -----------------------------------------------------------------

    def space_of(self, row: int) -> Space:
        return self.spaces[self.columns.at_space[row]]

    def find(self, space: Space, keys: NDArray[np.uint64]) -> Rows:
        """Return the rows of blocks that are reserved or visible, `NONE` for the others."""
        if space.number == NONE:
            return np.full(len(keys), NONE, np.int32)
        return self.table.find(space.number, keys)

    def find_one(self, space: Space, name: BlockHash, field: str = "hash") -> int:
        """Return the row of one block that is reserved or visible, or `NONE`. Raises `InvalidArgument`."""
        words = words_of(name, field)
        return NONE if space.number == NONE else self.table.find_one(space.number, *words)

    def bytes_of(self, rows: Rows) -> int:
        """The bytes of the slots of blocks."""
        return int(self.columns.pages[rows].sum(dtype=np.int64)) * PAGE_BYTES

    def prefix(self, space: Space, keys: NDArray[np.uint64], codecs: NDArray[np.bool_] | None = None) -> Rows:
        """Return the longest prefix of the keys that is visible, and whose codecs (by number) are taken."""
        rows = self.find(space, keys)
        good = self.columns.state.take(rows) == _COMMITTED
        good &= rows != NONE
        if codecs is not None:
            good &= codecs.take(self.columns.codec.take(rows))
        return rows if good.all() else rows[: int(good.argmin())]

    # -- coming ------------------------------------------------------------------

    def add(
        self, space: Space, words: tuple[int, int], parent: int, *, shape: BlockShape, codec: BlockCodec,
        tenant: TenantId, private: bool, wanted: int, now: float,
    ) -> int:  # fmt: skip
        """Reserve a slot, evicting what nobody needs; `NONE` when there is no room.

        `wanted` further ones are about to be asked for. Raises `QuotaExceeded` when the tenant's own blocks cannot go.
        """
        row = self._slot(space, shape, tenant, wanted, now)
        if row == NONE:
            return NONE
        columns = self.columns
        columns.at_codec[row] = CODECS.index(codec)
        columns.at_low[row], columns.at_high[row] = words
        columns.at_state[row] = BlockState.RESERVED
        columns.at_private[row] = private
        self.table.insert(row)
        self.lineage.link(row, parent)
        if parent != NONE:
            self.evictable.discard(parent)
        self.counts.blocks += 1
        self.counts.reserved += 1
        self.counts.private += private
        return row

    def seal(self, row: int, digest: int) -> None:
        """Make a reserved block visible; the caller holds it."""
        self.columns.at_state[row] = BlockState.COMMITTED
        self.columns.at_digest[row] = digest
        self.counts.reserved -= 1

    def hold(self, rows: Rows, now: float | None, *, pin: bool = False, read: bool = False) -> None:
        """Keep blocks, each named once, for one more lease; `read`: somebody asked for them; `now` None: nobody did."""
        columns = self.columns
        if read and now is not None:
            self.eviction.read(rows, now)
        if now is not None:
            columns.last_used[rows] = now
        before = columns.held.take(rows)
        columns.held[rows] = before + 1
        fresh = len(rows) - int(np.count_nonzero(before))
        self.counts.held += fresh
        if fresh:
            for row in rows[columns.place.take(rows) != 0].tolist():
                self.evictable.discard(row)
        if pin:
            pins = columns.pins[rows]
            columns.pins[rows] = pins + 1
            self._count_pins(rows[pins == 0], 1)

    # -- going -------------------------------------------------------------------

    def unhold(self, rows: Rows, *, pin: bool = False) -> None:
        """A lease on blocks ended."""
        columns = self.columns
        if pin:
            pins = columns.pins[rows] - 1
            columns.pins[rows] = pins
            self._count_pins(rows[pins == 0], -1)
        after = columns.held.take(rows) - 1
        columns.held[rows] = after
        let_go = rows[after == 0]
        self.counts.held -= len(let_go)
        plain = columns.state.take(let_go) == _COMMITTED
        plain &= columns.private.take(let_go) == 0
        for row in let_go[plain & (columns.first_child.take(let_go) == NONE)].tolist():
            self.evictable.add(row)
        if not plain.all():
            for row in let_go[~plain][::-1].tolist():
                self.settle(row)

    def discard(self, row: int, *, cool_until: float | None) -> None:
        """Drop a reservation or a draft; its slot rests until `cool_until`, in case its writer still writes."""
        columns = self.columns
        parent = NONE
        if columns.at_state[row] == BlockState.RESERVED:
            self.counts.reserved -= 1
            parent = self._hide(row)
        offset = columns.offset(row)
        self._forget(row)
        self.settle(parent)
        if cool_until is None:
            self.arena.free(offset)
        else:
            self._cooling.append((cool_until, offset))

    def next_due(self) -> float | None:
        """When the next slot has cooled."""
        return self._cooling[0][0] if self._cooling else None

    def thaw(self, now: float) -> None:
        """Free what has cooled."""
        while self._cooling and self._cooling[0][0] <= now:
            self.arena.free(self._cooling.popleft()[1])

    def quarantine(self, row: int) -> None:
        """Take a visible block out for good, and from view all that grows from it."""
        self.counts.quarantined += 1
        self.arena.retire(self.columns.offset(row))
        self._doom(row)

    def drop(self, row: int, now: float) -> bool:
        """Evict one block, unless somebody needs it."""
        if row not in self.evictable:
            return False
        self._evict(row, now)
        return True

    # -- versions ----------------------------------------------------------------

    def draft(self, row: int, size_bytes: int, codec: BlockCodec, now: float) -> int:
        """Take a slot for a new version of a visible block; `NONE` when there is no room."""
        columns, space = self.columns, self.space_of(row)
        shape = replace(space.shape, size_bytes=size_bytes)
        tenant = self.tenants[columns.at_tenant[row]].tenant
        draft = self._slot(space, shape, tenant, 0, now)
        if draft == NONE:
            return NONE
        for view in (columns.at_low, columns.at_high, columns.at_private, columns.at_depth):
            view[draft] = view[row]
        columns.at_codec[draft] = CODECS.index(codec)
        columns.at_state[draft] = BlockState.DRAFT
        return draft

    def swap(self, draft: int, digest: int) -> int:
        """Put a draft in the place of what is visible and return that row; `settle` both when pins are carried over.

        `NONE`, and the draft stays one, when nothing is visible any more.
        """
        columns = self.columns
        old = self.table.find_one(columns.at_space[draft], columns.at_low[draft], columns.at_high[draft])
        if old == NONE or columns.at_state[old] != BlockState.COMMITTED:
            return NONE
        self.evictable.discard(old)
        self.lineage.take_place(old, draft)
        self.table.swap(old, draft)
        columns.at_last_used[draft], columns.at_reads[draft] = columns.at_last_used[old], columns.at_reads[old]
        columns.at_state[draft], columns.at_digest[draft] = BlockState.COMMITTED, digest
        columns.at_state[old] = BlockState.DOOMED
        self.changes.note(KvEventKind.RECODED, [draft], self.space_of(draft).namespace)
        return old

    def carry_pins(self, old: int, new: int, leases: int) -> None:
        """Pins keep a block, not its bytes: let so many leases hold and pin its new version."""
        columns = self.columns
        columns.at_held[old] -= leases
        self.counts.held -= not columns.at_held[old]
        columns.at_held[new] += leases
        self.counts.held += 1
        self._count_pins(np.array([old], np.int32), -1)
        self._count_pins(np.array([new], np.int32), 1)
        columns.at_pins[old], columns.at_pins[new] = 0, leases

    # -- views -------------------------------------------------------------------

    def shared(self, first: int, last: int) -> Iterator[tuple[NamespaceId, Rows]]:
        """Yield the visible shared blocks among rows `first` to `last`, by namespace, parents first."""
        columns = self.columns
        part = slice(first, min(last, columns.touched))
        shown = np.flatnonzero((columns.state[part] == BlockState.COMMITTED) & (columns.private[part] == 0)) + first
        for number in np.unique(columns.space[shown]).tolist():
            rows = shown[columns.space[shown] == number].astype(np.int32)
            rows = rows[np.argsort(columns.depth[rows], kind="stable")]
            yield self.space_of(int(rows[0])).namespace, rows

    @property
    def memory_bytes(self) -> int:
        """What the books of the blocks take: rows, table, pools, arena, namespaces."""
        parts = (self.columns, self.table, self.evictable, self.arena)
        return sum(part.memory_bytes for part in parts) + 512 * len(self.spaces)

    # -- inside ------------------------------------------------------------------

    def _slot(self, space: Space, shape: BlockShape, tenant: TenantId, wanted: int, now: float) -> int:
        """Take a row and a slot for it; `NONE` when there is no room. Raises `QuotaExceeded`."""
        size = slot_bytes(shape)
        self._make_way(tenant, size, wanted, now)
        while True:
            row = self.columns.take()
            offset = self.arena.allocate(size) if row != NONE else None
            if offset is not None:
                break
            if row != NONE:
                self.columns.give_back(row)
            if not self._evict_all(self.eviction.for_room(size, wanted, now), now):
                return NONE
        columns = self.columns
        self._generation += 1
        columns.at_page[row], columns.at_pages[row] = offset // PAGE_BYTES, size // PAGE_BYTES
        columns.at_size_bytes[row], columns.at_generation[row] = shape.size_bytes, self._generation
        columns.at_codec[row], columns.at_last_used[row] = RAW, now
        account = self.tenants.account(tenant)
        columns.at_tenant[row] = account.number
        self.tenants.use(account, size)
        columns.at_space[row] = self.spaces.gain(space)
        return row

    def _make_way(self, tenant: TenantId, size: int, wanted: int, now: float) -> None:
        """Bring a tenant to where one more slot fits its quota: its own blocks go. Raises `QuotaExceeded`."""
        quota_bytes = self.tenants.quota_bytes(tenant)
        while 0 < quota_bytes < self.tenants.used_bytes(tenant) + size:
            own = self.eviction.of_tenant(tenant, wanted, now) if self.tenants.used_bytes(tenant) else []
            if not self._evict_all(own, now):
                raise QuotaExceeded(f"the quota of {tenant} at this store is {quota_bytes} bytes, all leased or pinned")

    def _evict_all(self, rows: list[int], now: float) -> bool:
        for row in rows:
            self._evict(row, now)
        return bool(rows)

    def _evict(self, row: int, now: float) -> None:
        columns = self.columns
        self.counts.evictions += 1
        kind = KvEventKind.MOVED if columns.at_below[row] else KvEventKind.EVICTED
        self.changes.note(kind, [row], self.space_of(row).namespace)
        self.eviction.evicted(row, now)
        parent = self._hide(row)
        offset = columns.offset(row)
        self._forget(row)
        self.arena.free(offset)
        self.settle(parent)

    def is_evictable(self, row: int) -> bool:
        columns = self.columns
        return (
            columns.at_state[row] == BlockState.COMMITTED
            and not columns.at_held[row]
            and not columns.at_private[row]
            and columns.at_first_child[row] == NONE
        )

    def settle(self, row: int) -> None:
        """Something let go of a block: free it, make it vanish or let it be evicted, if that is due."""
        columns = self.columns
        if row == NONE or columns.at_held[row]:
            return
        state = columns.at_state[row]
        if state == BlockState.DOOMED:
            offset = columns.offset(row)
            self._forget(row)
            if not self.arena.is_retired(offset):
                self.arena.free(offset)
        elif state == BlockState.COMMITTED and columns.at_private[row]:
            self._doom(row)
        elif row not in self.evictable and self.is_evictable(row):
            self.evictable.add(row)

    def _doom(self, row: int) -> None:
        """Take a block and all visible ones that grow from it out of view; slots go when their leases have ended."""
        columns = self.columns
        gone = [row]
        for each in gone:  # grows while it is walked
            gone += [c for c in self.lineage.children(each) if columns.at_state[c] == BlockState.COMMITTED]
        self.changes.note(KvEventKind.EVICTED, gone, self.space_of(row).namespace)
        parent = NONE
        for each in reversed(gone):
            parent = self._hide(each)
            columns.at_state[each] = BlockState.DOOMED
        for each in (*gone, parent):
            self.settle(each)

    def _hide(self, row: int) -> int:
        """Take a row out of table, pools and lineage; reservations that grow from it are lost. Return its parent."""
        self.table.remove(row)
        self.evictable.discard(row)
        for child in self.lineage.children(row):
            self.lineage.lose(child)
        self.counts.blocks -= 1
        self.counts.private -= self.columns.at_private[row]
        return self.lineage.unlink(row)

    def _forget(self, row: int) -> None:
        """Give a row back; its slot is the caller's to free."""
        columns = self.columns
        self.tenants.use(self.tenants[columns.at_tenant[row]], -columns.slot_bytes(row))
        self.spaces.lose(self.space_of(row))
        columns.give_back(row)

    def _count_pins(self, rows: Rows, sign: int) -> None:
        self.counts.pinned += sign * len(rows)
        self.counts.pinned_bytes += sign * self.bytes_of(rows)
