"""The paged block pool: reservations, references, a prefix cache, pins with expiry (PagedAttention §4.3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from covey.errors import NoSpace
from covey.types.ids import LeaseId

from .free_runs import FreeRuns
from .prefix_cache import BlockChanges, CacheKey, PrefixCache
from .reuse_value import ReuseValue


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Blocks kept from eviction until `expires_at` (monotonic seconds)."""

    id: LeaseId
    blocks: tuple[int, ...]
    expires_at: float


class BlockPool:
    """Who holds which block. Pure: the bytes are elsewhere, and `now` is passed in.

    A block is free, held (references > 0) or cached (no references, but named: a prompt may hit it). Cached blocks are
    evicted least worthy first, leaves before the blocks they grow from, so that what stays is a prefix. Who holds a
    named block holds all that it grows from; therefore every cached block can be evicted, and
    `free + cached - reserved` is what admission may still promise.
    """

    def __init__(self, *, n_blocks: int, name: str = "pool", value: ReuseValue | None = None) -> None:
        """`name` prefixes the ids of pins: give each life of the process its own. `value` says who is evicted first."""
        if n_blocks < 1:
            raise ValueError("a pool needs at least one block")
        self._name = name
        self._references = [0] * n_blocks
        self._free = FreeRuns(n_blocks)
        self._cache = PrefixCache(n_blocks, value or ReuseValue())
        self._reserved = 0
        self._pins: dict[LeaseId, Pin] = {}
        self._pin_count = 0

    @property
    def capacity(self) -> int:
        """Blocks in all."""
        return len(self._references)

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Named blocks that nobody holds."""
        return self._cache.idle

    @property
    def held(self) -> int:
        """Blocks with at least one reference, pins included."""
        return self.capacity - self.free - self.cached

    @property
    def reserved(self) -> int:
        """Blocks promised by `reserve` and not yet taken."""
        return self._reserved

    @property
    def available(self) -> int:
        """Blocks that can still be promised."""
        return self.free + self.cached - self._reserved

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

    def take(self, count: int, *, after: int | None = None, room: int = 0) -> tuple[int, ...]:
        """Turn `count` reserved promises into held, unnamed blocks, evicting cached ones as needed.

        They lie behind `after`, the last block of the sequence, or else behind each other, wherever that is possible;
        `room` is how many blocks the sequence may still take, these included.
        """
        assert 0 <= count <= self._reserved
        self._reserved -= count
        while len(self._free) < count:
            self._free.give(self._cache.evict())
        taken = self._free.take(count, after=after, room=room)
        for block in taken:
            self._references[block] = 1
        return tuple(taken)

    def match(self, keys: Iterable[CacheKey]) -> tuple[int, ...]:
        """Hold the longest cached prefix of `keys`; the caller releases it, or gives it back with `unmatch`."""
        found = []
        for key in keys:
            block = self._cache.find(key)
            if block is None:
                break
            self._hold(block)
            found.append(block)
        return tuple(found)

    def unmatch(self, blocks: Sequence[int]) -> None:
        """Give back what `match` held and was not used: it counts as if nobody had asked for it."""
        for block in reversed(blocks):
            self._let_go(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each after use; unnamed ones become free, named ones cached."""
        self._cache.tick()
        for block in reversed(blocks):
            self._cache.use(block)
            self._let_go(block)

    def name(self, block: int, key: CacheKey, parent: CacheKey | None) -> int:
        """Enter a held, full block into the prefix cache and return the block to use from now on.

        That is `block` itself, or, when the key is already there, the older twin: then `block` is released and the twin
        held in its stead. `parent` must be in the cache, or None for the first of a chain.
        """
        assert self._references[block] > 0
        former = self._cache.key_of(block)
        if former == key:
            return block
        assert former is None, "a block is named once"
        twin = self._cache.find(key)
        if twin is not None:
            self._hold(twin)
            self.release((block,))
            return twin
        self._cache.enter(block, key, parent)
        return block

    # -- pins --------------------------------------------------------------------

    def pin(self, blocks: Sequence[int], *, expires_at: float) -> Pin:
        """Keep held blocks beyond their holder; the pin has references of its own."""
        self._pin_count += 1
        pin = Pin(id=LeaseId(f"{self._name}-{self._pin_count}"), blocks=tuple(blocks), expires_at=expires_at)
        for block in blocks:
            assert self._references[block] > 0
            self._hold(block)
        self._pins[pin.id] = pin
        return pin

    def repin(self, pin_id: LeaseId, *, keep: int, expires_at: float) -> Pin | None:
        """Change when a pin ends and keep only its first `keep` blocks; None when it has ended."""
        pin = self._pins.get(pin_id)
        if pin is None:
            return None
        self.unmatch(pin.blocks[keep:])
        self._pins[pin_id] = pin = Pin(id=pin_id, blocks=pin.blocks[:keep], expires_at=expires_at)
        return pin

    def unpin(self, pin_id: LeaseId) -> None:
        """End a pin; without effect when it has ended."""
        pin = self._pins.pop(pin_id, None)
        if pin is not None:
            self.unmatch(pin.blocks)

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
        return self._cache.key_of(block)

    def keys(self) -> tuple[CacheKey, ...]:
        """Every name in the prefix cache, held or not."""
        return self._cache.keys()

    def next_idle_check(self) -> int | None:
        """The next of the cached blocks, round and round, to look whether its bytes are still right.

        None when there is none among the next few: ask again later. Look, and `discard` it if need be, before anything
        else is asked of the pool.
        """
        return self._cache.next_idle()

    def discard(self, block: int) -> tuple[CacheKey, ...]:
        """Free a cached block, whose bytes are wrong, and all that grows from it. Returns the names that are gone."""
        gone = self._cache.discard(block)
        for freed in gone:
            self._free.give(freed)
        return tuple(gone.values())

    def take_changes(self) -> BlockChanges:
        """What changed in the prefix cache since the last call."""
        return self._cache.take_changes()

    def check(self) -> None:
        """Assert the pool's invariants."""
        self._free.check()
        self._cache.check()
        free, cached = set(self._free), set(self._cache.idle_blocks())
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached
        assert free | cached == {block for block, count in enumerate(self._references) if count == 0}
        assert all(self._cache.key_of(block) is None for block in free)
        assert 0 <= self._reserved <= len(free) + len(cached), "more is promised than there is"
        for pin in self._pins.values():
            assert all(self._references[block] > 0 for block in pin.blocks)

    # -- inside ----------------------------------------------------------------------

    def _hold(self, block: int) -> None:
        if self._references[block] == 0:
            self._cache.hold(block)
        self._references[block] += 1

    def _let_go(self, block: int) -> None:
        assert self._references[block] > 0, f"block {block} is released more often than it was held"
        self._references[block] -= 1
        if self._references[block] == 0 and not self._cache.let_go(block):
            self._free.give(block)
