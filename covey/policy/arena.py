"""Slots of several sizes in one arena: extents that each serve one size, given back when they are empty."""

from __future__ import annotations

from dataclasses import dataclass, field

PAGE_BYTES = 4096
EXTENT_BYTES_MAX = 16 * 1024 * 1024
EXTENTS_MIN = 16
WASTE_SHARE_MAX = 1 / 8
"""An extent's unused end may be this share of it, where contiguous room allows."""


@dataclass(slots=True, eq=False)
class _Extent:
    first: int
    span: int
    slot_bytes: int
    slots: int
    free: list[int] = field(default_factory=list)


class Arena:
    """Which bytes of an arena are in use; knows offsets and sizes, never touches memory.

    The arena is cut into extents of equal size. A size takes extents (several contiguous ones for large
    slots) as it needs them and carves them into slots; an extent whose slots are all free returns to the
    pool and may serve another size. Fragmentation is thus bounded by what eviction cannot empty.
    """

    def __init__(self, capacity_bytes: int, *, extent_bytes: int | None = None) -> None:
        if capacity_bytes < PAGE_BYTES:
            raise ValueError(f"an arena needs at least {PAGE_BYTES} bytes")
        share = capacity_bytes // EXTENTS_MIN // PAGE_BYTES * PAGE_BYTES
        self.extent_bytes = extent_bytes or max(PAGE_BYTES, min(EXTENT_BYTES_MAX, share))
        self.capacity_bytes = capacity_bytes // self.extent_bytes * self.extent_bytes
        self._taken = bytearray(self.capacity_bytes // self.extent_bytes)
        self._extents: dict[int, _Extent] = {}  # by each extent number it spans
        self._partial: dict[int, dict[int, _Extent]] = {}  # slot size -> first extent number -> has free slots
        self._used: dict[int, int] = {}  # offset -> slot size
        self._bytes: dict[int, int] = {}  # slot size -> bytes in use
        self._retired: set[int] = set()
        self.used_bytes = 0

    def allocate(self, slot_bytes: int) -> int | None:
        """Take a slot of `slot_bytes`, a multiple of the page; return its offset, or None when there is no room."""
        if slot_bytes <= 0 or slot_bytes % PAGE_BYTES:
            raise ValueError("a slot is a positive number of pages")
        partial = self._partial.get(slot_bytes) or self._grow(slot_bytes)
        if not partial:
            return None
        extent = next(iter(partial.values()))
        offset = extent.free.pop()
        if not extent.free:
            self._forget_partial(extent)
        self._used[offset] = slot_bytes
        self._account(slot_bytes, slot_bytes)
        return offset

    def free(self, offset: int) -> None:
        """Give a slot back."""
        slot_bytes = self._used.pop(offset)
        self._account(slot_bytes, -slot_bytes)
        extent = self._extents[offset // self.extent_bytes]
        extent.free.append(offset)
        if len(extent.free) == extent.slots:
            self._forget_partial(extent)
            for number in range(extent.first, extent.first + extent.span):
                self._taken[number] = 0
                del self._extents[number]
        else:
            self._partial.setdefault(slot_bytes, {})[extent.first] = extent

    def retire(self, offset: int) -> None:
        """Take a slot out of use for this arena's life; its bytes stay counted as used."""
        if offset not in self._used:
            raise KeyError(offset)
        self._retired.add(offset)

    def is_retired(self, offset: int) -> bool:
        return offset in self._retired

    def bytes_of(self, slot_bytes: int) -> int:
        """Return the bytes that slots of one size use."""
        return self._bytes.get(slot_bytes, 0)

    @property
    def sizes(self) -> int:
        """How many slot sizes have slots in use."""
        return len(self._bytes)

    def check(self) -> None:
        """Assert the arena's invariants: no two slots overlap, and every byte is accounted for."""
        assert self.used_bytes == sum(self._used.values()) == sum(self._bytes.values()) <= self.capacity_bytes
        end = 0
        for offset, slot_bytes in sorted(self._used.items()):
            assert offset >= end, "slots overlap"
            end = offset + slot_bytes
        assert end <= self.capacity_bytes
        assert self._retired <= self._used.keys()
        extents = {id(extent): extent for extent in self._extents.values()}.values()
        for extent in extents:
            assert 0 <= len(extent.free) < extent.slots, "an empty extent was kept"
            assert not self._used.keys() & set(extent.free)
            partial = extent.first in self._partial.get(extent.slot_bytes, {})
            assert partial == bool(extent.free)
        assert sum(extent.slots - len(extent.free) for extent in extents) == len(self._used)
        assert sum(extent.span for extent in extents) == sum(self._taken)

    def _grow(self, slot_bytes: int) -> dict[int, _Extent]:
        least = -(-slot_bytes // self.extent_bytes)
        for span in (self._good_span(slot_bytes, least), least):
            first = self._taken.find(bytes(span))
            if first >= 0:
                break
        else:
            return {}
        start, slots = first * self.extent_bytes, span * self.extent_bytes // slot_bytes
        free = [start + i * slot_bytes for i in reversed(range(slots))]
        extent = _Extent(first=first, span=span, slot_bytes=slot_bytes, slots=slots, free=free)
        for number in range(first, first + span):
            self._taken[number] = 1
            self._extents[number] = extent
        return self._partial.setdefault(slot_bytes, {first: extent})

    def _good_span(self, slot_bytes: int, least: int) -> int:
        def waste(span: int) -> float:
            return (span * self.extent_bytes % slot_bytes) / (span * self.extent_bytes)

        return next((span for span in range(least, least + 8) if waste(span) <= WASTE_SHARE_MAX), least)

    def _forget_partial(self, extent: _Extent) -> None:
        partial = self._partial.get(extent.slot_bytes, {})
        partial.pop(extent.first, None)
        if not partial:
            self._partial.pop(extent.slot_bytes, None)

    def _account(self, slot_bytes: int, delta: int) -> None:
        self.used_bytes += delta
        left = self._bytes.get(slot_bytes, 0) + delta
        if left:
            self._bytes[slot_bytes] = left
        else:
            self._bytes.pop(slot_bytes, None)
