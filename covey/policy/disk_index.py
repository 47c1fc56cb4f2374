"""What the disk of a node holds: a few bytes a block, closed under parents, and which segment to give up next."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import xxhash

from covey.policy.disk_record import RECORD_ALIGN
from covey.policy.disk_table import FingerprintTable
from covey.types.block import BlockCodec
from covey.types.ids import BlockHash, NamespaceId, TenantId

_CODECS: Final = tuple(BlockCodec)
_NONE: Final = -1
_TENANTS_MAX: Final = 65_536
_COLUMNS: Final = (
    ("_fingerprint", "Q"), ("_segment", "I"), ("_offset", "I"), ("_size", "I"), ("_used", "f"), ("_parent", "i"),
    ("_child", "i"), ("_next", "i"), ("_prev", "i"), ("_tenant", "H"), ("_codec", "B"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a record lies: a segment, the offset in it and its padded size, in bytes."""

    segment: int
    offset: int
    size_bytes: int


@dataclass(slots=True)
class _Segment:
    blocks: int = 0
    live_bytes: int = 0
    total_bytes: int = 0
    use_sum: float = 0.0
    """Of the times of last use of its live blocks."""


class DiskIndex:
    """The blocks on a disk; pure. Invariant: a block is here only if it starts a chain or its parent is here too.

    A fingerprint stands for a name, so what is read must still be compared with the name. A row that is free
    has segment 0.
    """

    _fingerprint: array[int]
    _segment: array[int]
    _offset: array[int]
    _size: array[int]
    _used: array[float]
    _parent: array[int]
    _child: array[int]
    _next: array[int]
    _prev: array[int]
    _tenant: array[int]
    _codec: array[int]

    def __init__(self, *, blocks_max: int, seed: int) -> None:
        """`seed` keeps fingerprints unpredictable."""
        for name, kind in _COLUMNS:
            setattr(self, name, array(kind))
        self.blocks = 0
        self.live_bytes = 0
        self.total_bytes = 0
        """Of all segments, with what is dead in them."""
        self._blocks_max = blocks_max
        self._seed = seed
        self._table = FingerprintTable(self._fingerprint)
        self._free = _NONE
        self._segments: dict[int, _Segment] = {}
        self._tenants: dict[TenantId, int] = {}
        self._tenant_bytes: list[int] = []
        self._use_sum = 0.0

    # -- finding -----------------------------------------------------------------

    def prefix(self, namespace: NamespaceId, hashes: Sequence[BlockHash], codecs: Iterable[BlockCodec]) -> int:
        """Return how many leading hashes are here, in codecs that are taken."""
        taken = {_CODECS.index(codec) for codec in codecs}
        for count, name in enumerate(hashes):
            row = self._row(namespace, name)
            if row < 0 or self._codec[row] not in taken:
                return count
        return len(hashes)

    def spot(self, namespace: NamespaceId, name: BlockHash) -> Spot | None:
        """Return where a block's record lies."""
        row = self._row(namespace, name)
        return None if row < 0 else self._spot(row)

    def touch(self, namespace: NamespaceId, name: BlockHash, now: float) -> None:
        """Note that a block was of use, and all that it grows from."""
        if (row := self._row(namespace, name)) >= 0:
            self._use(row, now)

    def tenant_bytes(self, tenant: TenantId) -> int:
        """Return what a tenant's live records take."""
        number = self._tenants.get(tenant)
        return 0 if number is None else self._tenant_bytes[number]

    # -- changing ----------------------------------------------------------------

    def can_add(self, namespace: NamespaceId, parent: BlockHash, tenant: TenantId) -> bool:
        """Whether a block that grows from `parent` may come."""
        room = self.blocks < self._blocks_max and (tenant in self._tenants or len(self._tenants) < _TENANTS_MAX)
        return room and (not parent or self._row(namespace, parent) >= 0)

    def add(
        self, namespace: NamespaceId, name: BlockHash, parent: BlockHash, spot: Spot, *, tenant: TenantId,
        codec: BlockCodec, now: float,
    ) -> Spot | None:  # fmt: skip
        """Enter a block that `can_add`; an older version of it moves to `spot`. Returns the place that became free."""
        row = self._row(namespace, name)
        if row >= 0:
            old = self._spot(row)
            self._account(row, -1)
            self._place(row, spot, tenant, codec)
            self._use(row, now)
            return old
        assert self.can_add(namespace, parent, tenant), "no room, or the parent is not here"
        parent_row = self._row(namespace, parent) if parent else _NONE
        row = self._new_row()
        self._fingerprint[row] = self._name(namespace, name)
        self._parent[row], self._child[row], self._used[row] = parent_row, _NONE, 0.0
        self._link(row, parent_row)
        self._place(row, spot, tenant, codec)
        self._table.add(row)
        self.blocks += 1
        self._use(row, now)
        return None

    def remove(self, namespace: NamespaceId, name: BlockHash) -> list[Spot]:
        """Take out a block and all that grows from it; returns where their records lie."""
        row = self._row(namespace, name)
        return [] if row < 0 else self._remove(row)

    def open_segment(self, segment: int) -> None:
        assert segment > 0
        assert segment not in self._segments
        self._segments[segment] = _Segment()

    def grow(self, segment: int, size_bytes: int) -> None:
        """A segment has so many bytes more on disk."""
        self._segments[segment].total_bytes += size_bytes
        self.total_bytes += size_bytes

    def move(self, namespace: NamespaceId, name: BlockHash, old: Spot, new: Spot) -> bool:
        """A record was copied from `old` to `new`; False when the block is not there any more."""
        row = self._row(namespace, name)
        if row < 0 or self._spot(row) != old:
            return False
        self._account(row, -1)
        self._segment[row], self._offset[row] = new.segment, new.offset // RECORD_ALIGN
        self._account(row, 1)
        return True

    def remove_at(self, spot: Spot) -> list[Spot]:
        """`remove` for a record whose name cannot be read; looks through the segment."""
        row = next((row for row in self._rows_of(spot.segment) if self._spot(row) == spot), None)
        return [] if row is None else self._remove(row)

    def drop_segment(self, segment: int) -> int:
        """Forget a segment, its blocks and all that grows from them elsewhere; returns how many blocks went."""
        before = self.blocks
        for row in list(self._rows_of(segment)):
            if self._segment[row] == segment:  # not gone with its parent
                self._remove(row)
        self.total_bytes -= self._segments.pop(segment).total_bytes
        return before - self.blocks

    # -- choosing ----------------------------------------------------------------

    @property
    def segments(self) -> tuple[int, ...]:
        """The segments, oldest first."""
        return tuple(sorted(self._segments))

    def victim(self, keep: int, now: float) -> int | None:
        """Return the segment to give up next, never `keep`: one without live blocks, else the best by cost-benefit.

        The benefit is space times age over the cost of what is lost: Rosenblum and Ousterhout, "The Design and
        Implementation of a Log-Structured File System" (1992), §3.5.
        """
        worth: dict[int, tuple[bool, float]] = {}
        for number, segment in self._segments.items():
            share = segment.live_bytes / max(1, segment.total_bytes)
            age_s = 1.0 + max(0.0, now - segment.use_sum / max(1, segment.blocks))
            worth[number] = (segment.live_bytes == 0, (1.1 - share) * age_s / (1.0 + share))
        candidates = [number for number in sorted(self._segments) if number != keep]
        return max(candidates, key=worth.__getitem__, default=None)

    def live(self, segment: int) -> list[Spot]:
        """Return where the live records of a segment lie, in their order."""
        return sorted((self._spot(row) for row in self._rows_of(segment)), key=lambda spot: spot.offset)

    def survivors(self, segment: int, budget_bytes: int) -> list[Spot]:
        """Return the records of a segment that are worth a copy, parents first: used later than the average block.

        A parent is of use whenever its child is, so the best are closed under parents within the segment.
        """
        average = self._use_sum / max(1, self.blocks)
        rows = [row for row in self._rows_of(segment) if self._used[row] > average]
        rows.sort(key=lambda row: (-self._used[row], self._depth(row)))
        kept: list[Spot] = []
        for row in rows:
            budget_bytes -= self._size[row] * RECORD_ALIGN
            if budget_bytes < 0:
                break
            kept.append(self._spot(row))
        return kept

    # -- views -------------------------------------------------------------------

    @property
    def index_bytes(self) -> int:
        """Memory that this index takes."""
        columns: list[array[int] | array[float]] = [getattr(self, name) for name, _ in _COLUMNS]
        return sum(len(column) * column.itemsize for column in columns) + self._table.size_bytes

    def check(self) -> None:
        """Assert the invariants that hold between any two calls."""
        self._table.check()
        rows = [row for row, segment in enumerate(self._segment) if segment]
        assert len(rows) == self.blocks == len(self._table) <= self._blocks_max
        for row in rows:
            parent = self._parent[row]
            assert parent == _NONE or self._segment[parent], "a block without its parent"
            assert self._segment[row] in self._segments
            assert parent == _NONE or row in self._children(parent)
            assert parent == _NONE or self._used[parent] >= self._used[row], "a parent of less use than its child"
        live = {number: [row for row in rows if self._segment[row] == number] for number in self._segments}
        for number, segment in self._segments.items():
            assert segment.blocks == len(live[number])
            assert segment.live_bytes == sum(self._size[row] for row in live[number]) * RECORD_ALIGN
            assert segment.live_bytes <= segment.total_bytes
            assert abs(segment.use_sum - sum(self._used[row] for row in live[number])) < 1e-3 * max(1.0, self._use_sum)
        assert self.live_bytes == sum(segment.live_bytes for segment in self._segments.values())
        assert self.total_bytes == sum(segment.total_bytes for segment in self._segments.values())
        assert sum(self._tenant_bytes) == self.live_bytes
        assert abs(self._use_sum - sum(self._used[row] for row in rows)) < 1e-3 * max(1.0, self._use_sum)

    # -- inside ------------------------------------------------------------------

    def _name(self, namespace: NamespaceId, name: BlockHash) -> int:
        value: int = xxhash.xxh3_64_intdigest(namespace + name, self._seed)
        return value

    def _row(self, namespace: NamespaceId, name: BlockHash) -> int:
        return self._table.find(self._name(namespace, name))

    def _spot(self, row: int) -> Spot:
        return Spot(self._segment[row], self._offset[row] * RECORD_ALIGN, self._size[row] * RECORD_ALIGN)

    def _rows_of(self, segment: int) -> Iterator[int]:
        start = 0
        while True:
            try:
                row = self._segment.index(segment, start)
            except ValueError:
                return
            yield row
            start = row + 1

    def _depth(self, row: int) -> int:
        depth = 0
        while (row := self._parent[row]) != _NONE:
            depth += 1
        return depth

    def _children(self, row: int) -> list[int]:
        children, child = [], self._child[row]
        while child != _NONE:
            children.append(child)
            child = self._next[child]
        return children

    def _use(self, row: int, now: float) -> None:
        """A parent is of use whenever its child is; the walk ends where that is known already."""
        at = row
        while at != _NONE and (at == row or self._used[at] < self._used[row]):
            before = self._used[at]
            self._used[at] = max(now, before)
            later = self._used[at] - before
            self._use_sum += later
            self._segments[self._segment[at]].use_sum += later
            at = self._parent[at]

    def _new_row(self) -> int:
        if self._free != _NONE:
            row = self._free
            self._free = self._next[row]
            return row
        for name, _ in _COLUMNS:
            getattr(self, name).append(0)
        return len(self._segment) - 1

    def _place(self, row: int, spot: Spot, tenant: TenantId, codec: BlockCodec) -> None:
        self._segment[row], self._offset[row] = spot.segment, spot.offset // RECORD_ALIGN
        self._size[row] = spot.size_bytes // RECORD_ALIGN
        if tenant not in self._tenants:
            self._tenants[tenant] = len(self._tenants)
            self._tenant_bytes.append(0)
        self._tenant[row], self._codec[row] = self._tenants[tenant], _CODECS.index(codec)
        self._account(row, 1)

    def _account(self, row: int, sign: int) -> None:
        size_bytes = sign * self._size[row] * RECORD_ALIGN
        segment = self._segments[self._segment[row]]
        segment.blocks += sign
        segment.use_sum += sign * self._used[row]
        self._use_sum += sign * self._used[row]
        segment.live_bytes += size_bytes
        self.live_bytes += size_bytes
        self._tenant_bytes[self._tenant[row]] += size_bytes

    def _link(self, row: int, parent: int) -> None:
        self._prev[row] = self._next[row] = _NONE
        if parent != _NONE:
            first = self._next[row] = self._child[parent]
            self._child[parent] = row
            if first != _NONE:
                self._prev[first] = row

    def _unlink(self, row: int) -> None:
        before, after, parent = self._prev[row], self._next[row], self._parent[row]
        if before != _NONE:
            self._next[before] = after
        elif parent != _NONE:
            self._child[parent] = after
        if after != _NONE:
            self._prev[after] = before

    def _remove(self, row: int) -> list[Spot]:
        self._unlink(row)
        going = [row]
        for each in going:  # grows while it is walked
            going.extend(self._children(each))
        spots = [self._spot(each) for each in going]
        for each in going:
            self._table.discard(each)
            self._account(each, -1)
            self._segment[each], self._next[each] = 0, self._free
            self._free = each
        self.blocks -= len(going)
        return spots
