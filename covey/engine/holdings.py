"""The blocks that sequences hold, and those that they were promised."""

from __future__ import annotations

from collections.abc import Iterable

from covey.errors import NoSpace
from covey.policy.blocks import BlockPool

from .promises import Promises
from .sequence import Sequence


class Holdings:
    """Moves blocks between a pool and the sequences of one engine."""

    def __init__(self, pool: BlockPool, promises: Promises, block_size: int) -> None:
        self._pool = pool
        self._promises = promises
        self._block_size = block_size

    def find_room(self, seq: Sequence, live: Iterable[Sequence]) -> bool:
        """Hold the cached prefix and reserve the rest; False, and nothing held, when there is no room.

        A sequence whose blocks are still being swapped out has no room yet.
        """
        if seq.transfer is not None:
            return False
        if seq.is_long:
            return self._find_window(seq)
        matched = self._pool.match(seq.chain.keys[: self.reusable(seq)])
        others = (other for other in live if other.blocks and not other.is_long)
        needed = self._promises.promise(seq, matched, others)
        if needed is None:
            self._pool.unmatch(matched)
            return False
        try:
            self._pool.reserve(needed)
        except NoSpace:
            self._pool.unmatch(matched)
            return False
        seq.blocks = list(matched)
        seq.promised = needed
        seq.named = len(matched)
        seq.computed = len(matched) * self._block_size
        if not seq.preemptions:
            seq.cached_tokens = seq.computed
        return True

    def _find_window(self, seq: Sequence) -> bool:
        try:
            self._pool.reserve(seq.blocks_needed)
        except NoSpace:
            return False
        seq.blocks, seq.promised, seq.named, seq.computed = [], seq.blocks_needed, 0, 0
        return True

    def room(self, seq: Sequence) -> int:
        """The position up to which the window of a long sequence reaches."""
        return seq.base + seq.blocks_needed * self._block_size

    def reusable(self, seq: Sequence) -> int:
        """Full blocks that need not be computed: at least one token must be, to draw the next from."""
        return (len(seq.tokens) - 1) // self._block_size

    def cover(self, seq: Sequence, tokens: int) -> bool:
        """Take blocks, promised ones first, until they hold `tokens` tokens; False, and none taken, without room."""
        missing = -(-(tokens - seq.base) // self._block_size) - len(seq.blocks)
        if missing <= 0:
            return True
        beyond = missing - seq.promised
        if beyond > 0:
            try:
                self._pool.reserve(beyond)
            except NoSpace:
                return False
            seq.promised += beyond
        last, room = (seq.blocks[-1] if seq.blocks else None), max(missing, seq.blocks_needed - len(seq.blocks))
        seq.blocks += self._pool.take(missing, after=last, room=room)
        seq.promised -= missing
        return True

    def book(self, seq: Sequence) -> None:
        """Enter blocks that became full into the prefix cache."""
        full = seq.computed // self._block_size
        if full == seq.named or seq.is_long:
            return
        seq.chain.extend(seq.tokens)
        for index in range(seq.named, full):
            keys = seq.chain.keys
            seq.blocks[index] = self._pool.name(seq.blocks[index], keys[index], seq.chain.parent(index))
        seq.named = full

    def release(self, seq: Sequence) -> None:
        """Let go of everything; without effect when nothing is held."""
        self._pool.release(seq.blocks)
        self._pool.unreserve(seq.promised)
        seq.blocks, seq.promised, seq.named = [], 0, 0
