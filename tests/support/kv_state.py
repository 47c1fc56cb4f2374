"""What a store or a worker says of its blocks."""

from __future__ import annotations

from dataclasses import replace

from covey.codec.methods import KvStore
from covey.net.rpc import Channel
from covey.types.common import Empty
from covey.types.kv_state import KvSnapshot, StoreStats


async def snapshot(channel: Channel) -> KvSnapshot:
    """All pages as one."""
    async with channel.stream(KvStore.SNAPSHOT, Empty(), timeout_s=5) as pages:
        parts = [page async for page in pages]
    return replace(parts[0], entries=tuple(entry for part in parts for entry in part.entries))


async def stats(channel: Channel) -> StoreStats:
    return await channel.call(KvStore.STATS, Empty(), timeout_s=5)
