"""Blocks on their way down: each with all that it grows from, oldest first, so that what lies below is whole."""

from __future__ import annotations

from covey.errors import CoveyError
from covey.policy.store_index import Placed
from covey.types.ids import BlockHash, NamespaceId

from .below import Below
from .memory import Memory

BATCH = 8
"""Blocks that are held, and copied, at once."""


class Demotion:
    """Copies blocks of memory to the tiers below; none leaves memory by it."""

    def __init__(self, memory: Memory, below: Below) -> None:
        self.demoted = 0
        self._memory = memory
        self._below = below

    async def copy_down(self, namespace: NamespaceId, name: BlockHash, *, durable: bool = False) -> bool:
        """Have a block and its ancestors below; False when a tier does not take them, or it went meanwhile.

        With `durable` it is true only when the tier of truth would still have it after a loss of power.
        """

        def is_known(at: BlockHash) -> bool:
            return not (durable and at == name) and self._below.knows_everywhere(namespace, at)

        chain = await self._memory.lineage(namespace, name, is_known)
        for start in range(0, len(chain), BATCH):
            if not await self._copy(chain[start : start + BATCH], durable=durable):
                return False
        return bool(chain) or (not durable and self._below.knows(namespace, name))

    async def _copy(self, batch: list[Placed], *, durable: bool) -> bool:
        try:
            async with self._memory.held(batch) as held:
                kept = await self._below.put(held.records, durable=durable) if held.records else 0
                self.demoted += kept
                await self._memory.note_below(batch[0].namespace, [record.hash for record in held.records[:kept]])
        except CoveyError:
            return False  # memory is too busy to hold them now
        if held.bad is not None:
            await self._memory.condemn(held.bad, "its bytes in memory do not have their checksums")
        return kept == len(batch)
