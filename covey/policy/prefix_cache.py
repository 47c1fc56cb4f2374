"""Which full blocks have a name, what grows from what, and which of those that nobody holds goes first."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from covey.types.ids import BlockHash, NamespaceId

from .reuse_value import ReuseValue

CacheKey = tuple[NamespaceId, BlockHash]
"""What names a full block: where it may be used, and the prefix that it ends."""

SCAN_MAX = 1024
"""Blocks that one `next_idle` looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockChanges:
    """What entered and left the prefix cache since the last `take_changes`; a key is in at most one of them."""

    stored: tuple[CacheKey, ...] = ()
    evicted: tuple[CacheKey, ...] = ()


@dataclass(slots=True, kw_only=True)
class _Named:
    key: CacheKey
    parent: int | None
    depth: int
    children: int = 0
    is_idle: bool = False
    used: int = 0
    heat: float = 0.0
    worth: float = 0.0


class PrefixCache:
    """The named blocks of a pool. A named block is held by somebody, or idle: then it may be evicted.

    Idle blocks go least worthy first, leaves before the blocks they grow from, so that what stays is a prefix.
    """

    def __init__(self, capacity: int, value: ReuseValue) -> None:
        self._capacity = capacity
        self._value = value
        self._index: dict[CacheKey, int] = {}
        self._named: dict[int, _Named] = {}
        self._leaves: list[tuple[float, int]] = []  # lazy heap of (worth, block): may hold stale entries, misses none
        self._idle = 0
        self._tick = 0
        self._looked_at = -1
        self._changes: dict[CacheKey, bool] = {}

    @property
    def idle(self) -> int:
        """Named blocks that nobody holds."""
        return self._idle

    def keys(self) -> tuple[CacheKey, ...]:
        """Every name, of held and of idle blocks."""
        return tuple(self._index)

    def find(self, key: CacheKey) -> int | None:
        """The block of that name."""
        return self._index.get(key)

    def key_of(self, block: int) -> CacheKey | None:
        """The name of a block."""
        named = self._named.get(block)
        return None if named is None else named.key

    def enter(self, block: int, key: CacheKey, parent: CacheKey | None) -> None:
        """Name a held block. `parent` must have a name, or be None for the first of a chain."""
        assert block not in self._named
        assert key not in self._index
        grown_from = None if parent is None else self._index[parent]
        depth = 0
        if grown_from is not None:
            self._named[grown_from].children += 1
            depth = self._named[grown_from].depth + 1
        self._index[key] = block
        self._named[block] = _Named(key=key, parent=grown_from, depth=depth)
        self._note(key, present=True)

    # -- use and disuse -------------------------------------------------------------

    def tick(self) -> None:
        """Move time on by one use of the pool."""
        self._tick += 1

    def use(self, block: int) -> None:
        """Count a use of a block; without effect when it has no name."""
        if (named := self._named.get(block)) is not None:
            named.heat, named.used = self._value.use(named.heat, self._tick - named.used), self._tick

    def hold(self, block: int) -> None:
        """Keep an idle block from eviction."""
        named = self._named[block]
        assert named.is_idle
        named.is_idle = False
        self._idle -= 1

    def let_go(self, block: int) -> bool:
        """Make a block idle that nobody holds any more; False when it has no name."""
        named = self._named.get(block)
        if named is None:
            return False
        named.is_idle = True
        named.worth = self._value.worth(heat=named.heat, used=named.used, depth=named.depth)
        self._idle += 1
        self._offer(block)
        return True

    def evict(self) -> int:
        """Take the name from the least worthy idle leaf; there must be an idle block."""
        while True:
            worth, block = heapq.heappop(self._leaves)
            named = self._named.get(block)
            if named is not None and _is_leaf(named) and named.worth == worth:
                self._forget(block)
                return block

    def discard(self, block: int) -> dict[int, CacheKey]:
        """Take the names from an idle block and from all that grows from it; returns the blocks and their names."""
        assert self._named[block].is_idle, "nobody holds an idle block, nor what grows from it"
        grown: dict[int, list[int]] = {}
        for child, named in self._named.items():
            if named.parent is not None:
                grown.setdefault(named.parent, []).append(child)
        gone = {}
        ahead = [block]
        while ahead:
            next_block = ahead.pop()
            gone[next_block] = self._named[next_block].key
            ahead += grown.get(next_block, ())
        for gone_block in reversed(gone):
            self._forget(gone_block)
        return gone

    def next_idle(self) -> int | None:
        """The next of the idle blocks, round and round; None when there is none among the next few."""
        for _ in range(min(self._capacity, SCAN_MAX)):
            self._looked_at = (self._looked_at + 1) % self._capacity
            named = self._named.get(self._looked_at)
            if named is not None and named.is_idle:
                return self._looked_at
        return None

    def idle_blocks(self) -> Iterator[int]:
        """Every idle block."""
        return (block for block, named in self._named.items() if named.is_idle)

    def take_changes(self) -> BlockChanges:
        """What changed since the last call."""
        changes, self._changes = self._changes, {}
        return BlockChanges(
            stored=tuple(key for key, present in changes.items() if present),
            evicted=tuple(key for key, present in changes.items() if not present),
        )

    def check(self) -> None:
        """Assert the cache's invariants."""
        assert self._index == {named.key: block for block, named in self._named.items()}
        assert self._idle == len(tuple(self.idle_blocks()))
        children = dict.fromkeys(self._named, 0)
        for named in self._named.values():
            if named.parent is not None:
                children[named.parent] += 1
                parent = self._named[named.parent]
                assert named.is_idle or not parent.is_idle, "a held block grows from one that is not held"
                assert named.depth == parent.depth + 1
        assert all(named.children == children[block] for block, named in self._named.items())
        leaves = set(self._leaves)
        assert all((named.worth, block) in leaves for block, named in self._named.items() if _is_leaf(named))

    # -- inside ------------------------------------------------------------------------

    def _offer(self, block: int) -> None:
        named = self._named[block]
        if not _is_leaf(named):
            return
        heapq.heappush(self._leaves, (named.worth, block))
        if len(self._leaves) > 2 * self._capacity + 64:  # stale entries: sweeping them is amortised O(1)
            self._leaves = [(n.worth, b) for b, n in self._named.items() if _is_leaf(n)]
            heapq.heapify(self._leaves)

    def _forget(self, block: int) -> None:
        named = self._named.pop(block)
        del self._index[named.key]
        self._note(named.key, present=False)
        self._idle -= 1
        if named.parent is not None:
            self._named[named.parent].children -= 1
            self._offer(named.parent)

    def _note(self, key: CacheKey, *, present: bool) -> None:
        if self._changes.get(key, present) == present:
            self._changes[key] = present
        else:
            del self._changes[key]  # came and went, or went and came back, before anybody asked


def _is_leaf(named: _Named) -> bool:
    return named.is_idle and not named.children
