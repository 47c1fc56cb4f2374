"""How many blocks a sequence is promised when it enters: all that it may need, or those that it will need at first."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import Literal, Protocol

from covey.policy.blocks import BlockPool
from covey.policy.past_future import Footprint, PastFuture

from .sequence import Sequence

Admission = Literal["reserve", "past_future"]
"""Names of the ways to admit."""


class Promises(Protocol):
    """A way of admitting."""

    def promise(self, seq: Sequence, matched: Items[int], holding: Iterable[Sequence]) -> int | None:
        """Blocks to reserve besides the `matched` ones; None when the sequences that hold blocks leave no room."""

    def ended(self, seq: Sequence) -> None:
        """A sequence came to its own end."""


class WorstCase:
    """Everything is promised at admission: a running sequence never lacks a block."""

    def promise(self, seq: Sequence, matched: Items[int], holding: Iterable[Sequence]) -> int | None:
        """All that it may come to hold."""
        return seq.blocks_needed - len(matched)

    def ended(self, seq: Sequence) -> None:
        """Nothing to learn."""


class Predicted:
    """Promises what the first step needs, where the predicted peak of everybody fits; who lacks a block later takes
    it from a victim, which is swapped out.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._policy = PastFuture(block_size=block_size)

    def promise(self, seq: Sequence, matched: Items[int], holding: Iterable[Sequence]) -> int | None:
        """The blocks of its tokens and of the next one."""
        others = tuple(holding)
        used = [*matched, *(block for other in others for block in other.blocks)]
        distinct = len(set(used))
        elsewhere = self._pool.held - distinct  # pins and blocks adopted ahead of a request
        shared = len(used) - distinct
        capacity = self._pool.capacity - elsewhere + shared
        footprint = _footprint(seq)
        if not self._policy.admits([_footprint(other) for other in others], footprint, capacity):
            return None
        return max(0, min(seq.blocks_needed, self._policy.promise(footprint)) - len(matched))

    def ended(self, seq: Sequence) -> None:
        """Learn how long outputs become."""
        self._policy.observe(seq.generated)


def make_promises(admission: Admission, pool: BlockPool, block_size: int) -> Promises:
    """The way of admitting with this name."""
    return Predicted(pool, block_size) if admission == "past_future" else WorstCase()


def _footprint(seq: Sequence) -> Footprint:
    return Footprint(
        tokens=len(seq.tokens), generated=seq.generated, output_max=max(seq.generated, seq.tokens_max - seq.prompt_len)
    )
