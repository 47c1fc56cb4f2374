"""Slots of several sizes in one arena: extents that each serve one size, given back when they are empty."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

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
    free: array[int]
    """Numbers of its slots without a block, the next to take last."""
    taken: bytearray
    """One byte a slot: whether it has a block."""

    @property
    def slots(self) -> int:
        return len(self.taken)


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
        self._extents: list[_Extent | None] = [None] * len(self._taken)  # by each extent number it spans
        self._partial: dict[int, dict[int, _Extent]] = {}  # slot size -> first extent number -> has free slots
        self._bytes: dict[int, int] = {}  # slot size -> bytes in use
        self._retired: set[int] = set()
        self._slots = 0
        self.used_bytes = 0

    def allocate(self, slot_bytes: int) -> int | None:
        """Take a slot of `slot_bytes`, a multiple of the page; return its offset, or None when there is no room."""
        if slot_bytes <= 0 or slot_bytes % PAGE_BYTES:
            raise ValueError("a slot is a positive number of pages")
        partial = self._partial.get(slot_bytes) or self._grow(slot_bytes)
        if not partial:
            return None
        extent = next(iter(partial.values()))
        slot = extent.free.pop()
        if not extent.free:
            self._forget_partial(extent)
        extent.taken[slot] = 1
        self._account(slot_bytes, slot_bytes)
        return extent.first * self.extent_bytes + slot * slot_bytes

    def free(self, offset: int) -> None:
        """Give a slot back. Raises `KeyError` when it is not in use."""
        extent, slot = self._find(offset)
        extent.taken[slot] = 0
        extent.free.append(slot)
        self._account(extent.slot_bytes, -extent.slot_bytes)
        if len(extent.free) == extent.slots:
            self._slots -= extent.slots
            self._forget_partial(extent)
            for number in range(extent.first, extent.first + extent.span):
                self._taken[number] = 0
                self._extents[number] = None
        else:
            self._partial.setdefault(extent.slot_bytes, {})[extent.first] = extent

    def retire(self, offset: int) -> None:
        """Take a slot out of use for this arena's life; its bytes stay counted as used."""
        self._find(offset)
        self._retired.add(offset)

    def extent_of(self, offset: int) -> tuple[int, int, int]:
        """Return where the extent of a slot in use begins and ends, and how many of its slots are in use."""
        extent, _ = self._find(offset)
        start = extent.first * self.extent_bytes
        return start, start + extent.span * self.extent_bytes, extent.slots - len(extent.free)

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
        extents = list({id(extent): extent for extent in self._extents if extent is not None}.values())
        used_bytes = sum(extent.slot_bytes * sum(extent.taken) for extent in extents)
        assert self.used_bytes == used_bytes == sum(self._bytes.values()) <= self.capacity_bytes
        for extent in extents:
            assert extent.slots * extent.slot_bytes <= extent.span * self.extent_bytes, "slots leave their extent"
            assert all(self._extents[extent.first + i] is extent for i in range(extent.span)), "extents overlap"
            assert 0 <= len(extent.free) < extent.slots, "an empty extent was kept"
            assert sorted(extent.free) == [slot for slot in range(extent.slots) if not extent.taken[slot]]
            partial = extent.first in self._partial.get(extent.slot_bytes, {})
            assert partial == bool(extent.free)
        for offset in self._retired:
            self._find(offset)
        assert sum(extent.span for extent in extents) == sum(self._taken)
        assert sum(extent.slots for extent in extents) == self._slots

    @property
    def memory_bytes(self) -> int:
        """What the arena's own books take."""
        used = sum(map(len, self._partial.values())) + sum(self._taken)
        return 9 * len(self._taken) + 512 * used + 5 * self._slots + 64 * len(self._retired)

    def _find(self, offset: int) -> tuple[_Extent, int]:
        extent = self._extents[offset // self.extent_bytes]
        if extent is None:
            raise KeyError(offset)
        slot, rest = divmod(offset - extent.first * self.extent_bytes, extent.slot_bytes)
        if rest or slot >= extent.slots or not extent.taken[slot]:
            raise KeyError(offset)
        return extent, slot

    def _grow(self, slot_bytes: int) -> dict[int, _Extent]:
        least = -(-slot_bytes // self.extent_bytes)
        for span in (self._good_span(slot_bytes, least), least):
            first = self._taken.find(bytes(span))
            if first >= 0:
                break
        else:
            return {}
        slots = span * self.extent_bytes // slot_bytes
        self._slots += slots
        free = array("I", range(slots - 1, -1, -1))
        extent = _Extent(first=first, span=span, slot_bytes=slot_bytes, free=free, taken=bytearray(slots))
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
