"""An engine that a fleet shares: bytes under keys, kept, replicated and failed over by software that does just that."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Protocol
from urllib.parse import urlsplit

from anyio import to_thread

from covey.config import ConfigError

REDIS_SCHEMES = ("redis", "rediss", "valkey", "valkeys")
CLUSTER_SUFFIX = "+cluster"


class Engine(Protocol):
    """Raises `Unavailable` for whatever goes wrong; whoever calls sets the deadline and may cancel."""

    async def put(self, items: Mapping[str, bytes]) -> None:
        """Keep values; returns when the engine has acknowledged all of them."""
        ...

    async def get(self, key: str) -> bytes | None: ...

    async def has(self, keys: Sequence[str]) -> list[bool]: ...

    async def delete(self, keys: Sequence[str]) -> int:
        """Returns how many were there, or, of an engine that does not say, how many were named."""
        ...


def check_url(url: str) -> None:
    """Raises `ValueError` when no engine serves such a URL."""
    parts = urlsplit(url)
    scheme = parts.scheme.removesuffix(CLUSTER_SUFFIX)
    if parts.scheme != "s3" and scheme not in REDIS_SCHEMES:
        raise ValueError(
            f"url: starts with {', '.join(REDIS_SCHEMES)} (with {CLUSTER_SUFFIX} for a cluster) or s3, and ://"
        )
    if not parts.hostname:
        raise ValueError("url: names no host or bucket")


@asynccontextmanager
async def open_engine(url: str, *, endpoint: str, credentials: str | None, timeout_s: float) -> AsyncIterator[Engine]:
    """Own a client of the engine at a URL for a block; connects when it is used first.

    `credentials` is a password, or for S3 `KEY_ID:SECRET`; it goes before what the URL or the environment says.
    Raises `ConfigError`.
    """
    try:
        # A client is imported by those who use one, and in a thread: that takes its time.
        module = await to_thread.run_sync(
            import_module, f"{__package__}.{'s3' if url.startswith('s3://') else 'redis'}_engine"
        )
    except ModuleNotFoundError as error:
        raise ConfigError(f"the package {error.name!r} is not installed", field="remote.url") from error
    options = {"endpoint": endpoint} if endpoint else {}
    async with module.opened(url, credentials=credentials, timeout_s=timeout_s, **options) as engine:
        yield engine
