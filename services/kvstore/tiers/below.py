"""All tiers below memory as one: blocks are found in the nearest and kept in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import anyio
from anyio import to_thread

from covey.clock import Clock
from covey.policy.disk_record import Record
from covey.policy.tiering import RateMeter
from covey.types import block, kv_state
from covey.types.ids import BlockHash, NamespaceId

from .tier import ALL_CODECS, Tier

Encoder = Callable[[Record], Record]
"""Encodes a block anew on its way down; runs in a thread. What comes back names its codec and its own checksums."""

GUESSES = {kv_state.Tier.DISK: (4e8, 0.0005), kv_state.Tier.REMOTE: (1e8, 0.002)}
"""Bytes a second and seconds a call, until something has been measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cold:
    """A run of blocks that lie below: how many, of how many bytes about, and how long it would take to have them."""

    blocks: int = 0
    size_bytes: int = 0
    load_s: float = 0.0


class Below:
    """The tiers in the order in which they are asked; the last one is the truth. Measures what each takes."""

    def __init__(
        self, tiers: Sequence[Tier], *, clock: Clock, encoders: Mapping[kv_state.Tier, Encoder] | None = None
    ) -> None:
        self.tiers = tuple(tiers)
        self.meters = {tier.kind: RateMeter(bytes_per_s=rate, call_s=call_s) for tier in tiers
                       for rate, call_s in (GUESSES[tier.kind],)}  # fmt: skip
        self._clock = clock
        self._encoders = dict(encoders or {})

    def knows(self, namespace: NamespaceId, name: BlockHash) -> bool:
        """Whether a block lies below: its eviction costs nothing but the way up."""
        return any(tier.knows(namespace, name) for tier in self.tiers)

    def knows_everywhere(self, namespace: NamespaceId, name: BlockHash) -> bool:
        """Whether every tier that takes writes has the block, so that there is nothing to do."""
        return all(tier.knows(namespace, name) or not tier.stats().writable for tier in self.tiers)

    def load_s(self, size_bytes: int) -> float:
        """Return how long the nearest tier would take for a block of so many bytes."""
        return self.meters[self.tiers[0].kind].estimate_s(1, size_bytes)

    async def prefix(
        self, namespace: NamespaceId, hashes: Sequence[BlockHash], codecs: Sequence[block.BlockCodec] = ALL_CODECS
    ) -> Cold:
        """Return how far the hashes are found below; an engine that does not answer in time has nothing."""
        found = Cold()
        for tier in self.tiers:
            if found.blocks == len(hashes):
                break
            count = await tier.prefix(namespace, hashes[found.blocks :], codecs)
            size_bytes = count * _block_bytes(tier)
            found = Cold(
                blocks=found.blocks + count, size_bytes=found.size_bytes + size_bytes,
                load_s=found.load_s + self.meters[tier.kind].estimate_s(count, size_bytes),
            )  # fmt: skip
        return found

    async def get(self, namespace: NamespaceId, name: BlockHash) -> Record | None:
        """Return a block from the nearest tier that has a good one."""
        for tier in self.tiers:
            started = self._clock.now()
            record = await tier.get(namespace, name)
            if record is not None:
                self.meters[tier.kind].observe(len(record.payload), self._clock.now() - started)
                return record
        return None

    async def put(self, records: Sequence[Record], *, durable: bool = False) -> int:
        """Keep blocks in every tier. Returns how many leading ones lie below now: durably, in the tier of truth."""
        taken: dict[kv_state.Tier, int] = {}

        async def put(tier: Tier) -> None:
            encoder = self._encoders.get(tier.kind)
            going = records
            if encoder is not None:
                going = [await to_thread.run_sync(encoder, record) for record in records]
            taken[tier.kind] = await tier.put(going, durable=durable)

        async with anyio.create_task_group() as tg:
            for tier in self.tiers:
                tg.start_soon(put, tier)
        return taken[self.tiers[-1].kind] if durable else max(taken.values())

    async def heal(self) -> None:
        for tier in self.tiers:
            await tier.heal()

    def stats(self) -> tuple[kv_state.TierStats, ...]:
        return tuple(tier.stats() for tier in self.tiers)


def _block_bytes(tier: Tier) -> int:
    """The mean size of the blocks that went through a tier; a mebibyte before the first."""
    counts = tier.counts
    moved = counts.puts + counts.hits
    return (counts.put_bytes + counts.got_bytes) // moved if moved else 1 << 20
