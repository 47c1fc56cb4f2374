"""A bounded two-way index of blocks and the workers that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from covey.types.ids import BlockHash, NamespaceId, WorkerId

Block = tuple[NamespaceId, BlockHash]


class BlockHolders:
    """Who holds which block; an entry is one block at one worker, and at most `entries_max` are kept."""

    def __init__(self, entries_max: int) -> None:
        self.overflowed = 0
        """Entries that were not taken in because the index was full."""
        self._entries_max = entries_max
        self._size = 0
        self._of_worker: dict[WorkerId, set[Block]] = {}
        self._of_block: dict[Block, set[WorkerId]] = {}

    def __len__(self) -> int:
        return self._size

    def blocks(self, worker: WorkerId) -> frozenset[Block]:
        return frozenset(self._of_worker.get(worker, ()))

    def holders(self, block: Block) -> frozenset[WorkerId]:
        return frozenset(self._of_block.get(block, ()))

    def overlap(self, namespace: NamespaceId, hashes: Iterable[BlockHash]) -> Mapping[WorkerId, int]:
        """Return for each worker how many of the hashes, from the first on without a gap, it holds."""
        counts: dict[WorkerId, int] = {}
        unbroken: set[WorkerId] | None = None
        for depth, block in enumerate(hashes, start=1):
            here = self._of_block.get((namespace, block), set())
            unbroken = set(here) if unbroken is None else unbroken & here
            if not unbroken:
                break
            for worker in unbroken:
                counts[worker] = depth
        return counts

    def add(self, worker: WorkerId, block: Block) -> None:
        held = self._of_worker.setdefault(worker, set())
        if block in held:
            return
        if self._size >= self._entries_max:
            self.overflowed += 1
            return
        held.add(block)
        self._of_block.setdefault(block, set()).add(worker)
        self._size += 1

    def remove(self, worker: WorkerId, block: Block) -> None:
        held = self._of_worker.get(worker, set())
        if block not in held:
            return
        held.discard(block)
        holders = self._of_block[block]
        holders.discard(worker)
        if not holders:
            del self._of_block[block]
        self._size -= 1

    def clear(self, worker: WorkerId, namespace: NamespaceId | None = None) -> None:
        """Remove all blocks of a worker, or those of one namespace."""
        for block in self.blocks(worker):
            if namespace is None or block[0] == namespace:
                self.remove(worker, block)
        if not self._of_worker.get(worker):
            self._of_worker.pop(worker, None)

    def check(self) -> None:
        """Assert that both directions agree and the bound holds."""
        assert self._size == sum(map(len, self._of_worker.values())) <= self._entries_max
        assert self._size == sum(map(len, self._of_block.values()))
        assert all(self._of_block.values())
        for worker, blocks in self._of_worker.items():
            assert all(worker in self._of_block[block] for block in blocks)
