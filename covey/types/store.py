"""What an engine needs from a store of KV blocks; `covey.net.kv` implements it over real nodes, a double in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from covey.types.block import BlockShape
from covey.types.ids import BlockHash, NamespaceId, TenantId
from covey.types.kv import BlockKey

Ready = Callable[[int], None]
"""Called on the event loop with n: the first n layers of every block of a load are in its buffers, verified."""


class Held(Protocol):
    """A lease on stored blocks, over one or several nodes. Release it on every exit path; it expires by itself too."""

    @property
    def hashes(self) -> tuple[BlockHash, ...]:
        """The blocks it covers, in the order asked."""
        ...

    async def release(self) -> None:
        """Give the lease back; safe to call twice; never raises for a node that is gone."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreKey:
    """Whose blocks, and of which geometry."""

    tenant: TenantId
    namespace: NamespaceId
    shape: BlockShape


class BlockStore(Protocol):
    """Blocks by name, leased, checked on every read."""

    async def lookup(self, key: StoreKey, hashes: Sequence[BlockHash], *, owner: str, ttl_s: float) -> Held:
        """Lease the longest stored prefix of `hashes` (possibly empty: `hashes == ()`)."""
        ...

    async def load(self, held: Held, into: Sequence[memoryview], *, ready: Ready | None = None) -> int:
        """Copy the leased blocks, in order, into buffers of `shape.size_bytes`, verifying every checksum.

        Returns how many leading blocks are good. A bad block is quarantined and counts as missing.
        With `ready` the layers come one by one, each over all blocks, and it is called after each. A damaged layer
        ends the good prefix at its block: the rest of that prefix is completed, and `ready` is not called again.
        Raises LeaseExpired when the lease ended first.
        """
        ...

    async def store(
        self,
        key: StoreKey,
        blocks: Sequence[BlockKey],
        data: Sequence[memoryview],
        *,
        owner: str,
        ttl_s: float,
        private: bool = False,
    ) -> Held:
        """Write blocks that are not there yet and lease them all; private ones vanish with their last lease.

        Raises NoSpace, QuotaExceeded or Unavailable; then nothing stays reserved.
        """
        ...

    async def pin(self, key: StoreKey, hashes: Sequence[BlockHash], *, owner: str, ttl_s: float) -> Held:
        """Keep stored blocks from eviction for `ttl_s` seconds."""
        ...
