"""S3-compatible object storage as an engine, through `obstore`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TypeVar
from urllib.parse import urlsplit

import anyio
import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from covey.config import ConfigError
from covey.errors import Unavailable

REQUESTS_MAX = 16
"""Requests in flight for one call: object storage has no batches."""

A = TypeVar("A")
B = TypeVar("B")


class S3Engine:
    """One object a key. Credentials and region come from the environment unless they are given."""

    def __init__(self, store: S3Store) -> None:
        self._store = store
        self._slots = anyio.CapacityLimiter(REQUESTS_MAX)

    async def put(self, items: Mapping[str, bytes]) -> None:
        async def one(item: tuple[str, bytes]) -> None:
            await obstore.put_async(self._store, item[0], item[1], use_multipart=False)

        await self._all(one, list(items.items()))

    async def get(self, key: str) -> bytes | None:
        async with _translated():
            try:
                found = await obstore.get_async(self._store, key)
                return (await found.bytes_async()).to_bytes()
            except FileNotFoundError:
                return None

    async def has(self, keys: Sequence[str]) -> list[bool]:
        async def one(key: str) -> bool:
            try:
                await obstore.head_async(self._store, key)
            except FileNotFoundError:
                return False
            return True

        return await self._all(one, keys)

    async def delete(self, keys: Sequence[str]) -> int:
        async def one(key: str) -> None:
            try:
                await obstore.delete_async(self._store, key)
            except FileNotFoundError:
                return

        await self._all(one, keys)
        return len(keys)

    async def _all(self, call: Callable[[A], Awaitable[B]], each: Sequence[A]) -> list[B]:
        """Call for each, several at a time; the first failure cancels the rest. Raises `Unavailable`."""
        answers: dict[int, B] = {}
        failed: list[Unavailable] = []

        async def one(number: int, argument: A) -> None:
            try:
                async with self._slots, _translated():
                    answers[number] = await call(argument)
            except Unavailable as error:
                failed.append(error)
                tg.cancel_scope.cancel()

        async with anyio.create_task_group() as tg:
            for number, argument in enumerate(each):
                tg.start_soon(one, number, argument)
        if failed:
            raise failed[0]
        return [answers[number] for number in range(len(each))]


@asynccontextmanager
async def opened(url: str, *, credentials: str | None, timeout_s: float, endpoint: str = "") -> AsyncIterator[S3Engine]:
    """Make a client for `s3://bucket/prefix`. Raises `ConfigError`."""
    parts = urlsplit(url)
    options: dict[str, str] = {}
    if endpoint:
        options["endpoint"] = endpoint
    if credentials is not None:
        key_id, colon, secret = credentials.partition(":")
        if not colon:
            raise ConfigError("credentials of S3 are KEY_ID:SECRET", field="remote.credentials_file")
        options |= {"access_key_id": key_id, "secret_access_key": secret}
    try:
        store = S3Store(
            bucket=parts.netloc,
            prefix=parts.path.strip("/") or None,
            client_options={
                "timeout": timedelta(seconds=timeout_s),
                "connect_timeout": timedelta(seconds=timeout_s),
                "allow_http": endpoint.startswith("http://"),
            },
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=timeout_s)},
            **options,  # type: ignore[arg-type]
        )
    except BaseError as error:
        raise ConfigError(f"not a place in object storage: {error}", field="remote.url") from error
    yield S3Engine(store)


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (BaseError, OSError) as error:
        raise Unavailable(f"the engine of the remote tier does not answer: {type(error).__name__}") from error
