"""One block as the index of a store knows it, and the order in which blocks may be evicted."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from covey.types.ids import BlockHash, NamespaceId, TenantId
from covey.types.kv import BlockCodec, BlockShape


class BlockState(IntEnum):
    RESERVED = 0
    """A writer fills its slot; nobody sees it."""
    COMMITTED = 1
    """Visible and immutable."""
    DOOMED = 2
    """No longer visible; its slot waits for the last lease to end."""
    GONE = 3
    """The slot is free or retired; only ended leases still point here."""


class Block:
    """A slot in use. `held` counts leases and pins of any kind, `pins` those that are pins."""

    __slots__ = (
        "children", "codec", "depth", "digest", "generation", "hash", "held", "last_used", "namespace", "offset",
        "parent", "pins", "private", "shape", "slot_bytes", "state", "tenant", "ticket",
    )  # fmt: skip

    def __init__(
        self,
        *,
        namespace: NamespaceId,
        name: BlockHash,
        parent: Block | None,
        private: bool,
        offset: int,
        shape: BlockShape,
        slot_bytes: int,
        generation: int,
        tenant: TenantId,
        codec: BlockCodec = BlockCodec.RAW,
    ) -> None:
        self.tenant = tenant
        self.codec = codec
        self.namespace = namespace
        self.hash = name
        self.parent = parent
        self.private = private
        self.offset = offset
        self.shape = shape
        self.slot_bytes = slot_bytes
        self.generation = generation
        self.depth: int = parent.depth + 1 if parent is not None else 0
        self.state = BlockState.RESERVED
        self.digest = 0
        self.children = 0
        self.held = 0
        self.pins = 0
        self.last_used = 0.0
        self.ticket = 0

    @property
    def evictable(self) -> bool:
        """Whether nobody needs it: committed, no lease, no pin, nothing grows from it."""
        return self.state is BlockState.COMMITTED and not self.held and not self.children and not self.private


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What an eviction score sees of a block: when it was last read, how deep in its chain, how large its slot."""

    last_used: float
    depth: int
    slot_bytes: int


EvictionScore: TypeAlias = Callable[[Candidate], float]
"""The worth of keeping a block; the lowest goes first. A reuse probability belongs here."""


def least_recently_used(candidate: Candidate) -> float:
    return candidate.last_used


class EvictionQueue:
    """Evictable blocks by slot size, worst first; entries of blocks that have changed since are skipped."""

    def __init__(self, score: EvictionScore) -> None:
        self._score = score
        self._tickets = 0
        self._heaps: dict[int, list[tuple[float, int, Block]]] = {}

    def push(self, block: Block) -> None:
        """Enter a block that has just become evictable."""
        self._tickets += 1
        block.ticket = self._tickets
        candidate = Candidate(last_used=block.last_used, depth=block.depth, slot_bytes=block.slot_bytes)
        heap = self._heaps.setdefault(block.slot_bytes, [])
        heapq.heappush(heap, (self._score(candidate), block.ticket, block))

    def coldest(self, count: int) -> list[Block]:
        """Return the blocks to evict next, worst first."""
        entries = [entry for heap in self._heaps.values() for entry in heap if _is_live(entry)]
        return [block for _, _, block in heapq.nsmallest(count, entries)]

    def compact(self, blocks: int) -> None:
        """Drop stale entries once they outnumber `blocks`, those of the index: amortised O(1)."""
        if sum(map(len, self._heaps.values())) <= 2 * blocks + 64:
            return
        for size, heap in list(self._heaps.items()):
            live = [entry for entry in heap if _is_live(entry)]
            heapq.heapify(live)
            self._heaps[size] = live
            if not live:
                del self._heaps[size]

    def worst(self, slot_bytes: int | None = None) -> Block | None:
        """Return the block to evict next, of one slot size or of all; it stays in the queue until it changes."""
        sizes = tuple(self._heaps) if slot_bytes is None else (slot_bytes,)
        heads = [head for size in sizes if (head := self._head(size)) is not None]
        return min(heads)[2] if heads else None

    def holds(self, block: Block) -> bool:
        """Whether a live entry of the block exists."""
        heap = self._heaps.get(block.slot_bytes, ())
        return any(entry[2] is block and _is_live(entry) for entry in heap)

    def _head(self, slot_bytes: int) -> tuple[float, int, Block] | None:
        heap = self._heaps.get(slot_bytes, [])
        while heap and not _is_live(heap[0]):
            heapq.heappop(heap)
        if not heap:
            self._heaps.pop(slot_bytes, None)
            return None
        return heap[0]


def _is_live(entry: tuple[float, int, Block]) -> bool:
    _, ticket, block = entry
    return block.ticket == ticket and block.evictable
