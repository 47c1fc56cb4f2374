"""What every tier below memory does; one contract suite holds for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from covey.policy.disk_record import Record
from covey.types import block, kv_state
from covey.types.ids import BlockHash, NamespaceId

ALL_CODECS = tuple(block.BlockCodec)


@dataclass(slots=True)
class TierCounts:
    """What a tier has done so far, for metrics."""

    puts: int = 0
    gets: int = 0
    hits: int = 0
    put_bytes: int = 0
    got_bytes: int = 0
    refused: int = 0
    """Blocks not taken: no room, a quota, a parent that is not here, an engine that is away."""
    failed: int = 0
    """Calls that ended in an error or out of time; each was a miss or a refusal to whoever asked."""
    quarantined: int = 0
    """Records that were not what they should be; none was served."""
    dropped: int = 0
    """Blocks given up for room."""


class Tier(Protocol):
    """Blocks under their names, verified on every read. No method raises for what is wrong with disk or engine."""

    kind: kv_state.Tier
    counts: TierCounts

    async def put(self, records: Sequence[Record], *, durable: bool) -> int:
        """Keep blocks, parents first; one that is here already stays. Returns how many leading ones are here now.

        With `durable` the answer comes when they would survive the loss of power or, of an engine, when it has them.
        """
        ...

    async def get(self, namespace: NamespaceId, name: BlockHash) -> Record | None:
        """Return a block whose identity and layers have been verified; a bad one is taken out, counted and None."""
        ...

    async def prefix(
        self, namespace: NamespaceId, hashes: Sequence[BlockHash], codecs: Sequence[block.BlockCodec] = ALL_CODECS
    ) -> int:
        """Return how many leading hashes are here in these codecs. An engine that is late answers with fewer."""
        ...

    def knows(self, namespace: NamespaceId, name: BlockHash) -> bool:
        """Whether a block is here for all that is known without asking an engine; a quick answer that may be stale."""
        ...

    async def remove(self, namespace: NamespaceId, hashes: Sequence[BlockHash]) -> int:
        """Forget blocks and all that grows from them here; returns how many of the named ones were here."""
        ...

    async def scrub(self, step: Callable[[], None]) -> int:
        """Verify every block that this node answers for, calling `step` after each; returns how many were bad."""
        ...

    async def heal(self) -> None:
        """Look whether what was in the way of writing is gone. Called now and then."""
        ...

    def stats(self) -> kv_state.TierStats: ...

    @property
    def index_bytes(self) -> int:
        """Memory of this node that knowing its blocks takes."""
        ...
