"""Documents in Redis or Valkey, for a fleet: whoever takes a tenant over finds what was acknowledged before."""

from __future__ import annotations

import json
from array import array
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any, Self

import anyio
import msgspec
import redis.asyncio
from redis.driver_info import DriverInfo
from redis.exceptions import OutOfMemoryError, RedisError
from structlog.typing import FilteringBoundLogger

from covey.clock import Clock
from covey.errors import CoveyError, DataCorrupt, NoSpace, Unavailable
from covey.types.generate import FinishReason
from covey.types.ids import TenantId

from .documents import LOAD_BATCH, Voided
from .entry import Document, Partition, Scope, Shelf

PREFIX = "covey:semcache:1:"
AGES, STANDING = f"{PREFIX}ages", f"{PREFIX}standing"
CALL_S = 5.0
FORGET_S = 1.0
FORGET_BATCH = 1024
FORGOTTEN_MAX = 1_000_000
PROBE_S = 1.0
DRIVER = DriverInfo(lib_version="")
"""Given, so that the client does not search the disk for its own version on the event loop."""


class RedisDocuments:
    """One keyspace of documents that several processes share; as durable as that server's `appendfsync` makes it.

    A document expires in Redis by itself too. Every call is under a deadline.
    """

    def __init__(self, client: redis.asyncio.Redis, clock: Clock, log: FilteringBoundLogger) -> None:
        self._client = client
        self._clock = clock
        self._log = log
        self._forgotten: set[int] = set()
        self._why = ""
        self._failed_at = 0.0

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, *, clock: Clock, log: FilteringBoundLogger) -> AsyncIterator[Self]:
        """Connect for a block. Raises `Unavailable` when nobody answers there."""
        client = redis.asyncio.Redis.from_url(
            url.replace("valkey", "redis", 1) if url.startswith("valkey") else url,
            driver_info=DRIVER,
            socket_timeout=CALL_S,
            socket_connect_timeout=CALL_S,
            max_connections=8,
        )
        documents = cls(client, clock, log)
        try:
            await documents._do(client.ping())
            async with anyio.create_task_group() as tg:
                tg.start_soon(documents._forget_often)
                yield documents
                tg.cancel_scope.cancel()
        finally:
            with anyio.move_on_after(CALL_S, shield=True):
                await client.aclose()

    @property
    def writable(self) -> str:
        return self._why

    async def put(self, documents: Sequence[Document]) -> None:
        if not documents:
            return
        self._forgotten.difference_update(document.label for document in documents)
        async with self._client.pipeline(transaction=True) as pipe:
            for document in documents:
                expires_ms = int((document.expires_at + self._offset()) * 1000)
                pipe.set(_key(document.label), self._pack(document), pxat=max(1, expires_ms))
                pipe.zadd(AGES, {str(document.label): document.stored_at + self._offset()})
            await self._write(pipe)

    async def remove(self, labels: Iterable[int]) -> None:
        await self._delete(list(labels), None)

    def forget(self, labels: Iterable[int]) -> None:
        self._forgotten.update(labels)
        if len(self._forgotten) > FORGOTTEN_MAX:  # they expire by themselves
            self._forgotten.clear()

    async def get(self, labels: Sequence[int]) -> list[Document]:
        if not labels:
            return []
        values = await self._do(self._client.mget([_key(label) for label in labels]))
        return [self._unpack(label, value) for label, value in zip(labels, values, strict=True) if value is not None]

    async def load(self) -> AsyncIterator[list[Document]]:
        at = 0
        while labels := [int(one) for one in await self._do(self._client.zrange(AGES, at, at + LOAD_BATCH - 1))]:
            found = await self.get(labels)
            expired = {*labels} - {document.label for document in found}
            self.forget(expired)
            at += len(labels)
            if found:
                yield found

    async def standing(self, tenant: TenantId) -> Voided:
        value = await self._do(self._client.hget(STANDING, tenant))
        if value is None:
            return Voided()
        epoch, reign = json.loads(value)
        return Voided(epoch=epoch, reign=reign)

    async def void(self, tenant: TenantId, voided: Voided, labels: Iterable[int]) -> None:
        await self._delete(list(labels), (tenant, voided))

    async def _delete(self, labels: list[int], standing: tuple[TenantId, Voided] | None) -> None:
        if not labels and standing is None:
            return
        async with self._client.pipeline(transaction=True) as pipe:
            for label in labels:
                pipe.delete(_key(label))
                pipe.zrem(AGES, str(label))
            if standing is not None:
                tenant, voided = standing
                pipe.hset(STANDING, tenant, json.dumps((voided.epoch, voided.reign)))
            await self._write(pipe)

    async def _write(self, pipe: Any) -> None:
        if self._why and self._clock.now() - self._failed_at < PROBE_S:
            raise NoSpace(self._why)
        try:
            await self._do(pipe.execute())
        except NoSpace as error:
            if not self._why:
                self._log.error("the cache's Redis is full: answers are served, none is kept")
            self._why, self._failed_at = error.message, self._clock.now()
            raise
        if self._why:
            self._log.info("the cache's Redis takes writes again")
        self._why = ""

    async def _do(self, awaitable: Any) -> Any:
        try:
            with anyio.fail_after(CALL_S):
                return await awaitable
        except OutOfMemoryError as error:
            raise NoSpace("no answer is kept: the cache's Redis is full; raise its maxmemory") from error
        except (RedisError, OSError, TimeoutError) as error:
            raise Unavailable(f"the cache's Redis does not answer: {type(error).__name__}") from error

    async def _forget_often(self) -> None:
        while True:
            await anyio.sleep(FORGET_S)
            while some := list(islice(self._forgotten, FORGET_BATCH)):
                try:
                    await self._delete(some, None)
                except CoveyError:
                    break
                self._forgotten.difference_update(some)

    def _offset(self) -> float:
        return self._clock.wall() - self._clock.now()

    def _pack(self, document: Document) -> bytes:
        shelf, scope = document.shelf, document.scope
        return msgspec.msgpack.encode(
            (
                scope.tenant, scope.model, shelf.partition.category, shelf.context_key, document.asked_category,
                document.exact_key, document.text, document.answer, document.token_ids.tobytes(),
                document.reason.value, document.prompt_tokens, document.completion_tokens,
                document.stored_at + self._offset(), document.expires_at + self._offset(), document.size_bytes,
                document.tags, document.encoder, document.vector,
            )
        )  # fmt: skip

    def _unpack(self, label: int, value: bytes) -> Document:
        try:
            row = msgspec.msgpack.decode(value)
            return Document(
                label=label,
                shelf=Shelf(Partition(Scope(TenantId(row[0]), row[1]), row[2]), row[3]),
                asked_category=row[4],
                exact_key=row[5],
                text=row[6],
                answer=row[7],
                token_ids=array("I", row[8]),
                reason=FinishReason(row[9]),
                prompt_tokens=row[10],
                completion_tokens=row[11],
                stored_at=row[12] - self._offset(),
                expires_at=row[13] - self._offset(),
                size_bytes=row[14],
                tags=tuple(row[15]),
                encoder=row[16],
                vector=row[17],
            )
        except (msgspec.MsgspecError, IndexError, TypeError, ValueError) as error:
            raise DataCorrupt(f"the cache's Redis holds something else under {_key(label)}") from error


def _key(label: int) -> str:
    return f"{PREFIX}doc:{label:x}"
