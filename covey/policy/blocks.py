"""The paged block pool: reservations, references, a prefix cache, pins with expiry (PagedAttention §4.3)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from covey.errors import NoSpace
from covey.types.ids import BlockHash, LeaseId, NamespaceId

CacheKey = tuple[NamespaceId, BlockHash]
"""What names a full block: where it may be used, and the prefix that it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Blocks kept from eviction until `expires_at` (monotonic seconds)."""

    id: LeaseId
    blocks: tuple[int, ...]
    expires_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockChanges:
    """What entered and left the prefix cache since the last `take_changes`; a key is in at most one of them."""

    stored: tuple[CacheKey, ...] = ()
    evicted: tuple[CacheKey, ...] = ()


@dataclass(slots=True)
class _Block:
    references: int = 0
    key: CacheKey | None = None
    parent: CacheKey | None = None
    children: int = 0
    used: int = 0


class BlockPool:
    """Who holds which block. Pure: the bytes are elsewhere, and `now` is passed in.

    A block is free, held (references > 0) or cached (no references, but named: a prompt may hit it). Cached blocks are
    evicted least recently used first, leaves before the blocks they grow from, so that what stays is a prefix. Who
    holds a named block holds all that it grows from; therefore every cached block can be evicted, and
    `free + cached - reserved` is what admission may still promise.
    """

    def __init__(self, *, n_blocks: int, name: str = "pool") -> None:
        """`name` prefixes the ids of pins: give each life of the process its own."""
        if n_blocks < 1:
            raise ValueError("a pool needs at least one block")
        self._name = name
        self._blocks = [_Block() for _ in range(n_blocks)]
        self._free = list(range(n_blocks - 1, -1, -1))
        self._index: dict[CacheKey, int] = {}
        self._leaves: list[tuple[int, int]] = []  # lazy heap of (used, block): may hold stale entries, misses none
        self._cached = 0
        self._reserved = 0
        self._tick = 0
        self._pins: dict[LeaseId, Pin] = {}
        self._pin_count = 0
        self._changes: dict[CacheKey, bool] = {}

    @property
    def capacity(self) -> int:
        """Blocks in all."""
        return len(self._blocks)

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Named blocks that nobody holds."""
        return self._cached

    @property
    def held(self) -> int:
        """Blocks with at least one reference, pins included."""
        return self.capacity - self.free - self._cached

    @property
    def reserved(self) -> int:
        """Blocks promised by `reserve` and not yet taken."""
        return self._reserved

    @property
    def available(self) -> int:
        """Blocks that can still be promised."""
        return self.free + self._cached - self._reserved

    @property
    def pinned(self) -> int:
        """Distinct blocks under a pin."""
        return len({block for pin in self._pins.values() for block in pin.blocks})

    # -- holding ---------------------------------------------------------------

    def reserve(self, count: int) -> None:
        """Promise `count` blocks to a later `take`. Raises NoSpace, and then promises none."""
        if count > self.available:
            raise NoSpace(f"{count} blocks needed, {self.available} available")
        self._reserved += count

    def unreserve(self, count: int) -> None:
        """Give back promises that are not needed."""
        assert 0 <= count <= self._reserved
        self._reserved -= count

    def take(self, count: int) -> tuple[int, ...]:
        """Turn `count` reserved promises into held, unnamed blocks, evicting cached ones as needed."""
        assert 0 <= count <= self._reserved
        self._reserved -= count
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._blocks[block].references = 1
            taken.append(block)
        return tuple(taken)

    def match(self, keys: Iterable[CacheKey]) -> tuple[int, ...]:
        """Hold the longest cached prefix of `keys`; the caller releases it."""
        found = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            self._hold(block)
            found.append(block)
        return tuple(found)

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each; unnamed ones become free, named ones cached, the end of the prefix as oldest."""
        self._tick += 1
        for block in reversed(blocks):
            state = self._blocks[block]
            assert state.references > 0, f"block {block} is released more often than it was held"
            state.references -= 1
            if state.references:
                continue
            if state.key is None:
                self._free.append(block)
            else:
                self._cached += 1
                state.used = self._tick
                self._offer(block)

    def name(self, block: int, key: CacheKey, parent: CacheKey | None) -> int:
        """Enter a held, full block into the prefix cache and return the block to use from now on.

        That is `block` itself, or, when the key is already there, the older twin: then `block` is released and the twin
        held in its stead. `parent` must be in the cache, or None for the first of a chain.
        """
        state = self._blocks[block]
        assert state.references > 0
        if state.key == key:
            return block
        assert state.key is None, "a block is named once"
        twin = self._index.get(key)
        if twin is not None:
            self._hold(twin)
            self.release((block,))
            return twin
        if parent is not None:
            self._blocks[self._index[parent]].children += 1
        state.key, state.parent = key, parent
        self._index[key] = block
        self._note(key, present=True)
        return block

    # -- pins --------------------------------------------------------------------

    def pin(self, blocks: Sequence[int], *, expires_at: float) -> Pin:
        """Keep held blocks beyond their holder; the pin has references of its own."""
        self._pin_count += 1
        pin = Pin(id=LeaseId(f"{self._name}-{self._pin_count}"), blocks=tuple(blocks), expires_at=expires_at)
        for block in blocks:
            assert self._blocks[block].references > 0
            self._hold(block)
        self._pins[pin.id] = pin
        return pin

    def repin(self, pin_id: LeaseId, *, keep: int, expires_at: float) -> Pin | None:
        """Change when a pin ends and keep only its first `keep` blocks; None when it has ended."""
        pin = self._pins.get(pin_id)
        if pin is None:
            return None
        self.release(pin.blocks[keep:])
        self._pins[pin_id] = pin = Pin(id=pin_id, blocks=pin.blocks[:keep], expires_at=expires_at)
        return pin

    def unpin(self, pin_id: LeaseId) -> None:
        """End a pin; without effect when it has ended."""
        pin = self._pins.pop(pin_id, None)
        if pin is not None:
            self.release(pin.blocks)

    def pin_of(self, pin_id: LeaseId) -> Pin | None:
        """The pin, while it has not been unpinned."""
        return self._pins.get(pin_id)

    def due_pins(self, now: float) -> tuple[Pin, ...]:
        """Pins whose time is up, still held: the caller decides what becomes of the bytes, then calls `unpin`."""
        return tuple(pin for pin in self._pins.values() if pin.expires_at <= now)

    def next_pin_expiry(self) -> float | None:
        """When the next pin is due."""
        return min((pin.expires_at for pin in self._pins.values()), default=None)

    # -- the prefix cache ----------------------------------------------------------

    def key_of(self, block: int) -> CacheKey | None:
        """The name of a block."""
        return self._blocks[block].key

    def keys(self) -> tuple[CacheKey, ...]:
        """Every name in the prefix cache, held or not."""
        return tuple(self._index)

    def take_changes(self) -> BlockChanges:
        """What changed in the prefix cache since the last call."""
        changes, self._changes = self._changes, {}
        return BlockChanges(
            stored=tuple(key for key, present in changes.items() if present),
            evicted=tuple(key for key, present in changes.items() if not present),
        )

    def check(self) -> None:
        """Assert the pool's invariants."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        cached = {i for i, b in enumerate(self._blocks) if b.references == 0 and b.key is not None}
        assert len(cached) == self._cached
        assert free == {i for i, b in enumerate(self._blocks) if b.references == 0 and b.key is None}
        assert 0 <= self._reserved <= len(free) + len(cached), "more is promised than there is"
        assert self._index == {b.key: i for i, b in enumerate(self._blocks) if b.key is not None}
        children = dict.fromkeys(self._index, 0)
        for block in self._blocks:
            if block.key is not None and block.parent is not None:
                children[block.parent] += 1
                parent = self._blocks[self._index[block.parent]]
                assert parent.references >= min(block.references, 1), "a held block grows from one that is not held"
        assert all(self._blocks[self._index[key]].children == count for key, count in children.items())
        leaves = set(self._leaves)
        assert all((self._blocks[i].used, i) in leaves for i in cached if not self._blocks[i].children)
        for pin in self._pins.values():
            assert all(self._blocks[block].references > 0 for block in pin.blocks)

    # -- inside ----------------------------------------------------------------------

    def _hold(self, block: int) -> None:
        state = self._blocks[block]
        if state.references == 0:
            self._cached -= 1
        state.references += 1

    def _offer(self, block: int) -> None:
        """Make a cached block that nothing grows from a candidate for eviction."""
        state = self._blocks[block]
        if state.references or state.key is None or state.children:
            return
        heapq.heappush(self._leaves, (state.used, block))
        if len(self._leaves) > 2 * self.capacity + 64:  # stale entries: sweeping them is amortised O(1)
            self._leaves = [(b.used, i) for i, b in enumerate(self._blocks) if self._is_leaf(b)]
            heapq.heapify(self._leaves)

    def _evict(self) -> int:
        while True:
            used, block = heapq.heappop(self._leaves)
            state = self._blocks[block]
            if self._is_leaf(state) and state.used == used:
                break
        key, parent = state.key, state.parent
        assert key is not None
        del self._index[key]
        self._note(key, present=False)
        self._cached -= 1
        state.key = state.parent = None
        if parent is not None:
            grown_from = self._index[parent]
            self._blocks[grown_from].children -= 1
            self._offer(grown_from)
        return block

    @staticmethod
    def _is_leaf(state: _Block) -> bool:
        return state.references == 0 and state.key is not None and not state.children

    def _note(self, key: CacheKey, *, present: bool) -> None:
        if self._changes.get(key, present) == present:
            self._changes[key] = present
        else:
            del self._changes[key]  # came and went, or went and came back, before anybody asked
