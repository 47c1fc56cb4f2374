"""A client and a channel to a kvstore process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from covey.codec.methods import KvStore
from covey.net.kv import KvClient
from covey.net.rpc import Channel, Channels
from covey.types.common import Empty
from covey.types.kv import KvSnapshot, StoreStats
from tests.contract.kv_stores import StoreProcess, client_of


@asynccontextmanager
async def connected(process: StoreProcess, transport: str = "auto") -> AsyncIterator[tuple[KvClient, Channel]]:
    async with Channels.open() as channels:
        yield client_of(process, channels, transport), channels.to(process.address)


async def snapshot(channel: Channel) -> KvSnapshot:
    """All pages as one."""
    async with channel.stream(KvStore.SNAPSHOT, Empty(), timeout_s=5) as pages:
        parts = [page async for page in pages]
    return replace(parts[0], entries=tuple(entry for part in parts for entry in part.entries))


async def stats(channel: Channel) -> StoreStats:
    return await channel.call(KvStore.STATS, Empty(), timeout_s=5)
