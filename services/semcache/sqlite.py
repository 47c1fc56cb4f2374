"""Documents in SQLite: a write-ahead log, synced before a write is acknowledged, one writer for many waiting writes."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self

import anyio
from anyio import to_thread
from structlog.typing import FilteringBoundLogger

from covey import failpoint
from covey.clock import Clock
from covey.errors import FailedPrecondition, NoSpace, Unavailable
from covey.types.generate import FinishReason
from covey.types.ids import TenantId

from .documents import LOAD_BATCH, Voided
from .entry import Document, Partition, Scope, Shelf

WAITING_MAX = 4096
"""Writes that wait for the disk; more are refused."""
BATCH_MAX = 256
"""Writes that one transaction, and one sync, makes durable."""
FORGOTTEN_MAX = 1_000_000
GET_MAX = 500
PROBE_S = 1.0
"""A full disk is tried again this often, with the next write."""
PAGE_BYTES = 4096

SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
  label INTEGER PRIMARY KEY, tenant TEXT NOT NULL, model TEXT NOT NULL, category TEXT NOT NULL, context BLOB NOT NULL,
  asked TEXT NOT NULL, exact BLOB NOT NULL, text TEXT NOT NULL, answer TEXT NOT NULL, ids BLOB NOT NULL,
  reason TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, stored_at REAL NOT NULL,
  expires_at REAL NOT NULL, size_bytes INTEGER NOT NULL, tags TEXT NOT NULL, encoder TEXT NOT NULL, vector BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS tenants (
  tenant TEXT PRIMARY KEY, epoch INTEGER NOT NULL, reign INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""
PUT = f"INSERT OR REPLACE INTO documents VALUES ({', '.join('?' * 19)})"  # noqa: S608 - only marks
VOID = "INSERT OR REPLACE INTO tenants VALUES (?, ?, ?)"


@dataclass(slots=True)
class _Write:
    """Work of the writer, and what became of it."""

    apply: Callable[[sqlite3.Connection], None]
    done: anyio.Event = field(default_factory=anyio.Event)
    error: sqlite3.Error | None = None


class SqliteDocuments:
    """One file of documents, one process's alone; queries run in threads, one that writes and one that reads."""

    def __init__(self, path: Path, clock: Clock, log: FilteringBoundLogger, *, size_bytes_max: int) -> None:
        self._path = path
        self._clock = clock
        self._log = log
        self._offset = clock.wall() - clock.now()
        self._pages_max = max(16, size_bytes_max // PAGE_BYTES)
        self._waiting: deque[_Write] = deque()
        self._forgotten: set[int] = set()
        self._wake = anyio.Event()
        self._why = ""
        self._failed_at = 0.0
        self._writing, self._reading = anyio.CapacityLimiter(1), anyio.CapacityLimiter(1)
        self._writer: sqlite3.Connection = None  # type: ignore[assignment] # until opened
        self._reader: sqlite3.Connection = None  # type: ignore[assignment]
        self._lock = -1

    @classmethod
    @asynccontextmanager
    async def open(
        cls, path: Path, *, clock: Clock, log: FilteringBoundLogger, size_bytes_max: int
    ) -> AsyncIterator[Self]:
        """Open or make the file for a block.

        Raises `FailedPrecondition` when another process has it, `Unavailable` when it cannot be opened.
        """
        documents = cls(path, clock, log, size_bytes_max=size_bytes_max)
        await documents._run(documents._open, documents._writing)
        try:
            async with anyio.create_task_group() as tg:
                tg.start_soon(documents._write_often)
                yield documents
                await documents._flush()
                tg.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(documents._close, limiter=documents._writing)

    @property
    def writable(self) -> str:
        return self._why

    async def put(self, documents: Sequence[Document]) -> None:
        rows = [self._row(document) for document in documents]
        self._forgotten.difference_update(document.label for document in documents)

        def apply(db: sqlite3.Connection) -> None:
            for row in rows:
                db.execute(PUT, row)
                failpoint.hit("semcache.put")

        await self._write(apply)

    async def remove(self, labels: Iterable[int]) -> None:
        gone = list(labels)
        await self._write(lambda db: _delete(db, gone))

    def forget(self, labels: Iterable[int]) -> None:
        self._forgotten.update(labels)
        if len(self._forgotten) > FORGOTTEN_MAX:  # they expire by themselves
            self._forgotten.clear()
        self._wake.set()

    async def void(self, tenant: TenantId, voided: Voided, labels: Iterable[int]) -> None:
        gone = list(labels)

        def apply(db: sqlite3.Connection) -> None:
            _delete(db, gone)
            db.execute(VOID, (tenant, voided.epoch, voided.reign))

        await self._write(apply)

    async def get(self, labels: Sequence[int]) -> list[Document]:
        some = list(labels[:GET_MAX])
        query = f"SELECT * FROM documents WHERE label IN ({', '.join('?' * len(some))})"  # noqa: S608 - only marks
        rows: list[Any] = await self._run(lambda: self._reader.execute(query, some).fetchall(), self._reading)
        return [self._document(row) for row in rows]

    async def load(self) -> AsyncIterator[list[Document]]:
        after = (float("-inf"), -1)
        query = "SELECT * FROM documents WHERE (stored_at, label) > (?, ?) ORDER BY stored_at, label LIMIT ?"
        await self._run(
            lambda: self._writer.execute("CREATE INDEX IF NOT EXISTS by_age ON documents (stored_at, label)"),
            self._writing,
        )
        while True:
            read = partial(self._read, query, (*after, LOAD_BATCH))
            rows: list[Any] = await self._run(read, self._reading)
            if not rows:
                return
            after = (rows[-1][13], rows[-1][0])
            yield [self._document(row) for row in rows]

    async def standing(self, tenant: TenantId) -> Voided:
        query = "SELECT epoch, reign FROM tenants WHERE tenant = ?"
        row: Any = await self._run(lambda: self._reader.execute(query, (tenant,)).fetchone(), self._reading)
        return Voided(epoch=row[0], reign=row[1]) if row else Voided()

    def _open(self) -> None:
        self._lock = _take_lock(self._path)
        try:
            self._connect()
        except BaseException:
            os.close(self._lock)
            raise

    def _close(self) -> None:
        self._reader.close()
        self._writer.close()
        os.close(self._lock)

    def _connect(self) -> None:
        self._writer = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        self._writer.execute("PRAGMA journal_mode = WAL")
        self._writer.execute("PRAGMA synchronous = FULL")
        self._writer.execute("PRAGMA cache_size = -1024")
        self._writer.execute(f"PRAGMA max_page_count = {self._pages_max}")
        self._writer.executescript(SCHEMA)
        self._reader = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        self._reader.execute("PRAGMA query_only = ON")
        self._reader.execute("PRAGMA cache_size = -1024")

    async def _run(self, work: Callable[[], Any], limiter: anyio.CapacityLimiter) -> Any:
        try:
            return await to_thread.run_sync(work, limiter=limiter)
        except sqlite3.Error as error:
            raise Unavailable(f"the cache's documents cannot be read: {error}") from error

    def _read(self, query: str, bounds: tuple[object, ...]) -> list[Any]:
        return self._reader.execute(query, bounds).fetchall()

    async def _write(self, apply: Callable[[sqlite3.Connection], None]) -> None:
        if self._why and self._clock.now() - self._failed_at < PROBE_S:
            raise NoSpace(self._why)
        if len(self._waiting) >= WAITING_MAX:
            raise Unavailable("too many writes wait for the cache's disk", retry_after_ms=1000)
        write = _Write(apply)
        self._waiting.append(write)
        self._wake.set()
        await write.done.wait()
        if write.error is not None:
            raise NoSpace(self._why or f"the cache's disk refused a write: {write.error}") from write.error

    async def _write_often(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            await self._flush()

    async def _flush(self) -> None:
        while self._waiting or (self._forgotten and not self._why):
            batch = [self._waiting.popleft() for _ in range(min(BATCH_MAX, len(self._waiting)))]
            forgotten = set(islice(self._forgotten, 4 * BATCH_MAX))  # also on a full disk: it makes room
            with anyio.CancelScope(shield=True):  # a write in a thread ends anyway, and somebody waits to hear how
                await to_thread.run_sync(self._commit, batch, forgotten, limiter=self._writing)
            failed = next((write.error for write in batch if write.error is not None), None)
            if failed is None:
                self._forgotten -= forgotten
            if batch:
                self._note(failed)
            for write in batch:
                write.done.set()

    def _commit(self, batch: list[_Write], forgotten: set[int]) -> None:
        """Apply all and sync once; when that fails, each by itself, so that one cannot spoil the others."""
        try:
            self._transact([write.apply for write in batch], forgotten)
        except sqlite3.Error as error:
            if len(batch) <= 1:
                for write in batch:
                    write.error = error
                return
            for write in batch:
                self._commit([write], set())

    def _transact(self, steps: list[Callable[[sqlite3.Connection], None]], forgotten: set[int]) -> None:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            _delete(self._writer, forgotten)
            for step in steps:
                step(self._writer)
            failpoint.hit("semcache.commit")
            self._writer.execute("COMMIT")
        except BaseException:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise

    def _note(self, error: sqlite3.Error | None) -> None:
        """Remember and log when the disk stops or starts to take writes."""
        if error is None:
            if self._why:
                self._log.info("the cache's disk takes writes again", path=str(self._path))
            self._why = ""
            return
        if not self._why:
            self._log.error("the cache's disk refuses writes: answers are served, none is kept", error=str(error))
        self._why = f"no answer is kept: the cache's disk refuses writes ({error}); make room at {self._path.parent}"
        self._failed_at = self._clock.now()

    def _row(self, document: Document) -> tuple[Any, ...]:
        shelf = document.shelf
        scope = document.scope
        return (
            document.label, scope.tenant, scope.model, shelf.partition.category, shelf.context_key,
            document.asked_category, document.exact_key, document.text, document.answer, document.token_ids.tobytes(),
            document.reason.value, document.prompt_tokens, document.completion_tokens,
            document.stored_at + self._offset, document.expires_at + self._offset, document.size_bytes,
            json.dumps(document.tags), document.encoder, document.vector,
        )  # fmt: skip

    def _document(self, row: tuple[Any, ...]) -> Document:
        return Document(
            label=row[0],
            shelf=Shelf(Partition(Scope(TenantId(row[1]), row[2]), row[3]), row[4]),
            asked_category=row[5],
            exact_key=row[6],
            text=row[7],
            answer=row[8],
            token_ids=array("I", row[9]),
            reason=FinishReason(row[10]),
            prompt_tokens=row[11],
            completion_tokens=row[12],
            stored_at=row[13] - self._offset,
            expires_at=row[14] - self._offset,
            size_bytes=row[15],
            tags=tuple(json.loads(row[16])),
            encoder=row[17],
            vector=row[18],
        )


def _delete(db: sqlite3.Connection, labels: Iterable[int]) -> None:
    db.executemany("DELETE FROM documents WHERE label = ?", ((label,) for label in labels))


def _take_lock(path: Path) -> int:
    """Take the lock file beside `path`, which ends with the process, however that ends."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if not isinstance(error, BlockingIOError):
            raise
        raise FailedPrecondition(
            f"another process keeps its documents in {path}: give each semcache its own `worker` or `documents`",
            field="documents",
        ) from error
    return lock
