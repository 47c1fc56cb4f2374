"""Looks, while nothing runs, whether cached blocks still are what they were: memory fails, and stray writes happen."""

from __future__ import annotations

import xxhash

from covey.model.plan import Runner
from covey.policy.blocks import BlockPool
from covey.policy.prefix_cache import CacheKey

BLOCKS_A_LOOK = 4
"""So a look takes about a millisecond: whoever arrives meanwhile does not notice."""


class Integrity:
    """A checksum for each cached block, taken at the first look after it was named, compared at each later one."""

    def __init__(self, pool: BlockPool, runner: Runner) -> None:
        self._pool = pool
        self._runner = runner
        self._sums: dict[int, tuple[CacheKey | None, int]] = {}  # by block: bounded by the pool
        self.verified = 0
        """Comparisons that fitted, so far."""
        self.corrupt = 0
        """Blocks found to be wrong, so far."""

    def look(self) -> None:
        """Look at the next few blocks; a wrong one goes, with all that grows from it. Not while a step runs."""
        for _ in range(BLOCKS_A_LOOK):
            block = self._pool.next_idle_check()
            if block is None:
                return
            name, found = self._pool.key_of(block), self._checksum(block)
            known = self._sums.get(block)
            if known is None or known[0] != name:
                self._sums[block] = (name, found)
            elif known[1] == found:
                self.verified += 1
            else:
                self.corrupt += 1
                self._pool.discard(block)
                del self._sums[block]

    def _checksum(self, block: int) -> int:
        with self._runner.block_view(block) as view:
            return int(xxhash.xxh3_64_intdigest(view))
