"""Valkey or Redis as an engine, alone or as a cluster, through the `redis` client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.driver_info import DriverInfo
from redis.exceptions import RedisError

from covey.errors import Unavailable

from .engine import CLUSTER_SUFFIX

DRIVER = DriverInfo()  # reads its package's version from a file, so not at every connection


class RedisEngine:
    """Several keys go in one pipeline. Nothing is tried twice here: the breaker in front decides that."""

    def __init__(self, client: Redis | RedisCluster) -> None:
        self._client: Any = client  # the two clients share what is used here, and no type

    async def put(self, items: Mapping[str, bytes]) -> None:
        await self._pipelined("set", list(items.items()))

    async def get(self, key: str) -> bytes | None:
        try:
            value: bytes | None = await self._client.get(key)
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error
        return value

    async def has(self, keys: Sequence[str]) -> list[bool]:
        return [bool(there) for there in await self._pipelined("exists", [(key,) for key in keys])]

    async def delete(self, keys: Sequence[str]) -> int:
        return sum(await self._pipelined("delete", [(key,) for key in keys]))

    async def _pipelined(self, command: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        if not calls:
            return []
        try:
            pipeline = self._client.pipeline(transaction=False)
            for arguments in calls:
                getattr(pipeline, command)(*arguments)
            answers: list[Any] = await pipeline.execute()
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error
        return answers


@asynccontextmanager
async def opened(url: str, *, credentials: str | None, timeout_s: float) -> AsyncIterator[RedisEngine]:
    """Own a pool of connections for a block."""
    scheme, rest = url.split("://", 1)
    cluster = scheme.endswith(CLUSTER_SUFFIX)
    scheme = scheme.removesuffix(CLUSTER_SUFFIX).replace("valkeys", "rediss").replace("valkey", "redis")
    options: dict[str, Any] = {
        "driver_info": DRIVER,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 1 if cluster else 0),
    }
    if credentials is not None:
        options["password"] = credentials
    kind = RedisCluster if cluster else Redis
    client: Redis | RedisCluster = kind.from_url(f"{scheme}://{rest}", **options)
    try:
        yield RedisEngine(client)
    finally:
        await client.aclose()


def _unavailable(error: Exception) -> Unavailable:
    return Unavailable(f"the engine of the remote tier does not answer: {type(error).__name__}")
