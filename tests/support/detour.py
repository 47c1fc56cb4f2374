"""A node of the store whose bulk channel is said to be elsewhere: where a proxy listens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from covey.codec.methods import KvStore
from covey.net.rpc import Channel, Channels


class Detour:
    """Channels whose node says that its bulk channel is where the proxy listens."""

    def __init__(self, channels: Channels, bulk: str) -> None:
        self._channels = channels
        self._bulk = bulk

    def to(self, address: str) -> Any:
        return _Detoured(self._channels.to(address), self._bulk)


class _Detoured:
    def __init__(self, channel: Channel, bulk: str) -> None:
        self._channel = channel
        self._bulk = bulk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    async def call(self, method: Any, request: Any, **options: Any) -> Any:
        reply = await self._channel.call(method, request, **options)
        return replace(reply, bulk_address=self._bulk) if method is KvStore.INFO else reply
