"""A client and a channel to a kvstore process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from covey.net.kv import KvClient
from covey.net.rpc import Channel, Channels
from tests.contract.kv_stores import StoreProcess, client_of


@asynccontextmanager
async def connected(process: StoreProcess, transport: str = "auto") -> AsyncIterator[tuple[KvClient, Channel]]:
    async with Channels.open() as channels:
        yield client_of(process, channels, transport), channels.to(process.address)
